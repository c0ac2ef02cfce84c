"""What unlearning experiments leave behind: results on disk, tables against the retrained gold, warnings, plots."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ...presentation import COLOURS, spread, tidy
from . import metrics
from .metrics import Outcome
from .results import GOLD, ORIGINAL, SPLITS, UnlearningResult

_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_ORIGINAL_COLOUR, _GOLD_COLOUR = "0.55", "black"

# What counts as clearly worse than the gold, if it is also more than twice the golds' standard deviation.
_POINTS = 0.02  # of accuracy
_LOSS = 0.1  # nats, and the same share of the gold's loss
_SEEDS = 3
_SAMPLES = 100  # below, one sample is more than 1 %

# Measuring


@dataclass(frozen=True)
class _Metric:
    """How a metric is shown.

    Attributes:
        heading: Of its column.
        digits: After the point.
        scale: What it is multiplied with.
        gap: There is a column for the gap to the gold.
    """

    heading: str
    digits: int = 3
    scale: float = 1
    gap: bool = False


_METRICS = {
    **{f"accuracy_{split}": _Metric(f"{split} accuracy", 1, 100, gap=True) for split in SPLITS},
    "tug_of_war": _Metric("tug of war"),
    **{f"loss_{split}": _Metric(f"{split} loss", 3, gap=True) for split in SPLITS},
    **{f"reproduced_{split}": _Metric(f"{split} reproduced", 1, 100) for split in SPLITS},
    **{f"extraction_{split}": _Metric(f"{split} extraction", 3) for split in SPLITS},
    "truth_ratio": _Metric("truth ratio", 3, gap=True),
    "js_forget": _Metric("JS forget", 4),
    "js_ratio": _Metric("JS / golds' JS", 2),
    "js_test": _Metric("JS test", 4),
    "distance_forget": _Metric("activation distance forget"),
    "distance_test": _Metric("activation distance test"),
    "l1_forget": _Metric("L1 forget"),
    "l1_test": _Metric("L1 test"),
    "mia": _Metric("MIA", 1, 100, gap=True),
    "population_auc": _Metric("population AUC"),
    "attack_auc": _Metric("per-example AUC (error)"),
    "attack_auc_error": _Metric("error"),
    "attack_tpr": _Metric("TPR at 1 % FPR (error)", 1, 100),
    "attack_tpr_error": _Metric("error", 1, 100),
    "relearn_steps": _Metric("relearn steps", 0),
    "seconds": _Metric("seconds", 1),
    "time_fraction": _Metric("of retraining"),
    "peak_memory": _Metric("peak MB", 1, 1e-6),
}
# The tables of a case; the errors of an attack stand behind it.
_MEMBERSHIP = {
    "Membership inference, relearning and costs": [
        *("mia", "population_auc", "attack_auc", "attack_tpr"),
        *("relearn_steps", "seconds", "time_fraction", "peak_memory"),
    ]
}
_CLASSIFIER_TABLES = {
    "What the models get right": [*(f"accuracy_{split}" for split in SPLITS), "tug_of_war", "loss_forget"],
    "Distance to the gold of the same seed": [
        *("js_forget", "js_ratio", "js_test"),
        *("distance_forget", "distance_test", "l1_forget", "l1_test"),
    ],
    **_MEMBERSHIP,
}
_LANGUAGE_TABLES = {
    "What the models expect": [*(f"loss_{split}" for split in SPLITS), "truth_ratio"],
    "What the models write": [f"{name}_{split}" for name in ("reproduced", "extraction") for split in SPLITS],
    **_MEMBERSHIP,
}
_LEGEND = """\
Means ± standard deviations over seeds; accuracies, reproduction, MIA and TPR in percent; a gap is the difference to the
gold (retrain) of the same seed. The best value is the gold's, not the lowest or the highest.

- tug of war: product over forget, retain and test of 1 - |accuracy - gold's accuracy|.
- JS, activation distance, L1: Jensen-Shannon divergence (nats), mean Euclidean and L1 distance of the predicted
  distributions. In the gold's row: between golds of different seeds. JS / golds' JS: 1 is as far from the gold as
  golds are from one another.
- reproduced: samples whose target is written token for token; extraction: mean extraction strength; truth ratio: mean
  of min(R, 1/R) on the forget set, 1 where wrong answers are as likely as the right one.
