"""Methods whose steps take a forget and a retain batch: what each promises, and its loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import problems
import pytest
import torch
from method_cases import MethodCases, arguments, changed, loss, padded, samples, text_row
from peft import get_peft_model
from tiny_models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import Subset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, default_data_collator

from peft_ext import NolaConfig
from peft_ext.training.callbacks import trainable_state
from peft_ext.unlearning import NPO, GradDiff, IdkDPO, Request, SimNPO
from peft_ext.unlearning.methods.idk_dpo import ANSWERS
from peft_ext.unlearning.methods.paired import (
    NewPartners,
    Paired,
    PairedTrainer,
    Pairs,
    collate_pairs,
    log_probabilities,
    reference_log_probabilities,
)
from peft_ext.unlearning.methods.relabelling import split_target

TUNING: list[dict[str, Any]] = [{"epochs": 0}, {"max_steps": 0}, {"learning_rate": -1}, {"retain_weight": -1}]
SHORT: dict[str, Any] = {"epochs": 2}


def text_request(folder: Path, rows: list[dict[str, list[int]]], collator: Any = padded) -> Request:
    """A tiny language model with an adapter that has moved, the last four of some rows to be forgotten."""
    config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    initial = trainable_state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    training = arguments(folder, num_train_epochs=2, per_device_train_batch_size=4)
    retain, forget = Subset(rows, range(len(rows) - 4)), Subset(rows, range(len(rows) - 4, len(rows)))  # type: ignore
    return Request(model, retain, forget, collator, training, initial)


def text_rows() -> list[dict[str, list[int]]]:
    return [text_row([5, i], [20 + i, 30 + i, 2]) for i in range(12)]


class TestGradDiff(MethodCases):
    method, trains, wrong = GradDiff, True, [*TUNING, {"max_loss": 0}]
    options = text_options = SHORT


class TestNPO(MethodCases):
    method, trains, wrong = NPO, True, [*TUNING, {"beta": 0}]
    options = text_options = SHORT


class TestSimNPO(MethodCases):
    method, trains, wrong = SimNPO, True, [*TUNING, {"beta": -1}, {"gamma": -1}]
    options = text_options = SHORT


class TestIdkDPO(MethodCases):
    method, trains, exact = IdkDPO, True, False
    options: ClassVar[dict[str, Any]] = {**SHORT, "answers": [[40, 41, 2], [42, 43, 2]]}
    wrong = [*TUNING, {"beta": 0}, {"answers": []}, {"answers": "no"}, {"answers": [""]}]

    @pytest.fixture
    def request_(self, tmp_path: Path) -> Request:
        """A language model: it serves no other."""
        return text_request(tmp_path, text_rows())


# Losses by hand


def softplus(x: Any) -> Any:
    return np.log1p(np.exp(x))


def logarithms(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The log-probabilities of every sample's targets, by NumPy."""
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.double().numpy()
    found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = batch["labels"].numpy()
    if labels.ndim == 1:
        return [found[i, label][None] for i, label in enumerate(labels)]
    return [
        np.array([found[i, t - 1, label] for t, label in enumerate(row) if label != -100 and t > 0])
        for i, row in enumerate(labels)
    ]


@pytest.fixture(params=["classes", "texts"])
def two(request: pytest.FixtureRequest, request_: Request, tmp_path: Path) -> Iterator[tuple[nn.Module, Any, Any]]:
    """A model, and a batch of three pairs of samples; the texts have one, two and three targets."""
    if request.param == "classes":
        model, rows = request_.model, samples()[:6]
        collator: Any = default_data_collator
    else:
        model = text_request(tmp_path, text_rows()).model
        rows = [text_row([5, i], [20 + i, 30 + i, 2][-1 - i % 3 :]) for i in range(6)]
        collator = padded
    pairs = [{"forget": rows[i], "preferred": rows[5 - i], "retain": rows[i], "place": 2 - i} for i in range(3)]
    yield model.eval(), collate_pairs(collator, pairs), torch.tensor([-0.5, -3.0, 0.25])


