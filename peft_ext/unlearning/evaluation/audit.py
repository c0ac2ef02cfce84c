"""A record of one request for an auditor: what was done, what was measured, and where it stands in a ledger's log."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...files import write_whole
from ..derivatives.data import Loader, sample_keys
from ..ledger import UnlearningLedger
from ..ledger_chain import Entry, broken_links, commitment, entry_hash
from ..ledger_state import Deletion
from ..methods.base import UnlearningReport
from .findings import warnings
from .report import finite, markdown_table
from .results import SPLITS, UnlearningResult
from .tables import METRICS, table

_BOUNDS = ("damping", "ridge", "retain_tolerance")
_BEHAVIOUR = [f"{name}_{split}" for name in ("accuracy", "reproduced", "loss") for split in SPLITS]
_ATTACKS = ["mia", "population_auc", "attack_auc", "attack_tpr"]
_DISTANCES = ["js_forget", "js_ratio", "js_test", "distance_forget", "l1_forget", "tug_of_war"]
_PROVES = """\
- The numbers are those that the program measured and that its operator wrote down. Nothing in them is signed: who holds
  the ledger's folder can write another log from its start on. A hash of the log that was published or handed over
  before (its head) shows that: `peft-ext ledger verify FOLDER --head HASH` fails for a log that does not hold it.
- Each entry of the log holds the hash of the one before: none can be changed, left out or put in between without a
  change of all later hashes. The log binds the hashes of what was forgotten by a salted SHA-256. The ledger keeps
  neither the hashes nor the salt, this record holds both.
- A hash of a sample is not the sample. But who has a sample can compute its hash: this record confirms to them that it
  was among the training data. It is as confidential as the list of people who asked to be forgotten.
- The log says that the adapter of that moment was changed as described. It does not say that no copy of the adapter, of
  the data or of the ledger from before is kept, nor which adapter is in use.
