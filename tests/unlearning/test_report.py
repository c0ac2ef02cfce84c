"""Results on disk, the table, the warnings, the figures and the written report, on made-up outcomes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ext.unlearning.evaluation import figures, language, metrics, report
from peft_ext.unlearning.evaluation.findings import warnings
from peft_ext.unlearning.evaluation.metrics import Outcome
from peft_ext.unlearning.evaluation.results import UnlearningResult
from peft_ext.unlearning.evaluation.tables import table
from peft_ext.unlearning.methods import base

SIZES = {"forget": 120, "retain": 300, "test": 150}


def classified(n: int, accuracy: float, seed: int, certainty: float = 3.0) -> Outcome:
    """Three classes; the first `accuracy * n` samples are right, the rest take the next class for theirs."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    chosen = np.where(np.arange(n) < round(accuracy * n), labels, (labels + 1) % 3)
    logits = random.normal(0, 0.1, (n, 3))
    logits[np.arange(n), chosen] += certainty
    log_probs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    losses = -log_probs[np.arange(n), labels]
    correct = log_probs.argmax(1) == labels
    return Outcome(losses, correct, log_probs.astype(np.float32), -np.log(np.expm1(losses)))


def result(method: str, seed: int, accuracies: tuple[float, float, float], **options: Any) -> UnlearningResult:
    outcomes = {
        split: classified(SIZES[split], accuracy, 10 * seed + place)
        for place, (split, accuracy) in enumerate(zip(SIZES, accuracies))
    }
    return UnlearningResult("random", method, seed, outcomes, **options)


def written(method: str, seed: int, forget: float, retain: float = 0.3, **options: Any) -> UnlearningResult:
    """A language model with these mean losses."""
    random = np.random.default_rng(seed)
    outcomes = {}
    for split, level in {"forget": forget, "retain": retain, "test": 2.0}.items():
        losses = level * random.uniform(0.9, 1.1, SIZES[split])
        extraction = random.uniform(0, 1, SIZES[split])
        ratio = np.exp(random.normal(0, 1, SIZES[split])) if split == "forget" else None
        outcomes[split] = Outcome(losses, losses < 0.3, None, -np.log(np.expm1(losses)), extraction, ratio)
    return UnlearningResult("authors", method, seed, outcomes, **options)


def experiment(**method: Any) -> list[UnlearningResult]:
    """Three seeds of a case in order: a good method unless told otherwise."""
    settings: dict[str, Any] = {"accuracies": (0.8, 0.95, 0.9), "seconds": 5.0, **method}
    results = []
    for seed in range(3):
        results += [
            result("ours", seed, **settings),
            result("retrain", seed, (0.8 + 0.01 * seed, 0.95, 0.9), seconds=20.0),
            result("original", seed, (1.0, 0.95, 0.9)),
        ]
    return results


def warnings_of(results: list[UnlearningResult]) -> list[str]:
    return warnings(table(results))


@dataclass
class Facts:
    """A report of a method, in place of the real one."""

    curvature: str
    losses: tuple[float, float] = (1.0, math.nan)

    to_dict = asdict

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Facts:
        return cls(**facts)

    def notes(self) -> list[str]:
        return [f"curvature: {self.curvature}"]


def test_what_is_saved_is_loaded(tmp_path: Path):
    for saved in (
        result("ours", 3, (0.5, 0.9, 0.8), seconds=1.5, peak_memory=2**33, parameters=10, report={"damping": [0.1, 1]}),
        written("ours", 0, 1.0, relearn_limit=20),
    ):
        saved.save(tmp_path / "a" / "b")
        loaded = UnlearningResult.load(tmp_path / "a" / "b")
        for outcome in (saved.outcomes, loaded.outcomes):
            assert list(outcome) == list(SIZES)
        for split, outcome in saved.outcomes.items():
            for name, values in vars(outcome).items():
                found = getattr(loaded.outcomes[split], name)
                if values is None:
                    assert found is None
                else:
                    assert found.dtype == values.dtype
                    np.testing.assert_array_equal(found, values)
        assert {**vars(loaded), "outcomes": 0} == {**vars(saved), "outcomes": 0}
        assert len(list((tmp_path / "a" / "b").iterdir())) == 2


