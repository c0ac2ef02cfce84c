"""TOFU's metrics: every one against values worked out by hand."""

from __future__ import annotations

import math
from statistics import harmonic_mean
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from peft_ext.unlearning.evaluation import language, report
from peft_ext.unlearning.evaluation.metrics import Outcome, observe
from peft_ext.unlearning.evaluation.results import UnlearningResult
from peft_ext.unlearning.evaluation.tables import table


class FixedForCausalLM(nn.Module):
    """Answers every batch with the logits in it."""

    output: ClassVar[Any] = CausalLMOutput

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, logits: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=logits)


def batch(probabilities: list[list[float]]) -> dict[str, torch.Tensor]:
    """Answers whose tokens, all of class 0 of 2, have these probabilities; a 0 stands for no token."""
    p = torch.tensor(probabilities)
    known = p.clamp(min=0.5)
    logits = torch.stack([torch.where(p > 0, p, known), 1 - torch.where(p > 0, p, known)], 2).log()
    labels = torch.where(p > 0, 0, -100)
    before = torch.full((len(p), 1), -100)
    return {
        "logits": torch.cat([logits, torch.zeros(len(p), 1, 2)], 1),
        "labels": torch.cat([before, labels], 1),
    }


def test_the_end_mark_is_left_out_of_what_is_written_and_not_of_the_loss() -> None:
    """Five tokens and an end mark; three tokens and an end mark; an end mark alone."""
    given = batch([[0.9, 0.2, 0.4, 0.8, 0.7, 0.3], [0.9, 0.8, 0.3, 0.9, 0, 0], [0.6, 0, 0, 0, 0, 0]])
    found = observe(FixedForCausalLM(), [given], last_target=False)
    assert found.extraction == pytest.approx([2 / 5, 0, 1])
    assert found.memorised == pytest.approx([3 / 5, 2 / 3, 1])
    # 40 % of five tokens are two, of three one, and of one at least one.
    assert found.min_k == pytest.approx([-(math.log(0.2) + math.log(0.4)) / 2, -math.log(0.3), -math.log(0.6)])
    assert found.losses[1] == pytest.approx(-math.log(0.9 * 0.8 * 0.3 * 0.9) / 4)
    with_it = observe(FixedForCausalLM(), [given])
    assert with_it.extraction == pytest.approx([0, 1 / 4, 1]) and with_it.memorised == pytest.approx([3 / 6, 3 / 4, 1])
    assert with_it.min_k is not None and with_it.min_k[0] == pytest.approx(-(math.log(0.2) + math.log(0.3)) / 2)


def asked(right: list[float], wrong: list[list[float]], **more: Any) -> Outcome:
    """An outcome whose answers have these probabilities."""
    losses = -np.log(right)
    zeros = np.zeros(len(right))
    return Outcome(losses, zeros > 0, None, -losses, wrong=-np.log(wrong), rouge=zeros + 0.5, **more)


def test_truth_ratios_have_the_geometric_mean_of_wrong_answers_and_the_paraphrase() -> None:
    wrong = [[0.1, 0.4], [0.3, 0.3]]
    assert language.answer_ratios(asked([0.5, 0.1], wrong)) == pytest.approx([0.2 / 0.5, 0.3 / 0.1])
    paraphrase = -np.log([0.4, 0.6])
    ratios = language.answer_ratios(asked([0.5, 0.1], wrong, paraphrase=paraphrase))
    assert ratios == pytest.approx([0.2 / 0.4, 0.3 / 0.6])


def with_ratios(ratios: Any) -> Outcome:
    """An outcome with these truth ratios."""
    ratios = np.asarray(ratios, np.float64)
    return asked([0.01] * len(ratios), [[0.01 * ratio] for ratio in ratios])


def test_forget_quality() -> None:
    same = np.linspace(0.1, 0.9, 20)
    assert language.forget_quality(with_ratios(same), with_ratios(same[::-1])) == 1
    # Separated samples of n each: the exact p-value of the two-sided test is 2 / (2n choose n).
    apart = language.forget_quality(with_ratios(same), with_ratios(same + 1))
    assert apart == pytest.approx(2 / math.comb(40, 20))
    assert language.forget_quality(with_ratios([1, 2, 3]), with_ratios([4, 5, 6])) == pytest.approx(0.1)
    assert math.isnan(language.forget_quality(with_ratios([math.nan, 1]), with_ratios([1, 2])))


