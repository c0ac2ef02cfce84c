"""The written report of an unlearning experiment: tables, warnings and figures in Markdown, and the numbers in JSON."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_whole
from .figures import accuracy_figure, losses_figure, tradeoff_figure
from .findings import warnings
from .language import UTILITY
from .results import SPLITS, UnlearningResult
from .tables import METRICS, Metric, by_case, cell, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The metrics in the tables of a case. The error of an attack is shown behind its success.
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
_BENCHMARK_TABLES = {
    "TOFU": [
        *("forget_quality", "log_forget_quality", "model_utility", "truth_ratio"),
        *("extraction_forget", "memorised_forget", "rouge_forget", "loss_auc", "min_k_auc"),
    ],
    "Parts of the model utility": [f"{part}_{name}" for name in UTILITY for part in ("probability", "rouge", "truth")],
    "What the models expect": [f"loss_{split}" for split in SPLITS],
    "What the models write": [f"{name}_{split}" for name in ("reproduced", "extraction") for split in SPLITS],
    **_MEMBERSHIP,
}
_BENCHMARK_LEGEND = """
- Forget quality is the p-value of a Kolmogorov-Smirnov test between the truth ratios of a model and of the gold of the
  same seed; in the gold's row, between golds of different seeds. It is near 1 if they cannot be told apart, and the
  fewer the questions, the higher it is: log10 shows how small it gets.
- Model utility is the harmonic mean of nine parts: probability of the answer (of real authors and world facts its share
  among right and wrong answers), ROUGE-L recall of what is written, and max(0, 1 - truth ratio), on authors to retain,
  real authors and world facts.
- The truth ratio R of a question of TOFU is the probability of its wrong answers, by that of a paraphrase of the right
  one, each to the power of one over its length, with the geometric mean over the wrong ones.
- Extraction is the share of an answer, its end, that is written once the rest is given; exact memorisation the share of
  tokens that are the likeliest ones. Both, and min-k, leave out the end mark. (open-unlearning gives the extraction
  strength of one token where not even the last one is right, which is 0 here.)
- Loss AUC and min-k AUC are those of attacks with one threshold for all questions, on the mean loss and on that of the
  40 % of the tokens that are expected least: 1 if all forgotten answers look better known than those on authors never
  seen, 0.5 if they cannot be told apart.
"""
_LEGEND = """\
The gold (retrain) is a model retrained without the forget set. The tables show means ± standard deviations over seeds;
accuracies, reproduction, MIA and TPR are in percent; a gap is the difference to the gold of the same seed. The best
value is the gold's, not the lowest or the highest.

- Tug of war is the product over forget, retain and test of 1 - |accuracy - gold's accuracy|.
- JS, activation distance and L1 are the Jensen-Shannon divergence (nats), the mean Euclidean and the mean L1 distance
  of the predicted distributions. In the gold's row they are distances between golds of different seeds. JS / golds' JS
  is 1 for a model that is as far from the gold as golds are from one another.
- Reproduced are the samples whose target tokens are all right; extraction is the mean extraction strength; truth ratio
  is the mean of min(R, 1/R) on the forget set for R = mean P(wrong) / P(right), which is 1 where wrong answers are as
  likely as the right one.
