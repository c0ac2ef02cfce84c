"""Kills programs that write a ledger, lets two write at once, and changes its files: nothing is lost, damage is named.

    python -m benchmarks.ledger_survival

prints counts of outcomes, writes them to `benchmarks/results/ledger_survival.jsonl`, and fails if one is bad.

- Kills: a process creates a ledger and serves requests until SIGKILL ends it, at a random time, or before, in or after
  one of its file operations. Then the ledger must hold all that was acknowledged and at most the one request beyond it,
  give the very weights that an undisturbed run gives, go on from there, and keep no hash of what is forgotten.
- Pairs: two processes serve different requests, or the same one, or create a ledger in one folder, at the same time.
- Mutations: bit flips, cuts, edited fields, files of an older state. Opening must name the file; a whole older state,
  or a log rewritten with its checksum, must be named by `peft-ext ledger verify --head`.

It needs `os.fork`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from peft_ext.__main__ import main as command
from peft_ext.unlearning import UnlearningLedger
from peft_ext.unlearning.derivatives.data import sample_keys
from peft_ext.unlearning.ledger_chain import decoded, encoded
from peft_ext.unlearning.ledger_folder import FILE
from peft_ext.unlearning.ledger_lock import LOCK

SAMPLES, REQUESTS, EACH = 24, 6, 3
FORK = multiprocessing.get_context("fork")
Files = dict[str, bytes]


class Linear(nn.Module):
    """A linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return argparse.Namespace(logits=self.linear(pixel_values))