def test_an_interrupted_save_leaves_nothing_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = result("ours", 0, (0.5, 0.9, 0.8)), result("ours", 1, (0.7, 0.9, 0.8))
    with pytest.raises(FileNotFoundError):
        UnlearningResult.load(tmp_path)
    first.save(tmp_path)
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        replace(source, target)

    # New arrays beside the old numbers would be worse than nothing.
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        UnlearningResult.load(tmp_path)
    monkeypatch.undo()
    second.save(tmp_path)
    assert UnlearningResult.load(tmp_path).seed == 1


def test_no_pickle_is_loaded(tmp_path: Path):
    result("ours", 0, (0.5, 0.9, 0.8)).save(tmp_path)
    np.savez(tmp_path / "unlearning.npz", **{"forget.losses": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        UnlearningResult.load(tmp_path)


def test_rows_are_in_order_and_compare_with_the_gold_of_the_same_seed():
    results = experiment(accuracies=(0.75, 0.9, 0.9), relearn_limit=100, relearn_steps=10)
    results[0].relearn_steps = None
    rows = table(results)
    assert [row["method"] for row in rows] == ["original", "retrain", "ours"]
    original, gold, ours = rows
    assert ours["seeds"] == [0, 1, 2]
    # 120 samples: 0.8, 0.81 and 0.82 are 96, 97 and 98 right ones.
    assert gold["accuracy_forget"]["values"] == pytest.approx([96 / 120, 97 / 120, 98 / 120])
    assert ours["accuracy_forget"]["gap"] == pytest.approx(0.75 - 97 / 120)
    assert ours["accuracy_forget"]["gap_std"] == pytest.approx(1 / 120)
    assert ours["accuracy_forget"]["std"] == pytest.approx(0)
    assert original["accuracy_forget"]["gap"] == pytest.approx(1 - 97 / 120)
    assert ours["tug_of_war"]["values"][2] == pytest.approx((1 - abs(0.75 - 98 / 120)) * 0.95)
    assert "gap" not in gold["accuracy_forget"] and "tug_of_war" not in gold
    assert ours["time_fraction"]["mean"] == 0.25 and "seconds" not in original
    assert ours["relearn_steps"] | {"gap": 0, "gap_std": 0} == {
        **{"values": [100, 10, 10], "mean": 40, "std": pytest.approx(51.96, abs=0.01), "censored": 1},
        **{"gap": 0, "gap_std": 0},
    }


def test_time_is_that_of_the_processor_where_both_are_known():
    def run(*times: float | None) -> UnlearningResult:
        return UnlearningResult("class 3", "ours", 0, {}, seconds=times[0], processor_seconds=times[1])

    assert run(4.0, 1.0).time_over(run(2.0, 10.0)) == 0.1
    assert run(4.0, 1.0).time_over(run(2.0, None)) == run(4.0, None).time_over(run(2.0, 10.0)) == 2
    assert run(4.0, 1.0).time_over(run(None, None)) is None


def test_the_golds_row_has_what_golds_differ_by():
    results = experiment()
    _, gold, ours = table(results)
    golds = [r.outcomes["forget"].log_probs for r in results if r.method == "retrain"]
    pairs = [metrics.jensen_shannon(golds[a], golds[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert gold["js_forget"]["values"] == pytest.approx(pairs)
    assert gold["js_ratio"]["mean"] == pytest.approx(1)
    mine = [r.outcomes["forget"].log_probs for r in results if r.method == "ours"]
    expected = [metrics.jensen_shannon(p, q) for p, q in zip(mine, golds)]
    assert ours["js_forget"]["values"] == pytest.approx(expected)
    assert ours["js_ratio"]["mean"] == pytest.approx(np.mean(expected) / np.mean(pairs))
    assert ours["l1_test"]["values"][1] == pytest.approx(
        metrics.l1(*(r.outcomes["test"].log_probs for r in results if r.seed == 1 and r.method != "original"))
    )


def test_a_gold_is_no_reference_for_itself():
    results = experiment()
    golds = [(r.outcomes["forget"], r.outcomes["test"]) for r in results if r.method == "retrain"]
    _, gold, ours = table(results)
    assert gold["attack_auc"]["values"][1] == metrics.per_example_attack(*golds[1], [golds[0], golds[2]]).auc
    first = results[0].outcomes
    assert ours["attack_auc"]["values"][0] == metrics.per_example_attack(first["forget"], first["test"], golds).auc
    # Ranks do not tell whether it is among others (it shrinks its scores), but one alone would attack itself.
    rows = {row["method"]: row for row in table([r for r in results if r.seed == 0])}
    assert "attack_auc" in rows["ours"] and "attack_auc" not in rows["retrain"]


def test_non_members_are_the_held_out_samples_where_there_are_some():
    results = experiment()
    for r in results:
        r.outcomes["heldout"] = classified(110, 0.8, 77 + r.seed)
    ours = table(results)[-1]
    first = results[0].outcomes
    assert ours["population_auc"]["values"][0] == metrics.population_attack(first["forget"], first["heldout"])
    assert ours["mia"]["values"][0] == metrics.membership_attack(first["retain"], first["test"], first["forget"])
    assert ours["samples"] == {**SIZES, "heldout": 110}


def test_language_models_have_other_columns():
    results = [written(method, seed, 1.0) for method in ("original", "retrain", "ours") for seed in range(2)]
    rows = table(results)
    assert {"loss_forget", "reproduced_test", "extraction_forget", "truth_ratio", "attack_auc"} <= rows[2].keys()
    assert not any(name.startswith(("accuracy", "js", "l1", "tug", "seconds", "relearn")) for name in rows[2])
    assert rows[2]["truth_ratio"]["values"][0] == language.truth_score(results[4].outcomes["forget"].truth_ratio)


def test_results_that_do_not_go_together_are_refused():
    one = result("ours", 0, (0.5, 0.9, 0.8))
    with pytest.raises(ValueError, match="must be there once, got two of 'ours' in case 'random' with seed 0"):
        table([one, one])
    other = result("ours", 1, (0.5, 0.9, 0.8))
    other.outcomes["forget"] = classified(7, 0.5, 0)
    with pytest.raises(ValueError, match="must be about the same samples"):
        table([one, other])
    del other.outcomes["test"]
    with pytest.raises(ValueError, match="test is missing"):
        table([other])
    with pytest.raises(ValueError, match="must have results"):
        report.write_report([], "nowhere")


# Warnings


def test_a_good_method_in_a_sound_experiment_has_no_warnings():
    assert warnings_of(experiment()) == []


@pytest.mark.parametrize(
    "method, expected",
    [
        ({"accuracies": (0.77, 0.95, 0.9)}, "over-forgetting: forget accuracy 76.7 ± 0.0 %, gold 80.8 ± 0.8 %"),
        ({"accuracies": (0.8, 0.9, 0.9)}, "retain damage: retain accuracy 90.0 ± 0.0 %, gold 95.0 ± 0.0 %"),
        ({"accuracies": (0.8, 0.95, 0.8)}, "retain damage: test accuracy 80.0 ± 0.0 %, gold 90.0 ± 0.0 %"),
        ({"seconds": 30.0}, "slower than retraining, 1.5 times its time"),
    ],
)
def test_what_is_wrong_with_a_method_is_said(method, expected):
    found = warnings_of(experiment(**method))
    assert len(found) == 1 and found[0].startswith(f"random, ours: {expected}"), found


def test_forgetting_within_the_golds_spread_is_not_too_much():
    """The golds differ by 10 points: 5 below their mean is nothing, 25 is."""
    for forget, number in ((0.65, 0), (0.45, 1)):
        results = experiment(accuracies=(forget, 0.95, 0.9))
        for r in results:
            if r.method == "retrain":
                r.outcomes["forget"] = classified(120, 0.6 + 0.1 * r.seed, r.seed)
        assert len([text for text in warnings_of(results) if "over-forgetting" in text]) == number


def test_a_forget_loss_above_the_golds_is_over_forgetting():
    """As many samples are wrong as with the gold, but with far more certainty."""
    results = experiment()
    for r in results:
        if r.method == "ours":
            r.outcomes["forget"] = classified(120, 0.8, r.seed, certainty=9.0)
    (found,) = warnings_of(results)
    assert "over-forgetting: forget loss" in found and "accuracy" not in found


def test_noise_is_said():
    results = [r for r in experiment() if r.method != "retrain" or r.seed == 0]
    found = " ".join(warnings_of(results))
    assert "There is one gold" in found and "few seeds (retrain 1)" in found and "no gold with seed 1, 2" in found
    assert "no gold." in " ".join(warnings_of([r for r in results if r.method != "retrain"]))
    # Golds that differ from one another as much as from the original.
    results = experiment(accuracies=(0.9, 0.95, 0.9))
    for r in results:
        if r.method == "retrain":
            p = classified(120, 0.9, r.seed)
            order = np.roll(np.arange(120), 18 * r.seed)
            # Other samples are wrong in every gold; a shift by a multiple of three leaves their classes in place.
            r.outcomes["forget"] = Outcome(
                p.losses[order],
                p.correct[order],
                p.log_probs[order],
                p.confidence[order],  # type: ignore[index]
            )
    found = " ".join(warnings_of(results))
    assert "noisy gold. In Jensen-Shannon divergence" in found


def test_noisy_golds_of_language_models():
    steady = [written("retrain", s, 2.0 + 0.1 * s) for s in range(3)]
    noisy = [written("retrain", s, 2.0 + s) for s in range(3)]
    others = [written("original", s, 2.5) for s in range(3)]
    assert not any("noisy" in text for text in warnings_of(others + steady))
    assert any("noisy gold. In forget loss" in text for text in warnings_of(others + noisy))


def test_losses_judge_language_models_and_a_diverged_one_is_called_so():
    golds = [written("retrain", s, 2.0) for s in range(3)] + [written("original", s, 0.3) for s in range(3)]
    bad = [written("ours", s, 4.0, retain=0.6) for s in range(3)]
    found = warnings_of(golds + bad)
    assert any("ours: over-forgetting: forget loss 4." in text for text in found)
    assert any("ours: retain damage: retain loss 0.6" in text for text in found)
    for r in bad:
        nothing = np.full(SIZES["retain"], math.nan)
        r.outcomes["retain"] = Outcome(nothing, np.zeros(SIZES["retain"], bool), None, nothing)
    found = warnings_of(golds + bad)
    assert any("ours: outputs are not finite on retain" in text for text in found)


def test_too_few_samples_for_a_true_positive_rate():
    results = experiment()
    for r in results:
        r.outcomes = {**r.outcomes, "heldout": classified(99, 0.8, r.seed)}
    assert any(
        "too few samples for a TPR at 1 % FPR: 120 to forget and 99 never seen" in t for t in warnings_of(results)
    )


# The report


def markdown_cells(text: str, method: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if f"| {method} " in line]


def test_the_report_has_the_numbers_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "UnlearningReport", Facts, raising=False)
    facts = Facts("one draw", (1.0, 2.0)).to_dict()
    results = experiment(peak_memory=3_000_000, relearn_limit=50, parameters=3840, report=facts)
    report.write_report(results, tmp_path / "report", title="A title", notes="What was run.")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A title\n\nWhat was run.\n") and "## Warnings\n\nNone." in text
    assert "- ours: curvature: one draw" in text and "Trained parameters: 3,840" in text
    right, distance, attack = markdown_cells(text, "ours")
    ours = table(results)[2]
    assert right[:7] == ["80.0 ± 0.0", "-0.8", "95.0 ± 0.0", "+0.0", "90.0 ± 0.0", "+0.0", "0.992 ± 0.008"]
    assert distance[0] == f"{ours['js_forget']['mean']:.4f} ± {ours['js_forget']['std']:.4f}"
    assert attack[-4:] == ["≥ 50 ± 0", "5.0 ± 0.0", "0.250 ± 0.000", "3.0 ± 0.0"]
    assert attack[4].endswith(f"({100 * ours['attack_tpr_error']['mean']:.1f})")
    assert markdown_cells(text, "original")[2][-3:] == ["-", "-", "-"]
    content = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert content["rows"] == json.loads(json.dumps(table(results)))
    assert content["warnings"] == []
    for name in ("accuracy.png", "losses.png", "tradeoff.png"):
        assert f"]({name})" in text
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_methods_report_facts_by_seed_which_become_sentences_in_markdown_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(base, "UnlearningReport", Facts, raising=False)
    results = experiment()
    results[0].report, results[3].report = Facts("one draw").to_dict(), Facts("exact").to_dict()
    results[6].report = Facts("one draw", (3.0, 4.0)).to_dict()
    report.write_report(results, tmp_path)
    original, _, ours = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)[
        "rows"
    ]
    assert original["reports"] == [None, None, None]
    assert ours["reports"] == [
        {"curvature": "one draw", "losses": [1.0, None]},
        {"curvature": "exact", "losses": [1.0, None]},
        {"curvature": "one draw", "losses": [3.0, 4.0]},
    ]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "### What the methods say\n\n- ours: curvature: one draw\n- ours: curvature: exact\n\n##" in text
    report.write_report(experiment(), tmp_path)
    assert "What the methods say" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_every_method_has_a_colour_of_its_own():
    rows = table(experiment())
    rows += [{**rows[-1], "method": f"method {index}"} for index in range(41)]
    (legend,) = figures.tradeoff_figure(rows).legends
    looks = {
        text.get_text(): (handle.get_color(), handle.get_marker())
        for text, handle in zip(legend.get_texts(), legend.legend_handles)
        if handle.get_marker() != "None"
    }
    assert len(looks) == len({colour for colour, _ in looks.values()}) == 42
    assert not {colour for colour, _ in looks.values()} & {"0.55", "black"}  # those of the original and the gold
    # The points of the bars look as they do there.
    axis = figures.accuracy_figure(rows).subfigs[0].axes[0]
    points = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in axis.collections}
    assert len(points) == 44  # with the original and the gold


def test_figures_say_what_the_gold_is():
    results = experiment()
    rows = table(results)
    for figure in (figures.accuracy_figure(rows), figures.losses_figure(results), figures.tradeoff_figure(rows)):
        (legend,) = figure.legends
        said = " ".join(text.get_text() for text in [legend.get_title(), *legend.get_texts()])
        assert "gold: retrained without the forget set" in said.replace("\n", " ")


def test_a_report_of_what_is_least_and_of_what_diverged(tmp_path: Path):
    """One seed, no gold, no times, a label with marks, and a language model whose outputs are not finite."""
    broken = written("a|b [red]", 0, 1.0)
    nothing = np.full(SIZES["forget"], math.nan)
    broken.outcomes["forget"] = Outcome(nothing, np.zeros(len(nothing), bool), None, nothing, nothing, nothing)
    report.write_report([broken, result("original", 0, (1.0, 0.9, 0.9))], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| a\\|b [red] " in text and "not finite" in text and "no gold" in text
    row = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)["rows"][0]
    assert row["loss_forget"]["mean"] is None and row["loss_retain"]["mean"] > 0
