"""The output folder of a run, and what is taken from it when it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.finetune_gpt2 import FinetuneGPT2, main
from recipes.support import runs
from recipes.support.arguments import UserError, parse_arguments
from recipes.support.runs import argument_types, check_output_dir, claim_output_dir, last_checkpoint

TYPES = argument_types(FinetuneGPT2)


def prepare(folder: Path, *argv: str) -> None:
    parsed = parse_arguments("finetune_gpt2", TYPES, ["--output_dir", str(folder), *argv])
    claim_output_dir(parsed[-1], check_output_dir(parsed[-1], parsed, parsed[4].overwrite_output_dir))


def test_output_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare(folder, "--max_steps", "3")
    finished = folder / "nola-seed0" / "result.json"
    state = folder / "lora-seed0" / "checkpoint-2" / "trainer_state.json"
    report = folder / "results.md"
    for file in (finished, state, report):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    with pytest.raises(UserError, match="not empty.*--overwrite_output_dir.*--resume_from_checkpoint"):
        prepare(folder, "--max_steps", "3")
    prepare(folder, "--max_steps", "3", "--resume_from_checkpoint", "true")
    with pytest.raises(UserError, match="max_steps = 3, now it is 4"):
        prepare(folder, "--max_steps", "4", "--resume_from_checkpoint", "true")
    with pytest.raises(UserError, match="the only value is true"):
        prepare(folder, "--max_steps", "3", "--resume_from_checkpoint", "checkpoint-2")
    assert finished.exists() and state.exists() and report.exists()
    prepare(folder, "--max_steps", "4", "--overwrite_output_dir")
    # Nothing of the overwritten run may be taken for finished or continued later.
    assert not finished.exists() and not state.exists() and not report.exists()
    assert json.loads((folder / "arguments.json").read_text())["max_steps"] == 4
    with pytest.raises(UserError, match="is a file"):
        prepare(folder / "arguments.json")


def test_a_run_goes_on_in_as_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "out")
    two = SimpleNamespace(num_processes=2, wait_for_everyone=lambda: None)
    monkeypatch.setattr(runs, "PartialState", lambda: two)
    with pytest.raises(UserError, match="started with num_processes = 1, now it is 2"):
        prepare(tmp_path / "out", "--resume_from_checkpoint", "true")


def test_arguments_of_the_trainer_that_would_not_do_what_they_say(flags: list[str], ends: Callable[..., str]) -> None:
    assert "seed is 7, but --seeds (0, 1) says" in ends([*flags, "--seeds", "0", "1", "--seed", "7"])
    for name in ("bf16_full_eval", "fp16_full_eval"):
        assert f"{name}: the Trainer would cast the model for good" in ends([*flags, f"--{name}", "true"])


def test_an_output_folder_that_cannot_be_written_ends_in_a_line(
    flags: list[str], ends: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert f"output_dir: {tmp_path / 'file'} is a file; name a folder" in ends(
        [*flags, "--output_dir", str(tmp_path / "file" / "below" / "it")]
    )
    assert "File name too long" in ends([*flags, "--output_dir", str(tmp_path / ("x" * 300))])

    def read_only(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(runs.tempfile, "TemporaryFile", read_only)
    said = ends([*flags, "--output_dir", str(tmp_path / "new")])
    assert f"output_dir: cannot write into {tmp_path / 'new'}: Permission denied; name another folder" in said
    assert not (tmp_path / "new").exists()


def test_an_output_folder_that_fails_when_it_is_claimed_ends_in_a_line(
    flags: list[str], ends: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_whole", full)
    assert "output_dir: cannot write into" in ends(flags)


METHODS = ["--methods", "{name: lora, r: 1, lora_dropout: 0.1}", "--save_total_limit", "3"]
FOLDER = "lora-r=1-lora_dropout=0.1-seed42"
RESUME = ["--resume_from_checkpoint", "true"]


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def cut(file: Path) -> None:
    """Leaves half of a file, as a full disk or a crash does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.json", "optimizer.pt"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    main([*flags, *METHODS])
    expected = results(out)
    (out / FOLDER / "result.json").unlink()
    cut(out / FOLDER / "checkpoint-6" / name)
    capsys.readouterr()
    main([*flags, *METHODS, *RESUME])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "Skipped the damaged checkpoint" in line]
    assert f"{FOLDER}/checkpoint-6 ({name}" in line and line.endswith("the run goes on from checkpoint-4")
    assert without_seconds(results(out)) == without_seconds(expected)
    assert last_checkpoint(out / FOLDER) == out / FOLDER / "checkpoint-6"


def test_without_a_whole_checkpoint_a_run_starts_from_the_beginning(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*flags, *METHODS])
    expected = results(out)
    (out / FOLDER / "result.json").unlink()
    (out / FOLDER / "checkpoint-2" / "adapter_model.safetensors").unlink()
    (out / FOLDER / "checkpoint-4" / "trainer_state.json").unlink()
    cut(out / FOLDER / "checkpoint-6" / "adapter_model.safetensors")
    capsys.readouterr()
    main([*flags, *METHODS, *RESUME])
    printed = capsys.readouterr().out
    for step, reason in ((2, "no weights"), (4, "no trainer_state.json"), (6, "adapter_model.safetensors")):
        (line,) = [line for line in printed.splitlines() if f"checkpoint-{step} (" in line]
        assert reason in line and line.endswith("the run starts from the beginning")
    assert without_seconds(results(out)) == without_seconds(expected)
    assert {path.name for path in (out / FOLDER).glob("damaged-*")} == {f"damaged-checkpoint-{n}" for n in (2, 4, 6)}


@pytest.mark.parametrize("content", ["{", "[1, 2]", "", '{"seed": 3}'])
def test_damaged_files_of_an_earlier_run_end_in_a_line(
    flags: list[str], ends: Callable[..., str], tmp_path: Path, content: str
) -> None:
    out = tmp_path / "out"
    arguments = [*flags, *METHODS, *RESUME, "--max_steps", "1"]
    main(arguments)
    (out / FOLDER / "result.json").write_text(content)
    said = ends(arguments)
    assert f"resume_from_checkpoint: {out / FOLDER} is damaged (" in said and "--overwrite_output_dir" in said
    (out / FOLDER / "result.json").unlink()
    (out / "arguments.json").write_text(content)
    said = ends(arguments)
    if content.startswith('{"'):
        assert "resume_from_checkpoint: the run in" in said
    else:
        assert f"resume_from_checkpoint: {out / 'arguments.json'} is damaged (" in said