- MIA: share of the forget set that an attacker takes for data never seen; population AUC: one threshold for all
  samples, forget set against data never seen; per-example AUC and TPR: LiRA with the golds as reference models (in the
  gold's row: the other golds), with the standard error for so many samples. An AUC of 0.5 cannot be told from data
  never seen; below 0.5, the forget set stands out by low confidence. Damage to the test set raises it too.
- relearn steps: until the forget accuracy is back; with ≥ where runs stopped before that.
"""


def _groups(results: Sequence[UnlearningResult]) -> dict[str, dict[str, dict[int, UnlearningResult]]]:
    """Results by case, method and seed. Original and gold come first, the rest as it appears."""
    groups: dict[str, dict[str, dict[int, UnlearningResult]]] = {}
    for result in results:
        missing = [split for split in SPLITS if split not in result.outcomes]
        if missing:
            raise ValueError(
                f"`outcomes` must be those of {', '.join(SPLITS)}; {', '.join(missing)} is missing in {_name(result)}."
            )
        runs = groups.setdefault(result.case, {ORIGINAL: {}, GOLD: {}}).setdefault(result.method, {})
        if result.seed in runs:
            raise ValueError(
                f"Every result must be there once, got two of {_name(result)}. Give each configuration of a method a "
                "label of its own."
            )
        runs[result.seed] = result
    for methods in groups.values():
        present = [run for runs in methods.values() for run in runs.values()]
        for run in present:
            sizes = [len(run.outcomes[split]) for split in SPLITS]
            expected = [len(present[0].outcomes[split]) for split in SPLITS]
            if sizes != expected:
                raise ValueError(
                    f"All results of a case must be about the same samples, got {expected} to forget, retain and test "
                    f"in {_name(present[0])}, {sizes} in {_name(run)}. Draw the forget set once for all seeds, or make "
                    "a case of each."
                )
    return {case: {name: runs for name, runs in methods.items() if runs} for case, methods in groups.items()}


def _name(result: UnlearningResult) -> str:
    return f"{result.method!r} in case {result.case!r} with seed {result.seed}"


def _heldout(run: UnlearningResult) -> Outcome:
    return run.outcomes.get("heldout", run.outcomes["test"])


def _distances(run: UnlearningResult, gold: UnlearningResult) -> dict[str, float]:
    found = {}
    for split in ("forget", "test"):
        p, q = run.outcomes[split].log_probs, gold.outcomes[split].log_probs
        if p is not None and q is not None:
            found[f"js_{split}"] = metrics.jensen_shannon(p, q)
            found[f"distance_{split}"] = metrics.activation_distance(p, q)
            found[f"l1_{split}"] = metrics.l1(p, q)
    return found


def _own_metrics(run: UnlearningResult, golds: dict[int, UnlearningResult]) -> dict[str, float | None]:
    """Everything but what depends on the gold of the same seed."""
    found: dict[str, float | None] = {}
    classifier = run.outcomes["forget"].log_probs is not None
    for split in SPLITS:
        outcome = run.outcomes[split]
        found[f"{'accuracy' if classifier else 'reproduced'}_{split}"] = float(outcome.correct.mean())
        found[f"loss_{split}"] = float(outcome.losses.mean())
        if outcome.extraction is not None:
            found[f"extraction_{split}"] = float(outcome.extraction.mean())
    forget, heldout = run.outcomes["forget"], _heldout(run)
    if forget.truth_ratio is not None:
        found["truth_ratio"] = metrics.truth_score(forget.truth_ratio)
    found["mia"] = metrics.membership_attack(run.outcomes["retain"], run.outcomes["test"], forget)
    found["population_auc"] = metrics.population_attack(forget, heldout)
    references = [(gold.outcomes["forget"], _heldout(gold)) for gold in golds.values() if gold is not run]
    if references:
        attack = metrics.per_example_attack(forget, heldout, references)
        found |= {f"attack_{name}": value for name, value in dataclasses.asdict(attack).items()}
    found["relearn_steps"] = run.relearn_limit if run.relearn_steps is None else run.relearn_steps
    found["seconds"] = run.seconds
    found["peak_memory"] = run.peak_memory
    return found


def _against_gold(run: UnlearningResult, gold: UnlearningResult) -> dict[str, float]:
    found = _distances(run, gold)
    if found:
        accuracies = [[float(r.outcomes[split].correct.mean()) for split in SPLITS] for r in (run, gold)]
        found["tug_of_war"] = metrics.tug_of_war(*accuracies)
    if run.seconds is not None and gold.seconds:
        found["time_fraction"] = run.seconds / gold.seconds
    return found


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    present = [value for value in values if value is not None]
    deviation = stdev(present) if len(present) > 1 and all(map(math.isfinite, present)) else None
    return {"mean": mean(present) if present else None, "std": deviation, "values": list(values)}


def table(results: Sequence[UnlearningResult]) -> list[dict[str, Any]]:
    """One row a case and method: the original first, then the gold, then the methods as they appear.

    Args:
        results: All runs of all cases.

    Returns:
        Rows with `"case"`, `"method"`, `"seeds"`, `"parameters"`, `"samples"` (a number for every set), `"notes"`,
        and under the name of every metric that there is a dictionary:

        - `"values"`: one for every seed, in the order of `"seeds"`, None where it is not known; `"mean"` and `"std"`,
          the standard deviation, None for one seed;
        - `"gap"` and `"gap_std"`: mean and deviation of the difference to the gold of the same seed; not in the
          gold's own row;
        - `"censored"`, for `"relearn_steps"` alone: in how many runs the accuracy was not back within the limit, which
          stands for them.

        In the gold's row, `js_...`, `distance_...` and `l1_...` are distances between golds of different seeds: one
        value for every pair. Shares are fractions of 1.

    Raises:
        ValueError: two results of the same case, method and seed; results of a case with other samples; sets missing.
    """
    rows = []
    for case, methods in _groups(results).items():
        golds = methods.get(GOLD, {})
        own = {method: {s: _own_metrics(run, golds) for s, run in runs.items()} for method, runs in methods.items()}
        pairs = [_distances(one, other) for one, other in combinations(golds.values(), 2)]
        between: dict[str, list[float | None]] = {
            name: [pair[name] for pair in pairs] for name in (pairs[0] if pairs else ())
        }
        noise = mean(pair.get("js_forget", 0) for pair in pairs) if pairs else 0
        for method, runs in methods.items():
            found = {seed: dict(own[method][seed]) for seed in runs}
            for seed in runs.keys() & golds.keys():
                against = _against_gold(runs[seed], golds[seed])
                # A gold is itself the gold of its seed; what says something are its distances to the others.
                found[seed] |= {"time_fraction": against.get("time_fraction")} if method == GOLD else against
            columns = {name: [values.get(name) for values in found.values()] for name in _METRICS}
            if method == GOLD:
                columns |= between
            if noise:
                columns["js_ratio"] = [js if js is None else js / noise for js in columns["js_forget"]]
            first = next(iter(runs.values()))
            row: dict[str, Any] = {
                "case": case,
                "method": method,
                "seeds": list(runs),
                "parameters": first.parameters,
                "samples": {split: len(outcome) for split, outcome in first.outcomes.items()},
                "notes": list(dict.fromkeys(note for run in runs.values() for note in run.notes)),
            }
            for name in _METRICS:
                if any(value is not None for value in columns[name]):
                    row[name] = _summary(columns[name])
                    if method != GOLD:
                        pairs_of_seed = [(found[s].get(name), own[GOLD][s].get(name)) for s in runs if s in golds]
                        gaps = _summary([a - b for a, b in pairs_of_seed if a is not None and b is not None])
                        row[name] |= {"gap": gaps["mean"], "gap_std": gaps["std"]}
            if "relearn_steps" in row:
                row["relearn_steps"]["censored"] = sum(
                    run.relearn_steps is None and run.relearn_limit is not None for run in runs.values()
                )
            rows.append(row)
    return rows


# Warnings


def warnings(results: Sequence[UnlearningResult]) -> list[str]:
    """What a reader must know before believing the table: over-forgetting, damage, noise, too little data."""
    return _warnings(table(results))


def _warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["method"]: row for row in rows if row["case"] == case}
        gold = of_case.get(GOLD)
        found += [f"{case}: {text}" for text in [*_about_case(of_case, gold), *_about_seeds(of_case, gold)]]
        for method, row in of_case.items():
            texts = _about_outputs(row)
            if method not in (ORIGINAL, GOLD) and gold:
                texts += _about_method(row, gold)
            found += [f"{case}, {method}: {text}" for text in texts]
    return found


def _about_case(rows: dict[str, dict[str, Any]], gold: dict[str, Any] | None) -> list[str]:
    texts = []
    original = rows.get(ORIGINAL)
    if gold is None:
        return [f"no gold. Without a model retrained on the retain set (method {GOLD!r}) nothing says what is right."]
    if len(gold["seeds"]) == 1:
        texts.append("noisy gold? There is one gold, so that it is not known how far golds are from one another.")
    elif original:
        if "js_forget" in gold and "js_forget" in original:
            noise, gap = gold["js_forget"]["mean"], original["js_forget"]["mean"]
            what = "Jensen-Shannon divergence on the forget set"
        else:
            noise, gap, what = gold["loss_forget"]["std"], original["loss_forget"]["gap"], "forget loss"
        if noise is not None and gap is not None and noise > abs(gap):
            texts.append(
                f"noisy gold. In {what}, golds of different seeds differ by {noise:.3g}, original and gold by "
                f"{abs(gap):.3g}: there is little to forget, or too much chance in training, to rank methods."
            )
    samples = gold["samples"]
    few = min(samples["forget"], samples.get("heldout", samples["test"]))
    if few < _SAMPLES:
        texts.append(
            f"too few samples for a TPR at 1 % FPR: {samples['forget']} to forget and "
            f"{samples.get('heldout', samples['test'])} never seen; {_SAMPLES} of each are the least."
        )
    return texts


def _about_seeds(rows: dict[str, dict[str, Any]], gold: dict[str, Any] | None) -> list[str]:
    texts = []
    few = [f"{method} {len(row['seeds'])}" for method, row in rows.items() if len(row["seeds"]) < _SEEDS]
    if few:
        texts.append(f"few seeds ({', '.join(few)}). Take at least {_SEEDS}.")
    alone = sorted({seed for row in rows.values() for seed in row["seeds"] if gold and seed not in gold["seeds"]})
    if alone:
        texts.append(f"no gold with seed {', '.join(map(str, alone))}: gaps leave such runs out.")
    return texts


def _about_outputs(row: dict[str, Any]) -> list[str]:
    broken = [split for split in SPLITS if not math.isfinite(row[f"loss_{split}"]["mean"])]
    return [f"outputs are not finite on {', '.join(broken)}: the model diverged."] if broken else []


def _about_method(row: dict[str, Any], gold: dict[str, Any]) -> list[str]:
    texts = []
    over = _worse(row, gold, "forget", with_loss=True)
    if over:
        texts.append(f"over-forgetting: {'; '.join(over)}.")
    # With an accuracy, the loss on these sets says what the accuracy says, only noisier.
    damage = [text for s in ("retain", "test") for text in _worse(row, gold, s, "accuracy_forget" not in row)]
    if damage:
        texts.append(f"retain damage: {'; '.join(damage)}.")
    fraction = row.get("time_fraction")
    if fraction and fraction["mean"] > 1:
        texts.append(f"slower than retraining, {fraction['mean']:.2g} times its time.")
    return texts


def _worse(row: dict[str, Any], gold: dict[str, Any], split: str, with_loss: bool) -> list[str]:
    """Where a method is worse than the gold by a margin and by twice the golds' deviation."""
    worse = []
    for kind, sign, unit in (("accuracy", -1, " %"), ("loss", 1, "")):
        name = f"{kind}_{split}"
        if name not in row or row[name]["gap"] is None or (kind == "loss" and not with_loss):
            continue
        margin = _POINTS if kind == "accuracy" else max(_LOSS, _LOSS * gold[name]["mean"])
        if sign * row[name]["gap"] > max(margin, 2 * (gold[name]["std"] or 0)):
            one, other = (_cell(r[name], _METRICS[name]) for r in (row, gold))
            worse.append(f"{split} {kind} {one}{unit}, gold {other}{unit}")
    return worse


# Writing


def write_report(
    results: Sequence[UnlearningResult], folder: str | os.PathLike[str], title: str = "", notes: str = ""
) -> None:
    """Write `report.md`, `report.json`, `accuracy.png` (language models: losses), `losses.png` and `tradeoff.png`.

    Args:
        results: All runs of all cases, see `table`.
        folder: Where to; it is made if it is not there.
        title: Heading of the report.
        notes: Markdown below it: what was run, and how.

    Raises:
        ValueError: no results, or what `table` refuses.
    """
    if not results:
        raise ValueError("A report must have results, got none.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(results)
    title, found = title or "Unlearning", _warnings(rows)
    content = {"title": title, "notes": notes, "warnings": found, "rows": rows}
    (folder / "report.json").write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(rows, title, notes, found), encoding="utf-8")
    _plot_accuracy(rows, folder / "accuracy.png")
    _plot_losses(results, folder / "losses.png")
    _plot_tradeoff(rows, folder / "tradeoff.png")


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(metric: dict[str, Any] | None, shown: _Metric) -> str:
    if metric is None:
        return "-"
    values = [value if value is None else shown.scale * value for value in metric["values"]]
    if all(value is None or math.isfinite(value) for value in values):
        text = spread(values, shown.digits)
        return f"≥ {text}" if metric.get("censored") else text
    return "not finite"


def _gap_cell(metric: dict[str, Any] | None, shown: _Metric) -> str:
    if metric is None or metric.get("gap") is None:
        return "-"
    return f"{shown.scale * metric['gap']:+.{shown.digits}f}"


def _markdown(rows: Sequence[dict[str, Any]], title: str, notes: str, found: Sequence[str]) -> str:
    blocks = [f"# {title}", notes.strip(), "## Warnings", "\n".join(f"- {text}" for text in found) or "None."]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        samples = ", ".join(f"{split} {number:,}" for split, number in of_case[0]["samples"].items())
        parameters = ", ".join(dict.fromkeys(f"{row['parameters']:,}" for row in of_case if row["parameters"]))
        blocks += [f"## {case}", f"Samples: {samples}. Trained parameters: {parameters or 'not known'}."]
        tables = _CLASSIFIER_TABLES if "accuracy_forget" in of_case[0] else _LANGUAGE_TABLES
        for heading, names in tables.items():
            names = [name for name in names if any(name in row for row in of_case)]
            if names:
                blocks += [f"### {heading}", _markdown_table(of_case, names)]
        said = [f"- {row['method']}: {note}" for row in of_case for note in row["notes"]]
        if said:
            blocks += ["### What the methods say", "\n".join(said)]
    blocks += ["## Figures", *(f"![]({name})" for name in ("accuracy.png", "losses.png", "tradeoff.png"))]
    blocks += ["## How to read it", _LEGEND.strip()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.MARKDOWN)
    shown.add_column("method")
    for name in names:
        shown.add_column(_METRICS[name].heading, justify="right")
        if _METRICS[name].gap:
            shown.add_column("gap", justify="right")
    for row in rows:
        cells = []
        for name in names:
            error = row.get(f"{name}_error")
            behind = f" ({_METRICS[name].scale * error['mean']:.{_METRICS[name].digits}f})" if error else ""
            cells.append(_cell(row.get(name), _METRICS[name]) + behind)
            if _METRICS[name].gap:
                cells.append(_gap_cell(row.get(name), _METRICS[name]))
        # Labels are no markup, neither rich's nor Markdown's.
        shown.add_row(Text(row["method"].replace("|", "\\|")), *cells)
    file = io.StringIO()
    Console(file=file, width=10_000).print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().strip().splitlines())


