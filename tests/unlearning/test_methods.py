"""The unlearning methods on a small network with everything that must not move: frozen weights, batch-norm, dropout."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import torch
from peft import get_peft_model
from tiny_models import llama
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput

from peft_ext import NolaConfig
from peft_ext.training.callbacks import Ridge, trainable_state
from peft_ext.training.trainer import EvaluationTrainer, fit
from peft_ext.unlearning.methods import (
    METHODS,
    GradientAscent,
    Ledger,
    RandomLabels,
    Request,
    Retrain,
    SalUn,
)
from peft_ext.unlearning.methods.relabelling import OthersTargets, WrongLabels
from peft_ext.unlearning.methods.salun import forget_gradient, saliency_masks

CLASSES = 4


class Network(nn.Module):
    """A frozen layer, batch-norm with statistics that training mode would move, dropout, a trainable layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 16).requires_grad_(False)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        logits = self.head(self.dropout(torch.relu(self.norm(self.frozen(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(CLASSES, 6, generator=generator)
    return [{"x": centres[i % CLASSES] + torch.randn(6, generator=generator), "labels": i % CLASSES} for i in range(64)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "num_train_epochs": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "seed": 5,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A network that was trained on four classes, the first of which is to be forgotten."""
    torch.manual_seed(0)
    model, rows = Network(), samples()
    initial = trainable_state(model)
    forget = [i for i, row in enumerate(rows) if row["labels"] == 0]
    retain = [i for i, row in enumerate(rows) if row["labels"] != 0]
    training = arguments(tmp_path_factory.mktemp("run"))
    request = Request(model, Subset(rows, retain), Subset(rows, forget), default_data_collator, training, initial)
    fit(model, rows, default_data_collator, copy.copy(training))
    assert loss(request, request.forget) < 0.2 and loss(request, request.retain) < 0.2
    return request


@pytest.fixture
def request_(trained: Request) -> Request:
    """A fresh copy of it."""
    return dataclasses.replace(trained, model=copy.deepcopy(trained.model))


@torch.no_grad()
def loss(request: Request, dataset: Any) -> float:
    batch = request.collator([dataset[i] for i in range(len(dataset))])
    return float(request.model.eval()(**batch).loss)


@pytest.mark.parametrize("name", METHODS)
def test_only_trainable_parameters_change(name: str, request_: Request) -> None:
    before = {key: value.clone() for key, value in request_.model.state_dict().items()}
    settings = request_.training.to_dict()
    method = METHODS[name]()
    method.prepare(request_)
    notes = method.unlearn(request_).notes()
    after = request_.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert not request_.model.training
    assert request_.training.to_dict() == settings
    assert notes and all(isinstance(note, str) for note in notes)


def test_retrain_is_the_training_without_the_forget_set(request_: Request) -> None:
    torch.manual_seed(0)
    never_saw_it = Network()
    fit(never_saw_it, request_.retain, request_.collator, request_.training)
    Retrain().unlearn(request_)
    expected, found = never_saw_it.state_dict(), request_.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert loss(request_, request_.forget) > 1


def test_retrain_in_training_mode_is_the_plain_trainers(request_: Request) -> None:
    torch.manual_seed(0)
    plain = Network()
    initial = {**trainable_state(plain), **{name: value.clone() for name, value in plain.named_buffers()}}
    training = copy.copy(request_.training)
    training.remove_unused_columns = False
    Trainer(plain, training, default_data_collator, request_.retain).train()
    Retrain().unlearn(dataclasses.replace(request_, initial=initial, eval_mode=False))
    expected, found = plain.state_dict(), request_.model.state_dict()
    assert not torch.equal(expected["norm.running_mean"], initial["norm.running_mean"])
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_gradient_ascent_raises_the_loss_to_its_bound(request_: Request) -> None:
    before = loss(request_, request_.forget)
    report = GradientAscent(epochs=500, max_loss=1.0, batch_size=16).unlearn(request_)
    assert report.training.ended == "bound" and report.training.last_loss >= 1
    assert "ended by the bound" in report.notes()[0]
    assert before < 1 < loss(request_, request_.forget) < 1.5
    assert loss(request_, request_.retain) < 0.5


def test_gradient_ascent_without_a_bound_of_its_own_stops_at_a_guess(request_: Request) -> None:
    GradientAscent(epochs=500, batch_size=16).unlearn(request_)
    assert math.log(CLASSES) < loss(request_, request_.forget) < 2 * math.log(CLASSES)


@pytest.mark.parametrize("method", [RandomLabels(epochs=10), SalUn(epochs=10)])
def test_random_labels_forget_and_keep(method: RandomLabels, request_: Request) -> None:
    method.unlearn(request_)
    assert loss(request_, request_.forget) > 1
    assert loss(request_, request_.retain) < 0.3


def test_salun_keeps_the_masked_half_to_the_bit(request_: Request) -> None:
    before = trainable_state(request_.model)
    masks = saliency_masks(forget_gradient(request_), 0.5)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total // 2
    SalUn(epochs=2).unlearn(request_)
    after = trainable_state(request_.model)
    assert all(torch.equal(before[name] == after[name], ~masks[name]) for name in masks)
    assert not any(parameter._backward_hooks for parameter in request_.model.parameters())


def test_the_mask_takes_the_largest_gradients_of_the_forget_loss(request_: Request) -> None:
    request_.training = copy.copy(request_.training)
    request_.training.per_device_train_batch_size = 5  # 16 samples: the last batch is a single one
    found = forget_gradient(request_)
    batch = default_data_collator([request_.forget[i] for i in range(16)])
    (16 * request_.model.eval()(**batch).loss).backward()
    for name, parameter in request_.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)
    masks = saliency_masks({"a": torch.tensor([[3.0, -5.0], [0.0, 1.0]]), "b": torch.tensor([-4.0])}, 0.4)
    assert masks["a"].tolist() == [[False, True], [False, False]] and masks["b"].tolist() == [True]


def test_wrong_labels_are_wrong_and_stay(request_: Request) -> None:
    rows = WrongLabels(Subset(samples(), range(64)), CLASSES, request_.rng())
    labels = [rows[i]["labels"] for i in range(64)]
    assert labels == [rows[i]["labels"] for i in range(64)]
    pairs = {(i % CLASSES, label) for i, label in enumerate(labels)}
    assert pairs == {(true, wrong) for true in range(CLASSES) for wrong in range(CLASSES) if true != wrong}


def test_a_part_of_the_retain_set(request_: Request) -> None:
    assert len(RandomLabels().data(request_)) == 64  # type: ignore[arg-type]
    rows: Any = RandomLabels(retain_share=0.25).data(request_)
    assert len(rows) == 16 + 12
    assert all(rows[i]["labels"] != 0 for i in range(len(rows)))  # neither a retain nor a wrong label


@pytest.mark.parametrize("method", ["gauss_newton", "fast_ntk"])
def test_the_solver_gets_the_options(method: Any, request_: Request) -> None:
    settings: dict[str, Any] = {"damping": 0.3, "form": "kernel"}
    settings |= {"max_steps": 1, "draws": None} if method == "gauss_newton" else {}
    request_.ridge = 0.01
    direct = copy.deepcopy(request_.model)
    loaders = request_.loader(request_.retain, 5), request_.loader(request_.forget, 5)
    METHODS[method](**settings).fit(direct, *loaders, reference=request_.initial, ridge=0.01)
    notes = METHODS[method](**settings).unlearn(request_).notes()
    (note,) = [note for note in notes if "kernel form" in note]
    for name, value in trainable_state(direct).items():
        torch.testing.assert_close(trainable_state(request_.model)[name], value)
    assert ("1 of 1 steps kept" in note) == (method == "gauss_newton")


class Unreadable(torch.utils.data.Dataset):
    """A retain set that is gone when the request comes."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the retain set was read")


def test_the_ledger_needs_the_forget_set_alone(request_: Request) -> None:
    method = Ledger(damping=3.0, draws=None)
    method.prepare(request_)
    before = loss(request_, request_.forget)
    retain, request_.retain = request_.retain, Unreadable()
    (note,) = method.unlearn(request_).notes()
    assert loss(request_, request_.forget) > before
    assert loss(request_, retain) < 0.5
    assert note.startswith("16 of 64 samples")


def text_row(prompt: list[int], target: list[int]) -> dict[str, list[int]]:
    ids = prompt + target
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + target}


def test_prompts_get_the_targets_of_retain_samples() -> None:
    forget = [text_row([5, i], [20, 20 + i, 2]) for i in range(6)]
    retain = [text_row([6, 6, i], [30 + i % 3, 2]) for i in range(9)] + [text_row([6], [20, 21, 2])]
    rows = OthersTargets(forget, retain, np.random.default_rng(1))
    for i in range(len(rows)):
        row = rows[i]
        target = [label for label in row["labels"] if label != -100]
        assert target in [[30, 2], [31, 2], [32, 2], [20, 21, 2]] and target != [20, 20 + i, 2]
        assert row == text_row([5, i], target)
    with pytest.raises(ValueError, match="every retain sample has the target"):
        OthersTargets(forget[1:2], retain[-1:], np.random.default_rng(1))[0]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["labels"]) for row in rows)
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
        for key, value in filling.items()
    }


def test_a_language_model_with_an_adapter(tmp_path: Path) -> None:
    config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    rows = [text_row([5, i], [20 + i, 30 + i, 2][i % 2 :]) for i in range(8)]
    training = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=3)
    for name in METHODS:
        model = get_peft_model(llama(), config)
        initial = trainable_state(model)
        frozen = {key: value.clone() for key, value in model.state_dict().items() if key not in initial}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        request = Request(model, Subset(rows, range(5)), Subset(rows, range(5, 8)), padded, training, initial)
        start = trainable_state(model)
        # A model so small is certain of all it knows after a step, and has no curvature then.
        method: Any = METHODS[name](**({"max_steps": 1} if name == "gauss_newton" else {}))
        method.prepare(request)
        method.unlearn(request)
        assert all(not torch.equal(start[key], value) for key, value in trainable_state(model).items()), name
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in frozen.items()), name


