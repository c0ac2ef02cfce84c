"""Metrics: known answers, ranges, and `observe` against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_models
import torch
import transformers
import unlearning_worker
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput

from peft_ext.unlearning.evaluation import language, metrics
from peft_ext.unlearning.evaluation.metrics import Outcome


def of_confidence(values) -> Outcome:
    values = np.asarray(values, np.float64)
    return Outcome(np.logaddexp(0, -values), values > 0, None, values)


class Fixed(nn.Module):
    """Answers every batch with the logits in it."""

    output: ClassVar[Any] = ImageClassifierOutput

    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.norm.eval()

    def forward(self, logits, scale=1.0):
        assert not self.dropout.training and not torch.is_grad_enabled()
        return self.output(logits=logits * scale)


class FixedForCausalLM(Fixed):
    output = CausalLMOutput


# Distances


def test_distances_of_two_samples_by_hand():
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.5, 0.5], [0.1, 0.9]])
    # The second: the mean is (0.5, 0.5), both divergences from it are the same.
    divergence = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert metrics.jensen_shannon(p, q) == pytest.approx(divergence / 2)
    assert metrics.activation_distance(p, q) == pytest.approx(math.sqrt(2 * 0.8**2) / 2)
    assert metrics.l1(p, q) == pytest.approx(1.6 / 2)


def test_distances_of_certain_predictions_reach_their_bounds():
    with np.errstate(divide="ignore"):
        p, q = np.log([[1.0, 0.0]]), np.log([[0.0, 1.0]])
    assert metrics.jensen_shannon(p, q) == pytest.approx(math.log(2))
    assert metrics.activation_distance(p, q) == pytest.approx(math.sqrt(2))
    assert metrics.l1(p, q) == pytest.approx(2)


logits = arrays(np.float64, (2, 5, 3), elements=st.floats(-40, 40))


@settings(max_examples=50, deadline=None)
@given(logits)
def test_distances_are_symmetric_and_bounded(z):
    p, q = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    for distance, bound in (
        (metrics.jensen_shannon, math.log(2)),
        (metrics.activation_distance, math.sqrt(2)),
        (metrics.l1, 2),
    ):
        assert distance(p, q) == pytest.approx(distance(q, p), abs=1e-12)
        assert -1e-12 <= distance(p, q) <= bound + 1e-12
        assert distance(p, p) == pytest.approx(0, abs=1e-12)
    assert metrics.activation_distance(p, q) <= metrics.l1(p, q) + 1e-12


def test_what_are_no_log_probabilities_is_refused():
    p = np.log([[0.5, 0.5]])
    with pytest.raises(ValueError, match="must be those of distributions"):
        metrics.jensen_shannon(np.exp(p), p)
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.l1(p, np.log([[0.5, 0.5], [0.5, 0.5]]))


def test_tug_of_war():
    assert metrics.tug_of_war([0.2, 0.9, 0.8], [0.0, 1.0, 0.9]) == pytest.approx(0.8 * 0.9 * 0.9)
    assert metrics.tug_of_war([0.0, 1.0, 0.9], [0.0, 1.0, 0.9]) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4))
def test_tug_of_war_is_symmetric_and_a_share(pairs):
    one, other = zip(*pairs)
    assert 0 <= metrics.tug_of_war(one, other) <= 1
    assert metrics.tug_of_war(one, other) == metrics.tug_of_war(other, one)


def test_truth_score_is_1_where_wrong_answers_are_as_likely():
    assert language.truth_score(np.array([1.0, 1.0])) == 1
    assert language.truth_score(np.array([0.5, 4.0, 0.0])) == pytest.approx((0.5 + 0.25 + 0) / 3)


# Attacks


def test_membership_attack_counts_who_looks_like_test_samples():
    random = np.random.default_rng(0)
    members, others = of_confidence(random.normal(8, 1, 500)), of_confidence(random.normal(-2, 1, 100))
    assert metrics.membership_attack(members, others, of_confidence([8.0, 9.0, -2.0, 7.5])) == 0.25
    assert metrics.membership_attack(members, others, others) > 0.98
    assert metrics.membership_attack(members, others, members) < 0.02


def test_membership_attack_does_not_depend_on_how_many_members_there_are():
    """Classes are balanced: the threshold is in the middle though there are forty times as many members."""
    random = np.random.default_rng(0)
    members, others = of_confidence(random.normal(1, 1, 4000)), of_confidence(random.normal(-1, 1, 100))
    target = of_confidence(random.normal(0, 1, 2000))
    assert metrics.membership_attack(members, others, target) == pytest.approx(0.5, abs=0.1)


def test_attacks_tell_separable_sets_and_not_equal_ones():
    random = np.random.default_rng(0)
    low, high = random.normal(-5, 1, 600), random.normal(5, 1, 600)
    references = [(of_confidence(random.normal(0, 1, 600)), of_confidence(random.normal(0, 1, 600))) for _ in range(3)]
    # One threshold learns its direction; the per-example attack says which way the forget set differs.
    assert metrics.population_attack(of_confidence(high), of_confidence(low)) > 0.99
    assert metrics.population_attack(of_confidence(low), of_confidence(high)) > 0.99
    kept = metrics.per_example_attack(of_confidence(high), of_confidence(low), references)
    assert kept.auc > 0.99 and kept.tpr > 0.99 and kept.auc_error < 0.005
    over = metrics.per_example_attack(of_confidence(low), of_confidence(high), references)
    assert over.auc < 0.01 and over.tpr == 0 and over.tpr_error > 0
    same = [of_confidence(random.normal(0, 1, 600)) for _ in range(2)]
    assert metrics.population_attack(*same) == pytest.approx(0.5, abs=0.06)
    none = metrics.per_example_attack(*same, references)
    assert none.auc == pytest.approx(0.5, abs=4 * none.auc_error)
    assert none.auc_error == pytest.approx(math.sqrt(1201 / (12 * 600 * 600)), rel=0.01)  # of a rank sum without signal
    assert none.tpr <= 0.01 + 4 * none.tpr_error and 0.002 < none.tpr_error < 0.03


def test_a_per_example_attack_compares_samples_with_themselves():
    """Members differ from others by less than samples differ among themselves: one threshold sees nothing."""
    random = np.random.default_rng(0)
    difficulty = random.normal(0, 10, (2, 400))

    def seen(forget=0.0):
        return [of_confidence(d + random.normal(0, 0.3, 400) + shift) for d, shift in zip(difficulty, (forget, 0))]

    forget, heldout = seen(forget=2)
    assert metrics.population_attack(forget, heldout) < 0.6
    attack = metrics.per_example_attack(forget, heldout, [tuple(seen()) for _ in range(3)])
    assert attack.auc > 0.99 and attack.tpr > 0.9


def test_many_references_have_a_variance_for_every_sample():
    """Half of the samples are noisy, and one of these is as far out as the members: it is no member."""
    random = np.random.default_rng(0)
    noise = np.repeat([0.1, 10.0], 100)
    references = [tuple(of_confidence(random.normal(0, noise)) for _ in range(2)) for _ in range(64)]
    forget = of_confidence(np.repeat([1.0, 0.0], 100))
    heldout = of_confidence(np.repeat([0.0, 8.0], 100))
    few = metrics.per_example_attack(forget, heldout, references[:63])
    many = metrics.per_example_attack(forget, heldout, references)
    assert few.auc < 0.5 and few.tpr == 0
    assert many.auc > 0.6 and many.tpr == 0.5


def test_one_percent_of_false_positives():
    """Of 200 others two may be above: the third largest is the threshold, and what equals it is not above."""
    others = np.arange(200.0)
    reference = [(of_confidence(np.zeros(4)), of_confidence(np.zeros(200)))]
    attack = metrics.per_example_attack(of_confidence([196.0, 197.0, 197.5, 300.0]), of_confidence(others), reference)
    assert attack.tpr == 0.5


def test_attacks_refuse_references_that_do_not_fit():
    outcome = of_confidence(np.zeros(3))
    with pytest.raises(ValueError, match="one reference model"):
        metrics.per_example_attack(outcome, outcome, [])
    with pytest.raises(ValueError, match="on the same 3 and 3 samples"):
        metrics.per_example_attack(outcome, outcome, [(outcome, of_confidence(np.zeros(4)))])


def test_a_diverged_model_has_no_attack():
    random = np.random.default_rng(0)
    fine, broken = of_confidence(random.normal(size=10)), Outcome(*[np.full(10, np.nan)] * 4)
    assert math.isnan(metrics.membership_attack(fine, fine, broken))
    assert math.isnan(metrics.population_attack(broken, fine))
    assert math.isnan(metrics.per_example_attack(broken, fine, [(fine, fine)]).auc)


# Observing


def test_observe_a_classifier_as_a_plain_loop_does():
    model = tiny_models.vit(labels=3).train()
    images, labels = torch.randn(7, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    loader = DataLoader([{"pixel_values": x, "labels": y} for x, y in zip(images, labels)], batch_size=3)
    outcome = metrics.observe(model, loader)
    assert model.training and all(module.training for module in model.modules())
    with torch.no_grad():
        logits = model.eval()(pixel_values=images).logits
    probabilities = logits.double().softmax(1)
    p = probabilities.gather(1, labels[:, None])[:, 0].numpy()
    np.testing.assert_allclose(outcome.losses, -np.log(p), rtol=1e-5)
    np.testing.assert_allclose(outcome.confidence, np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outcome.correct, (logits.argmax(1) == labels).numpy())
    assert outcome.log_probs is not None
    np.testing.assert_allclose(outcome.log_probs, probabilities.log().numpy(), atol=1e-5)
    kinds = [outcome.losses, outcome.correct, outcome.log_probs, outcome.confidence]
    assert [array.dtype for array in kinds] == [np.float64, np.bool_, np.float32, np.float64]
    assert outcome.extraction is None


def test_observe_a_language_model_as_a_plain_loop_does():
    model = tiny_models.llama()
    rows = unlearning_worker.rows(5)
    outcome = metrics.observe(model, DataLoader(rows, batch_size=2))
    for index, row in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        labels = row["labels"][1:]
        loss = F.cross_entropy(logits, labels, ignore_index=-100).item()
        right = (logits.argmax(1) == labels)[labels != -100].tolist()
        k = next((k for k in range(len(right)) if all(right[k:])), len(right))
        assert outcome.losses[index] == pytest.approx(loss, rel=1e-5)
        assert outcome.confidence[index] == pytest.approx(math.log(math.exp(-loss) / (1 - math.exp(-loss))), rel=1e-4)
        assert outcome.correct[index] == all(right)
        assert outcome.extraction is not None and outcome.extraction[index] == pytest.approx(1 - k / len(right))
    assert outcome.log_probs is None


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 24}


def bert(name: str, **options: Any) -> nn.Module:
    return getattr(transformers, name)(transformers.BertConfig(**BERT, **options))


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))


def soft_prompt() -> nn.Module:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(tiny_models.gpt2(vocab_size=24), config)


def texts(classes: int = 24) -> dict[str, torch.Tensor]:
    """Four texts of which the first has targets at both ends, and the others have fewer and fewer."""
    ids = torch.randint(1, 24, (4, 6))
    labels = torch.randint(0, classes, (4, 6))
    for row in range(1, 4):
        labels[row, : row + 1] = -100
    labels[2, -1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def translations() -> dict[str, torch.Tensor]:
    batch = texts()
    return batch | {"decoder_input_ids": F.pad(batch["labels"].clamp(min=0)[:, :-1], (1, 0))}


def pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 2, 1, 1])}


# name: (model, batch, where the first target can be)
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]], int]] = {
    "causal": (lambda: tiny_models.gpt2(vocab_size=24), texts, 1),
    "causal, soft prompt": (soft_prompt, texts, 0),
    "token classes": (lambda: bert("BertForTokenClassification"), lambda: texts(2), 0),
    "masked": (lambda: bert("BertForMaskedLM"), texts, 0),
    "encoder-decoder": (t5, translations, 0),
    "classes of texts": (
        lambda: bert("BertForSequenceClassification", num_labels=3),
        lambda: texts() | {"labels": torch.tensor([0, 2, 1, 1])},
        0,
    ),
    "classes of images": (tiny_models.vit, pictures, 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_mean_of_the_losses_is_the_models_own_loss(name):
    make, data, first = KINDS[name]
    torch.manual_seed(0)
    model, batch = make().eval(), data()
    outcome = metrics.observe(model, [batch])
    labels = batch["labels"].reshape(4, -1)[:, first:]
    number = (labels != -100).sum(1).numpy()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert np.average(outcome.losses, weights=number) == pytest.approx(expected, abs=1e-5)
    assert (outcome.log_probs is None) == (batch["labels"].ndim == 2)
    assert (outcome.extraction is None) == (batch["labels"].ndim == 1)


@pytest.mark.parametrize("name", ["token classes", "masked", "encoder-decoder", "causal, soft prompt"])
def test_labels_that_a_model_finds_likeliest_are_right_at_their_own_places(name):
    make, data, _ = KINDS[name]
    torch.manual_seed(0)
    model, batch = make().eval(), data()
    arguments = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**arguments).logits
    # Behind a soft prompt, an output says what it expects of the next token.
    guesses = (logits[:, 2:-1] if "soft" in name else logits).argmax(2)
    labels = guesses.where(batch["labels"] != -100, -100)
    labels[0, 3] = (labels[0, 3] + 1) % logits.shape[2]  # one of six targets is wrong: the last two are the tail
    outcome = metrics.observe(model, [arguments | {"labels": labels}])
    assert outcome.correct.tolist() == [False, True, True, True]
    assert outcome.extraction == pytest.approx([2 / 6, 1, 1, 1])


def test_models_of_other_kinds_are_refused_by_name():
    labels = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="got Fixed"):
        metrics.observe(Fixed(), [{"logits": torch.zeros(2, 3, 2), "labels": labels}])
    with pytest.raises(ValueError, match="regression"):
        metrics.observe(tiny_models.vit(), [{"pixel_values": torch.zeros(2, 3, 16, 16), "labels": torch.zeros(2)}])


def test_extraction_strength_counts_right_tokens_from_the_end():
    """Targets are tokens 1 to 4 of 5, token 3 of the second row is no target; a 1 in `right` is a right guess."""
    right = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.ones(4, 5, dtype=torch.long)
    labels[1, 3] = -100
    logits = torch.zeros(4, 5, 2)
    logits[:, :4, 1] = 2.0 * right - 1
    loader = [{"logits": logits[:2], "labels": labels[:2]}, {"logits": logits[2:], "labels": labels[2:]}]
    outcome = metrics.observe(FixedForCausalLM(), loader)
    assert outcome.extraction == pytest.approx([2 / 4, 2 / 3, 1, 0])
    assert outcome.correct.tolist() == [False, False, True, False]


def test_confidence_is_right_where_probabilities_round_to_1():
    outcome = metrics.observe(
        Fixed(), [{"logits": torch.tensor([[60.0, 0.0], [60.0, 0.0], [0.0, 0.0]]), "labels": torch.tensor([0, 1, 0])}]
    )
    assert outcome.confidence == pytest.approx([60, -60, 0], abs=1e-5)
    assert outcome.losses == pytest.approx([math.exp(-60), 60, math.log(2)])
    # Of a language model, p is the geometric mean: the loss is that of both tokens, (0 + log 2) / 2.
    logits = torch.tensor([[[60.0, 0.0], [0.0, 0.0], [9.0, 9.0]]])
    outcome = metrics.observe(FixedForCausalLM(), [{"logits": logits, "labels": torch.zeros(1, 3).long()}])
    p = math.exp(-math.log(2) / 2)
    assert outcome.confidence == pytest.approx([math.log(p / (1 - p))])


def test_observe_passes_on_what_is_no_tensor_and_restores_every_mode():
    model = Fixed().train()
    model.norm.eval()
    outcome = metrics.observe(
        model, [{"logits": torch.tensor([[1.0, 0.0]]), "labels": torch.tensor([0]), "scale": 3.0}]
    )
    assert outcome.losses == pytest.approx([math.log1p(math.exp(-3))])
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)


def test_modes_are_restored_after_a_failure():
    model = Fixed().train()
    with pytest.raises(ValueError, match="must have a tensor 'labels', got 'logits'"):
        metrics.observe(model, [{"logits": torch.zeros(1, 2)}])
    assert model.dropout.training


def test_observe_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="must have samples"):
        metrics.observe(Fixed(), [])
    batch = {"logits": torch.zeros(2, 3, 2), "labels": torch.tensor([[0, -100, -100], [0, 1, 1]])}
    with pytest.raises(ValueError, match="must have a target, got 1 "):
        metrics.observe(FixedForCausalLM(), [batch])
    data = unlearning_worker.rows(4)
    sharded = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="Accelerator.prepare"):
        metrics.observe(tiny_models.llama(), sharded)


def test_outputs_that_are_not_finite_are_not_right():
    batch = {"logits": torch.tensor([[math.nan, 0.0], [2.0, 0.0]]), "labels": torch.tensor([0, 0])}
    outcome = metrics.observe(Fixed(), [batch])
    assert np.isnan(outcome.losses).tolist() == np.isnan(outcome.confidence).tolist() == [True, False]
    assert outcome.correct.tolist() == [False, True]


def test_an_outcome_is_about_the_same_samples_throughout():
    with pytest.raises(ValueError, match="must describe the same samples"):
        Outcome(np.zeros(3), np.zeros(2, bool), None, np.zeros(3))


def test_truth_ratio_is_the_mean_over_wrong_answers():
    """Two samples with two wrong answers each; every answer is two tokens, of probabilities given here."""

    def batch(probabilities):
        p = torch.tensor(probabilities)
        logits = torch.stack([p, 1 - p], dim=2).log()
        logits = torch.cat([logits, torch.zeros(len(p), 1, 2)], dim=1)
        return {"logits": logits, "labels": torch.zeros(len(p), 3, dtype=torch.long)}

    right = [batch([[0.5, 0.5], [0.9, 0.4]])]
    wrong = [batch([[0.25, 0.25], [0.1, 0.4]]), batch([[0.9, 0.9], [0.9, 0.9]])]
    ratios = language.truth_ratio(FixedForCausalLM(), right, wrong)
    assert ratios == pytest.approx([(0.25 + 0.2) / 2 / 0.5, 0.9 / 0.6], rel=1e-5)
    with pytest.raises(ValueError, match="got 2 wrong answers of 4 samples"):
        language.truth_ratio(FixedForCausalLM(), wrong, right)


# Several processes


def test_two_processes_get_the_whole_without_duplicates(two_processes: Path):
    """Eleven samples in batches of two: Accelerate repeats the first one to fill up the last round."""
    for name, (model, data) in unlearning_worker.tasks().items():
        expected = metrics.observe(model, DataLoader(data, batch_size=4))
        for rank in range(2):
            for kind in ("prepared", "plain"):
                found = np.load(two_processes / f"{name}.{kind}.{rank}.npz")
                assert len(found["losses"]) == 11
                for key in found.files:
                    np.testing.assert_allclose(found[key], getattr(expected, key), rtol=1e-4, atol=1e-6)


def test_one_process_with_a_prepared_loader():
    rows = unlearning_worker.rows(5)
    loader = Accelerator(cpu=True).prepare(DataLoader(rows, batch_size=2))
    expected = metrics.observe(tiny_models.llama(), DataLoader(rows, batch_size=2))
    np.testing.assert_array_equal(metrics.observe(tiny_models.llama(), loader).losses, expected.losses)
