"""The ledger's folder: several holders, files of others, damage, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import problems
import pytest
import torch
from problems import images, loader
from torch import nn

from peft_ext.unlearning import UnlearningLedger, ledger_lock
from peft_ext.unlearning.ledger_chain import commitment, decoded, encoded, entry_hash, line
from peft_ext.unlearning.ledger_lock import locked

ROOT = Path(__file__).resolve().parents[2]
ROWS = images(12, 1, (4,))


def linear() -> nn.Module:
    torch.manual_seed(1)
    return problems.Regression().double()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def made(folder: Path, requests: int = 0) -> tuple[nn.Module, UnlearningLedger]:
    """A ledger of twelve samples, of which each request takes two, and the adapter that it left."""
    model = linear()
    ledger = UnlearningLedger.create(folder, model, loader(ROWS), damping=0.1)
    for number in range(requests):
        ledger.forget(model, request(number))
    return model, ledger


def request(number: int):
    return loader(ROWS[2 * number : 2 * number + 2])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def after(tmp_path: Path, requests: int) -> torch.Tensor:
    return weights(made(tmp_path / "expected", requests)[0])


# Several holders


def test_a_second_holder_loses_nothing(tmp_path):
    made(tmp_path / "ledger")
    first, second = linear(), linear()
    a, b = UnlearningLedger(tmp_path / "ledger"), UnlearningLedger(tmp_path / "ledger")
    a.forget(first, request(0))
    deletion = b.forget(second, request(1))  # its adapter is the one that b knows, from before a's request
    found = UnlearningLedger(tmp_path / "ledger")
    assert len(found) == len(b) == deletion.remaining == 8 and deletion.number == 2
    assert [each.samples for each in found.requests] == [2, 2]
    assert torch.equal(weights(second), after(tmp_path, 2))
    with pytest.raises(ValueError, match="never learned, or are forgotten already"):
        b.forget(second, request(0))
    with pytest.raises(ValueError, match="never learned, or are forgotten already"):
        a.forget(first, request(1))
    a.forget(first, request(2))
    assert torch.equal(weights(first), weights(made(tmp_path / "three", 3)[0]))


def test_an_adapter_from_before_is_refused_by_a_ledger_that_knows_no_such_one(tmp_path):
    made(tmp_path, 1)
    model = linear()
    ledger = UnlearningLedger(tmp_path)
    with pytest.raises(ValueError, match="other weights than the ledger left it with.*`restore`"):
        ledger.forget(model, request(1))
    ledger.restore(model)
    ledger.forget(model, request(1))
    assert len(ledger) == 8


def test_restore_gives_what_others_have_left(tmp_path):
    model, ledger = made(tmp_path)
    other = UnlearningLedger(tmp_path)
    ledger.forget(model, request(0))
    behind = linear()
    other.restore(behind)
    assert torch.equal(weights(behind), weights(model))


def test_a_folder_that_holds_another_ledger_by_now_is_refused(tmp_path):
    model, ledger = made(tmp_path, 1)
    before = weights(model)
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = UnlearningLedger(tmp_path)
    other.forget(model, request(1))
    for path in tmp_path.iterdir():
        path.unlink()
    for path, data in old.items():  # an older copy
        path.write_bytes(data)
    with pytest.raises(ValueError, match="replaced by another one, or by an older copy.*no longer holds"):
        other.forget(model, request(2))
    with pytest.raises(ValueError, match="replaced by another one, or by an older copy"):
        other.restore(model)
    UnlearningLedger(tmp_path).restore(model)
    assert torch.equal(weights(model), before)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="There is no ledger in"):
        ledger.forget(model, request(1))


def test_a_request_waits_for_another_and_says_when_it_has_waited_enough(tmp_path, monkeypatch):
    model, ledger = made(tmp_path)
    before, content = weights(model), (tmp_path / "ledger.json").read_bytes()
    monkeypatch.setattr(ledger_lock, "LOCK_SECONDS", 0.1)
    with locked(tmp_path), pytest.raises(TimeoutError, match="Another process has been changing the ledger.*0.1 s"):
        ledger.forget(model, request(0))
    assert torch.equal(weights(model), before) and (tmp_path / "ledger.json").read_bytes() == content
    monkeypatch.setattr(ledger_lock, "LOCK_SECONDS", 60)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    threading.Timer(0.2, release.set).start()
    ledger.forget(model, request(0))
    assert release.is_set() and len(ledger) == 10
    thread.join()


def test_a_reader_meets_a_request_that_is_being_served(tmp_path, monkeypatch):
    """Between reading the log and reading its state, another process replaces both."""
    from peft_ext.unlearning import ledger_folder

    model, ledger = made(tmp_path)
    read, calls = ledger_folder.decoded, []

    def decoded(data: bytes):
        calls.append(data)
        if len(calls) == 1:
            ledger.forget(model, request(0))
        return read(data)

    monkeypatch.setattr(ledger_folder, "decoded", decoded)
    assert len(UnlearningLedger(tmp_path)) == 10


def test_it_survives_kills_two_processes_and_changed_files(tmp_path):
    """The short form of the benchmark."""
    command = [sys.executable, "-m", "benchmarks.ledger_survival", "--kills", "10", "--pairs", "2", "--mutations", "80"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--output", str(tmp_path / "counts.jsonl")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = [json.loads(text) for text in (tmp_path / "counts.jsonl").read_text().splitlines()]
    counts = {each.pop("what"): sum(each.values()) for each in found}
    assert sum(number for what, number in counts.items() if what.startswith("killed")) == 10
    assert sum(number for what, number in counts.items() if what.startswith("changed")) == 80
    assert counts["two requests"] == counts["one request twice"] == counts["two creations"] == 2


# What is not the ledger's


def test_files_of_others_stay(tmp_path):
    model, ledger = made(tmp_path)
    (tmp_path / "state-of-affairs.txt").write_text("mine")
    (tmp_path / "state-000007.safetensors").write_text("a file of another program")
    (tmp_path / "state-folder").mkdir()
    (tmp_path / "state-000009.safetensors").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "state-000008.safetensors").symlink_to(tmp_path / "elsewhere")
    others = names(tmp_path) - {"ledger.json", "ledger.lock", "state-000000.safetensors"}
    ledger.forget(model, request(0))
    assert names(tmp_path) == {*others, "ledger.json", "ledger.lock", "state-000001.safetensors"}
    UnlearningLedger(tmp_path)
    assert others <= names(tmp_path) and (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_has_the_name_of_the_next_state_is_not_overwritten(kind, tmp_path):
    model, ledger = made(tmp_path / "ledger")
    before, place = weights(model), tmp_path / "ledger" / "state-000001.safetensors"
    (tmp_path / "own").write_text("mine")
    {
        "file": lambda: place.write_text("mine"),
        "folder": place.mkdir,
        "link": lambda: place.symlink_to(tmp_path / "own"),
    }[kind]()
    with pytest.raises(FileExistsError, match="in the way of the ledger's next state: move it"):
        ledger.forget(model, request(0))
    assert torch.equal(weights(model), before) and len(UnlearningLedger(tmp_path / "ledger")) == 12
    assert (tmp_path / "own").read_text() == "mine"
    place.rename(tmp_path / "moved")
    ledger.forget(model, request(0))
    assert len(UnlearningLedger(tmp_path / "ledger")) == 10


def test_unfinished_files_that_are_links_are_replaced_and_not_followed(tmp_path):
    model, ledger = made(tmp_path / "ledger")
    (tmp_path / "own").write_text("mine")
    for name in ("ledger.json.partial", "state-000001.safetensors.partial"):
        (tmp_path / "ledger" / name).symlink_to(tmp_path / "own")
    ledger.forget(model, request(0))
    assert (tmp_path / "own").read_text() == "mine"
    assert names(tmp_path / "ledger") == {"ledger.json", "ledger.lock", "state-000001.safetensors"}
    assert not any(path.is_symlink() for path in (tmp_path / "ledger").iterdir())


@pytest.mark.parametrize("name", ["ledger.json", "state-000000.safetensors", "ledger.lock"])
def test_a_ledger_whose_files_are_links_is_refused(name, tmp_path):
    model, ledger = made(tmp_path / "ledger")
    path = tmp_path / "ledger" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name}' must be a regular file, and is a symbolic link"):
        UnlearningLedger(tmp_path / "ledger").forget(model, request(0))
    with pytest.raises(ValueError, match="There is a ledger in"):
        UnlearningLedger.create(tmp_path / "ledger", model, loader(ROWS), damping=0.1)


def test_a_folder_that_is_a_link_works(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "ledger").symlink_to(tmp_path / "disk")
    model, ledger = made(tmp_path / "ledger", 1)
    assert names(tmp_path / "disk") == {"ledger.json", "ledger.lock", "state-000001.safetensors"}
    assert len(UnlearningLedger(tmp_path / "disk")) == 10


# What an interruption leaves


def interrupted(folder: Path) -> tuple[nn.Module, set[bytes]]:
    """A ledger that was killed after a request was written and before the old state was deleted."""
    model, ledger = made(folder)
    old = folder / "state-000000.safetensors"
    data = old.read_bytes()
    deletion = ledger.forget(model, request(0))
    old.write_bytes(data)
    (folder / "ledger.json.partial").write_bytes(b"half")
    gone = {bytes.fromhex(key) for key in deletion.forgotten or ()}
    assert len(gone) == 2 and all(key in data for key in gone)
    return model, gone


def test_opening_deletes_what_an_interruption_left(tmp_path):
    interrupted(tmp_path)
    assert len(UnlearningLedger(tmp_path)) == 10
    assert names(tmp_path) == {"ledger.json", "ledger.lock", "state-000001.safetensors"}


def test_while_a_request_is_served_opening_leaves_its_files(tmp_path):
    interrupted(tmp_path)
    with locked(tmp_path):
        assert len(UnlearningLedger(tmp_path)) == 10
        assert "state-000000.safetensors" in names(tmp_path)


def test_creation_deletes_what_an_interrupted_one_left(tmp_path):
    made(tmp_path)
    (tmp_path / "ledger.json").unlink()
    (tmp_path / "state-000000.safetensors").rename(tmp_path / "state-000003.safetensors")
    with pytest.raises(ValueError, match="There is no ledger in .*'state-000003.safetensors' is what an interrupted"):
        UnlearningLedger(tmp_path)
    made(tmp_path)
    assert names(tmp_path) == {"ledger.json", "ledger.lock", "state-000000.safetensors"}


def test_hashes_that_cannot_be_deleted_are_told_of(tmp_path, monkeypatch):
    model, ledger = made(tmp_path / "ledger")
    expected, unlink = after(tmp_path, 1), Path.unlink

    def refusing(self: Path, missing_ok: bool = False) -> None:
        if self.name == "state-000000.safetensors":
            raise PermissionError("not allowed")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    told = "state-000000.safetensors' is a former state.*may hold hashes of forgotten samples.*not allowed"
    with pytest.warns(UserWarning, match=told):
        ledger.forget(model, request(0))
    assert torch.equal(weights(model), expected) and len(ledger) == 10
    with pytest.warns(UserWarning, match=told):
        UnlearningLedger(tmp_path / "ledger")

    def unlockable(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("peft_ext.unlearning.ledger.locked", unlockable)
    with pytest.warns(UserWarning, match="may hold hashes of forgotten samples.*read-only"):
        UnlearningLedger(tmp_path / "ledger")


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    model, ledger = made(tmp_path)
    before, content = weights(model), {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.forget(model, request(0))
    assert torch.equal(weights(model), before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content
    ledger.forget(model, request(0))
    assert len(ledger) == 10


# Damage


def edit(folder: Path, **fields: object) -> None:
    path = folder / "ledger.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_bytes(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "ledger.json"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "ledger.json").unlink(), "There is no ledger in"),
        (lambda folder: (folder / "ledger.json").write_text("{"), "ledger.json' is damaged"),
        (lambda folder: (folder / "ledger.json").write_bytes(b"\xff\x00"), "ledger.json' is damaged"),
        (lambda folder: (folder / "ledger.json").write_text("[]"), "ledger.json' is damaged"),
        (lambda folder: edit(folder, extra=1), "ledger.json' is damaged"),
        (lambda folder: edit(folder), "ledger.json' is damaged"),  # another layout
        (lambda folder: replace_bytes(folder, b'"ridge":0.0', b'"ridge":0.1'), "ledger.json' is damaged: the SHA-256"),
        (lambda folder: replace_bytes(folder, b'"draws":3', b'"draws":2'), "ledger.json' is damaged: the SHA-256"),
        (lambda folder: replace_bytes(folder, b'"targets":10', b'"targets":11'), "ledger.json' is damaged"),
        (lambda folder: replace_bytes(folder, b'"version": 3', b'"version": 2'), "ledger.json' is damaged"),
        (lambda folder: next(folder.glob("state-*")).unlink(), "state-000001.safetensors' .* is damaged"),
        (lambda folder: flip(next(folder.glob("state-*"))), "its SHA-256 is [0-9a-f]+, and [0-9a-f]+ was written"),
        (
            lambda folder: (folder / "ledger.json").write_text('{"version": 2, "state": "state-000000.safetensors"}'),
            "has version 2, whose settings no checksum covers; this release of peft_ext reads 3. Serve .* or `create`",
        ),
    ],
)
def test_damage_is_named(damage, message, tmp_path):
    made(tmp_path, 1)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        UnlearningLedger(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chain: chain[0]["settings"].update(ridge=0.5), "entry 1 follows [0-9a-f]+, and the one before it has"),
        (lambda chain: chain[1].update(shift=0.5), "entry 2 follows"),
        (lambda chain: chain.pop(1), "entry 1 follows"),
        (lambda chain: chain[2].pop("shift"), "entry 2 does not have the fields"),
        (lambda chain: chain[2].update(remaining=9), "leaves 9 samples, which does not add up"),
        (lambda chain: chain[2].update(targets=0), "which must be above 0"),
        (lambda chain: chain[2].update(state="0" * 64), "its SHA-256 is"),
        (lambda chain: chain.clear(), "it has no entry"),
    ],
)
def test_a_log_that_was_rewritten_in_part_is_named(change, message, tmp_path):
    """With a checksum that fits, as one makes who knows the format."""
    made(tmp_path, 2)
    path = tmp_path / "ledger.json"
    chain = [dict(entry) for entry in decoded(path.read_bytes())]
    change(chain)
    path.write_bytes(encoded(tuple(chain)))
    with pytest.raises(ValueError, match=message):
        UnlearningLedger(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "`loss` must be one of"),
        ({"damping": "much"}, "`damping` must be of type float, got 'much'"),
        ({"draws": 1.5}, "`draws` must be of type"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message, tmp_path):
    made(tmp_path)
    path = tmp_path / "ledger.json"
    (creation,) = decoded(path.read_bytes())
    path.write_bytes(encoded(({**creation, "settings": {**creation["settings"], **settings}},)))
    with pytest.raises(ValueError, match=f"do not hold a ledger together.*{message}"):
        UnlearningLedger(tmp_path)


# The log


def test_each_entry_holds_the_hash_of_the_one_before(tmp_path):
    model, ledger = made(tmp_path)
    heads, deletions = [ledger.head], []
    for number in range(2):
        deletions.append(ledger.forget(model, request(number)))
        heads.append(ledger.head)
    chain = UnlearningLedger(tmp_path).chain
    assert [entry["previous"] for entry in chain] == [None, *heads[:2]]
    assert [entry_hash(entry) for entry in chain] == heads == [heads[0], *(each.hash for each in deletions)]
    lines = (tmp_path / "ledger.json").read_text().splitlines()
    assert [text.rstrip(",") for text in lines[4:-2]] == [line(entry) for entry in chain]
    for entry, deletion in zip(chain[1:], deletions):
        assert deletion.forgotten is not None and deletion.salt is not None
        assert entry["forgotten"] == commitment(deletion.salt, deletion.forgotten)
    # What is read from disk knows neither the hashes nor the salt.
    assert [(each.forgotten, each.salt) for each in ledger.requests] == 2 * [(None, None)]
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for deletion in deletions:
        for secret in (*(deletion.forgotten or ()), deletion.salt or ""):
            assert secret.encode() not in content and bytes.fromhex(secret) not in content


def test_a_step_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    from peft_ext.unlearning.ledger_state import LedgerState

    model, ledger = made(tmp_path)
    before = weights(model)
    monkeypatch.setattr(LedgerState, "weights_after", lambda self, remaining: self.weights * float("nan"))
    with pytest.raises(ValueError, match="The step is not finite"):
        ledger.forget(model, request(0))
    assert torch.equal(weights(model), before) and len(UnlearningLedger(tmp_path)) == 12
