"""What every unlearning method gets, does and reports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, TrainingArguments

from ...checks import check_not_negative, check_share
from ...training.callbacks import Ridge, trainable_parameters
from ...training.modes import check_adapters
from ...training.trainer import EvaluationTrainer, fit
from ..derivatives.data import Loader
from ..derivatives.quadratic import CurvatureEstimate

_SHORT = 0.05  # nats by which the retain loss may rise without a word


@dataclass
class Request:
    """What is to be forgotten, from what.

    Attributes:
        model: fine-tuned on retain and forget set together; changed in place.
        retain: the samples that stay. Map-style, with rows as the collator takes them.
        forget: the samples that go, of the same kind.
        collator: makes a batch of rows, a mapping that the model is called with and that holds `labels`.
        training: the arguments that the model was trained with: learning rate, batch size, epochs, seed...
        initial: the trainable parameters before that training, by name; `trainable_state` copies them. If the training
            moved buffers (batch-norm statistics), those too.
        ridge: half of this times the squared distance from the initial parameters was added to the loss. Methods that
            go on training add it too.
        eval_mode: whether that training ran in evaluation mode, without dropout and with batch-norm statistics kept, as
            `fit` does. Only `Retrain` and `Rewind` ask: what the other methods do always runs in evaluation mode.
        stopped_after: the share of its planned optimizer steps after which that training was stopped, where the
            schedule of the learning rate stood at the time (`StopAfter`). Only `Retrain` and `Rewind` ask: what the
            other methods plan they do to the end.

    Raises:
        ValueError: the model has nothing to train, its adapter is merged or disabled, a set is empty, the sets share
            samples, `initial` does not fit, or a number is out of range.
    """

    model: nn.Module
    retain: Dataset
    forget: Dataset
    collator: Callable[[list[Any]], Mapping[str, Any]]
    training: TrainingArguments
    initial: Mapping[str, torch.Tensor]
    ridge: float = 0.0
    eval_mode: bool = True
    stopped_after: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative("ridge", self.ridge)
        check_share("stopped_after", self.stopped_after)
        check_adapters(self.model)
        parameters = trainable_parameters(self.model)
        if not parameters:
            raise ValueError(
                "the model has no trainable parameters: none has requires_grad=True (a loaded adapter needs "
                "`is_trainable=True`)"
            )
        for name, wanted in (("retain", "the samples that stay"), ("forget", "the samples that go")):
            if _length(getattr(self, name)) == 0:
                raise ValueError(f"the {name} set is empty: it must hold {wanted}, at least one")
        shared = _shared_rows(self.retain, self.forget)
        if shared:
            raise ValueError(
                f"the retain and the forget set overlap: they share {shared} samples; a sample to forget must be taken "
                "out of the retain set"
            )
        missing = sorted(parameters.keys() - self.initial.keys())
        if missing:
            raise ValueError(
                f"initial lacks {len(missing)} trainable parameters, such as {missing[0]!r}; copy them with "
                "trainable_state(model) before the training"
            )
        tensors = _tensors(self.model)
        for name, value in self.initial.items():
            if name not in tensors or tensors[name].shape != value.shape:
                found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is not there"
                raise ValueError(f"initial holds {name!r} of shape {tuple(value.shape)}; in the model it {found}")

    def fit(
        self,
        dataset: Dataset,
        training: TrainingArguments,
        trainer_class: Callable[..., Trainer] = EvaluationTrainer,
        **options: Any,
    ) -> Trainer:
        """Trains the model on some rows, pulled to its initial parameters; see `peft_ext.training.trainer.fit`."""
        ridge = Ridge(self.model, self.initial, self.ridge)
        return fit(self.model, dataset, self.collator, training, trainer_class, ridge, **options)

    def loader(self, dataset: Dataset, batch_size: int | None = None) -> DataLoader:
        """Returns a loader of the rows of a set in order, in batches of a size, by default that of the training."""
        return DataLoader(dataset, batch_size or self.training.train_batch_size, collate_fn=self.collator)

    def shared_loader(self, dataset: Dataset, batch_size: int | None = None) -> Any:
        """Returns a loader as `loader` does, of which each process reads its share."""
        return Accelerator().prepare_data_loader(self.loader(dataset, batch_size))

    def rng(self) -> np.random.Generator:
        """Returns random numbers for what a method draws beside the training: the training's seed decides them."""
        return np.random.default_rng(self.training.seed)

    @torch.no_grad()
    def restore_initial(self, keep: float = 0.0) -> None:
        """Puts the model back to what it was before the training, or most of the way to it.

        Args:
            keep: the share of the way from the initial parameters that is left.
        """
        tensors = _tensors(self.model)
        for name, value in self.initial.items():
            start = value.to(tensors[name].device)
            # Not through `.data`: the adapters notice a change by the parameter's version.
            tensors[name].copy_(start + keep * (tensors[name] - start) if keep else start)

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Gives the model back what `initial` names, as it was before, if an exception ends the context."""
        tensors = _tensors(self.model)
        before = {name: tensors[name].detach().clone() for name in self.initial}
        try:
            yield
        except BaseException:
            replace(self, initial=before).restore_initial()
            raise


@dataclass
class Step:
    """A step of a solver that was tried.

    Attributes:
        objective: objective after the step. For a rejected step a lower bound: evaluation stops as soon as the step is
            known to be too bad.
        retain_loss: retain loss after the step, mean over targets, in the unit of `UnlearningReport.retain_loss`; a
            lower bound for a rejected step as well.
        damping: what was added to the diagonal of the curvature, in units of its mean.
        accepted: whether the step was kept.
        predicted: decrease of the objective that the quadratic model promised.
        decrease: decrease of the objective that came, negative if it rose. For a rejected step an upper bound.
    """

    objective: float
    retain_loss: float
    damping: float
    accepted: bool
    predicted: float
    decrease: float | None = None


@dataclass
class Solution:
    """How a solver came to its weights.

    Attributes:
        form: in what form the curvature was kept: `"parameter"`, `"kernel"` or `"matrix_free"`.
        curvature: from what it was estimated, the last time that it was.
        steps: the steps that were tried, if the method takes steps.
        retain_tolerance: how far above its start the retain loss may be after a step, in the same unit.
        ended: why no further step was tried: `"steps"`, as many were kept as were allowed; `"gain"`, the last one
            gained too little; `"rejections"`, too many in a row were undone; `"distance"`, it would have led further
            from the trained weights than the training had led from the initial ones. None if the method takes no steps.
    """

    form: str
    curvature: CurvatureEstimate
    steps: list[Step] = field(default_factory=list)
    retain_tolerance: float | None = None
    ended: str | None = None


@dataclass
class Tuned:
    """How a training went.

    Attributes:
        steps: number of optimizer steps.
        learning_rate: the highest one.
        ended: why it ended: `"steps"`, all planned steps were taken; `"bound"`, the loss reached its bound; `"share"`,
            the model's own training was stopped there, too.
        last_loss: loss of the last batch, where the method looks at it.
        from_initial: whether it began at the parameters from before the model's training.
    """

    steps: int
    learning_rate: float
    ended: str = "steps"
    last_loss: float | None = None
    from_initial: bool = False


@dataclass
class Served:
    """What a ledger did for a request.

    Attributes:
        samples: number of samples that were taken off.
        learned: number of samples that were in the ledger before.
        damping: ridge on the curvature, in units of the mean of its diagonal.
        shortfalls: what the ledger's trial deletions had foretold; see `UnlearningLedger.shortfalls`.
    """

    samples: int
    learned: int
    damping: float
    shortfalls: list[str] = field(default_factory=list)


@dataclass
class UnlearningReport:
    """What a method did, as facts; `notes` says them in words.

    Attributes:
        method: name of the method.
        parameters: how many numbers could change.
        shift: length of their change.
        seconds: wall time.
        retain_loss: mean loss over the targets of the retain set, before and after; None if the method did not measure
            it. It is the loss that the method works with: nats of the cross-entropy, but half the squared distance to
            the one-hot target for `FastNTK` and for `GaussNewton(loss="squared_error")`.
        forget_loss: the same of the forget set.
        solution: how a solver came to its weights.
        training: how a training went.
        ledger: what a ledger did.
    """

    method: str
    parameters: int
    shift: float = 0.0
    seconds: float = 0.0
    retain_loss: tuple[float, float] | None = None
    forget_loss: tuple[float, float] | None = None
    solution: Solution | None = None
    training: Tuned | None = None
    ledger: Served | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the facts as what JSON can hold; numbers that are not finite become strings."""
        return _without_infinities(asdict(self))

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> UnlearningReport:
        """Returns the report that `to_dict` was called on."""
        values = dict(facts)
        for name in ("retain_loss", "forget_loss"):
            if values[name] is not None:
                before, after = values[name]
                values[name] = (float(before), float(after))
        for name, kind in (("training", Tuned), ("ledger", Served)):
            if values[name] is not None:
                values[name] = kind(**_with_infinities(values[name]))
        if values["solution"] is not None:
            solution = _with_infinities(values["solution"])
            solution["curvature"] = CurvatureEstimate(**_with_infinities(solution["curvature"]))
            solution["steps"] = [Step(**_with_infinities(step)) for step in solution["steps"]]
            values["solution"] = Solution(**solution)
        return cls(**_with_infinities(values))

    def notes(self) -> list[str]:
        """Returns sentences for a reader."""
        found = []
        if self.solution is not None:
            found += _solution_notes(self.solution, self.retain_loss)
        if self.training is not None:
            found.append(_training_note(self.training))
            if self.retain_loss is not None:
                found.append(_retain_note(*self.retain_loss))
        if self.ledger is not None:
            taken = f"{self.ledger.samples:,} of {self.ledger.learned:,} samples taken off"
            found.append(f"{taken}, damping {self.ledger.damping:g}; the retain set was not read")
            found += [f"By the ledger's trial deletions: {text}" for text in self.ledger.shortfalls]
        return found