def utility() -> dict[str, Outcome]:
    outcomes = {
        "retain_questions": asked([0.8, 0.4], [[0.1, 0.1], [0.6, 0.6]], paraphrase=-np.log([0.2, 0.4])),
        "real_authors": asked([0.5, 0.2], [[0.3, 0.2], [0.6, 0.2]]),
        "world_facts": asked([0.9, 0.6], [[0.3, 0.3], [0.2, 0.2]]),
    }
    outcomes["world_facts"].rouge = np.array([0.25, math.nan])
    return outcomes


def test_model_utility_is_the_harmonic_mean_of_nine_parts() -> None:
    found = language.utility_parts(utility())
    expected = {
        "probability_retain_questions": 0.6,
        "rouge_retain_questions": 0.5,
        "truth_retain_questions": ((1 - 0.1 / 0.2) + 0) / 2,
        "probability_real_authors": (0.5 / 1 + 0.2 / 1) / 2,
        "rouge_real_authors": 0.5,
        "truth_real_authors": ((1 - math.sqrt(0.06) / 0.5) + 0) / 2,
        "probability_world_facts": (0.9 / 1.5 + 0.6 / 1) / 2,
        "rouge_world_facts": 0.25,
        "truth_world_facts": ((1 - 0.3 / 0.9) + (1 - 0.2 / 0.6)) / 2,
    }
    assert found == pytest.approx(expected)
    assert language.model_utility(found) == pytest.approx(9 / sum(1 / value for value in expected.values()))
    assert language.model_utility({"a": 0.0, "b": 1.0}) == 0
    assert math.isnan(language.model_utility({"a": math.nan, "b": 1.0}))


def test_attacks_are_1_where_the_forgotten_are_better_known() -> None:
    one, other = np.array([1.0, 2.0]), np.array([3.0, 4.0, 1.5])
    assert language.attack_auc(one, other) == pytest.approx(5 / 6)
    assert language.attack_auc(one, one + 5) == 1 and language.attack_auc(one + 5, one) == 0
    assert math.isnan(language.attack_auc(one, other * math.nan))


def run(method: str, seed: int, ratios: np.ndarray) -> UnlearningResult:
    """A run with these truth ratios on the forget set."""
    plain = with_ratios(ratios)
    plain.memorised, plain.min_k, plain.extraction = plain.losses * 0 + 0.25, plain.losses * 2, plain.losses * 0 + 0.75
    plain.paraphrase = plain.losses
    return UnlearningResult("forget01", method, seed, {"forget": plain, "retain": plain, "test": plain, **utility()})


def test_the_report_shows_the_benchmark(tmp_path: Any) -> None:
    values = np.linspace(0.3, 0.9, 20)
    results = []
    for seed in range(2):
        results += [run("original", seed, values / 10), run("retrain", seed, values), run("ours", seed, values + 0.01)]
    results[4] = run("retrain", 1, values[:20] + 0.02)
    for number, result in enumerate(results):
        result.save(tmp_path / str(number))
    loaded = [UnlearningResult.load(tmp_path / str(number)) for number in range(len(results))]
    original, gold, ours = table(loaded)
    assert ours["forget_quality"]["values"] == [
        language.forget_quality(loaded[2].outcomes["forget"], loaded[1].outcomes["forget"]),
        language.forget_quality(loaded[5].outcomes["forget"], loaded[4].outcomes["forget"]),
    ]
    # The gold's is that of one gold against the other.
    assert gold["forget_quality"]["values"] == [
        language.forget_quality(loaded[1].outcomes["forget"], loaded[4].outcomes["forget"])
    ]
    assert gold["forget_quality"]["mean"] > 0.9 and original["forget_quality"]["mean"] < 1e-8
    assert original["log_forget_quality"]["values"][0] == pytest.approx(
        math.log10(original["forget_quality"]["values"][0])
    )
    assert ours["model_utility"]["mean"] == pytest.approx(harmonic_mean(language.utility_parts(utility()).values()))
    assert ours["memorised_forget"]["mean"] == 0.25 and ours["loss_auc"]["mean"] == ours["min_k_auc"]["mean"] == 0.5
    assert ours["truth_ratio"]["values"][0] == pytest.approx(np.mean(values + 0.01))
    assert "tug_of_war" not in ours
    report.write_report(loaded, tmp_path, "TOFU")
    text = (tmp_path / "report.md").read_text()
    assert "### TOFU" in text and "| forget quality |" in " ".join(text.split()) and "probability, real authors" in text