def test_the_loss_of_grad_diff(two: Any) -> None:
    model, batch, _ = two
    mean = np.concatenate(logarithms(model, batch["forget"])).mean()
    found = GradDiff().forget_loss(model, batch, 100.0)
    assert float(found.detach()) == pytest.approx(mean, rel=1e-5)
    found.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    beyond = GradDiff().forget_loss(model, batch, -mean / 2)
    assert float(beyond.detach()) == pytest.approx(mean / 2, rel=1e-5)
    beyond.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()), "ascended beyond the bound"


def test_the_loss_of_npo(two: Any) -> None:
    model, batch, reference = two
    ratios = np.array([logs.sum() for logs in logarithms(model, batch["forget"])]) - reference.numpy()[[2, 1, 0]]
    for beta in (0.1, 1.0):
        expected = (2 / beta * np.log(1 + np.exp(ratios) ** beta)).mean()
        assert float(NPO(beta=beta).forget_loss(model, batch, reference)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_the_loss_of_simnpo(gamma: float, two: Any) -> None:
    model, batch, _ = two
    means = np.array([logs.mean() for logs in logarithms(model, batch["forget"])])
    expected = (2 / 2.5 * softplus(2.5 * means + gamma)).mean()
    assert float(SimNPO(gamma=gamma).forget_loss(model, batch, None)) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_idk_dpo(two: Any) -> None:
    model, batch, before = two
    wanted, unwanted = (
        np.array([logs.sum() for logs in logarithms(model, batch[name])]) for name in ("preferred", "forget")
    )
    margin = wanted - unwanted - before.numpy()[[2, 1, 0]]
    expected = (-2 / 0.1 * np.log(1 / (1 + np.exp(-0.1 * margin)))).mean()
    assert float(IdkDPO().forget_loss(model, batch, before)) == pytest.approx(expected, rel=1e-5)


def gradient(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])


def test_npo_with_a_small_beta_is_gradient_ascent(two: Any) -> None:
    model, batch, reference = two
    model = model.double()
    batch["forget"] = {k: v.double() if v.is_floating_point() else v for k, v in batch["forget"].items()}
    ascent = gradient(model, log_probabilities(model, batch["forget"])[0].mean())
    far, near = (gradient(model, NPO(beta=b).forget_loss(model, batch, reference.double())) for b in (1.0, 1e-6))
    assert float((near - ascent).norm() / ascent.norm()) < 1e-5
    assert float((far - ascent).norm() / ascent.norm()) > 0.05


def test_simnpo_is_npo_against_a_model_that_knows_nothing_for_one_target(request_: Request) -> None:
    """With one target the length is no matter, and a reference of probability 1 takes nothing off."""
    batch = collate_pairs(default_data_collator, [{"forget": row, "place": 0} for row in samples()[:5]])
    npo = NPO(beta=2.5).forget_loss(request_.model.eval(), batch, torch.zeros(1))
    assert float(npo) == pytest.approx(float(SimNPO(beta=2.5).forget_loss(request_.model, batch, None)), rel=1e-6)


def test_the_reference_is_the_untouched_model_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = text_request(tmp_path, text_rows())
    expected = [logs.sum() for logs in logarithms(request.model, padded(list(request.forget)))]  # type: ignore[arg-type]
    found = reference_log_probabilities(request, request.forget)
    assert found.tolist() == pytest.approx(expected, rel=1e-5) and not found.requires_grad
    seen: list[tuple[list[int], list[float]]] = []
    original = NPO.forget_loss

    def remember(self: NPO, model: nn.Module, batch: Any, before: torch.Tensor) -> torch.Tensor:
        tokens = batch["forget"]["input_ids"][:, 1].tolist()
        seen.append((tokens, before[batch["place"]].tolist()))
        return original(self, model, batch, before)

    monkeypatch.setattr(NPO, "forget_loss", remember)
    NPO(epochs=3, batch_size=3).unlearn(request)
    assert len(seen) == 6
    for tokens, values in seen:  # the prompts of the forget set end with 8 to 11
        assert values == pytest.approx([expected[token - 8] for token in tokens], rel=1e-5)


# Pairs


