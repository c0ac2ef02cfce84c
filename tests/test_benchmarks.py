"""The benchmarks' entry: what it lists, runs and reports, and that the figures which the text names are there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import tiny_models
import torch
from peft import get_peft_model
from torch import nn

from benchmarks import __main__ as entry
from benchmarks import catalog, flat, lines, many_adapters, mixed_batch, quantization, scaling, step_time, timing
from benchmarks.models import generator_bytes
from benchmarks.quality import __main__ as quality
from benchmarks.quality import learning_rates, runs
from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.report import report_rates
from benchmarks.quality.summary import Point, by_budget, chosen, front, latest
from benchmarks.quality.task import QualityTask, Sources
from peft_ext import McncConfig
from recipes.support.arguments import UserError
from recipes.support.inputs import ModelArguments
from recipes.tasks.base import Task

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.query(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class TinyTask(Task):
    head = ("head",)
    dataset = "random numbers"

    def fresh_model(self) -> nn.Module:
        torch.manual_seed(0)
        return TinyModel()

    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
        rows = [{"x": row, "labels": row[:3].argmax()} for row in x]
        accuracy = lambda found: {"accuracy": 100.0 * (found.predictions.argmax(-1) == found.label_ids).mean()}  # noqa: E731
        collator = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
        return {
            "train_dataset": rows[:16],
            "eval_dataset": rows[16:],
            "data_collator": collator,
            "compute_metrics": accuracy,
        }

    def score(self, model, evaluation, result):
        raise AssertionError("the benchmarks read the Trainer's metrics")

    def probes(self):
        raise AssertionError("the benchmarks compare no processes")


class Tiny(QualityTask):
    name, title, targets, steps, batch_size, metric = "tiny", "Random numbers", ("query",), 4, 4, "accuracy"

    def load(self, training):
        return TinyTask(ModelArguments(), None, training)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, float, int]]:
    """The trainings that are done, on a tiny task beside the others."""
    done = []

    def measure(task, method, rate, seed, dtypes=()):
        done.append((method.label, rate, seed))
        return real(task, method, rate, seed, dtypes)

    real = runs.measure
    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setitem(runs.TASKS, "tiny", Tiny)
    return done


NOLA = "{name: nola, r: 2, num_basis: 8, label: NOLA 8}"
LORA = "{name: lora, r: 2, label: LoRA tiny, init_lora_weights: false}"


def flags(folder: Path, *more: str) -> list[str]:
    return ["--tasks", "tiny", "--output", str(folder), *more]


def test_learning_rates_go_on_where_they_were_and_say_where_they_diverged(tmp_path, measured, monkeypatch, capsys):
    tmp_path = tmp_path / "new"
    given = flags(tmp_path, "--methods", "head alone", NOLA, LORA, "--rates", "1e-2", "1e30")
    learning_rates.main(given)
    rows = lines.read(tmp_path / "learning_rates.jsonl")
    assert len(measured) == len(rows) == 6
    found = {(row["method"], row["rate"]): row for row in rows}
    row = found["NOLA 8", 1e-2]
    assert row["coefficients"] == 16 and row["saved"]["float32"]["bytes"] >= 64
    assert math.isfinite(row["loss"]) and 0 <= row["score"] <= 100 and row["options"] == {"r": 2, "num_basis": 8}
    assert row["versions"].keys() == {"torch", "transformers", "peft", "peft_ext"}
    assert str(tmp_path) not in row["command"] and "learning_rates --tasks tiny" in row["command"]
    lost = found["LoRA tiny", 1e30]
    assert lost["loss"] is None and lost["score"] is None and 2 <= lost["diverged_at"] <= 4
    # The head has a rate of its own: the searched one changes nothing where there is no adapter.
    assert found["head alone", 1e-2]["loss"] == found["head alone", 1e30]["loss"]
    assert found["head alone", 1e-2]["coefficients"] == found["head alone", 1e-2]["saved"]["float32"]["bytes"] == 0

    learning_rates.main(given)
    assert len(measured) == 6
    for more in (["--seeds", "1"], ["--steps", "2"]):
        learning_rates.main(flags(tmp_path, "--methods", NOLA, "--rates", "1e-2", *more))
    learning_rates.main(flags(tmp_path, "--methods", NOLA.replace("r: 2", "r: 3"), "--rates", "1e-2"))
    assert len(measured) == 9

    monkeypatch.setattr(runs, "measure", None)  # a report trains nothing
    (tmp_path / "learning_rates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry.main(["report", "learning_rates", "--results", str(tmp_path), "--output", str(tmp_path / "plots")])
    shown = capsys.readouterr().out
    assert "Random numbers" in shown and "diverged" in shown and f"{row['loss']:.3f}" in shown
    assert (tmp_path / "plots" / "learning-rates-tiny.png").stat().st_size > 1000
    one_rate = [row for row in rows if row["rate"] == 1e-2]  # all of these have no curve but a point
    assert report_rates(one_rate, tmp_path)[1] == ["learning-rates-tiny.png"]
    assert (tmp_path / "learning-rates-tiny.png").stat().st_size > 1000


def test_quality_takes_the_best_rate_to_other_seeds(tmp_path, measured, capsys):
    given = flags(tmp_path, "--methods", NOLA, "--rates", "1e-6", "1e-1", "--seeds", "1", "2")
    quality.main(given)
    searched: dict[float, list[float]] = {}
    for row in lines.read(tmp_path / "learning_rates.jsonl"):
        searched.setdefault(row["rate"], []).append(row["loss"])
    best = min(searched, key=lambda rate: mean(searched[rate]))
    tried = [("NOLA 8", rate, seed) for rate in searched for seed in (0, 4)]
    assert measured == [*tried, ("NOLA 8", best, 1), ("NOLA 8", best, 2)] and list(searched)[:2] == [1e-6, 1e-1]
    quality.main(given)
    assert len(measured) == len(tried) + 2
    row = lines.read(tmp_path / "quality.jsonl")[0]
    assert row["search"] == {"seeds": [0, 4], "rates": sorted(searched)}
    sizes = [row["saved"][dtype]["bytes"] for dtype in ("float32", "int8", "int4")]
    assert len(set(sizes)) == 3 and math.isfinite(row["saved"]["int4"]["loss"])
    entry.main(["report", "quality", "--results", str(tmp_path), "--output", str(tmp_path / "plots")])
    shown = capsys.readouterr().out
    assert "int4" in shown and "end of grid" in shown
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "quality-tiny-loss.png",
        "quality-tiny-accuracy.png",
    }
    with pytest.raises(UserError, match="search_seeds: 4 is one of --seeds"):
        quality.main(flags(tmp_path, "--seeds", "4", "1"))
    # A wider search that chooses the same rate measures nothing again, and its choice is the one that counts.
    quality.main([*given, "--search_seeds", "0"])
    rows, _ = chosen(lines.read(tmp_path / "quality.jsonl"))
    assert len(measured) == len(tried) + 2
    assert [(each["seed"], each["search"]["seeds"], each["loss"]) for each in rows] == [
        (seed, [0], each["loss"]) for seed, each in zip((1, 2), lines.read(tmp_path / "quality.jsonl"))
    ]


@pytest.mark.parametrize(
    ("best", "tried", "found"),
    [
        (3e-3, [1e-3, 3e-3, 1e-2], 3e-3),
        (3e-1, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], 3e-1),  # it goes on until losses rise
        (1e-4, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2], 1e-4),
        (99.0, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0], 30.0),  # the end of the ladder
    ],
)
def test_search_goes_on_where_the_best_rate_is_at_an_end(tmp_path, monkeypatch, best, tried, found):
    monkeypatch.setitem(runs.TASKS, "tiny", Tiny)
    distance = lambda task, method, rate, seed, dtypes: {"loss": abs(math.log(rate / best)), "seconds": 0}  # noqa: E731
    monkeypatch.setattr(runs, "measure", distance)
    (task,), (contestant,) = runs.load(runs.RunArguments(tasks=["tiny"], methods=[LORA]), Sources())
    rate, rates = quality.search(task, contestant, [1e-3, 3e-3, 1e-2], [0], tmp_path / "known.jsonl", ["x"])
    assert (rate, rates) == (found, tried)


@pytest.mark.parametrize(("loss", "found"), [(None, None), (0.5, 1e-3)])
def test_search_ends_where_all_rates_are_alike(tmp_path, monkeypatch, loss, found):
    monkeypatch.setitem(runs.TASKS, "tiny", Tiny)
    monkeypatch.setattr(runs, "measure", lambda *args: {"loss": loss, "seconds": 0, "diverged_at": None if loss else 3})
    (task,), (contestant,) = runs.load(runs.RunArguments(tasks=["tiny"], methods=[LORA]), Sources())
    rate, rates = quality.search(task, contestant, [1e-3, 1e-2], [0, 1], tmp_path / "known.jsonl", ["x"])
    assert rates == [1e-3, 1e-2] and rate == found


def test_flat_training_is_measured_in_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(runs.TASKS, "tiny", Tiny)
    given = flags(tmp_path, "--methods", LORA, "--rates", "1e-2", "--sigmas", "0.8", "--pairs", "2", "--draws", "2")
    flat.main(given)
    rows = lines.read(tmp_path / "flat.jsonl")
    assert [(row["seed"], row["sigma"]) for row in rows] == [(0, 0), (0, 0.8), (1, 0), (1, 0.8)]
    plain, noisy = rows[:2]
    assert plain["loss"] != noisy["loss"] and [each["sigma"] for each in plain["noise"]] == [0.8]
    assert plain["noise"][0]["loss"] != plain["loss"] and plain["loss"] != rows[2]["loss"]
    check_provenance(plain, "flat", tmp_path)
    monkeypatch.setattr(flat, "measure", None)  # what is there is not measured again
    flat.main(given)
    entry.main(["report", "flat", "--results", str(tmp_path), "--output", str(tmp_path / "plots")])
    shown = " ".join(capsys.readouterr().out.split())
    means = [sum(row["loss"] for row in rows if row["sigma"] == sigma) / 2 for sigma in (0, 0.8)]
    assert "flat minus plain" in shown and f"{means[0]:.3f} ±" in shown and f"{means[1] - means[0]:.3f} ±" in shown
    with pytest.raises(UserError, match="sizes of noise are above 0"):
        flat.main(flags(tmp_path, "--sigmas", "0"))


def point(label: str, size: int, loss: float | None) -> Point:
    return Point(label, "m", "float32", size, {"loss": [loss], "score": [None if loss is None else -loss]})


def test_the_front_has_what_nothing_smaller_beats():
    found = [point("a", 10, 3.0), point("b", 20, 3.5), point("c", 30, 2.0), point("d", 30, 1.5), point("e", 40, None)]
    assert [each.label for each in front(found, "loss")] == ["a", "d"]
    assert [each.label for each in front(found, "score")] == ["a", "d"]
    assert found[-1].diverged() == 1


def test_lines_of_old_defaults_are_left_out_and_other_budgets_are_apart():
    row = {"task": "t", "method": "m", "config": "new", "budget": {"steps": 5, "head_rate": 0.1}}
    other = {**row, "budget": {"steps": 1, "head_rate": 0.1}}
    third = {**row, "budget": {"steps": 5, "head_rate": 0.2}}
    rows = [{**row, "config": "old"}, other, {**row, "method": "n", "config": "x"}, row, {**row, "task": "u"}]
    found = by_budget([*rows, other, third])  # the last line's budget is not the one with most lines
    assert {name: len(group) for name, group in found.items()} == {"t": 3, "t-steps-1": 2, "t-head_rate-0.2": 1, "u": 1}
    assert latest(found["t"]) == ([rows[2], rows[3]], 1)


def test_a_head_alone_is_no_contestant_where_there_is_none(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(TinyTask, "head", ())
    for program in (learning_rates, quality):
        program.main(flags(tmp_path, "--methods", "head alone"))
    assert measured == []


def test_what_does_not_exist_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'step_time'"):
        entry.main(["run", "steptime"])
    with pytest.raises(UserError, match="there are no results of quality"):
        entry.main(["report", "quality", "--results", str(tmp_path)])
    with pytest.raises(UserError, match="there is no 'NOLA 145'; there are .*; did you mean 'NOLA 144'"):
        learning_rates.main(["--methods", "NOLA 145"])
    with pytest.raises(UserError, match="the task sst2 needs --sst2_model: all-MiniLM-L6-v2"):
        learning_rates.main(["--tasks", "sst2"])
    with pytest.raises(UserError, match="rates: they must be positive"):
        learning_rates.main(["--rates", "0"])
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match="line 2 of .* is no JSON .*; delete the line"):
        lines.read(tmp_path / "broken.jsonl")


# Times

LINE = {"versions": {"torch", "transformers", "peft", "peft_ext"}, "machine": {"processor", "threads"}}


def check_provenance(row: dict[str, Any], name: str, folder: Path) -> None:
    """A line says how it was measured, without the folders of this machine."""
    assert {key: set(row[key]) for key in LINE} == LINE
    assert row["command"].startswith(f"python -m benchmarks run {name} ") and str(folder) not in row["command"]


def test_pairs_alternate_and_the_first_is_no_measurement(monkeypatch):
    clocks = {"baseline": (2.0, 1.0), "candidate": iter([(99.0, 99.0), *((2.0 + n, 4.0 - n / 2) for n in range(7))])}
    order = []

    def seconds(work):
        order.append(work)
        found = clocks[work]
        return found if isinstance(found, tuple) else next(found)

    monkeypatch.setattr(timing, "seconds", seconds)
    found = timing.compare("step", "baseline", "candidate", 7)
    assert found == {
        "step_seconds": 5.0,
        "step_ratio": 2.5,
        "step_ratio_quartiles": [1.75, 3.25],
        "step_processor_ratio": 2.5,
        "step_processor_ratio_quartiles": [1.75, 3.25],
    }
    assert order == ["candidate", "baseline", "baseline", "candidate"] * 4


def test_step_time_measures_what_has_no_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "load_model", lambda arguments: tiny_models.llama())
    short = ["--pairs", "7", "--generation_pairs", "7", "--new_tokens", "2", "--sequence_length", "8"]
    given = [*short, "--method", "MCNC r=8", "LoRA r=1", "--output", str(tmp_path / "step_time.jsonl")]
    step_time.main([*given[:-4], "LoRA r=1", *given[-2:]])
    step_time.main(given)
    first, second = lines.read(tmp_path / "step_time.jsonl")
    assert (first["method"], second["method"]) == ("LoRA r=1", "MCNC r=8") and first["frozen_bytes"] == 0
    model = get_peft_model(tiny_models.llama(), McncConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model(tiny_models.tokens())
    assert second["trainable"] == model.get_nb_trainable_parameters()[0]
    assert second["frozen_bytes"] == 4 * (5 * 32 + 32 * 32 + 32 * 500 + 8 * 32) == generator_bytes(model)
    for what in ("step", "generation"):
        low, high = second[f"{what}_ratio_quartiles"]
        assert 0 < low <= second[f"{what}_ratio"] <= high and second[f"{what}_seconds"] > 0
    check_provenance(second, "step_time", tmp_path)

    monkeypatch.setattr(step_time, "measure", None)
    step_time.main(given)
    entry.main(["report", "step_time", "--results", str(tmp_path), "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("MCNC r=8") == 3 and f"{second['step_ratio']:.3f} (" in shown
    with pytest.raises(TypeError):  # another budget
        step_time.main([*given, "--batch_size", "3"])
    with pytest.raises(UserError, match="generation_pairs: quartiles need at least 7 pairs, got 6"):
        step_time.main(["--generation_pairs", "6"])
    with pytest.raises(UserError, match="method: no name has any of NOLAA; there are LoRA r=8; "):
        step_time.main(["--method", "NOLAA"])


def test_scaling_grows_one_size_at_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "WIDTHS", {8: 24, 16: 40})
    axes = {"hidden": [scaling.Point(2, hidden, 4, 3) for hidden in (8, 16)], "bases": [scaling.Point(2, 8, 4, 2)]}
    everything = ("LoRA", "NOLA", "PRANC", "PRANC on factors", "MCNC")
    monkeypatch.setattr(scaling, "AXES", axes)
    given = ["--pairs", "7", "--tokens", "16", "--output", str(tmp_path)]
    scaling.main(["--axes", "hidden", "--largest", "8", *given])
    scaling.main(given)
    rows = lines.read(tmp_path / "scaling.jsonl")
    assert [(row["axis"], row["hidden"], row["method"]) for row in rows] == [
        *(("hidden", hidden, method) for hidden in (8, 16) for method in everything),
        *(("bases", 8, method) for method in everything[1:4]),
    ]
    lora, nola, pranc, factors = rows[:4]
    assert lora["generator_bytes"] == 0 and lora["trainable"] == 2 * 4 * (8 + 24)
    assert nola["generator_bytes"] == 4 * 2 * 3 * 4 * (8 + 24) + 4 * 4 * (8 + 24) and nola["trainable"] == 2 * 2 * 3
    assert pranc["generator_bytes"] == 2 * 2 * 8 * 24 + 4 * 2 * 24 and pranc["trainable"] == 24
    assert factors["generator_bytes"] == (2 + 4 + 2) * 4 * (8 + 24) + 2 * 4 * 24 and factors["trainable"] == 24
    check_provenance(pranc, "scaling", tmp_path)

    monkeypatch.setattr(scaling, "measure", None)
    scaling.main(given)
    entry.main(["report", "scaling", "--results", str(tmp_path), "--output", str(tmp_path / "plots")])
    assert capsys.readouterr().out.count("PRANC") == 2 + 3 * 6
    assert (tmp_path / "plots" / "scaling.png").stat().st_size > 1000
    with pytest.raises(UserError, match="axes: there is no 'base'; there are hidden, bases; did you mean 'bases'"):
        scaling.main(["--axes", "base"])


def test_lines_of_batches_and_pools_say_how_to_measure_them_again(tmp_path, monkeypatch):
    found = {"prefill_seconds": 1.0, "decode_seconds": 1.0, "first_seconds": 1.0}
    ratios = {f"{phase}_{to}": 1.0 for phase in ("prefill", "decode") for to in ("ratio", "to_lora")}
    monkeypatch.setattr(mixed_batch, "Runner", lambda *_: None)
    monkeypatch.setattr(mixed_batch, "compare", lambda *_: {**found, **ratios})
    kept = lines.read(lines.RESULTS / "many_adapters.jsonl")[0]
    measured = type("Run", (), {"stdout": json.dumps({**kept, "way": "lora"}).encode()})
    monkeypatch.setattr(many_adapters.subprocess, "run", lambda *_, **__: measured)
    for name, program in (("mixed_batch", mixed_batch), ("many_adapters", many_adapters)):
        path = tmp_path / "new" / f"{name}.jsonl"
        monkeypatch.setattr("sys.argv", [name, "--rows", "2", "--output", str(path)])
        program.main()
        row = lines.read(path)[0]
        check_provenance(row, name, tmp_path)
        assert name != "mixed_batch" or row["rows"] == 2
        entry.main(["report", name, "--results", str(path.parent), "--output", str(tmp_path)])


def test_lines_of_quantized_adapters_say_how_to_measure_them_again(tmp_path, monkeypatch):
    class Recipe:
        methods, seeds, task = [type("Method", (), {"folder": "m", "label": "NOLA"})], [0], None

        def __init__(self):
            self.training = type("Training", (), {"output_dir": str(tmp_path / "out")})()

        def check(self):
            pass

        load = check

    row = {"method": "NOLA", "seed": 0, "dtype": "int8", "bytes": 1, "head_bytes": 0, "change": 0.0, "loss": 1.0}
    monkeypatch.setitem(quantization.RECIPES, "finetune_gpt2", Recipe)
    monkeypatch.setattr(quantization, "argument_types", lambda _: ())
    monkeypatch.setattr(quantization, "parse_arguments", lambda *_: ())
    monkeypatch.setattr(quantization, "peft_ext_adapter", lambda _: True)
    monkeypatch.setattr(quantization, "evaluated", lambda *_: [row])
    path = tmp_path / "new" / "quantization.jsonl"
    quantization.main(["finetune_gpt2", "--output_dir", str(tmp_path / "out"), "--results", str(path)])
    (found,) = lines.read(path)
    assert found["task"] == "out" and found["loss"] == 1.0
    check_provenance(found, "quantization", tmp_path)


def test_every_benchmark_is_listed_and_every_result_is_one_of_theirs(capsys, tmp_path):
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    programs = (programs - {"__main__", "catalog"}) | {"parity", "quality", "learning_rates"}
    assert catalog.NEEDS.keys() == programs and all(map(catalog.summary, programs))
    entry.main(["list"])
    assert all(name in capsys.readouterr().out for name in ["step_time"])
    assert {path.stem for path in lines.RESULTS.glob("*.jsonl")} <= programs
    entry.main(["report", "quantization", "--output", str(tmp_path)])
    assert "SmolLM2-135M, E2E" in capsys.readouterr().out
    assert len({contestant.label for contestant in CONTESTANTS}) == len(CONTESTANTS)


def named_files() -> list[tuple[str, str]]:
    """Figures and results that the text names, with the file that does."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "model_cards").rglob("*.md"))]
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        places = re.findall(r"""(?:\]\(|src=["'])([^)"'\s]+\.(?:png|svg|jsonl))""", text)
        places += re.findall(r"benchmarks/results/[\w-]+\.jsonl", text)
        found += [(str(page.relative_to(ROOT)), place) for place in dict.fromkeys(places)]
    return found


@pytest.mark.parametrize(("page", "place"), named_files())
def test_figures_and_results_that_the_text_names_exist(page, place):
    # A page that is shown elsewhere names its figures by an address, which ends in the path inside the repository.
    inside = place.partition("/main/")[2] if "://" in place else place
    assert any((folder / inside).is_file() for folder in (ROOT, (ROOT / page).parent))