def loader(first: int = 0, last: int = SAMPLES) -> DataLoader:
    """Batches of some of the samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 8, generator=generator, dtype=torch.float64)
    rows = [{"pixel_values": row, "labels": torch.tensor(place % 3)} for place, row in enumerate(x)]
    return DataLoader(rows[first:last], batch_size=8)  # type: ignore[arg-type]


def request(number: int) -> DataLoader:
    """Batches of what one of the requests is to forget."""
    return loader(EACH * number, EACH * (number + 1))


KEYS = sample_keys(loader())


def weights(model: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def close(found: bytes, expected: bytes) -> bool:
    """Returns whether weights are equal but for the rounding that the order of requests makes."""
    first, second = (torch.frombuffer(bytearray(data), dtype=torch.float64) for data in (found, expected))
    return torch.allclose(first, second, rtol=1e-12, atol=1e-12)


def create(folder: Path, model: nn.Module) -> UnlearningLedger:
    return UnlearningLedger.create(folder, model, loader(), damping=0.1)


def undisturbed() -> list[bytes]:
    """The weights after as many requests."""
    with tempfile.TemporaryDirectory() as folder:
        model = Linear()
        ledger = create(Path(folder), model)
        found = [weights(model)]
        for number in range(REQUESTS):
            ledger.forget(model, request(number))
            found.append(weights(model))
    return found


# Kills


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(operation: int, moment: str) -> list[int]:
    """Has this process killed at one of its file operations, before it, in it or after it, and counts them down."""
    left = [operation]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0] and moment == "before":
                die()
            result = function(*arguments, **options)
            if not left[0] and moment == "in" and hasattr(result, "writable") and result.writable():
                result.write(os.urandom(100))  # a file that is not finished
                result.flush()
            if not left[0]:
                die()
            return result

        return call

    for place, names in ((os, ("replace", "fsync")), (Path, ("unlink", "open", "mkdir"))):
        for name in names:
            setattr(place, name, watched(getattr(place, name)))
    return left


def serve(folder: Path, told: int, operation: int, moment: str) -> None:
    """Creates a ledger and serves all requests, each by a new holder, and tells a pipe what is done."""
    if moment != "time":
        die_at(operation, moment)
    model = Linear()
    create(folder, model)
    os.write(told, b".")
    for number in range(REQUESTS):
        UnlearningLedger(folder).forget(model, request(number))
        os.write(told, b".")


def count_operations(told: Any) -> None:
    """Tells how many file operations `serve` has."""
    left = die_at(0, "never")
    with tempfile.TemporaryDirectory() as folder:
        serve(Path(folder), os.open(os.devnull, os.O_WRONLY), 0, "time")
        told.send(-left[0])


def killed(folder: Path, chance: random.Random, seconds: float, operations: int) -> tuple[str, int]:
    """Starts a process, kills it at random, and returns how, and how much it had acknowledged."""
    reading, writing = os.pipe()
    moment = chance.choice(["time", "before", "in", "after"])
    operation = chance.randint(1, operations)
    process = FORK.Process(target=serve, args=(folder, writing, operation, moment))
    process.start()
    if moment == "time":
        time.sleep(chance.uniform(0, seconds))
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        done = len(pipe.read())
    return ("at a time" if moment == "time" else f"{moment} a file operation") if process.exitcode else "not hit", done


def survived(folder: Path, done: int, expected: list[bytes]) -> str:
    """Returns what a ledger is found to be after a kill, `"before"` or `"after"`, or what is wrong with it."""
    model = Linear()
    if not (folder / FILE).exists():
        if done:
            return "lost"
        create(folder, model)
        return "before" if weights(model) == expected[0] and tidy(folder, 0) else "wrong after another creation"
    ledger = UnlearningLedger(folder)
    served = len(ledger.requests)
    ledger.restore(model)
    if served + 1 not in (done, done + 1) or len(ledger) != SAMPLES - EACH * served:
        return f"{done} acknowledged, {served} requests and {len(ledger)} samples found"
    if weights(model) != expected[served] or not tidy(folder, served):
        return "wrong weights, or hashes that should be gone"
    if served < REQUESTS:
        ledger.forget(model, request(served))
        if weights(model) != expected[served + 1] or not tidy(folder, served + 1):
            return "wrong after the next request"
    return "before" if served + 1 == done else "after"


def tidy(folder: Path, served: int) -> bool:
    """Returns whether a folder holds the files of one state, and no hash of what was forgotten."""
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    gone = KEYS[: EACH * served]
    clean = not any(bytes.fromhex(key) in content or key.encode() in content for key in gone)
    return clean and {path.name for path in folder.iterdir()} == {FILE, LOCK, f"state-{served:06d}.safetensors"}


def kills(number: int, seed: int) -> Iterator[tuple[str, str, bool]]:
    """Yields how a process was killed, what was found, and whether that is right."""
    chance, expected, start = random.Random(seed), undisturbed(), time.perf_counter()
    reading, writing = FORK.Pipe(duplex=False)
    FORK.Process(target=count_operations, args=(writing,)).start()
    operations, seconds = reading.recv(), time.perf_counter() - start
    while number:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "ledger"
            how, done = killed(folder, chance, seconds, operations)
            if how == "not hit":  # it was done before
                continue
            found = survived(folder, done, expected)
        number -= 1
        yield f"killed {how}", found, found in ("before", "after")


# Pairs


def take_part(kind: str, folder: Path, place: int, barrier: Any, told: Any) -> None:
    """Is one of two processes, and tells what it was told."""
    model = Linear()
    try:
        if kind == "two creations":
            barrier.wait()
            create(folder, model)
        else:
            ledger = UnlearningLedger(folder)
            barrier.wait()
            ledger.forget(model, request(place if kind == "two requests" else 0))
        told.send(("ok", weights(model)))
    except Exception as error:
        told.send((str(error), weights(model)))


def pair(kind: str, folder: Path, expected: list[bytes]) -> str:
    """Returns what came of two processes at once, `"right"` or what is wrong."""
    if kind != "two creations":
        create(folder, Linear())
    barrier, pipes = FORK.Barrier(2), [FORK.Pipe(duplex=False) for _ in range(2)]
    processes = [
        FORK.Process(target=take_part, args=(kind, folder, place, barrier, pipes[place][1])) for place in range(2)
    ]
    for process in processes:
        process.start()
    told = [reading.recv() for reading, _ in pipes]
    for process in processes:
        process.join()
    ledger, model = UnlearningLedger(folder), Linear()
    ledger.restore(model)
    served = {"two creations": 0, "two requests": 2, "one request twice": 1}[kind]
    good = (len(ledger.requests), len(ledger)) == (served, SAMPLES - EACH * served)
    good &= close(weights(model), expected[served])
    good &= {path.name for path in folder.iterdir()} == {FILE, LOCK, f"state-{served:06d}.safetensors"}
    messages = sorted(text for text, _ in told)
    if kind == "two requests":
        good &= messages == ["ok", "ok"] and any(close(found, expected[2]) for _, found in told)
    else:
        refusal = "There is a ledger" if kind == "two creations" else "never learned, or are forgotten already"
        good &= messages.count("ok") == 1 and any(refusal in text for text in messages)
        good &= all(found == expected[served if text == "ok" else 0] for text, found in told)
    return "right" if good else f"wrong: {messages}, {len(ledger.requests)} requests, {len(ledger)} samples"


PAIRS = ("two requests", "one request twice", "two creations")


def pairs(number: int) -> Iterator[tuple[str, str, bool]]:
    """Yields what two processes did at once, what came of it, and whether that is right."""
    expected = undisturbed()
    for kind in PAIRS:
        for _ in range(number):
            with tempfile.TemporaryDirectory() as temporary:
                found = pair(kind, Path(temporary), expected)
            yield kind, found, found == "right"


# Mutations


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def history(folder: Path) -> list[Files]:
    """The files of a ledger after its creation, after one request and after two."""
    model = Linear()
    ledger = create(folder, model)
    found = [contents(folder)]
    for number in range(2):
        ledger.forget(model, request(number))
        found.append(contents(folder))
    return found


def changed_bytes(files: Files, chance: random.Random, older: list[Files]) -> None:
    name = chance.choice(list(files))
    data = bytearray(files[name])
    kind, place = chance.choice(["flip", "cut", "add", "remove", "zero", "swap"]), chance.randrange(len(data))
    end = min(len(data), place + chance.randint(1, 40))
    if kind == "flip":
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "add":
        data[place:place] = os.urandom(end - place)
    elif kind == "remove":
        del data[place:end]
    elif kind == "zero":
        data[place:end] = bytes(end - place)
    else:
        data[place:end], data[-(end - place) :] = data[-(end - place) :], data[place:end]
    files[name] = bytes(data)


def other_value(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bool) or value is None:
        return chance.choice([0, "x", 1.5])
    if isinstance(value, (int, float)):
        return chance.choice([value + 1, -value - 1, 2 * value + 0.5, 0, str(value), None, 1e300])
    if isinstance(value, str):
        return chance.choice([value + "0", value[::-1], "", 7, None])
    return chance.choice([[], {}, None])


def edited(value: Any, chance: random.Random) -> None:
    """Changes one field of what JSON held, at any depth, or takes it away."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], (dict, list)) or not value[key] or chance.random() < 0.1:
            break
        value = value[key]
    if chance.random() < 0.15:
        del value[key]
    else:
        value[key] = other_value(value[key], chance)


