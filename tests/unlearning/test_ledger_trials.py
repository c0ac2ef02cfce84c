"""What trial deletions foretell is said when a ledger is made, and kept with it."""

from __future__ import annotations

import math
import re
import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path

import problems
import pytest
import torch
from problems import loader, trained
from test_ledger import weights

from peft_ext.__main__ import main
from peft_ext.unlearning import UnlearningLedger
from peft_ext.unlearning.evaluation.audit import AuditRecord
from peft_ext.unlearning.methods import Ledger, UnlearningReport

once = cache(trained)
CLASS = "samples of the most frequent class took their mean loss from .* a guess among 3 classes has 1.1"
TENTH = "deletion of 3 of 24 samples raised their mean loss by .* with the damping of 30, which spares the others"


def create(folder: Path, dampings: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, **options) -> UnlearningLedger:
    monkeypatch.setattr("peft_ext.unlearning.ledger_trials.DAMPINGS", dampings)
    model, initial, retain, forget = once()
    return UnlearningLedger.create(folder, model, loader(retain + forget), ridge=0.01, reference=initial, **options)


def said(caught: pytest.WarningsRecorder) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_a_ledger_that_will_leave_too_much_of_a_class_says_so(tmp_path, monkeypatch, capsys):
    model, _, retain, forget = deepcopy(once())
    before = weights(model)
    with pytest.warns(UserWarning, match=CLASS) as caught:
        ledger = create(tmp_path / "ledger", (30.0,), monkeypatch)
    assert torch.equal(weights(model), before)
    (text,) = ledger.shortfalls
    assert said(caught) == [text] and UnlearningLedger(tmp_path / "ledger").shortfalls == [text]
    random, most = ledger._state.trials
    assert (random.kind, random.samples, random.of, random.classes) == ("random", 3, 24, 3)
    assert (most.kind, most.samples) == ("class", 8) and most.before < most.after == most.least_damped < math.log(3)

    rows = [row for row in retain + forget if int(row["labels"]) == 0]
    served = UnlearningLedger(tmp_path / "ledger").forget(model, loader(rows[:2]))
    record = AuditRecord.of_ledger(UnlearningLedger(tmp_path / "ledger"), served)
    assert record.notes == [text] and text in record.markdown()
    assert main(["ledger", "verify", str(tmp_path / "ledger")]) == 0
    assert " ".join(text.split()) in " ".join(capsys.readouterr().out.split())


def test_a_ledger_that_can_take_little_back_says_so(tmp_path, monkeypatch):
    """Nothing but the largest damping spares the others."""
    with pytest.warns(UserWarning) as caught:
        ledger = create(tmp_path, (1e-3, 30.0), monkeypatch, retain_tolerance=0.01)
    assert ledger.damping == 30
    assert said(caught) == ledger.shortfalls
    assert re.search(TENTH, ledger.shortfalls[0]) and re.search(CLASS, ledger.shortfalls[1])
    tenth = ledger._state.trials[0]
    assert tenth.after - tenth.before < 0.25 * (tenth.least_damped - tenth.before)


def test_a_method_repeats_what_its_ledger_foretold(monkeypatch):
    monkeypatch.setattr("peft_ext.unlearning.ledger_trials.DAMPINGS", (30.0,))
    model, initial, retain, forget = deepcopy(once())
    with pytest.warns(UserWarning, match=CLASS):
        report = Ledger().fit(model, loader(retain), loader(forget), reference=initial, ridge=0.01)
    assert any(note.startswith("By the ledger's trial deletions: A trial deletion") for note in report.notes())
    assert UnlearningReport.from_dict(report.to_dict()) == report


def test_a_ledger_that_does_its_work_says_nothing(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ledger = create(tmp_path / "kept", (0.03,), monkeypatch, retain_tolerance=10.0)
    assert ledger.shortfalls == [] and len(ledger._state.trials) == 2
    assert create(tmp_path / "chosen", (0.03,), monkeypatch, damping=30.0).shortfalls == []


def test_more_than_was_ever_tried_is_not_vouched_for(tmp_path, monkeypatch):
    """Requests add up: eight samples were tried together, so the ninth is one too many."""
    model, _, retain, forget = deepcopy(once())
    ledger = create(tmp_path, (0.03,), monkeypatch, retain_tolerance=10.0)
    rows = retain + forget
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ledger.forget(model, loader(rows[:8]))
    with pytest.warns(UserWarning, match="^9 of 24 samples are forgotten .* trial deletion had 8:") as caught:
        ledger.forget(model, loader(rows[8:9]))
    assert said(caught) == UnlearningLedger(tmp_path).shortfalls
    chosen = create(tmp_path / "chosen", (0.03,), monkeypatch, damping=30.0)
    model = deepcopy(once())[0]
    chosen.forget(model, loader(rows[:9]))
    assert chosen.shortfalls == []  # nothing was tried


def test_texts_are_tried_too(tmp_path):
    """From a damping of 1 on, by a random tenth: they have no classes."""
    model, rows = problems.language_model(), problems.texts(20)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model(**next(iter(loader(rows, 20)))).loss.backward()
        optimizer.step()
    before = weights(model)
    ledgers = [
        UnlearningLedger.create(tmp_path / name, model, loader(rows), retain_tolerance=tolerance)
        for name, tolerance in {"easy": 10.0, "strict": 0.0}.items()
    ]
    easy, strict = [ledger._state.trials[0] for ledger in ledgers]
    assert (easy.kind, easy.samples, easy.of, easy.classes) == ("random", 2, 20, 0)
    assert easy.after == easy.least_damped == strict.least_damped > easy.before
    assert ledgers[0].damping == 1 < ledgers[1].damping
    assert torch.equal(weights(model), before)