class UnlearningMethod(ABC):
    """A way to make a model forget.

    A method is a dataclass: its fields are its options, each with a default, checked in `__post_init__`. Adding one is
    one file with a subclass and a line in `METHODS`.
    """

    name: ClassVar[str]
    universal: ClassVar[bool] = True
    """Whether its default options serve every model of classes or of tokens."""

    def check(self, request: Request) -> None:
        """Raises a ValueError if the method cannot serve a request, as far as shows before anything is trained.

        By default nothing shows. The model is left as it is, and may be one from before its training.
        """
        return None

    def prepare(self, request: Request) -> None:
        """Does what the method would have done at training time, before there was any request to forget.

        It is no part of the time that unlearning takes; by default there is nothing to do.
        """
        return None

    @abstractmethod
    def unlearn(self, request: Request) -> UnlearningReport:
        """Changes the model's trainable parameters, and nothing else of it.

        Raises:
            ValueError: the method cannot serve the request. The model is then as it was, as after any exception.
        """

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        retain: Loader,
        forget: Loader,
        *,
        reference: Mapping[str, torch.Tensor] | None = None,
        ridge: float = 0.0,
    ) -> UnlearningReport:
        """Changes the model's trainable parameters as `unlearn` does, with the samples that two loaders give.

        Args:
            model: fine-tuned on retain and forget set together; changed in place.
            retain: batches of the samples that stay: dicts of the model's arguments, `labels` among them. They are read
                once and more; their order does not matter.
            forget: batches of the samples that go, of the same kind.
            reference: the trainable parameters before training, by name; `trainable_state` copies them. By default the
                parameters that the model has now.
            ridge: half of this times the squared distance from `reference` was added to the loss in training.

        Raises:
            ValueError: one of the sets is empty, they overlap, or the method cannot do with what it is given.
        """


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _length(dataset: Any) -> int:
    return len(dataset)


