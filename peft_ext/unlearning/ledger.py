"""What a training leaves behind for deletion requests to need the forget samples alone."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import torch
from torch import nn

from ..checks import check_choice, check_not_negative, check_positive, check_positive_integer
from .derivatives.data import Loader, sample_keys
from .derivatives.function import AdapterFunction
from .derivatives.losses import LOSSES
from .derivatives.quadratic import DRAWS, MEMORY, SampledQuadratic, smaller_form
from .ledger_chain import Chain, Entry, commitment, entry_hash
from .ledger_fingerprint import fingerprint
from .ledger_folder import exists, leftovers, read_record, remove_leftovers, warn_of_leftover
from .ledger_lock import alone, locked, on_main
from .ledger_state import Deletion, LedgerState
from .ledger_trials import least_damped

RETAIN_TOLERANCE = 0.05
"""How far trial deletions may raise the loss of what remains, per target, unless the user says otherwise."""


class UnlearningLedger:
    """Curvature, gradient and weights of a fine-tuned adapter on disk, from which samples can be taken off.

    The quadratic model of the training loss at the trained weights w is a sum over samples: curvature G, gradient g. A
    request takes the terms of the forget set off and sets the weights to

        `w + (A^-1 b)(all) - (A^-1 b)(remaining)`, `A = G / N + (ridge + shift) I`,
        `b = g / N + ridge (w - reference)`,

    the difference between the damped Newton steps with and without the samples: an influence function with the softmax
    curvature (Koh & Liang 2017, "Understanding black-box predictions via influence functions"), shortened to the
    distance between `reference` and w where it is longer (to the length of w if they are equal). It is always taken
    from the trained weights, so the order of requests does not matter. It is one step of `GaussNewton`, linearised
    once; retain data is what it takes to do better.

    The curvature is kept as its rows, a few for every sample, or as their sum of outer products `p x p`, whichever is
    smaller. Rows of forgotten samples are deleted, their outer products are subtracted.

    The folder holds `ledger.json` (the log: settings, and an entry for every request with the hash of the one before),
    one `state-*.safetensors` (tensors and the hashes of the remaining samples; never samples, but the trained weights
    are those before any request: keep it as confidential as the adapter) and `ledger.lock`. A request writes a new
    state and then replaces `ledger.json`, so that an interruption leaves the ledger as it was or as it is to be;
    `restore` brings an adapter that was not saved in time up to it. docs/ledger.md says what the log proves.

    `create` makes a ledger, and the constructor opens one, which deletes what an interrupted request left. A ledger may
    be open several times, in several processes: requests are served one after the other, each from what is on disk.

    Args:
        folder: where the ledger is.
        memory: bytes for the derivatives of a chunk of samples, and for matrices.

    Raises:
        ValueError: there is no ledger, or it is damaged.

    Warns:
        UserWarning: a file with hashes of forgotten samples could not be deleted.
    """

    def __init__(self, folder: str | os.PathLike[str], memory: float = MEMORY) -> None:
        self.folder = Path(folder)
        self.memory = memory
        self._record, self._state = LedgerState.read(self.folder)
        self._left = self._state.weights  # what this holder left adapters with
        self._clean()

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        data: Loader,
        loss: str = "cross_entropy",
        damping: float | None = None,
        retain_tolerance: float = RETAIN_TOLERANCE,
        ridge: float = 0.0,
        reference: Mapping[str, torch.Tensor] | None = None,
        draws: int | None = DRAWS,
        parameters: str | None = None,
        memory: float = MEMORY,
    ) -> UnlearningLedger:
        """Reads the training data a few times and writes a ledger of the model as it is.

        Args:
            folder: where to write it; it must not hold a ledger.
            model: fine-tuned on the data.
            data: batches of all training samples, as `GaussNewton.fit` takes them.
            loss: `"cross_entropy"` or `"squared_error"`: what the model was trained with.
            damping: ridge on the curvature, in units of the mean of its diagonal. No retain data will be there to
                steer it by, so it is chosen now by default: the smallest of 0.03, 0.1, 0.3, ... 1000 with which trial
                deletions (of a random tenth, and of the most frequent class) leave the loss of what remains as it
                should be. Nothing is deleted. For labels of tokens it is 1 at least: there a value that does no damage
                to the rest may still forget too much. See `UnlearningLedger.damping`.
            retain_tolerance: how far a trial deletion may raise that loss per target: nats of the cross-entropy, or
                half squared distances.
            ridge: half of this times the squared distance from `reference` was added to the loss in training.
            reference: parameters before training, by name; by default those that the model has.
            draws: the curvature is estimated from as many random vectors a sample, see `GaussNewton`; None for the
                exact one.
            parameters: a regular expression that the names of the parameters to change contain; by default those that
                require gradients.
            memory: bytes for matrices, and for the derivatives of a chunk of samples.

        Raises:
            ValueError: an argument holds what it cannot, there is a ledger already, or matrices of p x p for p
                parameters do not fit `memory`.
            OSError: the ledger could not be written.

        Warns:
            UserWarning: a trial deletion raised the loss of what remains by more with every damping (the ledger is
                written with the largest one), or left too much; see `shortfalls`.
        """
        start = time.perf_counter()
        folder = Path(folder)
        check_choice("loss", loss, tuple(LOSSES))
        check_options(damping, retain_tolerance, draws, memory)
        check_not_negative("ridge", ridge)
        _check_absent(folder)
        function = AdapterFunction(model, LOSSES[loss](), parameters, memory / 4)
        samples = len(sample_keys(data))
        if not samples:
            raise ValueError("The training set is empty.")
        form, need = smaller_form(function.size, samples * function.rows_of_a_sample(data, draws))
        if need > memory:
            raise ValueError(
                f"A ledger of {function.size:,} parameters and {samples:,} samples needs {need / 1e9:.3g} GB, and "
                f"`memory` allows {memory / 1e9:.3g} GB. Raise it, or lower `draws`, or name fewer parameters with "
                "`parameters`."
            )
        centre = None if reference is None else function.flatten(reference)
        with function.prefix.remembering():
            quadratic, loss_sum = SampledQuadratic.of(function, data, form, centre, ridge, draws)
            trained = quadratic.trained
            state = LedgerState(
                quadratic,
                weights=trained,
                full_step=torch.zeros_like(trained),
                damping=0.0,
                mean_curvature=quadratic.mean_curvature,
                fingerprint=fingerprint(function),
                loss=loss,
                parameters=parameters,
                created=_now(),
                seconds=0.0,
                retain_tolerance=retain_tolerance if damping is None else None,
            )
            if damping is None:
                state = least_damped(state, function, data, loss_sum, retain_tolerance)
            else:
                state = state.damped(damping)
        state = replace(state, seconds=time.perf_counter() - start)

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                _check_absent(folder)
                state.write(folder, {"time": state.created, "seconds": state.seconds})

        on_main(write)
        return cls(folder, memory)

    @property
    def damping(self) -> float:
        """Ridge on the curvature, in units of the mean of its diagonal over all training samples."""
        return self._state.damping

    @property
    def parameters(self) -> int:
        """Number of parameters that can change."""
        return len(self._state.weights)

    @property
    def shortfalls(self) -> list[str]:
        """What the trial deletions foretell that requests will leave, a sentence each; empty if they did not fail.

        There were trials if nobody chose the damping. Requests for a class will leave too much of it if the mean loss
        of the most frequent one stayed below that of a guess among all classes: a model that was never shown a class
        gives it more. Requests for random samples will if the damping that spares the others lets the loss of a tenth
        rise by less than a quarter of what the smallest damping does. Both are signs, not bounds: how far the model is
        from a retrained one is not known without one. Where more samples are forgotten by now than any trial deletion
        had, a sentence says so.
        """
        return self._state.shortfalls

    @property
    def requests(self) -> list[Deletion]:
        """What was forgotten so far, as this holder knows: others may have served requests since its last one."""
        return self._state.requests

    @property
    def chain(self) -> list[Entry]:
        """The log, an entry for the creation and one for every request; see `peft_ext.unlearning.ledger_chain`."""
        return [dict(entry) for entry in self._state.chain]

    @property
    def head(self) -> str:
        """SHA-256 of the last entry of the log. Where it is published, nobody can rewrite what came before."""
        return entry_hash(self._state.chain[-1])

    def __len__(self) -> int:
        """Returns the number of samples that were learned and not forgotten, as this holder knows."""
        return len(self._state.quadratic.keys)

    def forget(self, model: nn.Module, data: Loader) -> Deletion:
        """Serves a request: changes the model in place and writes the ledger that follows.

        If other holders of the ledger have served requests since, the model is brought up to them too.

        Args:
            model: the adapter as this ledger left it.
            data: batches of the samples to forget, as they were learned.

        Returns:
            What was done, with the hashes of what was forgotten: nothing else keeps them.

        Raises:
            ValueError: the ledger belongs to another model, the adapter has changed since, there is no sample, a
                sample was never learned or is forgotten already, none would remain, the step is not finite, or the
                folder holds another ledger by now. Nothing has changed then.
            TimeoutError: another process has been changing the ledger for ten minutes. Nothing has changed.
            OSError: the ledger could not be written. Nothing has changed.

        Warns:
            UserWarning: the former state, which has hashes of what is forgotten, could not be deleted; or more samples
                are forgotten by now than any trial deletion had, so that nothing is known of what the others lose.
        """
        start = time.perf_counter()
        with alone(self.folder):
            self._refresh()
            function, state = self._function(model), self._state
            before = function.vector
            if not any(torch.equal(before.cpu(), _as_stored(function, left)) for left in (state.weights, self._left)):
                raise ValueError(
                    "The adapter has other weights than the ledger left it with: it was trained on, or not saved after "
                    "the last request. `restore` gives it the ledger's."
                )
            keys = sample_keys(data)
            if not keys:
                raise ValueError("The forget set is empty.")
            unknown = Counter(keys) - Counter(state.quadratic.keys)
            if unknown:
                raise ValueError(
                    f"{unknown.total()} of {len(keys)} samples were never learned, or are forgotten already (SHA-256 "
                    f"of the first: {next(iter(unknown))}). A sample is known by the exact tensors that the model was "
                    "trained with."
                )
            if len(keys) == len(self):
                raise ValueError("No sample would remain: take the adapter off the model instead.")
            function.vector = state.quadratic.trained.to(function.device)
            try:
                remaining, _ = state.quadratic.without(function, data, Counter(keys))
            finally:
                function.vector = before
            weights = state.weights_after(remaining)
            if not torch.isfinite(weights).all():
                raise ValueError("The step is not finite: what remains does not determine it. Nothing has changed.")
            shift = float((weights - state.weights).norm())
            served = {"time": _now(), "samples": len(keys), "seconds": time.perf_counter() - start, "shift": shift}
            after = replace(state, quadratic=remaining, weights=weights)

            def write() -> tuple[str, bytes, Chain]:
                salt = token_hex(32)
                chain = after.write(self.folder, {**served, "forgotten": commitment(salt, keys)})
                return salt, read_record(self.folder), chain

            salt, self._record, chain = on_main(write)
            self._state = replace(after, chain=chain)
            function.vector = weights.to(function.device)
            self._left = weights
        if self._state.untried is not None:
            warnings.warn(self._state.untried, stacklevel=2)
        done = time.perf_counter() - start
        return replace(self.requests[-1], seconds=done, forgotten=tuple(sorted(keys)), salt=salt)

    def restore(self, model: nn.Module) -> None:
        """Gives an adapter the weights that the ledger, as it is on disk, left it with.

        Raises:
            ValueError: the ledger belongs to another model, or the folder holds another ledger by now.
        """
        self._refresh()
        function = self._function(model)
        function.vector = self._state.weights.to(function.device)
        self._left = self._state.weights

    def _refresh(self) -> None:
        """Reads again what others have changed."""
        if read_record(self.folder) == self._record:
            return
        record, state = LedgerState.read(self.folder)
        known = self._state.chain
        if state.chain[: len(known)] != known:
            raise ValueError(
                f"The ledger in {str(self.folder)!r} was replaced by another one, or by an older copy, after it was "
                f"opened: its log no longer holds {self.head}, the head it had. Open it anew if that is meant."
            )
        self._record, self._state = record, state

    def _clean(self) -> None:
        """Deletes what an interruption left, unless a request is being served, which will."""
        chain = self._state.chain
        if not leftovers(self.folder, chain):
            return
        try:
            with locked(self.folder, 0):
                record, state = LedgerState.read(self.folder)
                self._record, self._state, self._left = record, state, state.weights
                remove_leftovers(self.folder, state.chain)
        except TimeoutError:
            return
        except OSError as error:  # such as a folder that may only be read
            for path in leftovers(self.folder, chain):
                warn_of_leftover(path, error)

    def _function(self, model: nn.Module) -> AdapterFunction:
        state = self._state
        function = AdapterFunction(model, LOSSES[state.loss](), state.parameters, self.memory / 4)
        found = fingerprint(function, state.fingerprint)
        if found != state.fingerprint:
            raise ValueError(
                f"The ledger in {str(self.folder)!r} belongs to another model: its fingerprint is "
                f"{state.fingerprint}, that of the model is {found}. The frozen weights, the names or shapes of the "
                "parameters that can change, or the options of the active adapters (seed, alpha, ...) differ. Give the "
                "base model and the adapter's configuration with which the ledger was created."
            )
        return function


def _check_absent(folder: Path) -> None:
    if exists(folder):
        raise ValueError(f"There is a ledger in {str(folder)!r} already: open it, or choose another folder.")


def check_options(damping: float | None, retain_tolerance: float, draws: int | None, memory: float) -> None:
    """Raises a ValueError unless these are options that `UnlearningLedger.create` takes."""
    if damping is not None:
        check_positive("damping", damping)
    check_not_negative("retain_tolerance", retain_tolerance)
    if draws is not None:
        check_positive_integer("draws", draws)
    check_positive("memory", memory)


def _as_stored(function: AdapterFunction, vector: torch.Tensor) -> torch.Tensor:
    """Returns a vector after rounding to the parameters' dtypes."""
    return function.flatten(function.split(vector.to(function.device))).cpu()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
