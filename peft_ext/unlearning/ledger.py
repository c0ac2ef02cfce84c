"""What a fine-tuned adapter must remember of its training for deletion requests to need the forget samples alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from ..checks import check_choice, check_number, check_positive_integer
from .derivatives.curvature import Curvature, KernelForm, ParameterForm
from .derivatives.data import Loader, Selection, batches, gathered, sample_keys, total, uniform
from .derivatives.function import AdapterFunction
from .derivatives.losses import LOSSES

_FILE = "ledger.json"
_VERSION = 2
_DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_UNTRIED_DAMPING = 1.0
_TRIAL_SHARE = 0.1


@dataclass
class Deletion:
    """A request that was served.

    Attributes:
        time: when, in UTC.
        samples: how many were forgotten.
        seconds: wall time.
        shift: length of the change of the parameters.
    """

    time: str
    samples: int
    seconds: float
    shift: float


class UnlearningLedger:
    """Curvature, gradient and weights of a fine-tuned adapter on disk, from which samples can be taken off.

    The quadratic model of the training loss at the trained weights w is a sum over samples: curvature G, gradient g. A
    request takes the terms of the forget set off and sets the weights to

        `w + (A^-1 b)(all) - (A^-1 b)(remaining)`, `A = G / N + (weight_decay + ridge) I`,
        `b = g / N + weight_decay (w - reference)`,

    the difference between the damped Newton steps with and without the samples: an influence function with the softmax
    curvature. It is always taken from the trained weights, so the order of requests does not matter. It is one step of
    `NTKUnlearner`, linearised once; retain data is what it takes to do better.

    The curvature is kept as its rows, a few for every sample, or as their sum of outer products `p x p`, whichever is
    smaller. Rows of forgotten samples are deleted, their outer products are subtracted.

    The folder holds `ledger.json` (settings, checksum, log of requests) and one `state-*.safetensors` (tensors and the
    hashes of the remaining samples; never samples, but the trained weights are those before any request: keep it as
    confidential as the adapter). A request writes a new state and then replaces `ledger.json`, so that an interruption
    leaves the ledger as it was or as it is to be; `restore` brings an adapter that was not saved in time up to it.

    Made by `create`, opened by the constructor.

    Args:
        folder: where it is.
        memory: bytes for the derivatives of a chunk of samples, and for matrices.

    Raises:
        ValueError: there is none, or it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], memory: float = 4e9) -> None:
        self.folder = Path(folder)
        self.memory = memory
        path = self.folder / _FILE
        if not path.is_file():
            raise ValueError(f"There is no ledger in {str(self.folder)!r}: {_FILE} is missing. `create` makes one.")
        try:
            self._record = json.loads(path.read_text(encoding="utf-8"))
            version, name, expected = (self._record[key] for key in ("version", "state", "sha256"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error!r}.") from error
        if version != _VERSION:
            raise ValueError(f"{str(path)!r} has version {version!r}; this release of peft_ext reads {_VERSION}.")
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{str(path)!r} names the state {name!r}, which is no file name.")
        try:
            data = (self.folder / name).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != expected:
                raise ValueError(f"its SHA-256 is {found}, and {expected} was written")
            self._state = load(data)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"The state {name!r} of the ledger in {str(self.folder)!r} is damaged: {error}."
            ) from error

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        data: Loader,
        loss: str = "cross_entropy",
        damping: float | None = None,
        retain_tolerance: float = 0.05,
        weight_decay: float = 0.0,
        reference: Mapping[str, torch.Tensor] | None = None,
        draws: int | None = 3,
        parameters: str | None = None,
        memory: float = 4e9,
    ) -> UnlearningLedger:
        """Reads the training data a few times and writes a ledger of the model as it is.

        Args:
            folder: where to; must not hold a ledger.
            model: fine-tuned on the data.
            data: batches of all training samples; see `NTKUnlearner.fit`.
            damping: ridge on the curvature, in units of the mean of its diagonal. No retain data will be there to
                steer it by, so for classifiers it is chosen now by default: the smallest of 0.03, 0.1, 0.3, ... 30 with
                which trial deletions (of a random tenth, and of the most frequent class) leave the loss of what remains
                as it should be. Nothing is deleted. For language models it is 1 by default: there a value that does no
                damage to the rest may still forget too much. See `UnlearningLedger.damping`.
            retain_tolerance: how far a trial deletion may raise that loss, in nats per target.
            loss, weight_decay, reference, draws, parameters, memory: as for `NTKUnlearner`.

        Raises:
            ValueError: an argument holds what it cannot, there is a ledger already, or matrices of p x p for p
                parameters do not fit `memory`.

        Warns:
            UserWarning: a trial deletion raised the loss of what remains by more with every damping. The ledger is
                written with the largest one.
        """
        start = time.perf_counter()
        folder = Path(folder)
        check_choice("loss", loss, tuple(LOSSES))
        for name, value, zero in (
            ("damping", 1.0 if damping is None else damping, False),
            ("retain_tolerance", retain_tolerance, True),
            ("weight_decay", weight_decay, True),
            ("memory", memory, False),
        ):
            check_number(name, value)
            if value < 0 or (value == 0 and not zero):
                raise ValueError(f"`{name}` must be {'at least' if zero else 'above'} 0, got {value!r}.")
        if draws is not None:
            check_positive_integer("draws", draws)
        if (folder / _FILE).exists():
            raise ValueError(f"There is a ledger in {str(folder)!r} already: open it, or choose another folder.")
        function = AdapterFunction(model, LOSSES[loss](), parameters, memory / 4)
        keys = sample_keys(data)
        if not keys:
            raise ValueError("The training set is empty.")
        rows = len(keys) * function.rows_of_a_sample(data, draws)
        needs = {
            "rows": KernelForm.bytes_needed(rows, function.size),
            "gram": ParameterForm.bytes_needed(function.size),
        }
        form = min(needs, key=lambda name: needs[name])
        if needs[form] > memory:
            raise ValueError(
                f"A ledger of {function.size:,} parameters and {len(keys):,} samples needs {needs[form] / 1e9:.3g} GB, "
                f"and `memory` allows {memory / 1e9:.3g} GB. Raise it, or lower `draws`, or name fewer parameters with "
                "`parameters`."
            )
        weights = function.vector
        centre = weights if reference is None else function.flatten(reference)
        with function.prefix.remembering():
            loss_sum, targets, gradient = function.loss_and_gradient(data)
            if form == "rows":
                found = [(key, row) for part in _linearised(function, data, draws) for key, row in zip(*part)]
                found = sorted(gathered([(key, row.cpu()) for key, row in found]), key=lambda item: item[0])
                curvature = torch.stack([row for _, row in found])
            else:
                curvature = _gram(function, data, draws).cpu()
            if not torch.isfinite(curvature).all() or not torch.isfinite(gradient).all():
                raise ValueError("The curvature or the gradient is not finite: the adapter or the data lead to NaN.")
            ledger = cls.__new__(cls)
            ledger.folder, ledger.memory = folder, memory
            ledger._state = {
                form: curvature,
                "gradient": gradient.cpu(),
                "trained": weights.cpu(),
                "reference": centre.cpu(),
                "weights": weights.cpu(),
                "samples": _packed(keys),
            }
            trace = curvature.square().sum() if form == "rows" else curvature.trace()
            ledger._record = {
                "version": _VERSION,
                "fingerprint": _fingerprint(function),
                "loss": loss,
                "draws": draws,
                "parameters": parameters,
                "weight_decay": weight_decay,
                "mean_curvature": float(trace) / function.size / targets,
                "targets": targets,
                "created": _now(),
                "seconds": 0.0,
                "requests": [],
            }
            ledger._set_damping(_DAMPINGS[0] if damping is None else damping)
            if damping is None:
                try:
                    ledger._choose_damping(function, data, loss_sum, retain_tolerance)
                finally:
                    function.vector = weights
        ledger._record["seconds"] = time.perf_counter() - start
        ledger._commit(0)
        return ledger

    @property
    def damping(self) -> float:
        """Ridge on the curvature, in units of the mean of its diagonal over all training samples."""
        return self._record["damping"]

    def _set_damping(self, damping: float) -> None:
        self._record |= {"damping": damping, "ridge": damping * self._record["mean_curvature"]}
        self._state["full_step"] = self._newton_step()

    def _choose_damping(self, function: AdapterFunction, data: Loader, loss_sum: float, tolerance: float) -> None:
        """The smallest one with which trial deletions hardly raise the loss of the remaining samples, or the last."""
        level, keys = 0, _unpacked(self._state["samples"])
        trials = _trials(data, keys)
        if not trials:
            self._set_damping(_UNTRIED_DAMPING)
        for trial in trials:
            gone, rest = Selection(data, trial), Selection(data, trial, without=True)
            after, gone_loss = self._without(function, gone, Counter(key for key in keys if key in trial))
            targets = after._record["targets"]
            most = loss_sum - gone_loss + tolerance * targets
            while True:
                self._set_damping(_DAMPINGS[level])
                after._record["ridge"] = self._record["ridge"]
                weights = self._state["trained"] + after._newton_step() - self._state["full_step"]
                function.vector = weights.to(function.device)
                raised = not function.loss_and_gradient(rest, most, gradient=False)[0] <= most
                function.vector = self._state["trained"].to(function.device)
                if not raised:
                    break
                if level + 1 == len(_DAMPINGS):
                    warnings.warn(
                        f"A trial deletion of {len(keys) - len(after)} of {len(keys)} samples raised the loss of the "
                        f"others by more than {tolerance:g} with every damping up to {_DAMPINGS[-1]:g}: requests that "
                        "this ledger serves may damage the model. Measure it on data that remains after a request, or "
                        "use NTKUnlearner.",
                        stacklevel=3,
                    )
                    return
                level += 1

    @property
    def requests(self) -> list[Deletion]:
        """What was forgotten so far."""
        return [Deletion(**request) for request in self._record["requests"]]

    def __len__(self) -> int:
        """Number of samples that were learned and not forgotten."""
        return len(self._state["samples"])

    def forget(self, model: nn.Module, data: Loader) -> Deletion:
        """Serves a request: changes the model in place and writes the ledger that follows.

        Args:
            model: the adapter as this ledger left it.
            data: batches of the samples to forget, as they were learned.

        Raises:
            ValueError: the ledger belongs to another model, the adapter has changed since, there is no sample, a
                sample was never learned or is forgotten already, or none would remain. Nothing has changed then.
        """
        start = time.perf_counter()
        function = self._function(model)
        state = self._state
        if not torch.equal(function.vector.cpu(), self._as_stored(function, state["weights"])):
            raise ValueError(
                "The adapter has other weights than the ledger left it with: it was trained on, or not saved after the "
                "last request. `restore` gives it the ledger's."
            )
        keys = sample_keys(data)
        if not keys:
            raise ValueError("The forget set is empty.")
        unknown = Counter(keys) - Counter(_unpacked(state["samples"]))
        if unknown:
            raise ValueError(
                f"{unknown.total()} of {len(keys)} samples were never learned, or are forgotten already (SHA-256 of "
                f"the first: {next(iter(unknown))}). A sample is known by the exact tensors that the model was "
                "trained with."
            )
        if len(keys) == len(self):
            raise ValueError("No sample would remain: take the adapter off the model instead.")
        before = function.vector
        function.vector = state["trained"].to(function.device)
        try:
            new, _ = self._without(function, data, Counter(keys))
        finally:
            function.vector = before
        weights = state["trained"] + new._newton_step() - state["full_step"]
        new._state["weights"] = weights
        shift = float((weights - state["weights"]).norm())
        deletion = Deletion(_now(), len(keys), time.perf_counter() - start, shift)
        new._record["requests"] = [*self._record["requests"], asdict(deletion)]
        new._commit(len(new._record["requests"]))
        self._state, self._record = new._state, new._record
        function.vector = weights.to(function.device)
        deletion.seconds = time.perf_counter() - start
        return deletion

    def _without(self, function: AdapterFunction, data: Loader, keys: Counter[str]) -> tuple[UnlearningLedger, float]:
        """The ledger less some samples, its weights still these; their loss. The model has the trained weights."""
        loss, targets, gradient = function.loss_and_gradient(data)
        state = self._state
        new = UnlearningLedger.__new__(UnlearningLedger)
        new.folder, new.memory = self.folder, self.memory
        new._record = {**self._record, "targets": self._record["targets"] - targets}
        gone, stays, all_keys = Counter(keys), [], _unpacked(state["samples"])
        for i, key in enumerate(all_keys):
            gone[key] -= 1
            if gone[key] < 0:
                stays.append(i)
        new._state = {
            **state,
            "gradient": state["gradient"] - gradient.cpu(),
            "samples": state["samples"][stays],
        }
        if "rows" in state:
            new._state["rows"] = state["rows"][stays]
        else:
            new._state["gram"] = state["gram"] - _gram(function, data, self._record["draws"]).cpu()
        return new, loss

    def restore(self, model: nn.Module) -> None:
        """Gives an adapter the weights that the ledger left it with.

        Raises:
            ValueError: the ledger belongs to another model.
        """
        function = self._function(model)
        function.vector = self._state["weights"].to(function.device)

    def _function(self, model: nn.Module) -> AdapterFunction:
        record = self._record
        function = AdapterFunction(model, LOSSES[record["loss"]](), record["parameters"], self.memory / 4)
        found = _fingerprint(function)
        if found != record["fingerprint"]:
            raise ValueError(
                f"The ledger in {str(self.folder)!r} belongs to another model: its fingerprint is "
                f"{record['fingerprint']}, that of the model is {found}. The frozen weights, or the names or shapes of "
                "the parameters that can change, differ."
            )
        return function

    @staticmethod
    def _as_stored(function: AdapterFunction, vector: torch.Tensor) -> torch.Tensor:
        """A vector after rounding to the parameters' dtypes."""
        return function.flatten(function._split(vector.to(function.device))).cpu()

    def _newton_step(self) -> torch.Tensor:
        state, record = self._state, self._record
        decay, count = record["weight_decay"], record["targets"]
        gradient = state["gradient"] / count + decay * (state["trained"] - state["reference"])
        form: Curvature
        if "gram" in state:
            form = ParameterForm(state["gram"] / count)
        else:
            form = KernelForm(state["rows"].double().flatten(0, 1) / math.sqrt(count))
        return -form.solve(gradient, decay + record["ridge"])

    def _commit(self, number: int) -> None:
        """Makes the state on disk this one: `ledger.json` is replaced last, in one step."""
        process = PartialState()
        if process.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            data = save({name: tensor.clone() for name, tensor in self._state.items()})
            name = f"state-{number:06d}.safetensors"
            self._record |= {"state": name, "sha256": hashlib.sha256(data).hexdigest()}
            _write(self.folder / name, data)
            _write(self.folder / _FILE, (json.dumps(self._record, indent=1) + "\n").encode())
            for old in self.folder.glob("state-*"):
                if old.name != name:
                    old.unlink()
        process.wait_for_everyone()


