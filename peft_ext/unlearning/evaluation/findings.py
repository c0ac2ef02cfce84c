"""What a reader must know before believing the table of an unlearning experiment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .results import GOLD, ORIGINAL, SPLITS
from .tables import METRICS, by_case, cell

# A difference to the gold counts if it is above one of these margins and above twice the golds' standard deviation.
_POINTS = 0.02  # margin of an accuracy
_LOSS = 0.1  # margin of a loss: as many nats, or this share of the gold's loss if that is more
_SEEDS = 3
_SAMPLES = 100  # with fewer, one sample is more than 1 %


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a sentence for everything that keeps a table from being believed as it is.

    The sentences tell of over-forgetting, damage to what should stay, models that diverged, methods slower than
    retraining, noise among the golds, and too few seeds or samples.

    Args:
        rows: all rows of `table`.
    """
    found = []
    for case, rows_of_case in by_case(rows).items():
        of_case = {row["method"]: row for row in rows_of_case}
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
    # Where accuracies are known, the losses on these sets would say the same with more noise.
    damage = [text for s in ("retain", "test") for text in _worse(row, gold, s, "accuracy_forget" not in row)]
    if damage:
        texts.append(f"retain damage: {'; '.join(damage)}.")
    fraction = row.get("time_fraction")
    if fraction and fraction["mean"] > 1:
        texts.append(f"slower than retraining, {fraction['mean']:.2g} times its time.")
    return texts


def _worse(row: dict[str, Any], gold: dict[str, Any], split: str, with_loss: bool) -> list[str]:
    """Returns a phrase for the accuracy and the loss that are worse than the gold's by more than the margin.

    Args:
        row: the row of the method.
        gold: the row of the gold.
        split: the set on which they are compared.
        with_loss: whether the loss is compared too.
    """
    worse = []
    for kind, sign, unit in (("accuracy", -1, " %"), ("loss", 1, "")):
        name = f"{kind}_{split}"
        if name not in row or row[name]["gap"] is None or (kind == "loss" and not with_loss):
            continue
        margin = _POINTS if kind == "accuracy" else max(_LOSS, _LOSS * gold[name]["mean"])
        if sign * row[name]["gap"] > max(margin, 2 * (gold[name]["std"] or 0)):
            one, other = (cell(r[name], METRICS[name]) for r in (row, gold))
            worse.append(f"{split} {kind} {one}{unit}, gold {other}{unit}")
    return worse