def edited_field(files: Files, chance: random.Random, older: list[Files]) -> None:
    record = json.loads(files[FILE])
    edited(record, chance)
    layout: Any = chance.choice([{"indent": 1}, {"separators": (",", ":")}, {}])
    files[FILE] = json.dumps(record, **layout).encode()


def edited_in_place(files: Files, chance: random.Random, older: list[Files]) -> None:
    """Changes a field and leaves all other bytes, the checksum among them."""
    chain = copy.deepcopy(decoded(files[FILE]))
    edited(chain[chance.randrange(len(chain))], chance)
    data = bytearray(encoded(chain))
    data[: data.index(b"\n", 2)] = files[FILE][: files[FILE].index(b"\n", 2)]
    files[FILE] = bytes(data)


def other_layout(files: Files, chance: random.Random, older: list[Files]) -> None:
    files[FILE] = json.dumps(json.loads(files[FILE]), indent=chance.randint(1, 8)).encode()


def older_file(files: Files, chance: random.Random, older: list[Files]) -> None:
    """Puts one file of an older state in the place of the newest."""
    from_then = chance.choice(older)
    if chance.random() < 0.5:
        files[FILE] = from_then[FILE]
    else:
        state = next(name for name in files if name != FILE)
        files[state] = next(data for name, data in from_then.items() if name != FILE)