def _trials(data: Loader, keys: list[str]) -> list[set[str]]:
    """Hashes of samples of a classifier to delete on trial: a random tenth, and the most frequent class."""
    found: list[tuple[str, int]] = []
    for batch in batches(data, torch.device("cpu")):
        labels = batch.tensors["labels"]
        if labels.dim() == 1:
            found += zip(batch.keys(), labels.tolist())
    found = gathered(found)
    if not found:
        return []
    order = sorted(set(keys), key=lambda key: float(uniform(key, "trial")))
    classes = Counter(label for _, label in found)
    largest = min(classes, key=lambda label: (-classes[label], label))
    trials = [
        set(order[: math.ceil(_TRIAL_SHARE * len(order))]),
        {key for key, label in found if label == largest},
    ]
    return [trial for trial in trials if any(key not in trial for key in keys)]


def _linearised(function: AdapterFunction, data: Loader, draws: int | None) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Hashes of samples, and their rows in float32, chunk by chunk."""
    for found in function.linearise(data, draws):
        yield found.keys, found.rows.float()


def _gram(function: AdapterFunction, data: Loader, draws: int | None) -> torch.Tensor:
    gram = torch.zeros(function.size, function.size, dtype=torch.float64, device=function.device)
    for found in function.linearise(data, draws):
        rows = found.rows.flatten(0, 1)
        gram.addmm_(rows.T, rows)
    return total(gram)


def _fingerprint(function: AdapterFunction) -> str:
    """A SHA-256 of the frozen weights, and of names and shapes of the others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(function.model.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if name not in function.parameters:
            data = tensor.detach().cpu().contiguous().view(-1)
            digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def _packed(keys: Iterable[str]) -> torch.Tensor:
    data = bytearray(b"".join(bytes.fromhex(key) for key in sorted(keys)))
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, 32)


def _unpacked(samples: torch.Tensor) -> list[str]:
    return [bytes(row).hex() for row in samples.numpy()]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, also when the machine stops."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