- A model near one that was retrained is evidence, not proof, that the influence of the samples is gone. Attacks that
  were not run may find more."""


@dataclass
class AuditRecord:
    """What was done for one request.

    `of_ledger` and `of_method` make it, `write` saves it as JSON and Markdown.

    Attributes:
        method: name of the method.
        time: when the request was served, in UTC.
        samples: number of samples that were forgotten.
        parameters: how many numbers could change.
        shift: length of their change.
        seconds: wall time.
        bounds: what bounded the change, by name: `damping` (ridge on the curvature, in units of its mean), `ridge`
            (strength of the training's pull to its reference), `retain_tolerance` (how far the loss of what
            remains may rise per target: nats of the cross-entropy, or half squared distances; of a ledger: in the trial
            deletions when it was made). None where the method has none.
        forgotten: SHA-256 of the samples, in alphabetical order; None if the object that `forget` returned is lost.
        notes: sentences of the method on its run.
        measured: rows of `tables.table` for the model before, after, and the gold; empty if nothing was measured.
        warnings: what keeps these from being believed as they are.
        number: place of the request in the ledger's log, None without a ledger; so are the next two.
        salt: digits that the log's hash of `forgotten` was made with.
        chain: the log up to this request; see `peft_ext.unlearning.ledger_chain`.
    """

    method: str
    time: str
    samples: int
    parameters: int
    shift: float
    seconds: float
    bounds: dict[str, float | None]
    forgotten: list[str] | None
    notes: list[str] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    number: int | None = None
    salt: str | None = None
    chain: list[Entry] | None = None

    @classmethod
    def of_ledger(
        cls, ledger: UnlearningLedger, deletion: Deletion, results: Sequence[UnlearningResult] = ()
    ) -> AuditRecord:
        """Returns the record of a request that a ledger served.

        Args:
            ledger: the ledger.
            deletion: what `forget` returned, or one of `requests`, which do not have the hashes.
            results: what the models say of the data: `"original"` for the one before, a label for the one after, and
                `"retrain"` for the gold if there is one, of one case. With a gold of several seeds, the per-example
                attack has reference models.

        Raises:
            ValueError: the ledger did not serve this request, or `table` refuses the results.
        """
        chain = ledger.chain[: deletion.number + 1]
        if entry_hash(chain[-1]) != deletion.hash:
            raise ValueError(
                f"`deletion` must be a request of the ledger in {str(ledger.folder)!r}: its log has no entry "
                f"{deletion.number} with the hash {deletion.hash}."
            )
        settings = chain[0]["settings"]
        names = ("time", "samples", "shift", "seconds")
        record = cls(
            method="ledger: one damped Newton step from the trained weights, without retain data",
            **{name: getattr(deletion, name) for name in names},
            parameters=ledger.parameters,
            bounds={name: settings[name] for name in _BOUNDS},
            forgotten=None if deletion.forgotten is None else list(deletion.forgotten),
            number=deletion.number,
            salt=deletion.salt,
            chain=chain,
            notes=ledger.shortfalls,
        )
        return record._measured(results)

    @classmethod
    def of_method(
        cls, report: UnlearningReport, forget: Loader, ridge: float = 0.0, results: Sequence[UnlearningResult] = ()
    ) -> AuditRecord:
        """Returns the record of a request that a method served just now.

        Args:
            report: what the method returned.
            forget: batches of the samples that were to be forgotten.
            ridge: what the method was told of the training.
            results: as in `of_ledger`.

        Raises:
            ValueError: `table` refuses the results.
        """
        solution, keys = report.solution, sorted(sample_keys(forget))
        kept = [step for step in solution.steps if step.accepted] if solution is not None else []
        record = cls(
            method=report.method,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            samples=len(keys),
            parameters=report.parameters,
            shift=report.shift,
            seconds=report.seconds,
            bounds={
                "damping": kept[-1].damping if kept else None,
                "ridge": ridge,
                "retain_tolerance": None if solution is None else solution.retain_tolerance,
            },
            forgotten=keys,
            notes=report.notes(),
        )
        return record._measured(results)

    def _measured(self, results: Sequence[UnlearningResult]) -> AuditRecord:
        if results:
            rows = table(results)
            self.warnings = warnings(rows)
            self.measured = [{name: value for name, value in row.items() if name != "reports"} for row in rows]
        return self

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as what JSON can hold, with None for what is not finite."""
        return finite(asdict(self))

    def markdown(self) -> str:
        """Returns the record for readers."""
        rows = [
            ("served", self.time),
            ("method", self.method),
            ("samples forgotten", f"{self.samples:,}"),
            ("parameters that could change", f"{self.parameters:,}"),
            ("length of their change", f"{self.shift:.6g}"),
            *((f"bound: {name}", "none" if value is None else f"{value:g}") for name, value in self.bounds.items()),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        blocks = ["# A request to forget", _two_columns(rows), *(f"- {note}" for note in self.notes)]
        blocks += ["## What was forgotten", _listed(self.forgotten)]
        blocks.append("## What was measured")
        for names in (_BEHAVIOUR, _ATTACKS, _DISTANCES):
            names = [name for name in names if any(name in row for row in self.measured)]
            if names:
                assert set(names) <= METRICS.keys()
                blocks.append(markdown_table(self.measured, names))
        blocks += ["\n".join(f"- {text}" for text in self.warnings)] if self.measured else ["Nothing."]
        if self.chain is not None:
            hashes = [
                (str(number), f"{entry['time']}, {entry['remaining']:,} samples remain, `{entry_hash(entry)}`")
                for number, entry in enumerate(self.chain)
            ]
            blocks += ["## The ledger's log up to this request", _two_columns(hashes)]
        blocks += ["## What this proves, and what it does not", _PROVES]
        return "\n\n".join(block for block in blocks if block) + "\n"

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `request-000001.json` and `request-000001.md`, with the request's number, and returns the former.

        A record without a ledger is known by when and by what was forgotten: `request-20260101T120000Z-0123456789ab`.
        The ledger's own folder is no place for it: it holds what the ledger does not keep.

        Raises:
            FileExistsError: the folder holds another record of that name, such as one with the hashes that this one
                lacks. Nothing was written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self._name()}.json"
        texts = {path: json.dumps(self.to_dict(), indent=1) + "\n", path.with_suffix(".md"): self.markdown()}
        for each, text in texts.items():
            if each.exists() and each.read_bytes() != text.encode():
                raise FileExistsError(
                    f"{str(each)!r} holds another record of this request, or of one of another ledger, and a record is "
                    "not overwritten. Write this one to a folder of its own, or move the other away."
                )
        for each, text in texts.items():
            write_whole(each, text)
        return path

    def _name(self) -> str:
        if self.number is not None:
            return f"request-{self.number:06d}"
        what = hashlib.sha256("\n".join([self.method, *(self.forgotten or [])]).encode()).hexdigest()
        return f"request-{re.sub('[-:]', '', self.time)}-{what[:12]}"


def problems_of(record: Mapping[str, Any], chain: Sequence[Entry]) -> list[str]:
    """Returns what does not fit in a record, `AuditRecord.to_dict()`, and the log of a ledger: a sentence each.

    Raises:
        ValueError: it is no record of a request that a ledger served.
    """
    try:
        number, own, salt, forgotten = (record[name] for name in ("number", "chain", "salt", "forgotten"))
        entry = own[number]
        found = [f"the record's own log is broken: {text}" for text in broken_links(own)]
        if number != len(own) - 1 or number < 1:
            found.append(f"the record is about request {number}, and its log has {len(own) - 1}")
        logged = {**entry, "bounds": {name: own[0]["settings"][name] for name in _BOUNDS}}
        for name in ("time", "samples", "shift", "bounds"):
            if record[name] != logged[name]:
                found.append(f"the record says {name} {record[name]!r}, its log {logged[name]!r}")
        if list(own) != list(chain[: len(own)]):
            found.append("the ledger's log does not begin with that of the record")
        bound = forgotten is None or commitment(salt, forgotten) == entry["forgotten"]
        if not bound or (forgotten is not None and len(forgotten) != record["samples"]):
            found.append("the hashes of the forgotten samples are not those that the log was bound to")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"The record is none of a request that a ledger served: {error!r}.") from error
    return found


def _two_columns(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _listed(keys: Sequence[str] | None) -> str:
    if keys is None:
        return "The hashes are not known: the ledger does not keep them, and what `forget` returned is not at hand."
    return "SHA-256 of each sample's tensors:\n\n" + "\n".join(f"- `{key}`" for key in keys)
