"""The benchmarks' entry: what it lists, runs and reports, and that the figures which the text names are there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments

from benchmarks import __main__ as entry
from benchmarks import (
    brainwash,
    catalog,
    flat,
    lines,
    many_adapters,
    mixed_batch,
    quantization,
    report,
    scaling,
    soup,
    soup_memory,
    step_time,
    timing,
)
from benchmarks.models import generator_bytes
from benchmarks.quality import __main__ as quality
from benchmarks.quality import learning_rates, runs
from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.report import report_rates
from benchmarks.quality.summary import Point, by_budget, chosen, front, latest
from benchmarks.quality.task import QualityTask, Sources
from benchmarks.sources import digest_of, source_entry
from peft_ext import McncConfig
from recipes.support.arguments import UserError
from recipes.support.inputs import ModelArguments
from recipes.support.methods import parse_methods
from recipes.support.reporting import RunResult
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
    data_seed = 0

    def fresh_model(self) -> nn.Module:
        torch.manual_seed(0)
        return TinyModel()

    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        x = torch.randn(24, 8, generator=torch.Generator().manual_seed(self.data_seed))
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
    assert len({str(row["budget"]) for row in rows}) == 1
    check_provenance(plain, "flat", tmp_path)
    monkeypatch.setattr(flat, "measure", None)  # what is there is not measured again
    flat.main(given)
    entry.main(["report", "flat", "--results", str(tmp_path), "--output", str(tmp_path / "plots")])
    shown = " ".join(capsys.readouterr().out.split())
    means = [sum(row["loss"] for row in rows if row["sigma"] == sigma) / 2 for sigma in (0, 0.8)]
    assert "flat minus plain" in shown and f"{means[0]:.3f} ±" in shown and f"{means[1] - means[0]:.3f} ±" in shown
    with pytest.raises(UserError, match="sizes of noise are above 0"):
        flat.main(flags(tmp_path, "--sigmas", "0"))


def pair_line(task: str, steps: int, sigma: float, **more: Any) -> dict[str, Any]:
    budget = {"steps": steps, "batch_size": 4, "train_rows": 16}
    noise = [{"sigma": 0.5, "loss": 1.0}]
    values = {"loss": 1.0 + sigma, "score": 50.0, "processor_seconds": 1.0, "noise": noise, "metric": "accuracy"}
    names = {"task": task, "method": "m", "config": "c", "rate": 0.1, "seed": 0, "budget": budget, "sigma": sigma}
    return {**names, "sigmas": [0.5], "draws": 1, **values, **more}


def test_flat_training_has_a_table_for_every_task_and_budget():
    known = [pair_line(task, steps, sigma) for task, steps in (("t", 5), ("t", 6), ("u", 5)) for sigma in (0.0, 0.5)]
    for row in known[-2:]:
        row |= {"config": "of another task", "sigmas": [0.5, 0.7]}
    found = flat.tables([pair_line("t", 5, 0.0, draws=9), *known])
    assert [table.title for table in found] == [
        f"Flat training: {task}, {steps} steps of 4, 16 rows" for task, steps in (("t", 5), ("t", 6), ("u", 5))
    ]
    assert [list(table.columns[3].cells) for table in found] == [["1"]] * 3
    assert ["1 lines of other settings" in str(table.caption) for table in found] == [True, False, False]


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


def test_a_budget_that_says_more_than_the_usual_one_or_less_has_a_name_of_its_own():
    row = {"task": "t", "budget": {"steps": 5, "source": "a"}}
    other = {"task": "t", "budget": {"steps": 5}}
    assert by_budget([row, row, other]) == {"t": [row, row], "t-source-usual": [other]}
    assert by_budget([row, other, other]) == {"t": [other, other], "t-source-a": [row]}


def rate_line(method: str, rate: float, seed: int, loss: float | None) -> dict[str, Any]:
    budget = {"steps": 5, "batch_size": 4, "train_rows": 16}
    names = {"task": "t", "method": method, "name": "lora", "config": "c", "budget": budget}
    return {**names, "rate": rate, "seed": seed, "loss": loss, "coefficients": 7}


def test_rates_are_compared_by_the_seeds_that_all_have(tmp_path, monkeypatch):
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr("benchmarks.quality.report.plot_rates", lambda rows, title, path: drawn.extend(rows))
    rows = [
        *(rate_line("some", 0.1, seed, loss) for seed, loss in ((0, 0.5), (4, 0.1))),
        rate_line("some", 0.2, 0, 0.4),
        *(rate_line("lost", rate, seed, 0.3 + seed) for rate in (0.1, 0.2) for seed in (0, 1)),
        rate_line("lost", 0.3, 0, None),  # after which no further seeds are trained
        *(rate_line("none", rate, seed, 0.6) for rate, seed in ((0.1, 0), (0.2, 1))),
    ]
    (table,), _ = report_rates(rows, tmp_path)
    assert list(zip(*(column.cells for column in table.columns))) == [
        ("some", "7", "0 (of 2)", "0.500", "[bold]0.400[/bold]", "", "0.2"),
        ("lost", "7", "0, 1", "[bold]0.800[/bold]", "[bold]0.800[/bold]", "diverged", "0.1, 0.2"),
        ("none", "7", "2, other ones at each rate", "[bold]0.600[/bold]", "[bold]0.600[/bold]", "", "0.1, 0.2"),
    ]
    assert drawn == [rows[0], *rows[2:]]


def test_lines_are_of_a_model_and_data(tmp_path, measured, monkeypatch):
    class Other(TinyTask):
        def fresh_model(self):
            model = super().fresh_model()
            nn.init.ones_(model.query.weight)
            nn.init.normal_(model.head.weight)
            return model

    class Rows(TinyTask):
        def trainer_arguments(self, model):
            found = super().trainer_arguments(model)
            return {**found, "train_dataset": found["train_dataset"][::-1]}

    class Elsewhere(Tiny):
        def load(self, training):
            return {"other": Other, "rows": Rows}.get(self.sources.sst2_model, TinyTask)(
                ModelArguments(), None, training
            )

    monkeypatch.setitem(runs.TASKS, "tiny", Elsewhere)
    monkeypatch.setattr(Elsewhere, "known_source", Tiny(Sources()).source)
    given = flags(tmp_path, "--methods", NOLA, "--rates", "1e-2", "--sst2_model")
    for count, where in enumerate(("here", "other", "rows"), start=1):
        for _ in range(2):
            learning_rates.main([*given, where])
        assert len(measured) == count
    learning_rates.main([*given, "there"])  # where files lie changes nothing
    assert len(measured) == 3
    rows = lines.read(tmp_path / "learning_rates.jsonl")
    assert "source" not in rows[0]["budget"] and len({row["budget"].get("source") for row in rows}) == 3
    tables, files = report_rates(rows, tmp_path)
    assert len(tables) == len(set(files)) == 3 and f"model and data {rows[1]['budget']['source']}" in str(
        tables[1].title
    )


def test_a_source_is_told_by_values_alone():
    weights, rows = [torch.ones(2), torch.zeros(3)], [{"a": [1, 2], "b": "x"}, {"a": [3], "b": "y"}]
    found = digest_of(weights, rows, [])
    assert found == digest_of(weights[::-1], [{"b": "x", "a": torch.tensor([1, 2])}, rows[1]], []) and len(found) == 12
    others = [digest_of(weights, [], rows), digest_of(weights, rows[::-1], []), digest_of(weights[:1], rows, [])]
    others += [
        digest_of([*weights[:1], torch.zeros(1, 3)], rows, []),
        digest_of(weights, [rows[0], {**rows[1], "b": "z"}], []),
    ]
    assert len({found, *others}) == 6
    assert source_entry("a", "a") == {} and source_entry("b", "a") == {"source": "b"}


def test_soups_are_of_adapters_of_the_same_options_model_data_and_scores(tmp_path, monkeypatch):
    trained: list[dict[str, Any]] = []

    def trainings(tasks, methods, seeds):
        def run(method):
            trained.append(method.options)
            return RunResult(method.label, 0, validation_loss=1.0, metrics={"accuracy": 50.0})

        return {
            f"{each.folder}-seed{seed}": (lambda folder, each=each: run(each)) for each in methods for seed in seeds
        }

    monkeypatch.setattr(soup, "trainings", trainings)
    monkeypatch.setattr(soup, "held_out", lambda *_: None)
    monkeypatch.setattr(soup, "best_adapter", lambda model, places, rows: SimpleNamespace(losses=[1.0] * len(places)))
    task = TinyTask(ModelArguments(), None, TrainingArguments(str(tmp_path), use_cpu=True))

    def first(bases: int, source: str = soup.KNOWN_SOURCE, **more: Any) -> dict[str, Any]:
        given = {"seeds": [0], "adapters": str(tmp_path / "adapters"), "output": str(tmp_path), **more}
        args = soup.Arguments("model", "data", **given)
        methods = parse_methods([f"{{name: nola, label: same, num_basis: {bases}, target_modules: [query]}}"])
        return next(soup.measure(args, task, "same", methods, source, ["x"]))

    row = first(8)
    assert "source" not in row["budget"]
    for other in (lambda: first(4), lambda: first(8, "of another model"), lambda: first(8, eval_samples=9)):
        count = len(trained)
        row = other()
        assert len(trained) == count + 1 and trained[-1] == row["options"]
        other()
        assert len(trained) == count + 1  # the line is there
    (tmp_path / "soup.jsonl").unlink()
    first(4)
    assert len(trained) == 4  # and so are the adapters


def test_noise_is_measured_on_a_network_and_images():
    def recipe(scale: float, images: int, digits: bool = False) -> Any:
        def fresh(seed: int) -> nn.Module:
            model = nn.Linear(2, 2, bias=False).requires_grad_(False)
            nn.init.constant_(model.weight, scale)
            return model

        rows = [{"pixel_values": torch.ones(2), "labels": number} for number in range(images)]
        problem = SimpleNamespace(fresh=fresh, train=[rows], test=[rows])
        return SimpleNamespace(problem=problem, quickstart=SimpleNamespace(digits=digits))

    found = [brainwash.source_of(recipe(*given)) for given in ((1.0, 3), (2.0, 3), (1.0, 4))]
    assert len(set(found)) == 3 and found[0] == brainwash.source_of(recipe(1.0, 3))
    assert brainwash.source_of(recipe(1.0, 3, True)) == brainwash.source_of(recipe(2.0, 3, True))


def test_lines_are_apart_by_what_their_settings_differ_in():
    rows = [{"budget": {"steps": steps, "rate": 1}, "n": number} for number, steps in enumerate((5, 6, 6))]
    assert lines.apart(rows, "budget") == {"steps 6": rows[1:], "steps 5": rows[:1]}
    assert lines.apart(rows[1:], "budget") == {"": rows[1:]} and lines.apart(rows, "none") == {"": rows}
    assert lines.apart([*rows[1:], {"n": 3}], "budget") == {"steps 6, rate 1": rows[1:], "": [{"n": 3}]}


def cells(table: Any) -> list[tuple[Any, ...]]:
    return list(zip(*(column.cells for column in table.columns)))


def test_tables_have_lines_of_one_budget():
    row = {"method": "m", "budget": {"steps": 5}, "seed": 0, "loss": 1.0, "rows": 2}
    usual, other = report.tables(
        "any", [row, {**row, "seed": 1, "loss": 3.0}, {**row, "budget": {"steps": 6}, "loss": 7.0}]
    )
    assert (usual.title, other.title) == ("any, steps 5", "any, steps 6")
    assert cells(usual)[0][-1].startswith("2.0") and cells(other)[0][-1].startswith("7.0")
    (sizes,) = report.tables("any", [row, {**row, "rows": 4, "loss": 3.0}])
    assert [each[:2] for each in cells(sizes)] == [("m", "2"), ("m", "4")]

    names = {"method": "m", "pool": "all", "kind": "best single", "adapters": 9, "options": {"r": 1}, "loss": 1.0}
    found = [
        {**names, "budget": {"shots": shots}, "data_seed": seed, "accuracy": 50.0 + shots}
        for shots, seed in ((10, 0), (10, 1), (20, 0))
    ]
    old = {**found[0], "options": {"r": 2}, "accuracy": 0.0, "data_seed": 7}
    few, many = soup.tables([old, *found])
    assert "shots 10" in str(few.title) and "shots 20" in str(many.title)
    assert [cells(table)[0][4] for table in (few, many)] == ["2", "1"] and cells(few)[0][5].startswith("60.00")
    assert few.caption == "1 lines of other options are left out" and many.caption is None

    sizes_of = {"method": "m", "way": "soup", "adapter_bytes": 1e6, "gguf_file": "", "target_modules": ["a"]}
    grown = [
        {**sizes_of, "adapters": 2, "model_name_or_path": name, "grown_bytes": 1e6 * n} for n, name in enumerate("xy")
    ]
    assert [(table.title, cells(table)[0][-1]) for table in soup_memory.tables(grown)] == [
        (f"Memory (MB) that making one adapter of many takes at most, model_name_or_path {name}", f"{n}")
        for n, name in enumerate("xy")
    ]


def test_scaling_has_a_table_and_a_plot_for_every_budget(tmp_path, monkeypatch):
    plotted = {}
    monkeypatch.setattr(scaling, "plot", lambda rows, path: plotted.update({path.name: len(rows)}))
    known = lines.read(lines.RESULTS / "scaling.jsonl")[:3]
    other = {**known[0], "budget": {**known[0]["budget"], "tokens": 7}}
    tables, files = report.REPORTERS["scaling"]([*known, other], tmp_path)
    assert [table.row_count for table in tables] == [3, 1] and "tokens 7" in str(tables[1].title)
    assert files == list(plotted) == ["scaling.png", "scaling-tokens-7.png"]


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
