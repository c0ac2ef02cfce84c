"""Trial deletions, with which a ledger chooses its damping and finds out how much its requests will leave."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from .derivatives.data import Loader, Selection, batches, gathered, unit_uniform
from .derivatives.function import AdapterFunction
from .derivatives.quadratic import SampledQuadratic
from .ledger_state import LedgerState, Trial

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Those that are tried, in units of the mean curvature."""

_UNTRIED = 1.0
_SHARE = 0.1


@dataclass
class _Attempt:
    """A trial deletion that is repeated with one damping after the other.

    Attributes:
        kind: `"random"` or `"class"`.
        gone, rest: batches of the samples that it deletes, and of the others.
        remaining: the quadratic model of the others.
        gone_targets: number of targets of what it deletes.
        gone_loss: the sum of their losses before.
        most: up to where the sum of the others' losses may rise.
        found: whether it rises further, by damping; that takes a pass over the others.
    """

    kind: str
    gone: Loader
    rest: Loader
    remaining: SampledQuadratic
    gone_targets: int
    gone_loss: float
    most: float
    found: dict[float, bool] = field(default_factory=dict)

    def damages(self, function: AdapterFunction, state: LedgerState) -> bool:
        """Returns whether the loss of the others rises too far; the model may be left with other weights."""
        if state.damping not in self.found:
            function.vector = state.weights_after(self.remaining).to(function.device)
            loss = function.loss_and_gradient(self.rest, self.most, gradient=False)[0]
            self.found[state.damping] = not loss <= self.most
        return self.found[state.damping]

    def made(self, function: AdapterFunction, state: LedgerState, classes: int, least: float) -> Trial:
        """Returns what it comes to with the damping of a state, and with the least one."""
        damages = self.damages(function, state)
        samples, of = (len(model.keys) for model in (self.remaining, state.quadratic))
        before, after = self.gone_loss / self.gone_targets, self._after(function, state)
        least_damped = after if state.damping == least else self._after(function, state.damped(least))
        return Trial(self.kind, of - samples, of, classes, before, after, least_damped, damages)

    def _after(self, function: AdapterFunction, state: LedgerState) -> float | None:
        function.vector = state.weights_after(self.remaining).to(function.device)
        mean = function.loss_and_gradient(self.gone, gradient=False)[0] / self.gone_targets
        return mean if math.isfinite(mean) else None


def least_damped(
    state: LedgerState, function: AdapterFunction, data: Loader, loss_sum: float, tolerance: float
) -> LedgerState:
    """Returns the state with the smallest damping with which trial deletions hardly raise the loss of the rest.

    Args:
        state: of all training samples.
        function: with the trained weights; it has them again afterwards.
        data: batches of all training samples.
        loss_sum: the sum of their losses.
        tolerance: how far the mean loss of what remains may rise.

    Warns:
        UserWarning: no damping is large enough, or the ledger will leave too much.
    """
    quadratic, trained = state.quadratic, state.quadratic.trained.to(function.device)
    chosen, classes = _chosen(data, quadratic.keys)
    if not chosen:
        return state.damped(_UNTRIED)
    # Of texts a damping that spares the others may still forget too much, so that small ones are no choice.
    dampings = DAMPINGS if classes else [each for each in DAMPINGS if each >= _UNTRIED]
    level, state, attempts = 0, state.damped(dampings[0]), []
    try:
        for kind, keys in chosen.items():
            function.vector = trained
            gone, rest = Selection(data, keys), Selection(data, keys, without=True)
            remaining, loss = quadratic.without(function, gone, Counter(key for key in quadratic.keys if key in keys))
            most = loss_sum - loss + tolerance * remaining.targets
            attempt = _Attempt(kind, gone, rest, remaining, quadratic.targets - remaining.targets, loss, most)
            attempts.append(attempt)
            while attempt.damages(function, state):
                if level + 1 == len(dampings):
                    break
                level += 1
                state = state.damped(dampings[level])
        trials = tuple(attempt.made(function, state, classes, dampings[0]) for attempt in attempts)
    finally:
        function.vector = trained
    state = replace(state, trials=trials)
    for text in state.shortfalls:
        warnings.warn(text, stacklevel=3)
    return state


def _chosen(data: Loader, keys: list[str]) -> tuple[dict[str, set[str]], int]:
    """Returns hashes of samples to delete on trial, and the number of classes that there are, 0 for labels of tokens.

    They are those of a random tenth and, of samples that have one class each, those of the most frequent class.
    """
    found: list[tuple[str, int]] = []
    for batch in batches(data, torch.device("cpu")):
        labels = batch.tensors["labels"]
        if labels.dim() == 1:
            found += zip(batch.keys(), labels.tolist())
    found = gathered(found)
    order = sorted(set(keys), key=lambda key: float(unit_uniform(key, "trial")))
    chosen = {"random": set(order[: math.ceil(_SHARE * len(order))])}
    classes = Counter(label for _, label in found)
    if classes:
        largest = min(classes, key=lambda label: (-classes[label], label))
        chosen["class"] = {key for key, label in found if label == largest}
    return {kind: some for kind, some in chosen.items() if any(key not in some for key in keys)}, len(classes)