def _shared_rows(first: Any, second: Any) -> int:
    """Returns how many samples two sets share, as far as that shows without reading them.

    Equal rows are no overlap: data sets hold duplicates.
    """
    if isinstance(first, Subset) and isinstance(second, Subset) and first.dataset is second.dataset:
        return len(set(first.indices) & set(second.indices))
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len({id(row) for row in first} & {id(row) for row in second})
    return len(first) if first is second else 0


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinities(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_infinities(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(value) if value in ("inf", "-inf", "nan") else value for name, value in values.items()}


def _solution_notes(solution: Solution, retain_loss: tuple[float, float] | None) -> list[str]:
    kept, tried = sum(step.accepted for step in solution.steps), len(solution.steps)
    steps = f"{kept} of {tried} steps kept, " if tried else ""
    notes = [f"{steps}{solution.form} form, curvature {_curvature_note(solution)}"]
    if kept < tried and retain_loss is not None and solution.retain_tolerance is not None:
        limit = retain_loss[0] + solution.retain_tolerance
        notes.append(
            f"{tried - kept} of {tried} steps were undone: they took the retain loss above {limit:.4g} "
            f"({solution.retain_tolerance:g} above its start), or raised the objective."
        )
    notes += _step_notes(solution.steps)
    if solution.ended is not None and not kept:
        notes.append("No step was kept: the model is unchanged.")
    elif solution.ended == "steps":
        notes.append(f"Stopped after {kept} steps, with the objective still falling.")
    elif solution.ended == "distance":
        notes.append(
            "Stopped short: a further step led further from the trained weights than the training had moved them."
        )
    return notes


def _step_notes(steps: list[Step]) -> list[str]:
    """Returns what the quadratic model promised of each step and what came, and how far it is to be trusted."""
    if not steps or any(step.decrease is None for step in steps):
        return []
    listed = ", ".join(
        f"{step.predicted:.2g} -> {'' if step.accepted else 'at most '}{step.decrease:.2g} "
        f"({step.damping:.2g}{'' if step.accepted else ', undone'})"
        for step in steps
    )
    notes = [f"Decrease of the objective, predicted -> actual, and damping of every step: {listed}."]
    kept = [(step.predicted, step.decrease or 0.0) for step in steps if step.accepted]
    promised, came = (sum(part) for part in zip(*kept)) if kept else (0.0, 0.0)
    if promised > 0:
        ratio = came / promised
        trust = "holds" if ratio > 0.75 else "holds roughly" if ratio > 0.25 else "is wrong"
        notes.append(
            f"The kept steps lowered the objective by {ratio:.2g} times what was predicted ({came:.2g} of "
            f"{promised:.2g}): the quadratic model {trust} at their length."
        )
    return notes


def _curvature_note(solution: Solution) -> str:
    estimate = solution.curvature
    if solution.form == "matrix_free":
        return f"exact products over {estimate.samples:,} samples"
    if estimate.relative_error is None:
        return "exact"
    each = "all labels" if estimate.draws is None else f"{estimate.draws} x random {estimate.estimator} each"
    return (
        f"{estimate.samples:,} of {estimate.of:,} retain samples, {each}: relative standard error of the curvature "
        f"along the gradient {estimate.relative_error:.2g}"
    )


def _retain_note(before: float, after: float) -> str:
    text = f"Retain loss {before:.3g} -> {after:.3g}"
    if after <= before + _SHORT:  # false for NaN
        return f"{text}."
    return (
        f"{text}: stopped short, it is more than {_SHORT:g} nats above its start. A larger `share` costs time for it."
    )


def _training_note(training: Tuned) -> str:
    if training.from_initial:
        where = ", where the original's training was stopped too" if training.ended == "share" else ""
        return f"{training.steps} steps from the initial parameters{where}"
    note = f"{training.steps} steps, learning rate {training.learning_rate:g}"
    if training.last_loss is None:
        return note
    ended = "the bound" if training.ended == "bound" else "the last step"
    return f"{note}; ended by {ended}, batch loss {training.last_loss:.2f}"