- MIA is the share of the forget set that an attacker takes for data never seen. Population AUC is that of one threshold
  for all samples, between the forget set and data never seen. Per-example AUC and TPR are those of LiRA with the golds
  as reference models (in the gold's row: the other golds), with the standard error for so many samples. An AUC of 0.5
  means that the forget set cannot be told from data never seen; below 0.5, it stands out by low confidence. Damage to
  the test set raises the AUC too.
- Relearn steps are the training steps until the forget accuracy is back, with ≥ where runs stopped before that.
- Of retraining is the time of a run over that of the gold of its seed: of processor time where a CPU does the work, so
  that other work on the machine changes little, of wall time elsewhere.
"""


def write_report(
    results: Sequence[UnlearningResult], folder: str | os.PathLike[str], title: str = "", notes: str = ""
) -> None:
    """Writes `report.md`, `report.json`, `accuracy.png` (of language models: losses), `losses.png`, `tradeoff.png`.

    Args:
        results: all runs of all cases, see `table`.
        folder: the folder of the report, which is made if it is not there.
        title: the heading of the report.
        notes: Markdown below the heading that says what was run, and how.

    Raises:
        ValueError: there are no results, or `table` refuses them.
    """
    if not results:
        raise ValueError("A report must have results, got none.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(results)
    title, found = title or "Unlearning", warnings(rows)
    content = {"title": title, "notes": notes, "warnings": found, "rows": rows}
    write_whole(folder / "report.json", json.dumps(finite(content), indent=1) + "\n")
    write_whole(folder / "report.md", _markdown(rows, title, notes, found))
    write_whole(folder / "accuracy.png", _png(accuracy_figure(rows)))
    write_whole(folder / "losses.png", _png(losses_figure(results)))
    write_whole(folder / "tradeoff.png", _png(tradeoff_figure(rows)))


def sentences(report: dict[str, Any]) -> list[str]:
    """Returns what a method says of its run, in sentences.

    Args:
        report: the facts, `UnlearningReport.to_dict()`.
    """
    # Only sentences need the methods, and with them the Trainer.
    from ..methods.base import UnlearningReport

    return UnlearningReport.from_dict(report).notes()


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def finite(value: Any) -> Any:
    """Returns a value with None in place of what is not finite: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _gap_cell(metric: dict[str, Any] | None, shown: Metric) -> str:
    if metric is None or metric.get("gap") is None:
        return "-"
    return f"{shown.scale * metric['gap']:+.{shown.digits}f}"


def _tables(row: dict[str, Any]) -> dict[str, list[str]]:
    if "accuracy_forget" in row:
        return _CLASSIFIER_TABLES
    return _BENCHMARK_TABLES if "model_utility" in row else _LANGUAGE_TABLES


def _markdown(rows: Sequence[dict[str, Any]], title: str, notes: str, found: Sequence[str]) -> str:
    blocks = [f"# {title}", notes.strip(), "## Warnings", "\n".join(f"- {text}" for text in found) or "None."]
    for case, of_case in by_case(rows).items():
        samples = ", ".join(f"{split} {number:,}" for split, number in of_case[0]["samples"].items())
        parameters = ", ".join(dict.fromkeys(f"{row['parameters']:,}" for row in of_case if row["parameters"]))
        blocks += [f"## {case}", f"Samples: {samples}. Trained parameters: {parameters or 'not known'}."]
        for heading, names in _tables(of_case[0]).items():
            names = [name for name in names if any(name in row for row in of_case)]
            if names:
                blocks += [f"### {heading}", markdown_table(of_case, names)]
        said = dict.fromkeys(
            f"- {row['method']}: {sentence}"
            for row in of_case
            for report in row["reports"]
            if report is not None
            for sentence in sentences(report)
        )
        if said:
            blocks += ["### What the methods say", "\n".join(said)]
    blocks += ["## Figures", *(f"![]({name})" for name in ("accuracy.png", "losses.png", "tradeoff.png"))]
    benchmark = _BENCHMARK_LEGEND if any("model_utility" in row for row in rows) else ""
    blocks += ["## How to read it", _LEGEND.strip() + benchmark.rstrip()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Returns some metrics of some rows of `table` as a table in Markdown."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.MARKDOWN)
    shown.add_column("method")
    for name in names:
        shown.add_column(METRICS[name].heading, justify="right")
        if METRICS[name].gap:
            shown.add_column("gap", justify="right")
    for row in rows:
        cells = []
        for name in names:
            error = row.get(f"{name}_error")
            behind = f" ({METRICS[name].scale * error['mean']:.{METRICS[name].digits}f})" if error else ""
            cells.append(cell(row.get(name), METRICS[name]) + behind)
            if METRICS[name].gap:
                cells.append(_gap_cell(row.get(name), METRICS[name]))
        # Labels are no markup, neither rich's nor Markdown's.
        shown.add_row(Text(row["method"].replace("|", "\\|")), *cells)
    file = io.StringIO()
    Console(file=file, width=10_000).print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().strip().splitlines())
