"""Metrics of what a language model writes and expects: TOFU's, with the definitions of its two public evaluations.

TOFU is Maini et al. 2024, "TOFU: a task of fictitious unlearning for LLMs". The definitions are those of the evaluation
that came with it (locuslab/tofu) and of open-unlearning (Dorna et al. 2025), which agree where both have one. A
probability is that of an answer and its end mark, to the power of one over their number of tokens. Everything but
`truth_ratio` is a pure function of outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import harmonic_mean
from typing import Any

import numpy as np
from torch import nn

from .metrics import Outcome, observe

UTILITY = {"retain_questions": "retain", "real_authors": "real authors", "world_facts": "world facts"}
"""What the sets of questions that the model utility is measured on are called in outcomes, and in tables."""


def truth_ratio(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], wrong_loader: Iterable[Mapping[str, Any]]
) -> np.ndarray:
    """Returns how likely wrong answers are, relative to the right one, for every sample (Maini et al. 2024, TOFU).

    The ratio is the mean over wrong answers of `P(wrong)^(1/length) / P(right)^(1/length)`: it is near 0 for what a
    model knows, and near 1 where it cannot tell right from wrong. Maini et al. take a paraphrase for the right answer.

    Args:
        model: a language model that writes an answer token by token, see `observe`.
        loader: questions with the right answers, n samples.
        wrong_loader: the same questions with wrong answers: all those of the first sample, then those of the second.

    Returns:
        Ratios of shape `(n,)`.

    Raises:
        ValueError: samples do not all have the same number of wrong answers.
    """
    right, wrong = observe(model, loader).losses, observe(model, wrong_loader).losses
    if len(wrong) % len(right):
        raise ValueError(
            f"Every sample must have as many wrong answers, got {len(wrong)} wrong answers of {len(right)} samples."
        )
    logs = -wrong.reshape(len(right), -1)
    return np.exp(np.logaddexp.reduce(logs, axis=1) - math.log(logs.shape[1]) + right)


def truth_score(ratios: np.ndarray) -> float:
    """Returns TOFU's aggregate of the truth ratios R of a forget set, the mean of min(R, 1/R).

    It is at most 1, which it reaches where wrong answers are as likely as the right ones (Maini et al. 2024).

    Args:
        ratios: shape `(n,)`.
    """
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratios, 1 / ratios).mean())


def answer_ratios(outcome: Outcome) -> np.ndarray:
    """Returns the truth ratio of every question: how likely its wrong answers are, relative to the right one.

    It is `P(wrong) / P(right)` with the geometric mean over the wrong answers, exp of their mean loss, as both public
    evaluations compute it; the formula in the paper, and `truth_ratio`, have the arithmetic mean. The right answer is
    the paraphrase where there is one. (open-unlearning adds 1e-10 to the denominator.)

    Args:
        outcome: with `wrong`, on n questions.

    Returns:
        Shape `(n,)`: near 0 for what a model knows.
    """
    assert outcome.wrong is not None
    right = outcome.losses if outcome.paraphrase is None else outcome.paraphrase
    return np.exp(right - outcome.wrong.mean(1))


def forget_quality(forget: Outcome, gold: Outcome) -> float:
    """Returns TOFU's forget quality: the p-value of a two-sample Kolmogorov-Smirnov test.

    The two samples are the truth ratios of a model and of the gold on the forget set. The p-value is high where they
    cannot be told apart. It depends on the number of questions: the fewer, the higher.

    Args:
        forget: outcome of the model on the forget set.
        gold: outcome of the gold on the same questions.

    Returns:
        From 0 to 1, NaN if outputs of a model are not finite.
    """
    from scipy.stats import ks_2samp

    one, other = answer_ratios(forget), answer_ratios(gold)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.nan
    return float(ks_2samp(one, other).pvalue)


def utility_parts(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Returns the nine parts of TOFU's model utility, from 0 to 1, by name and set, such as `"rouge_real_authors"`.

    - `probability`: the mean probability of the answer; of real authors and world facts, its share of the sum with
      those of the wrong answers.
    - `rouge`: the mean ROUGE-L recall of what the model writes.
    - `truth`: the mean of max(0, 1 - R) over truth ratios R.

    Args:
        outcomes: those on the sets that `UTILITY` names, with `wrong` and `rouge`.
    """
    found = {}
    for name in UTILITY:
        outcome = outcomes[name]
        assert outcome.wrong is not None and outcome.rouge is not None
        probability = np.exp(-outcome.losses)
        if name != "retain_questions":
            probability = probability / (probability + np.exp(-outcome.wrong).sum(1))
        found[f"probability_{name}"] = float(probability.mean())
        found[f"rouge_{name}"] = float(np.nanmean(outcome.rouge))
        found[f"truth_{name}"] = float(np.maximum(0, 1 - answer_ratios(outcome)).mean())
    return found


def model_utility(parts: Mapping[str, float]) -> float:
    """Returns TOFU's model utility, the harmonic mean of its parts; NaN if one of them is."""
    values = list(parts.values())
    return harmonic_mean(values) if all(map(math.isfinite, values)) else math.nan


def attack_auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """Returns how well a loss tells members from non-members: the area under the ROC curve, as open-unlearning has it.

    Args:
        members: losses, or what else is low for what a model knows, of the forget set.
        non_members: those of samples that were never seen.

    Returns:
        1 if every member has a lower loss than every other sample, 0.5 if they cannot be told apart; NaN if outputs of
        the model are not finite.
    """
    from sklearn.metrics import roc_auc_score

    scores = -np.concatenate([members, non_members])
    if not np.isfinite(scores).all():
        return math.nan
    return float(roc_auc_score(np.arange(len(scores)) < len(members), scores))


def benchmark(outcomes: Mapping[str, Outcome], non_members: Outcome) -> dict[str, float]:
    """Returns what TOFU measures of one model, by the names of metrics in `tables.METRICS`.

    Args:
        outcomes: those on the forget set and on the sets that `UTILITY` names. Without the latter there is nothing.
        non_members: the outcome on authors that the model never saw.
    """
    if not UTILITY.keys() <= outcomes.keys():
        return {}
    forget, parts = outcomes["forget"], utility_parts(outcomes)
    assert forget.rouge is not None and forget.memorised is not None
    assert forget.min_k is not None and non_members.min_k is not None
    return {
        "model_utility": model_utility(parts),
        **parts,
        "truth_ratio": truth_score(answer_ratios(forget)),
        "memorised_forget": float(forget.memorised.mean()),
        "rouge_forget": float(np.nanmean(forget.rouge)),
        "loss_auc": attack_auc(forget.losses, non_members.losses),
        "min_k_auc": attack_auc(forget.min_k, non_members.min_k),
    }
