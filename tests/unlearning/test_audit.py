"""Records of requests for auditors, and the command that verifies a ledger and a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import torch
from problems import images, loader

from peft_ext.__main__ import main
from peft_ext.unlearning import GaussNewton, UnlearningLedger
from peft_ext.unlearning.evaluation.audit import AuditRecord
from peft_ext.unlearning.evaluation.metrics import Outcome, observe
from peft_ext.unlearning.evaluation.results import UnlearningResult
from peft_ext.unlearning.ledger_chain import decoded, encoded

ROWS = images(12, 1, (4,))


def linear() -> torch.nn.Module:
    torch.manual_seed(1)
    return problems.Regression().double()


def result(model: torch.nn.Module, method: str, seed: int = 0) -> UnlearningResult:
    sets = {"forget": ROWS[:3], "retain": ROWS[3:], "test": images(9, 5, (4,))}
    return UnlearningResult(
        "request", method, seed, {name: observe(model, loader(rows)) for name, rows in sets.items()}
    )


def served(folder: Path) -> tuple[UnlearningLedger, list[Any], list[UnlearningResult]]:
    """A ledger of two requests, what `forget` returned, and what models say: before and after the first, golds."""
    model = linear()
    ledger = UnlearningLedger.create(folder, model, loader(ROWS), damping=0.1)
    results = [result(model, "original")]
    deletions = [ledger.forget(model, loader(ROWS[:3]))]
    results.append(result(model, "ledger"))
    for seed in range(2):
        torch.manual_seed(seed)
        results.append(result(problems.Regression().double(), "retrain", seed))
    deletions.append(ledger.forget(model, loader(ROWS[3:5])))
    return ledger, deletions, results


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["ledger", "verify", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_record_says_what_was_done_and_measured(tmp_path):
    ledger, deletions, results = served(tmp_path / "ledger")
    path = AuditRecord.of_ledger(ledger, deletions[0], results).write(tmp_path / "records")
    assert path.name == "request-000001.json"
    found, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert found["samples"] == 3 and found["forgotten"] == list(deletions[0].forgotten) and found["number"] == 1
    assert found["time"] == deletions[0].time and found["shift"] == deletions[0].shift > 0
    assert found["bounds"] == {"damping": 0.1, "ridge": 0.0, "retain_tolerance": None}
    assert found["chain"] == ledger.chain[:2]
    rows = {row["method"]: row for row in found["measured"]}
    assert list(rows) == ["original", "retrain", "ledger"]
    assert rows["ledger"]["js_forget"]["mean"] > 0 and "attack_auc" in rows["original"]
    assert found["warnings"]
    for key in deletions[0].forgotten:
        assert f"- `{key}`" in text
    for expected in (
        deletions[0].hash,
        "| original ",
        "| ledger ",
        "JS forget",
        "per-example AUC",
        "Nothing in them",
    ):
        assert expected in text


def test_a_record_without_hashes_or_measurements_says_so(tmp_path):
    ledger, _, _ = served(tmp_path)
    text = AuditRecord.of_ledger(ledger, ledger.requests[1]).markdown()
    assert "The hashes are not known: the ledger does not keep them" in text
    assert "## What was measured\n\nNothing." in text


def test_numbers_that_are_not_finite_are_no_json_numbers(tmp_path):
    ledger, deletions, results = served(tmp_path / "ledger")
    broken = results[1].outcomes["forget"]
    results[1].outcomes["forget"] = Outcome(
        broken.losses * np.nan, broken.correct, broken.log_probs, broken.confidence * np.nan
    )
    path = AuditRecord.of_ledger(ledger, deletions[0], results).write(tmp_path)
    assert "NaN" not in path.read_text()


def test_a_record_of_another_ledger_is_refused(tmp_path):
    ledger, _, _ = served(tmp_path / "one")
    _, deletions, _ = served(tmp_path / "two")
    with pytest.raises(
        ValueError, match="`deletion` must be a request of the ledger in .*one': its log has no entry 1"
    ):
        AuditRecord.of_ledger(ledger, deletions[0])


def test_a_record_of_a_method_without_a_ledger():
    model = linear()
    report = GaussNewton(max_steps=1).fit(model, loader(ROWS[3:]), loader(ROWS[:3]), ridge=0.01)
    record = AuditRecord.of_method(report, loader(ROWS[:3]), 0.01)
    assert record.method == "gauss_newton" and record.samples == 3 and len(record.forgotten or []) == 3
    assert record.bounds["ridge"] == 0.01 and record.bounds["retain_tolerance"] is not None
    assert record.notes and record.chain is None
    assert "ledger's log" not in record.markdown()


def test_no_record_takes_the_place_of_another(tmp_path):
    ledger, deletions, _ = served(tmp_path / "ledger")
    record = AuditRecord.of_ledger(ledger, deletions[0])
    path = record.write(tmp_path / "records")
    before = path.read_bytes()
    assert record.write(tmp_path / "records") == path, "the same record again is nothing new"
    with pytest.raises(FileExistsError, match="request-000001.json' holds another record .* a folder of its own"):
        AuditRecord.of_ledger(ledger, ledger.requests[0]).write(tmp_path / "records")  # without the hashes
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(FileExistsError, match="request-000001.md' holds another"):
        AuditRecord.of_ledger(ledger, ledger.requests[0]).write(tmp_path / "records")
    assert not path.exists()


def test_records_of_methods_have_names_of_their_own(tmp_path):
    report = GaussNewton(max_steps=1).fit(linear(), loader(ROWS[3:]), loader(ROWS[:3]))
    paths = [AuditRecord.of_method(report, loader(rows)).write(tmp_path) for rows in (ROWS[:3], ROWS[:2])]
    assert len(list(tmp_path.iterdir())) == 4 and paths[0] != paths[1]
    for path, samples in zip(paths, (3, 2)):
        record = json.loads(path.read_text())
        assert record["samples"] == samples
        assert path.name.startswith(f"request-{record['time'].replace('-', '').replace(':', '')}-")


def test_verify_shows_the_log_and_accepts_what_fits(tmp_path, capsys):
    ledger, deletions, _ = served(tmp_path / "ledger")
    record = AuditRecord.of_ledger(ledger, deletions[0]).write(tmp_path / "records")
    code, out, err = run(capsys, tmp_path / "ledger", "--head", deletions[0].hash, "--record", record)
    assert (code, err) == (0, "")
    assert f"The log holds {deletions[0].hash}: it is entry 1." in out and "The record fits request 1" in out
    assert f"Head: {ledger.head}" in out
    code, out, err = run(capsys, tmp_path / "ledger", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert list(found) == ["folder", "entries", "head", "chain", "state", "verified", "shortfalls", "problems"]
    assert [entry["forgotten"] for entry in found["entries"]] == [0, 3, 2] and found["problems"] == []
    assert found["chain"] == ledger.chain and found["head"] == ledger.head


def test_verify_names_what_is_left_and_leaves_it(tmp_path, capsys):
    ledger, _, _ = served(tmp_path)
    left = tmp_path / "state-000001.safetensors"
    left.write_bytes((tmp_path / "state-000002.safetensors").read_bytes())
    code, out, err = run(capsys, tmp_path)
    assert code == 1 and "2 entries" not in out and "Head: " in out
    assert "state-000001.safetensors is left from an interruption" in err and left.exists()
    UnlearningLedger(tmp_path)
    assert run(capsys, tmp_path)[0] == 0


def test_verify_refuses_damage_and_a_log_without_the_published_head(tmp_path, capsys):
    ledger, deletions, _ = served(tmp_path / "ledger")
    path = tmp_path / "ledger" / "ledger.json"
    data = path.read_bytes()
    chain = [dict(entry) for entry in decoded(data)]
    chain[-1]["shift"] = 0.0  # rewritten with everything that depends on it
    path.write_bytes(encoded(tuple(chain)))
    assert run(capsys, tmp_path / "ledger")[0] == 0
    code, _, err = run(capsys, tmp_path / "ledger", "--head", ledger.head)
    assert code == 1 and f"the log does not hold {ledger.head}: it was rewritten, or is an older copy" in err
    record = AuditRecord.of_ledger(ledger, deletions[1]).write(tmp_path / "records")
    code, _, err = run(capsys, tmp_path / "ledger", "--record", record)
    assert code == 1 and "the ledger's log does not begin with that of the record" in err
    path.write_bytes(data[:-1])
    code, out, err = run(capsys, tmp_path / "ledger")
    assert code == 1 and out == "" and "ledger.json' is damaged" in err
    path.unlink()
    assert run(capsys, tmp_path / "ledger")[0] == 1
    code, _, err = run(capsys, tmp_path / "nowhere")
    assert code == 2 and "There is no folder" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["forgotten"].__setitem__(0, "0" * 64), "not those that the log was bound to"),
        (lambda record: record.update(salt="0" * 64), "not those that the log was bound to"),
        (lambda record: record.update(time="2020-01-01T00:00:00Z"), "the record says time '2020-01-01T00:00:00Z', its"),
        (lambda record: record["bounds"].update(damping=3.0), "the record says bounds"),
        (lambda record: record.update(bounds={}), "the record says bounds {}, its log {'damping': 0.1"),
        (lambda record: record["chain"][0].update(time="x"), "the record's own log is broken: entry 1 follows"),
        (lambda record: record["chain"].pop(), "The record is none of a request that a ledger served"),
        (lambda record: record.update(chain=None), "The record is none of a request that a ledger served"),
    ],
)
def test_a_changed_record_does_not_fit(change, message, tmp_path, capsys):
    ledger, deletions, _ = served(tmp_path / "ledger")
    path = AuditRecord.of_ledger(ledger, deletions[0]).write(tmp_path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    code, _, err = run(capsys, tmp_path / "ledger", "--record", path)
    assert code == 1 and message in err
