"""Soups in the recipe for images, and their benchmarks, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from benchmarks import __main__ as entry
from benchmarks import lines, soup, soup_memory
from peft_ext.adapters.soup import Soup
from recipes.finetune_vit import main
from recipes.support.arguments import UserError
from recipes.tasks import soups, training

METHODS = ["--methods", "{name: nola, r: 4, num_basis: 16}", "head"]
KINDS = ["best single", "uniform soup", "greedy soup", "learned soup", "learned soup by layer"]


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def test_soups_of_all_seeds_and_rates(vit_flags: list[str], vit_folder: Path, tmp_path: Path) -> None:
    methods = ["--methods", METHODS[1], "{name: mcnc, r: 2, k: 2, d: 20}"]
    soup = "--soup --seeds 5 6 --soup_rates 3e-2 --shots 3 --soup_shots 2 --max_steps 3".split()
    main([*vit_flags, *methods, *soup])
    out, label = tmp_path / "out", "nola r=4 num_basis=16"
    rows = {row["label"]: row for row in results(out)}
    trained = [f"{name} rate=0.03" for name in (label, "mcnc r=2 k=2 d=20")]
    assert list(rows) == [*trained, *(f"{label}, {kind}" for kind in KINDS)]
    runs = [row for row in results(out) if row["label"] == trained[0]]
    for kind in KINDS:
        row = rows[f"{label}, {kind}"]
        assert row["trainable_parameters"] == 99 + 128 and row["head_parameters"] == 99
        assert row["adapter_bytes"] == pytest.approx(runs[0]["adapter_bytes"], abs=64)
    best = rows[f"{label}, best single"]["validation_loss"]
    assert min(abs(best - row["validation_loss"]) for row in runs) < 1e-5

    def tensors(folder: str) -> dict[str, torch.Tensor]:
        found = load_file(out / f"nola-r=4-num_basis=16-{folder}" / "adapter" / "adapter_model.safetensors")
        return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}

    singles = [tensors(f"rate=0.03-data0-seed{seed}") for seed in (5, 6)]
    uniform = tensors("uniform-soup-data0")
    assert len(uniform) == 4 + 2
    for name, tensor in uniform.items():
        torch.testing.assert_close(tensor, torch.stack([single[name] for single in singles]).mean(0))
    assert all(rows[f"{label}, {kind}"]["seed"] == 5 for kind in KINDS)  # of the frozen numbers
    made = json.loads((out / "nola-r=4-num_basis=16-learned-soup-data0" / "soup.json").read_text())
    assert made["adapters"] == [f"nola-r=4-num_basis=16-rate=0.03-data0-seed{seed}" for seed in (5, 6)]
    assert made["loss"] <= min(made["losses"]) and all(
        sum(each) == pytest.approx(1) for each in made["coefficients"].values()
    )
    text = (out / "results.md").read_text()
    assert "Soups are of 2 adapters." in text and "on 2 images a class" in text
    assert "No soup of mcnc r=2 k=2 d=20: Coefficients of MCNC cannot be combined" in text


def test_soups_that_cannot_be_made(vit_flags: list[str], vit_refused: Callable[[list[str]], str]) -> None:
    several = ["--seeds", "0", "1"]
    assert "there is one run" in vit_refused([*vit_flags, *METHODS, "--soup"])
    assert "no use without --soup" in vit_refused([*vit_flags, *METHODS, "--soup_rates", "1e-2"])
    assert "soup_shots has no use without --soup" in vit_refused([*vit_flags, *METHODS, "--soup_shots", "3"])
    assert "1e-2, 1e-2: one is there twice" in vit_refused(
        [*vit_flags, *METHODS, "--soup", "--soup_rates", "1e-2", "1e-2"]
    ).replace("0.01", "1e-2")
    assert "must be positive" in vit_refused([*vit_flags, *METHODS, "--soup", "--soup_rates", "0", "1e-2"])
    assert "soup_shots is 0" in vit_refused([*vit_flags, *METHODS, *several, "--soup", "--soup_shots", "0"])
    mcnc = ["--methods", "{name: mcnc, k: 2, d: 20}"]
    assert "phi is not linear" in vit_refused([*vit_flags, *mcnc, *several, "--soup"])
    assert "3 samples of every class cannot be held out beside 4" in vit_refused(
        [*vit_flags, *METHODS, *several, "--soup", "--soup_shots", "3"]
    )
    place = vit_flags.index("--shots")
    without = [*vit_flags[:place], *vit_flags[place + 2 :]]
    assert "shots: give it" in vit_refused([*without, *METHODS, *several, "--soup", "--soup_shots", "1"])


@pytest.fixture
def measured(vit_folder: Path, image_folder: Path, tmp_path: Path) -> list[str]:
    """A short run of the benchmark."""
    text = (
        f"--model_name_or_path {vit_folder} --dataset_name {image_folder} --adapters {tmp_path / 'adapters'} --output "
        f"{tmp_path} --image_size 16 --epochs 1 --shots 3 --held_out 2 --seeds 0 1 2 --rates 2e-2 --data_seeds 0"
    )
    return [*text.split(), "--methods", "{name: nola, label: NOLA, r: 2, num_basis: 8}"]


def test_the_benchmark_goes_on_where_it_was(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed: list[tuple[str, list[str]]] = []

    def make(kind: str, real: Callable[..., Soup]) -> Callable[..., Soup]:
        def work(model: Any, adapters: list[Path], loader: Any) -> Soup:
            mixed.append((kind, [place.parent.name for place in adapters]))
            return real(model, adapters, loader)

        return work

    for kind, real in list(soups.KINDS.items()):
        monkeypatch.setitem(soups.KINDS, kind, make(kind, real))
    soup.main(measured)
    rows = lines.read(tmp_path / "soup.jsonl")
    assert [row["kind"] for row in rows] == [soup.SINGLES, *KINDS, *KINDS]
    assert [row["pool"] for row in rows] == ["all"] * 6 + ["worse half"] * 5
    singles = rows[0]["singles"]
    order = sorted(singles, key=lambda name: singles[name]["held_out_loss"])
    assert mixed == [(kind, names) for names in (order, order[1:]) for kind in KINDS]
    assert rows[0]["accuracy"] == pytest.approx(sum(run["accuracy"] for run in singles.values()) / 3)
    for row, name in ((rows[1], order[0]), (rows[6], order[1])):
        assert row["loss"] == pytest.approx(singles[name]["loss"], abs=1e-5)
    assert str(tmp_path) not in rows[1]["command"]

    file = tmp_path / "soup.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-1]))
    monkeypatch.setattr(training, "make_trainer", None)  # adapters are there
    soup.main(measured)
    assert len(mixed) == 11 and lines.read(file)[-1]["loss"] == rows[-1]["loss"]
    monkeypatch.setattr(soup, "mix", None)
    soup.main(measured)
    assert len(lines.read(file)) == 11
    entry.main(["report", "soup", "--results", str(tmp_path), "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "worse half" in shown and f"{rows[1]['loss']:.3f}" in shown
    with pytest.raises(UserError, match="methods: mcnc cannot be mixed: .* phi is not linear"):
        soup.main([*measured, "{name: mcnc}"])


def test_memory_is_that_of_a_few_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are those of processes, which are not started here; what each would do is done."""
    monkeypatch.setattr(soup_memory, "load_model", lambda arguments: tiny_models.llama())
    started: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        started.append(command)
        (args,) = soup_memory.HfArgumentParser([soup_memory.Arguments]).parse_args_into_dataclasses(command[3:])
        return type("Run", (), {"stdout": f"{soup_memory.growth(args)}".encode()})

    monkeypatch.setattr(soup_memory.subprocess, "run", run)
    given = ["--numbers", "3", "--output", str(tmp_path)]
    soup_memory.main(given)
    soup_memory.main(given)
    rows = lines.read(tmp_path / "soup_memory.jsonl")
    assert len(started) == len(rows) == 4 and all(row["grown_bytes"] >= 0 < row["adapter_bytes"] for row in rows)
    assert [(row["way"], row["adapters"]) for row in rows[:2]] == [("soup", 3), ("held", 3)]
    entry.main(["report", "soup_memory", "--results", str(tmp_path), "--output", str(tmp_path)])