def missing_file(files: Files, chance: random.Random, older: list[Files]) -> None:
    name = chance.choice(list(files))
    if chance.random() < 0.5:
        del files[name]
    else:
        files[name] = b""


def older_ledger(files: Files, chance: random.Random, older: list[Files]) -> None:
    """Puts back a whole older ledger, as from a backup."""
    files.clear()
    files.update(chance.choice(older))


def rewritten(files: Files, chance: random.Random, older: list[Files]) -> None:
    """Changes a field and makes the checksum anew, as one does who wants to deceive."""
    chain = copy.deepcopy(decoded(files[FILE]))
    edited(chain[chance.randrange(len(chain))], chance)
    files[FILE] = encoded(chain)


MUTATIONS: dict[str, Callable[[Files, random.Random, list[Files]], None]] = {
    "bytes": changed_bytes,
    "bytes of either file": changed_bytes,  # more often than the others
    "field of the JSON file": edited_field,
    "field, other bytes kept": edited_in_place,
    "layout of the JSON file": other_layout,
    "a file of an older state": older_file,
    "a file missing or empty": missing_file,
    "a whole older ledger": older_ledger,
    "field and checksum": rewritten,
}
DECEIT = ("a whole older ledger", "field and checksum")


def noticed(folder: Path, head: str, kind: str) -> str:
    """Returns how a changed ledger is noticed: `"named"`, or `"named by the head"`; or `"silent"`, or an error."""
    try:
        UnlearningLedger(folder)
    except ValueError as error:
        return "named" if str(folder) in str(error) else f"named without the file: {error}"
    except Exception as error:
        return f"crash: {error!r}"
    if kind not in DECEIT:
        return "silent"
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = command(["ledger", "verify", str(folder), "--head", head])
    return "named by the head" if code == 1 and head in told.getvalue() else "silent"


def mutations(number: int, seed: int) -> Iterator[tuple[str, str, bool]]:
    """Yields how files were changed, how that was noticed, and whether it was."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "ledger"
        *older, newest = history(folder)
        head = UnlearningLedger(folder).head
        while number:
            kind, files = chance.choice(list(MUTATIONS)), dict(newest)
            MUTATIONS[kind](files, chance, older)
            if files == newest:
                continue
            shutil.rmtree(folder)
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            found = noticed(folder, head, kind)
            number -= 1
            yield f"changed: {kind}", found, found in ("named", "named by the head")


def main(arguments: list[str] | None = None) -> int:
    """Runs what the flags say, and returns 1 if something was bad."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=100, help="for each of three things that two processes do")
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ledger_survival.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    bad = 0
    for runs in (
        kills(options.kills, options.seed),
        pairs(options.pairs),
        mutations(options.mutations, options.seed),
    ):
        for what, found, right in runs:
            counts.setdefault(what, Counter())[found] += 1
            if not right:
                bad += 1
                print(f"{what}: {found}", file=sys.stderr, flush=True)
    for what, count in counts.items():
        print(f"{what:34}" + ", ".join(f"{found} {times}" for found, times in sorted(count.items())))
    print(f"{bad} bad")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"what": what, **count}) for what, count in counts.items()]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