# Plots: figures without pyplot, which would choose a backend for the whole program.


def _styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method, the same in all figures of a report."""
    others = [method for method in dict.fromkeys(methods) if method not in (ORIGINAL, GOLD)]
    styles = {ORIGINAL: (_ORIGINAL_COLOUR, "o"), GOLD: (_GOLD_COLOUR, "*")}
    for index, method in enumerate(others):
        styles[method] = (COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)])
    return styles


def _by_case(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {case: [row for row in rows if row["case"] == case] for case in dict.fromkeys(row["case"] for row in rows)}


def _plot_accuracy(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar for the mean, a point for every seed, a line and a band for the golds' mean and deviation."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cases, styles = _by_case(rows), _styles(row["method"] for row in rows)
    heights = [1.1 + 0.36 * len(of_case) for of_case in cases.values()]
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (case, of_case) in zip(parts, cases.items()):
        kind = "accuracy" if "accuracy_forget" in of_case[0] else "loss"
        part.suptitle(case, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for axis, split in zip(part.subplots(1, len(SPLITS), sharey=True), SPLITS):
            shown = _METRICS[f"{kind}_{split}"]
            found = [row[f"{kind}_{split}"] for row in of_case]
            gold = next((metric for row, metric in zip(of_case, found) if row["method"] == GOLD), None)
            largest = 100.0
            if kind == "loss":
                finite = [value for metric in found for value in metric["values"] if math.isfinite(value)]
                largest = max(finite, default=1.0) or 1.0
            if gold and math.isfinite(gold["mean"]):
                middle, deviation = shown.scale * gold["mean"], shown.scale * (gold["std"] or 0)
                axis.axvspan(middle - deviation, middle + deviation, color=_GOLD_COLOUR, alpha=0.12, linewidth=0)
                axis.axvline(middle, color=_GOLD_COLOUR, linewidth=1.2, linestyle="--", zorder=3)
            for place, (row, metric) in enumerate(zip(of_case, found)):
                colour = styles[row["method"]][0]
                values = [shown.scale * value for value in metric["values"]]
                axis.barh(place, shown.scale * metric["mean"], color=colour, alpha=0.4, height=0.66)
                # Spread over the bar's width in the order of the seeds, so that equal values stay apart.
                offsets = [0.44 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
                axis.scatter(values, [place + offset for offset in offsets], color=colour, s=12, zorder=4)
                axis.text(1.06 * largest, place, _cell(metric, shown), va="center", fontsize=8.5)
            axis.set_xlim(0, 1.5 * largest)
            axis.set_xticks(
                [0, 25, 50, 75, 100] if kind == "accuracy" else [t for t in axis.get_xticks() if t <= largest]
            )
            unit = "accuracy (%)" if kind == "accuracy" else "loss (nats per token)"
            axis.set_xlabel(f"{split} {unit}", loc="left")
            axis.set_yticks(range(len(of_case)), [row["method"] for row in of_case])
            axis.set_ylim(len(of_case) - 0.5, -0.5)
            axis.spines["bottom"].set_bounds(0, largest)
            axis.tick_params(axis="y", length=0)
            tidy(axis, "x")
    handles = [
        Line2D([], [], color=_GOLD_COLOUR, linestyle="--", linewidth=1.2, label="mean of the golds"),
        Patch(color=_GOLD_COLOUR, alpha=0.12, linewidth=0, label="± their standard deviation"),
        Line2D([], [], color="0.3", linestyle="", marker="o", markersize=3.5, label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _plot_losses(results: Sequence[UnlearningResult], path: Path) -> None:
    """Histograms of the losses of forget and held-out samples, a small one for every method, all seeds together."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cases = _groups(results)
    lines = [math.ceil(len(methods) / 5) for methods in cases.values()]
    heights = [0.7 + 1.75 * number for number in lines]
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, number, (case, methods) in zip(parts, lines, cases.items()):
        part.suptitle(case, x=0.01, ha="left", fontsize=12, fontweight="bold")
        pooled = {}
        for method, runs in methods.items():
            pairs = [(run.outcomes["forget"].losses, _heldout(run).losses) for run in runs.values()]
            pooled[method] = [np.concatenate(losses) for losses in zip(*pairs)]
        everything = np.concatenate([losses for pair in pooled.values() for losses in pair])
        finite = everything[np.isfinite(everything)]
        # Losses of well-fitted samples reach down to nothing; what is below the first bin is counted in it.
        low, high = np.quantile(finite, [0.02, 1]) if len(finite) else (0.1, 1.0)
        low = max(low, 1e-6)
        bins = np.geomspace(low, max(high, 10 * low), 31)
        columns = math.ceil(len(methods) / number)
        axes = part.subplots(number, columns, squeeze=False, sharex=True).flat
        for axis, (method, pair) in zip(axes, pooled.items()):
            for losses, colour in zip(pair, (COLOURS[1], COLOURS[0])):
                counts, _ = np.histogram(np.clip(losses[np.isfinite(losses)], bins[0], bins[-1]), bins)
                shares = counts / max(len(losses), 1)
                axis.stairs(shares, bins, fill=True, color=colour, alpha=0.35)
                axis.stairs(shares, bins, color=colour, linewidth=1.2)
            axis.set_ylim(bottom=0)
            axis.set_title(method, loc="left", fontsize=9.5)
            axis.set_xscale("log")
            axis.tick_params(labelsize=8.5)
            # Heights tell nothing that areas do not, and a narrow peak would flatten all others.
            axis.set_yticks([])
            tidy(axis, "x")
        for place, axis in enumerate(part.axes):
            # The lowest axis of a column has the label: those below it are empty.
            if place + columns >= len(pooled) > place:
                axis.set_xlabel("loss (nats)", fontsize=9)
                axis.tick_params(labelbottom=True)
            if place % columns == 0:
                axis.set_ylabel("share of samples", fontsize=9)
            axis.set_visible(place < len(pooled))
    handles = [
        Patch(color=COLOURS[1], alpha=0.6, label="forget set"),
        Patch(color=COLOURS[0], alpha=0.6, label="held-out"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _gap_to_gold(row: dict[str, Any]) -> tuple[float | None, list[float]]:
    """What the trade-off shows, and its values by seed: JS, language models: the gap of the forget loss."""
    if "js_forget" in row:
        return row["js_forget"]["mean"], row["js_forget"]["values"]
    gap = row["loss_forget"].get("gap", row["loss_forget"]["std"])
    return (None if gap is None else abs(gap)), []


def _plot_tradeoff(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Distance to the gold against time: a point for the mean, a faint one for every seed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    cases, styles = _by_case(rows), _styles(row["method"] for row in rows)
    columns = min(3, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(3.9 * columns + 2.2, 3.5 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (case, of_case) in zip(axes, cases.items()):
        gold = next((row for row in of_case if row["method"] == GOLD), None)
        original = next((row for row in of_case if row["method"] == ORIGINAL), None)
        if gold and "seconds" in gold:
            axis.axvline(gold["seconds"]["mean"], color=_GOLD_COLOUR, linewidth=1, linestyle="--", zorder=1)
        if gold and (noise := _gap_to_gold(gold)[0]) is not None:
            axis.axhline(noise, color=_GOLD_COLOUR, linewidth=1, linestyle=":", zorder=1)
        if original and (gap := _gap_to_gold(original)[0]) is not None:
            axis.axhline(gap, color=_ORIGINAL_COLOUR, linewidth=1.2, zorder=1)
        for row in of_case:
            gap, values = _gap_to_gold(row)
            if row["method"] in (ORIGINAL, GOLD) or gap is None or "seconds" not in row:
                continue
            colour, marker = styles[row["method"]]
            if len(values) > 1 and len(values) == len(row["seconds"]["values"]):
                known = [(t, v) for t, v in zip(row["seconds"]["values"], values) if t is not None and v is not None]
                axis.scatter(*zip(*known), color=colour, marker=marker, s=14, alpha=0.35, linewidth=0)
            axis.scatter(row["seconds"]["mean"], gap, color=colour, marker=marker, s=48, zorder=3)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(bottom=0)
        if not axis.collections:
            text = "no method with a time and a gold"
            axis.text(0.5, 0.5, text, ha="center", va="center", color="0.4", transform=axis.transAxes)
            axis.set_xticks([])
        axis.set_title(case, loc="left", fontsize=11)
        axis.set_xlabel("seconds")
        tidy(axis, "both")
        classifier = "js_forget" in of_case[0]
        axis.set_ylabel("JS to gold on forget (nats)" if classifier else "|forget loss - gold's| (nats)")
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    handles = [
        Line2D([], [], color=_ORIGINAL_COLOUR, linewidth=1.2, label="original"),
        Line2D([], [], color=_GOLD_COLOUR, linewidth=1, linestyle=":", label="between golds"),
        Line2D([], [], color=_GOLD_COLOUR, linewidth=1, linestyle="--", label="time of retraining"),
    ]
    for method, (colour, marker) in styles.items():
        if method not in (ORIGINAL, GOLD):
            handles.append(Line2D([], [], color=colour, linestyle="", marker=marker, label=method))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