def test_every_pass_goes_over_the_forget_set_with_new_partners() -> None:
    def pairs() -> Pairs:
        rng = np.random.default_rng(3)
        return Pairs({"forget": list(range(50))}, list(range(100, 130)), lambda n: rng.integers(0, 30, n))

    found, again = pairs(), pairs()
    first = [found[i] for i in range(50)]
    assert [item["forget"] for item in first] == [item["place"] for item in first] == list(range(50))
    assert {item["retain"] for item in first} <= set(range(100, 130))
    assert first == [again[i] for i in range(50)]
    callbacks = [NewPartners(each) for each in (found, again)]
    for callback in callbacks:
        callback.on_epoch_begin(None, None, None)
    assert first == [found[i] for i in range(50)], "the first pass has partners already"
    for callback in callbacks:
        callback.on_epoch_begin(None, None, None)
    assert first != [found[i] for i in range(50)] and found[7] == again[7]


def test_a_training_pairs_anew_in_every_pass(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, tuple[float, ...]]] = []
    original = GradDiff.forget_loss

    def remember(self: GradDiff, model: nn.Module, batch: Any, before: Any) -> torch.Tensor:
        seen.extend(zip(batch["place"].tolist(), map(tuple, batch["retain"]["x"].tolist())))
        return original(self, model, batch, before)

    monkeypatch.setattr(GradDiff, "forget_loss", remember)
    GradDiff(epochs=3).unlearn(request_)
    passes = [dict(seen[start : start + 16]) for start in (0, 16, 32)]
    assert [sorted(each) for each in passes] == [list(range(16))] * 3
    same = [sum(one[i] == other[i] for i in range(16)) for one, other in zip(passes, passes[1:])]
    assert max(same) < 8


def test_the_loss_of_the_retain_samples_counts_as_often_as_it_is_said_to(request_: Request) -> None:
    rows = samples()
    batch = collate_pairs(
        default_data_collator, [{"forget": rows[i], "retain": rows[i + 9], "place": i} for i in range(5)]
    )
    for weight in (0.0, 1.0, 2.0):
        method = GradDiff(retain_weight=weight)
        trainer = PairedTrainer(method, 1e9, request_.model, request_.training, data_collator=default_data_collator)
        found = float(trainer.compute_loss(request_.model, batch).detach())
        retained = float(request_.model(**batch["retain"]).loss)
        expected = float(method.forget_loss(request_.model, batch, 1e9)) + weight * retained
        assert retained > 1e-4 and found == pytest.approx(expected, rel=1e-5)


def test_passes_steps_rates_and_the_ridge(request_: Request) -> None:
    report = NPO(epochs=3, batch_size=5).unlearn(changed(request_))
    assert report.training.steps == 3 * math.ceil(16 / 5)
    assert report.training.learning_rate == pytest.approx(NPO.rate * 0.05)
    assert NPO(max_steps=2, learning_rate=0.01).unlearn(changed(request_)).training.learning_rate == 0.01
    plain, ridged = changed(request_), changed(request_, ridge=5.0)
    for request in (plain, ridged):
        SimNPO().unlearn(request)
    away = [
        sum(float((v - r.initial[k]).square().sum()) for k, v in trainable_state(r.model).items())
        for r in (plain, ridged)
    ]
    assert away[1] < away[0]


@pytest.mark.parametrize("method", [GradDiff(epochs=20), NPO(epochs=20, beta=1.0), SimNPO(epochs=20)])
def test_it_forgets_and_keeps(method: Paired, request_: Request) -> None:
    method.unlearn(request_)
    assert loss(request_, request_.forget) > 1
    assert loss(request_, request_.retain) < 0.3


