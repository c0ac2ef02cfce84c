"""What a ledger holds, and how it becomes the entries and the tensors on disk."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..checks import check_choice, check_types
from . import ledger_folder
from .derivatives.losses import LOSSES
from .derivatives.quadratic import SampledQuadratic, furthest
from .ledger_chain import Chain, Entry, entry_hash, extended
from .ledger_folder import FILE, MARK, state_name

_TERMS = {"kernel": "rows", "parameter": "gram"}  # the name on disk, by the form
_SETTINGS = ("damping", "mean_curvature", "fingerprint", "loss", "parameters", "retain_tolerance")


_LEFT = 0.25
"""A random trial deletion that raises the loss by less than this share of what it does undamped leaves too much."""


@dataclass
class Deletion:
    """A request that was served.

    Attributes:
        time: when it was, in UTC.
        samples: number of samples that were forgotten.
        seconds: wall time.
        shift: length of the change of the parameters.
        remaining: number of samples that were learned and not forgotten.
        number: its place in the ledger's log, from 1 on.
        hash: SHA-256 of its entry in the log; see `peft_ext.unlearning.ledger_chain`.
        forgotten: SHA-256 of the samples, in alphabetical order. The ledger does not keep them: only the object that
            `forget` returns has them, None elsewhere.
        salt: random digits, with which the log's entry for `forgotten` can be verified; neither kept by the ledger.
    """

    time: str
    samples: int
    seconds: float
    shift: float
    remaining: int
    number: int
    hash: str
    forgotten: tuple[str, ...] | None = None
    salt: str | None = None


@dataclass(frozen=True)
class Trial:
    """A deletion that was tried when a ledger was made, with the damping that was chosen, and taken back.

    Attributes:
        kind: `"random"`, a tenth of the samples; `"class"`, those of the most frequent class.
        samples: number of samples that it deleted.
        of: number of all samples.
        classes: number of classes among them, 0 for labels of tokens.
        before, after: mean loss over the targets of what it deleted.
        least_damped: the same after it with the smallest damping that was tried. None for a mean that is not finite.
        damages: whether it raised the loss of the others by more than `retain_tolerance`, for want of a larger damping.
    """

    kind: str
    samples: int
    of: int
    classes: int
    before: float
    after: float | None
    least_damped: float | None
    damages: bool

    def shortfall(self, state: LedgerState) -> str | None:
        """Returns what it foretells of the requests that a ledger will serve, in a sentence; None if nothing bad."""
        if self.damages:
            return (
                f"A trial deletion of {self.samples} of {self.of} samples raised the loss of the others by more than "
                f"{state.retain_tolerance:g} with every damping up to {state.damping:g}: requests that this ledger "
                "serves may damage the model. Measure it on data that remains after a request, or use GaussNewton."
            )
        if self.after is None:
            return f"A trial deletion of {self.samples} of {self.of} samples led to a loss that is not finite."
        use = "Use a method that has the retain data, such as Rewind."
        if self.kind == "class":
            guess = math.log(self.classes) if state.loss == "cross_entropy" else 0.5 * (1 - 1 / self.classes)
            if self.after >= guess:
                return None
            return (
                f"A trial deletion of all {self.samples:,} samples of the most frequent class took their mean loss "
                f"from {self.before:.3g} to {self.after:.3g} only, and a guess among {self.classes} classes has "
                f"{guess:.3g}: requests to forget a class will leave too much of it. {use}"
            )
        undamped = math.inf if self.least_damped is None else self.least_damped
        rise, most = self.after - self.before, undamped - self.before
        if most <= 0 or rise >= _LEFT * most:
            return None
        return (
            f"A trial deletion of {self.samples:,} of {self.of:,} samples raised their mean loss by {rise:.3g} with "
            f"the damping of {state.damping:g}, which spares the others, and by {most:.3g} with the smallest: requests "
            f"will take back a small part only of what samples taught. {use}"
        )


@dataclass(frozen=True)
class LedgerState:
    """All that a ledger holds.

    Attributes:
        quadratic: quadratic model of the training loss, less the samples that were forgotten.
        weights: parameters that the ledger left the adapter with, `(size,)`.
        full_step: damped Newton step on all training samples, `(size,)`.
        damping: ridge on the curvature, in units of `mean_curvature`.
        mean_curvature: mean of the diagonal of the curvature over all training samples.
        fingerprint: of what cannot change; see `peft_ext.unlearning.ledger_fingerprint`.
        loss: name of the loss.
        parameters: regular expression of the names of the parameters, or None.
        created: when, in UTC.
        seconds: wall time of that.
        retain_tolerance: how far trial deletions were to raise the loss of what remains per target, in the loss's unit;
            None if there were none.
        trials: what those came to.
        chain: the log; empty if nothing is on disk yet.
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
    retain_tolerance: float | None = None
    trials: tuple[Trial, ...] = ()
    chain: Chain = ()

    @property
    def requests(self) -> list[Deletion]:
        """What was forgotten."""
        names = ("time", "samples", "seconds", "shift", "remaining")
        return [
            Deletion(**{name: entry[name] for name in names}, number=number, hash=entry_hash(entry))
            for number, entry in enumerate(self.chain)
            if number
        ]

    @property
    def shortfalls(self) -> list[str]:
        """What the trials foretell that requests will leave, and what they cannot foretell, in sentences."""
        found = (trial.shortfall(self) for trial in self.trials)
        return [text for text in (*found, self.untried) if text is not None]

    @property
    def untried(self) -> str | None:
        """Says that more samples are forgotten than were in any trial; None if that is not so, or nothing was tried."""
        if not self.trials:
            return None
        of, most = self.trials[0].of, max(trial.samples for trial in self.trials)
        gone = of - len(self.quadratic.keys)
        if gone <= most:
            return None
        return (
            f"{gone:,} of {of:,} samples are forgotten by now, and the largest trial deletion had {most:,}: whether "
            "the damping spares the others is not known at this size. Measure the model on data that remains."
        )

    @property
    def shift(self) -> float:
        """What is added to the diagonal of the curvature."""
        return self.damping * self.mean_curvature

    def damped(self, damping: float) -> LedgerState:
        """Returns the state of all training samples with another damping."""
        state = replace(self, damping=damping)
        return replace(state, full_step=self.quadratic.newton_step(state.shift))

    def weights_after(self, remaining: SampledQuadratic) -> torch.Tensor:
        """Returns the parameters that the difference of two damped Newton steps leads to, `(size,)`.

        The difference is shortened to what the training had moved; see `furthest`.
        """
        trained, reference = self.quadratic.trained, self.quadratic.reference
        step = remaining.newton_step(self.shift) - self.full_step
        most = furthest(trained, None if torch.equal(trained, reference) else reference)
        return trained + step * min(1.0, most / max(float(step.norm()), 1e-300))

    @classmethod
    def read(cls, folder: Path) -> tuple[bytes, LedgerState]:
        """Reads what `write` wrote: the bytes of `ledger.json`, and what the ledger holds.

        Raises:
            ValueError: there is nothing, or it is damaged; the message names the file.
        """
        record, chain, data = ledger_folder.read(folder)
        try:
            return record, cls._of(chain, load(data))
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{str(folder / FILE)!r} and {state_name(chain)!r} do not hold a ledger together: {error!r}."
            ) from error

    @classmethod
    def _of(cls, chain: Chain, tensors: dict[str, torch.Tensor]) -> LedgerState:
        settings, last = chain[0]["settings"], chain[-1]
        form = next(form for form, name in _TERMS.items() if name in tensors or form == "parameter")
        quadratic = SampledQuadratic(
            form,
            tensors[_TERMS[form]],
            tensors["gradient"],
            tensors["trained"],
            tensors["reference"],
            settings["ridge"],
            [bytes(row).hex() for row in tensors["samples"].numpy()],
            last["targets"],
            settings["draws"],
        )
        state = cls(
            quadratic,
            tensors["weights"],
            tensors["full_step"],
            **{name: settings[name] for name in _SETTINGS},
            trials=tuple(Trial(**trial) for trial in settings.get("trials", ())),
            created=chain[0]["time"],
            seconds=chain[0]["seconds"],
            chain=chain,
        )
        check_types(quadratic)
        check_types(state)
        for trial in state.trials:
            check_types(trial)
        check_choice("loss", state.loss, tuple(LOSSES))
        size, count = (len(state.weights),), last["remaining"]
        shapes = {name: tuple(tensors[name].shape) for name in ("gradient", "trained", "reference", "full_step")}
        terms = tuple(quadratic.terms.shape)
        fits = terms == size * 2 if form == "parameter" else len(terms) == 3 and terms[::2] == (count, *size)
        if len(quadratic.keys) != count or not fits or any(shape != size for shape in shapes.values()):
            raise ValueError(f"{count} samples, {len(quadratic.keys)} hashes, tensors of the shapes {terms}, {shapes}")
        return state

    def write(self, folder: Path, event: Entry) -> Chain:
        """Makes the state on disk this one, and returns its chain. The caller holds the lock.

        Args:
            folder: of the ledger, which is there.
            event: what the new entry of the chain says beside the settings, the numbers of samples and targets that
                remain, and the hash of the state.

        Raises:
            OSError: something could not be written; the ledger is as it was.
        """
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
        data = save({name: tensor.clone() for name, tensor in tensors.items()}, {"format": MARK})
        entry = {
            **event,
            "remaining": len(quadratic.keys),
            "targets": quadratic.targets,
            "state": hashlib.sha256(data).hexdigest(),
        }
        if not self.chain:
            own = {name: getattr(self, name) for name in _SETTINGS}
            entry["settings"] = {**own, "ridge": quadratic.ridge, "draws": quadratic.draws}
            entry["settings"]["trials"] = [asdict(trial) for trial in self.trials]
        chain = extended(self.chain, entry)
        ledger_folder.commit(folder, chain, data)
        return chain


