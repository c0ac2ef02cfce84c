"""The command line: looks at saved adapters and networks, verifies them, and saves them in fewer bits or as LoRA.

It verifies unlearning ledgers too.

    peft-ext inspect FOLDER
    peft-ext verify FOLDER --base MODEL
    peft-ext quantize FOLDER OUT --dtype int4
    peft-ext export FOLDER OUT
    peft-ext ledger verify FOLDER

A folder of a checkpoint can also be the id of a repository on the hub, `user/name`; `--revision` names its branch, tag
or commit. `--json` prints one JSON object:

- inspect: what `peft_ext.adapters.inspection.inspect` returns;
- verify: `folder`, `identity`, `verified` (sentences) and `unexplained` (names of tensors that only `--base` explains);
- quantize: what `peft_ext.adapters.conversion.quantize` returns;
- export: what `peft_ext.to_lora` returns;
- ledger verify: what `peft_ext.unlearning.ledger_state.survey` returns, `verified` and `problems` (sentences) among it.

Exit codes: 0 fine; 1 the checkpoint or ledger fails verification, or cannot be exported as asked; 2 wrong arguments, or
a file or repository is missing. What is wrong is one line on stderr, and one each for all problems of a ledger.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .adapters.conversion import quantize
from .adapters.inspection import inspect, load_with_base
from .adapters.lora import to_lora
from .adapters.saved import read, unexplained, verify
from .checkpoint.identity import describe_shapes
from .checkpoint.quantization import DTYPES

FINE, REFUSED, WRONG = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        found = options.run(options)
    except ValueError as error:
        return _fail(error, REFUSED)
    except OSError as error:  # also what huggingface_hub raises
        return _fail(error, WRONG)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        options.show(found, Console(soft_wrap=True, highlight=False))
    for problem in found.get("problems", ()):
        _fail(ValueError(problem), REFUSED)
    return REFUSED if found.get("problems") else FINE


def _fail(error: Exception, code: int) -> int:
    print(f"peft-ext: {_visible(' '.join(str(error).split())) or type(error).__name__}", file=sys.stderr)
    return code


def _visible(text: str) -> str:
    """Text of strangers without what a terminal would obey."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def _plain(value: Any) -> str:
    """A value of strangers as text for rich."""
    return escape(_visible(str(value)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("peft-ext", description="Adapters and networks that are a seed and coefficients.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, show: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument("folder", help="of the checkpoint, or its id on the hub (user/name)")
        added.add_argument("--revision", help="branch, tag or commit on the hub")
        added.add_argument("--json", action="store_true", help="print one JSON object")
        added.set_defaults(run=run, show=show)
        return added

    command("inspect", _inspect, _show_inspected, "show method, options, size, and what would be drawn")
    verifying = command("verify", _verify, _show_verified, "verify all that can be verified without a model")
    verifying.add_argument("--base", help="load this base model too: a folder, or its id on the hub")
    quantizing = command("quantize", _quantize, _show_quantized, "save the coefficients in another type")
    quantizing.add_argument("out", help="folder to write to")
    quantizing.add_argument("--dtype", choices=DTYPES, required=True, help="what the coefficients are saved in")
    quantizing.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    exporting = command("export", _export, _show_exported, "write a LoRA adapter, which loads without peft_ext")
    exporting.add_argument("out", help="folder to write to")
    size = exporting.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="of dense updates (PRANC, and MCNC on whole weights)")
    size.add_argument("--error", type=float, help="wanted relative error of dense updates; 0 keeps them whole")
    exporting.add_argument(
        "--base", help="base model, of which the configuration is read: a folder, or its id on the hub"
    )
    exporting.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    ledgers = commands.add_parser("ledger", help="about unlearning ledgers").add_subparsers(
        required=True, metavar="COMMAND"
    )
    text = "verify checksums, log and state of an unlearning ledger, and that nothing of former states is left"
    checking = ledgers.add_parser("verify", help=text, description=text)
    checking.add_argument("folder", help="of the ledger")
    checking.add_argument("--head", help="hash of an entry that the log must hold, as it was published")
    checking.add_argument("--record", help="record of a request (JSON) that must fit the log")
    checking.add_argument("--json", action="store_true", help="print one JSON object")
    checking.set_defaults(run=_verify_ledger, show=_show_ledger)
    return parser


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    return inspect(read(options.folder, options.revision))


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    saved = read(options.folder, options.revision)
    if saved.is_network and options.base is not None:
        raise FileNotFoundError("--base: a network from a seed has no base model; leave it out.")
    verified = verify(saved)
    strangers = sorted(unexplained(saved))
    if options.base is not None:
        verified += load_with_base(saved, options.base)
        strangers = []
    return {
        "folder": options.folder,
        "identity": saved.identity["sha256"],
        "verified": verified,
        "unexplained": strangers,
    }


def _quantize(options: argparse.Namespace) -> dict[str, Any]:
    saved = read(options.folder, options.revision, complete=True)
    verify(saved)
    return quantize(saved, options.out, options.dtype, options.overwrite)


def _export(options: argparse.Namespace) -> dict[str, Any]:
    return to_lora(
        options.folder,
        options.out,
        rank=options.rank,
        error=options.error,
        base=options.base,
        revision=options.revision,
        overwrite=options.overwrite,
    )


def _verify_ledger(options: argparse.Namespace) -> dict[str, Any]:
    # With unlearning comes the Trainer, which the other commands do without.
    from .unlearning.evaluation.audit import problems_of
    from .unlearning.ledger_state import survey

    found = survey(Path(options.folder))
    if options.head is not None:
        held = [entry["hash"] for entry in found["entries"]]
        if options.head in held:
            found["verified"].append(f"The log holds {options.head}: it is entry {held.index(options.head)}.")
        else:
            found["problems"].append(f"the log does not hold {options.head}: it was rewritten, or is an older copy")
    if options.record is not None:
        record = json.loads(Path(options.record).read_text(encoding="utf-8"))
        problems = problems_of(record, found["chain"])
        found["problems"] += problems
        if not problems:
            found["verified"].append(f"The record fits request {record['number']} of the log.")
    return found


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(_plain(name), _plain(value))
    return table


def _show_inspected(found: dict[str, Any], console: Console) -> None:
    rows = [
        ("base model", found["base_model"] or "(not recorded)"),
        ("network", found["network"]),
        ("adapted", describe_shapes(found["modules"]) + " (out x in)"),
        ("names", ", ".join(found["names"])),
        ("coefficients", f"{found['coefficients']:,} in {found['coefficient_dtype']}"),
        ("bytes", f"{found['bytes']:,}"),
        ("identity", found["identity"]),
    ]
    mine = {"network"} if found["kind"] == "adapter" else {"base model", "adapted", "names"}
    rows = [row for row in rows if row[0] not in mine]
    console.print(_table(f"{found['method']} {found['kind']} in {_plain(found['folder'])}", rows))
    marked = [(f"{name} *" if name in found["generating"] else name, value) for name, value in found["options"].items()]
    console.print(_table("Options (* make the weights)", marked))
    drawn = Table(title="Drawn from the seed", title_justify="left")
    for column in ("what", "number", "frozen numbers", "bytes in memory"):
        drawn.add_column(column, justify="left" if column == "what" else "right")
    for row in found["drawn"]:
        drawn.add_row(row["what"], f"{row['number']:,}", f"{row['numbers']:,}", f"{row['memory']:,}")
    if found["drawn"]:
        console.print(drawn)
    if not found["drawn_exactly"]:
        console.print("Ranks differ between modules: the numbers drawn are those of an arbitrary order of the modules.")


def _show_verified(found: dict[str, Any], console: Console) -> None:
    for sentence in found["verified"]:
        console.print(_plain(sentence))
    for name in found["unexplained"]:
        console.print(
            _plain(f"Not verified: {name} is none of the adapter's; --base tells whether the base model has it.")
        )


def _show_quantized(found: dict[str, Any], console: Console) -> None:
    rows = [
        ("folder", found["folder"]),
        ("coefficients in", found["coefficient_dtype"]),
        ("bytes", f"{found['bytes']:,} (before: {found['bytes_before']:,})"),
        ("relative error", f"{found['error']:.2e}"),
    ]
    if found["not_copied"]:
        rows.append(("not copied", ", ".join(found["not_copied"])))
    console.print(_table("Saved", rows))


def _show_exported(found: dict[str, Any], console: Console) -> None:
    worst = f"; worst: {found['worst_error']:.2e}, {found['worst_module']}" if found["error"] else ""
    rows = [
        ("folder", found["folder"]),
        ("r, lora_alpha", f"{found['r']}, {found['lora_alpha']}"),
        ("modules", f"{len(found['modules']):,}"),
        ("bytes", f"{found['bytes']:,}"),
        ("relative error", f"{found['error']:.2e}{worst}" if found["error"] else "none, to rounding"),
    ]
    console.print(_table(f"LoRA of {found['method']}", rows))
    for note in found["notes"]:
        console.print(_plain(note))


def _show_ledger(found: dict[str, Any], console: Console) -> None:
    shown = Table(title=f"Ledger in {_plain(found['folder'])}", title_justify="left")
    for column in ("entry", "time", "forgotten", "remaining", "change", "hash begins"):
        shown.add_column(column, justify="left" if column in ("time", "hash begins") else "right")
    for number, entry in enumerate(found["entries"]):
        change = "-" if entry["shift"] is None else f"{entry['shift']:.4g}"
        numbers = (f"{entry['forgotten']:,}", f"{entry['remaining']:,}", change)
        shown.add_row(f"{number:,}", _plain(entry["time"]), *numbers, entry["hash"][:16])
    console.print(shown)
    console.print(f"Head: {found['head']}")
    for sentence in found["verified"] + found["shortfalls"]:
        console.print(_plain(sentence))


if __name__ == "__main__":
    sys.exit(main())