def test_without_a_retain_loss_the_retain_set_is_not_read(request_: Request) -> None:
    class Unreadable(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("the retain set was read")

    retain = Unreadable(list(request_.retain))  # type: ignore[call-overload]
    assert NPO(epochs=1, retain_weight=0).unlearn(changed(request_, retain=retain)).shift > 0
    with pytest.raises(AssertionError, match="the retain set was read"):
        NPO(epochs=1).unlearn(changed(request_, retain=retain))


# "I don't know"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words behind a space and words without one are different tokens, as in byte-level vocabularies."""
    words = sorted({word for answer in ANSWERS for word in [*answer.split()]} | {"Who", "are", "you?", "Bo"})
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *words, *(f"\u0120{word}" for word in words)]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("gap", [" ", ""])
def test_answers_are_tokenised_as_targets_are(gap: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The prompt stays; behind it stand the same white space, no start mark, and the same end mark."""
    prompt = tokenizer("Who are you?")["input_ids"]
    target = [*tokenizer(f"{gap}Bo", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = [text_row([*prompt, 3 + i], target) for i in range(12)]
    request = text_request(tmp_path, rows, DataCollatorForSeq2Seq(tokenizer))
    parts = IdkDPO().parts(request)
    written = set()
    for place, row in enumerate(parts["preferred"]):
        head, answer = split_target(row)
        assert head == split_target(request.forget[place])[0]
        assert answer[-1] == tokenizer.eos_token_id and tokenizer.bos_token_id not in answer
        text = tokenizer.decode(answer[:-1])
        assert text[: len(gap)] == gap and text[len(gap) :] in ANSWERS
        assert answer[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]
        written.add(text)
        if place == 3:
            break
    assert len(written) > 1
    assert [row for row, _ in zip(IdkDPO().parts(request)["preferred"], range(4))] == [
        row for row, _ in zip(parts["preferred"], range(4))
    ]


def test_answers_become_likelier_than_targets(tmp_path: Path) -> None:
    request = text_request(tmp_path, text_rows())
    method = IdkDPO(answers=[[40, 41, 2]], learning_rate=0.1, epochs=30, retain_weight=0)
    before = method.before(request, method.parts(request))
    method.unlearn(request)
    assert (method.before(request, method.parts(request)) > before + 0.05).all()


def test_padding_in_front_is_no_prompt() -> None:
    row = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 6, 7]}
    assert split_target(row) == ([5], [6, 7])


# What is refused


def test_idk_dpo_refuses_what_has_no_prompts(request_: Request, tmp_path: Path) -> None:
    method = IdkDPO(answers=[[40, 2]])
    with pytest.raises(ValueError, match="makes a causal language model say.*; Network is none. npo and simnpo"):
        method.unlearn(request_)
    request = text_request(tmp_path, text_rows())
    before = trainable_state(request.model)
    for row, said in (
        ({"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}, "its first token has a label already"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token of it has a label"),
        ({"input_ids": [5, 6]}, "it holds 'input_ids'"),
        ({**text_row([5], [6]), "pixel_values": [1.0]}, "it holds 'attention_mask', .*'pixel_values'"),
    ):
        rows = [text_row([5, 1], [7, 2]), row]
        with pytest.raises(ValueError, match=f"labels` of -100 on a prompt .* sample 1 does not: {said}"):
            method.unlearn(dataclasses.replace(request, forget=rows))
    with pytest.raises(ValueError, match="the collator has none: take .*DataCollatorForSeq2Seq.* or give `answers`"):
        IdkDPO().unlearn(request)
    assert all(torch.equal(value, before[name]) for name, value in trainable_state(request.model).items())


@pytest.mark.parametrize("method", [GradDiff(), NPO(), SimNPO()])
def test_regression_is_refused(method: Paired, request_: Request) -> None:
    rows = [{**row, "labels": float(row["labels"])} for row in samples()]
    with pytest.raises(ValueError, match="regression and several labels a sample are not supported"):
        method.unlearn(changed(request_, retain=rows[:40], forget=rows[40:]))


@pytest.mark.parametrize("name", ["GPT-2, prompt, whole texts", "BERT, token classes", "T5", "ViT, PRANC"])
def test_any_model_and_adapter(name: str, tmp_path: Path) -> None:
    make, data = problems.PROBLEMS[name]
    model = make()
    training = arguments(tmp_path, per_device_train_batch_size=2)
    request = Request(model, data(6, 1), data(5, 2), default_data_collator, training, trainable_state(model))
    start = trainable_state(model)
    NPO(max_steps=1).unlearn(request)
    assert any(not torch.equal(value, start[key]) for key, value in trainable_state(model).items())