def survey(folder: Path) -> dict[str, Any]:
    """Verifies a ledger as far as that can be done without the adapter, and changes nothing.

    Args:
        folder: of the ledger.

    Returns:
        What JSON can hold: `folder`; `entries`, for the creation and every request the `time`, the numbers of samples
        `forgotten` and `remaining`, `shift` (None for the creation) and `hash`; `head`, the last hash; `chain`, the log
        itself; `state`, the name of the file of the tensors; `verified`, `shortfalls` (see
        `UnlearningLedger.shortfalls`) and `problems`, sentences.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no ledger, or it is damaged; the message names the file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    _, state = LedgerState.read(folder)
    chain, left = state.chain, ledger_folder.leftovers(folder, state.chain)
    entries = [
        {
            "time": entry["time"],
            "forgotten": entry.get("samples", 0),
            "remaining": entry["remaining"],
            "shift": entry.get("shift"),
            "hash": entry_hash(entry),
        }
        for entry in chain
    ]
    name = state_name(chain)
    return {
        "folder": str(folder),
        "entries": entries,
        "head": entries[-1]["hash"],
        "chain": list(chain),
        "state": name,
        "verified": [
            f"{FILE} is as it was written (SHA-256); each of {len(chain)} entries holds the hash of the one before.",
            f"{name} is the state of the last entry (SHA-256), with {len(state.quadratic.keys):,} hashes of samples.",
        ],
        "shortfalls": state.shortfalls,
        "problems": [
            f"{path.name} is left from an interruption, or from a request that is being served now, and may hold "
            "hashes of forgotten samples: opening the ledger deletes it"
            for path in left
        ],
    }


def _packed(keys: list[str]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(map(bytes.fromhex, keys))), dtype=torch.uint8).view(-1, 32)