def test_what_cannot_be_is_refused(request_: Request) -> None:
    rows = samples()
    with pytest.raises(ValueError, match="the forget set is empty"):
        dataclasses.replace(request_, forget=Subset(rows, []))
    with pytest.raises(ValueError, match="the retain set is empty"):
        dataclasses.replace(request_, retain=[])
    with pytest.raises(ValueError, match="share 2 samples"):
        dataclasses.replace(request_, retain=Subset(rows, [1, 2, 3]), forget=Subset(rows, [2, 3, 4]))
    with pytest.raises(ValueError, match="share 1 samples"):
        dataclasses.replace(request_, retain=rows[:3], forget=rows[2:])
    with pytest.raises(ValueError, match="initial lacks 1 trainable parameters, such as 'head.bias'"):
        initial = {name: value for name, value in request_.initial.items() if name != "head.bias"}
        dataclasses.replace(request_, initial=initial)
    with pytest.raises(ValueError, match=r"'head.bias' of shape \(5,\); in the model it has shape \(4,\)"):
        dataclasses.replace(request_, initial={**request_.initial, "head.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match="no trainable parameters"):
        dataclasses.replace(request_, model=request_.model.requires_grad_(False))
    with pytest.raises(ValueError, match="`share` must be a number above 0 and at most 1, got 0"):
        SalUn(share=0)
    with pytest.raises(ValueError, match="`learning_rate` must be above 0, got -1"):
        GradientAscent(learning_rate=-1)


def test_a_ridge_pulls_to_the_initial_parameters():
    """With plain SGD a step of the ridge alone is known: with no loss left, the distance shrinks by a fixed factor."""
    model = problems.Regression()
    reference = {name: value + 1 for name, value in trainable_state(model).items()}
    rows = [{"pixel_values": torch.zeros(4), "labels": torch.tensor(-100)}] * 4

    class NoLoss(EvaluationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 0.0 * sum(p.sum() for p in model.parameters())

    training = TrainingArguments(
        output_dir="unused", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True, max_grad_norm=1e-3,
    )  # fmt: skip
    before = trainable_state(model)
    fit(model, rows, default_data_collator, training, NoLoss, ridge=Ridge(model, reference, 0.5))
    for name, value in trainable_state(model).items():
        assert torch.allclose(value, reference[name] + (before[name] - reference[name]) * 0.95**3, atol=1e-5)
