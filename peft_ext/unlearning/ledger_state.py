"""What a ledger holds, and the two files that hold it on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..files import write_whole
from .derivatives.quadratic import SampledQuadratic

FILE = "ledger.json"
_VERSION = 2
_TERMS = {"kernel": "rows", "parameter": "gram"}  # the name on disk, by the form


@dataclass
class Deletion:
    """A request that was served.

    Attributes:
        time: when it was, in UTC.
        samples: number of samples that were forgotten.
        seconds: wall time.
        shift: length of the change of the parameters.
    """

    time: str
    samples: int
    seconds: float
    shift: float


@dataclass(frozen=True)
class LedgerState:
    """All that a ledger holds.

    Attributes:
        quadratic: quadratic model of the training loss, less the samples that were forgotten.
        weights: parameters that the ledger left the adapter with, `(size,)`.
        full_step: damped Newton step on all training samples, `(size,)`.
        damping: ridge on the curvature, in units of `mean_curvature`.
        mean_curvature: mean of the diagonal of the curvature over all training samples.
        fingerprint: SHA-256 of what cannot change.
        loss: name of the loss.
        parameters: regular expression of the names of the parameters, or None.
        created: when, in UTC.
        seconds: wall time of that.
        requests: what was forgotten.
    """

    quadratic: SampledQuadratic
    weights: torch.Tensor
    full_step: torch.Tensor
    damping: float
    mean_curvature: float
    fingerprint: str
    loss: str
    parameters: str | None
    created: str
    seconds: float
    requests: tuple[Deletion, ...] = ()

    @property
    def shift(self) -> float:
        """What is added to the diagonal of the curvature."""
        return self.damping * self.mean_curvature

    def damped(self, damping: float) -> LedgerState:
        """Returns the state of all training samples with another damping."""
        state = replace(self, damping=damping)
        return replace(state, full_step=self.quadratic.newton_step(state.shift))

    def weights_after(self, remaining: SampledQuadratic) -> torch.Tensor:
        """Returns the parameters that the difference of two damped Newton steps leads to, `(size,)`."""
        return self.quadratic.trained + remaining.newton_step(self.shift) - self.full_step

    @classmethod
    def read(cls, folder: Path) -> LedgerState:
        """Reads what `write` wrote.

        Raises:
            ValueError: there is nothing, or it is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"There is no ledger in {str(folder)!r}: {FILE} is missing. `create` makes one.")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version, name, expected = (record[key] for key in ("version", "state", "sha256"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error!r}.") from error
        if version != _VERSION:
            raise ValueError(f"{str(path)!r} has version {version!r}; this release of peft_ext reads {_VERSION}.")
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{str(path)!r} names the state {name!r}, which is no file name.")
        try:
            data = (folder / name).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != expected:
                raise ValueError(f"its SHA-256 is {found}, and {expected} was written")
            tensors = load(data)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"The state {name!r} of the ledger in {str(folder)!r} is damaged: {error}.") from error
        try:
            return cls._of(record, tensors)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error!r}.") from error

    @classmethod
    def _of(cls, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LedgerState:
        form = next(form for form, name in _TERMS.items() if name in tensors or form == "parameter")
        quadratic = SampledQuadratic(
            form,
            tensors[_TERMS[form]],
            tensors["gradient"],
            tensors["trained"],
            tensors["reference"],
            record["weight_decay"],
            [bytes(row).hex() for row in tensors["samples"].numpy()],
            record["targets"],
            record["draws"],
        )
        names = ("damping", "mean_curvature", "fingerprint", "loss", "parameters", "created", "seconds")
        settings = {name: record[name] for name in names}
        requests = tuple(Deletion(**request) for request in record["requests"])
        return cls(quadratic, tensors["weights"], tensors["full_step"], **settings, requests=requests)

    def write(self, folder: Path) -> None:
        """Makes the state on disk this one: `ledger.json` is replaced last, in one step."""
        process = PartialState()
        if process.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            quadratic = self.quadratic
            tensors = {
                _TERMS[quadratic.form]: quadratic.terms,
                "gradient": quadratic.gradient,
                "trained": quadratic.trained,
                "reference": quadratic.reference,
                "weights": self.weights,
                "samples": _packed(quadratic.keys),
                "full_step": self.full_step,
            }
            data = save({name: tensor.clone() for name, tensor in tensors.items()})
            name = f"state-{len(self.requests):06d}.safetensors"
            record = {
                "version": _VERSION,
                "fingerprint": self.fingerprint,
                "loss": self.loss,
                "draws": quadratic.draws,
                "parameters": self.parameters,
                "weight_decay": quadratic.ridge,
                "mean_curvature": self.mean_curvature,
                "targets": quadratic.targets,
                "created": self.created,
                "seconds": self.seconds,
                "requests": [asdict(request) for request in self.requests],
                "damping": self.damping,
                "ridge": self.shift,
                "state": name,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            write_whole(folder / name, data)
            write_whole(folder / FILE, json.dumps(record, indent=1) + "\n")
            for old in folder.glob("state-*"):
                if old.name != name:
                    old.unlink()
        process.wait_for_everyone()


def _packed(keys: list[str]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(map(bytes.fromhex, keys))), dtype=torch.uint8).view(-1, 32)
