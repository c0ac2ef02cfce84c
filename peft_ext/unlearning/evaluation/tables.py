"""The metrics of an unlearning experiment by case, method and seed, against the retrained gold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from ...presentation import spread
from . import language, metrics
from .results import GOLD, SPLITS, UnlearningResult, grouped


@dataclass(frozen=True)
class Metric:
    """Says how a metric is shown.

    Attributes:
        heading: the heading of its column.
        digits: how many digits stand after the point.
        scale: what the metric is multiplied with.
        gap: whether a column with the gap to the gold follows.
    """

    heading: str
    digits: int = 3
    scale: float = 1
    gap: bool = False


_PARTS = ("probability", "rouge", "truth")

METRICS = {
    **{f"accuracy_{split}": Metric(f"{split} accuracy", 1, 100, gap=True) for split in SPLITS},
    "tug_of_war": Metric("tug of war"),
    **{f"loss_{split}": Metric(f"{split} loss", 3, gap=True) for split in SPLITS},
    **{f"reproduced_{split}": Metric(f"{split} reproduced", 1, 100) for split in SPLITS},
    **{f"extraction_{split}": Metric(f"{split} extraction", 3) for split in SPLITS},
    "forget_quality": Metric("forget quality"),
    "log_forget_quality": Metric("log10", 2),
    "model_utility": Metric("model utility", gap=True),
    **{f"{part}_{name}": Metric(f"{part}, {heading}") for name, heading in language.UTILITY.items() for part in _PARTS},
    "memorised_forget": Metric("exact memorisation", gap=True),
    "rouge_forget": Metric("forget ROUGE-L", gap=True),
    "truth_ratio": Metric("truth ratio", 3, gap=True),
    "loss_auc": Metric("loss AUC", gap=True),
    "min_k_auc": Metric("min-k AUC", gap=True),
    "js_forget": Metric("JS forget", 4),
    "js_ratio": Metric("JS / golds' JS", 2),
    "js_test": Metric("JS test", 4),
    "distance_forget": Metric("activation distance forget"),
    "distance_test": Metric("activation distance test"),
    "l1_forget": Metric("L1 forget"),
    "l1_test": Metric("L1 test"),
    "mia": Metric("MIA", 1, 100, gap=True),
    "population_auc": Metric("population AUC"),
    "attack_auc": Metric("per-example AUC (error)"),
    "attack_auc_error": Metric("error"),
    "attack_tpr": Metric("TPR at 1 % FPR (error)", 1, 100),
    "attack_tpr_error": Metric("error", 1, 100),
    "relearn_steps": Metric("relearn steps", 0),
    "seconds": Metric("seconds", 1),
    "time_fraction": Metric("of retraining"),
    "peak_memory": Metric("peak MB", 1, 1e-6),
}
"""All metrics that a row can have, in their order."""


def _distances(run: UnlearningResult, gold: UnlearningResult) -> dict[str, float]:
    found = {}
    forget, forget_of_gold = run.outcomes["forget"], gold.outcomes["forget"]
    if forget.wrong is not None and forget_of_gold.wrong is not None:
        quality = language.forget_quality(forget, forget_of_gold)
        found["forget_quality"] = quality
        found["log_forget_quality"] = math.log10(quality) if quality else -math.inf
    for split in ("forget", "test"):
        p, q = run.outcomes[split].log_probs, gold.outcomes[split].log_probs
        if p is not None and q is not None:
            found[f"js_{split}"] = metrics.jensen_shannon(p, q)
            found[f"distance_{split}"] = metrics.activation_distance(p, q)
            found[f"l1_{split}"] = metrics.l1(p, q)
    return found


def _own_metrics(run: UnlearningResult, golds: dict[int, UnlearningResult]) -> dict[str, float | None]:
    """Returns all metrics but those that depend on the gold of the same seed."""
    found: dict[str, float | None] = {}
    classifier = run.outcomes["forget"].log_probs is not None
    for split in SPLITS:
        outcome = run.outcomes[split]
        found[f"{'accuracy' if classifier else 'reproduced'}_{split}"] = float(outcome.correct.mean())
        found[f"loss_{split}"] = float(outcome.losses.mean())
        if outcome.extraction is not None:
            found[f"extraction_{split}"] = float(outcome.extraction.mean())
    forget, heldout = run.outcomes["forget"], run.non_members
    if forget.truth_ratio is not None:
        found["truth_ratio"] = language.truth_score(forget.truth_ratio)
    found |= language.benchmark(run.outcomes, heldout)
    found["mia"] = metrics.membership_attack(run.outcomes["retain"], run.outcomes["test"], forget)
    found["population_auc"] = metrics.population_attack(forget, heldout)
    references = [(gold.outcomes["forget"], gold.non_members) for gold in golds.values() if gold is not run]
    if references:
        attack = metrics.per_example_attack(forget, heldout, references)
        found |= {f"attack_{name}": value for name, value in dataclasses.asdict(attack).items()}
    found["relearn_steps"] = run.relearn_limit if run.relearn_steps is None else run.relearn_steps
    found["seconds"] = run.seconds
    found["peak_memory"] = run.peak_memory
    return found


def _against_gold(run: UnlearningResult, gold: UnlearningResult) -> dict[str, float]:
    found = _distances(run, gold)
    if "js_forget" in found:
        accuracies = [[float(r.outcomes[split].correct.mean()) for split in SPLITS] for r in (run, gold)]
        found["tug_of_war"] = metrics.tug_of_war(*accuracies)
    fraction = run.time_over(gold)
    if fraction is not None:
        found["time_fraction"] = fraction
    return found


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    present = [value for value in values if value is not None]
    deviation = stdev(present) if len(present) > 1 and all(map(math.isfinite, present)) else None
    return {"mean": mean(present) if present else None, "std": deviation, "values": list(values)}


def table(results: Sequence[UnlearningResult]) -> list[dict[str, Any]]:
    """Measures all runs and returns one row for every case and method.

    In each case the original comes first, then the gold, then the methods as they appear.

    Args:
        results: all runs of all cases.

    Returns:
        Rows with `"case"`, `"method"`, `"seeds"`, `"parameters"`, `"samples"` (a number for every set), `"reports"`
        (what the method said of its run with each seed, in the order of `"seeds"`; None where it said nothing), and
        for every metric that is known a dictionary under the metric's name:

        - `"values"` has one value for every seed, in the order of `"seeds"`, None where it is not known; `"mean"` and
          `"std"` are their mean and standard deviation (None for one seed).
        - `"gap"` and `"gap_std"` are mean and deviation of the difference to the gold of the same seed. The gold's own
          row does not have them.
        - `"censored"`, for `"relearn_steps"` alone, is the number of runs in which the accuracy was not back within
          the limit; the limit stands for these runs.

        In the gold's row, `js_...`, `distance_...`, `l1_...` and `forget_quality` are between golds of different seeds,
        with one value for every pair. Shares are fractions of 1.

    Raises:
        ValueError: two results have the same case, method and seed, results of a case are about other samples, or a
            set is missing.
    """
    rows = []
    for case, methods in grouped(results).items():
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
                # A gold is the gold of its own seed: only its distances to the other golds say something.
                found[seed] |= {"time_fraction": against.get("time_fraction")} if method == GOLD else against
            columns = {name: [values.get(name) for values in found.values()] for name in METRICS}
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
                "reports": [run.report for run in runs.values()],
            }
            for name in METRICS:
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


def by_case(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of a table by their case, in their order."""
    return {case: [row for row in rows if row["case"] == case] for case in dict.fromkeys(row["case"] for row in rows)}


def cell(metric: dict[str, Any] | None, shown: Metric) -> str:
    """Returns a metric as text: its mean and deviation over seeds, or a dash for a metric that is not known.

    Args:
        metric: the dictionary of one metric in a row of `table`.
        shown: how it is shown.
    """
    if metric is None:
        return "-"
    values = [value if value is None else shown.scale * value for value in metric["values"]]
    if all(value is None or math.isfinite(value) for value in values):
        text = spread(values, shown.digits)
        return f"≥ {text}" if metric.get("censored") else text
    return "not finite"
