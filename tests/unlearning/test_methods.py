"""The unlearning methods: what each promises, and what is its own."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from method_cases import (
    CLASSES,
    MethodCases,
    Network,
    RestoringCases,
    arguments,
    changed,
    loaders,
    loss,
    padded,
    samples,
    text_row,
)
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from peft_ext.training.callbacks import Ridge, trainable_state
from peft_ext.training.trainer import EvaluationTrainer, fit, mean_loss
from peft_ext.unlearning import (
    METHODS,
    FastNTK,
    Finetune,
    GaussNewton,
    GradientAscent,
    Ledger,
    RandomLabels,
    Request,
    Retrain,
    Rewind,
    SalUn,
    UnlearningReport,
)
from peft_ext.unlearning.derivatives.data import Chain, sample_keys
from peft_ext.unlearning.derivatives.quadratic import CurvatureEstimate
from peft_ext.unlearning.methods.base import Solution, Step
from peft_ext.unlearning.methods.relabelling import OthersTargets, WrongLabels, count_classes, mislabelled
from peft_ext.unlearning.methods.rows import rows_of
from peft_ext.unlearning.methods.salun import forget_gradient, saliency_masks

TUNING: list[dict[str, Any]] = [
    {"epochs": 0}, {"max_steps": 0}, {"max_steps": 1.5}, {"learning_rate": -1}, {"batch_size": 0}
]  # fmt: skip


class TestRetrain(MethodCases):
    method, trains = Retrain, True

    def test_it_needs_to_know_how_the_model_was_trained(self, request_: Request) -> None:
        for context in ({"reference": request_.initial}, {"training": request_.training}):
            with pytest.raises(ValueError, match="needs `reference`.* and `training`"):
                Retrain().fit(request_.model, *loaders(request_), **context)


class TestRewind(MethodCases):
    method, trains, wrong = Rewind, True, [{"keep": -0.1}, {"keep": 1}, {"share": 0}, {"share": 1.5}]

    def test_nothing_kept_and_all_passes_is_retraining(self, request_: Request) -> None:
        rewound, retrained = changed(request_), changed(request_)
        Rewind(keep=0, share=1).unlearn(rewound)
        Retrain().unlearn(retrained)
        states = [trainable_state(request.model) for request in (rewound, retrained)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_it_starts_on_the_way_and_never_reads_the_forget_set(self, request_: Request) -> None:
        training = copy.copy(request_.training)
        training.learning_rate = 0.0
        request = changed(request_, training=training, forget=Unreadable())
        report = Rewind(keep=0.25, share=0.5).unlearn(request)
        for name, value in trainable_state(request.model).items():
            trained, start = trainable_state(request_.model)[name], request_.initial[name]
            torch.testing.assert_close(value, start + 0.25 * (trained - start))
        assert report.training.steps == 4 * math.ceil(len(request.retain) / 8)

    def test_it_says_what_the_retain_set_lost(self, request_: Request) -> None:
        request = changed(request_, training=copy.copy(request_.training))
        before = loss(request, request.retain)
        request.training.learning_rate = 0.0
        report = Rewind(keep=0, share=0.5).unlearn(request)
        assert report.retain_loss == pytest.approx((before, loss(request, request.retain)), rel=1e-5)
        assert "stopped short, it is more than 0.05 nats above" in report.notes()[-1]
        kept = Rewind(keep=0.9, share=1).unlearn(changed(request_))
        assert "stopped short" not in kept.notes()[-1] and kept.notes()[-1].startswith("Retain loss")
        assert kept.training.learning_rate == pytest.approx(0.1 * request_.training.learning_rate)  # 0.1 was taken back
        fewer = Rewind(keep=0.4, share=0.4).unlearn(
            changed(request_)
        )  # 0.6 was, to be made up for in 0.4 of the passes
        assert fewer.training.learning_rate == pytest.approx(1.5 * request_.training.learning_rate)

    def test_a_part_of_a_large_retain_set_says_what_it_lost(
        self, request_: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = changed(request_)
        drawn = np.random.default_rng(request.training.seed).choice(len(request.retain), 5, replace=False)
        part = Subset(request.retain, drawn.tolist())
        before = loss(request, part)
        monkeypatch.setattr("peft_ext.unlearning.methods.rewind.MEASURED", 5)
        report = Rewind().unlearn(request)
        assert report.retain_loss == pytest.approx((before, loss(request, part)), rel=1e-5)


class TestFinetune(MethodCases):
    method, trains, wrong = Finetune, True, TUNING


class TestGradientAscent(MethodCases):
    method, trains = GradientAscent, True
    wrong = [*TUNING, {"max_loss": 0}]


class TestRandomLabels(MethodCases):
    method, trains = RandomLabels, True
    wrong = [*TUNING, {"retain_share": 0}, {"retain_share": 1.5}]


class TestSalUn(MethodCases):
    method, trains = SalUn, True
    wrong = [*TUNING, {"retain_share": 0}, {"share": 0}, {"share": 3}]


class TestFastNTK(RestoringCases):
    method = FastNTK
    wrong = [{"form": "matrix_free"}, {"damping": 0}, {"memory": 0}, {"batch_size": 0}]


class TestGaussNewton(RestoringCases):
    method = GaussNewton
    # A model so small is certain of all it knows after a step, and has no curvature then.
    text_options = {"max_steps": 1}
    wrong = [
        {"form": "dense"}, {"loss": "hinge"}, {"damping": 0}, {"max_steps": 0}, {"tolerance": -1}, {"draws": 0},
        {"retain_tolerance": -1}, {"estimator": "guess"}, {"curvature_samples": 0}, {"memory": 0}, {"batch_size": 0},
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:A trial deletion of:UserWarning")  # the problem is small, and the warning right
class TestLedger(RestoringCases):
    method, exact = Ledger, False
    text_options = {"damping": 1}  # a trial deletion is of one of the eight texts, the request of three
    wrong = [{"damping": 0}, {"retain_tolerance": -1}, {"draws": 0}, {"memory": 0}, {"batch_size": 0}]


def test_every_method_keeps_the_promises() -> None:
    methods = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        if "MethodCases" in path.read_text(encoding="utf-8"):
            for name, value in vars(importlib.import_module(path.stem)).items():
                if name.startswith("Test") and issubclass(value, MethodCases):
                    methods.add(value.method)
    assert methods >= set(METHODS.values())


def test_retrain_is_the_training_without_the_forget_set(request_: Request) -> None:
    torch.manual_seed(0)
    never_saw_it = Network()
    fit(never_saw_it, request_.retain, request_.collator, request_.training)
    Retrain().unlearn(request_)
    expected, found = never_saw_it.state_dict(), request_.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert loss(request_, request_.forget) > 1


def test_retrain_stops_where_the_training_was_stopped(request_: Request) -> None:
    """With the learning rates of the whole schedule, unlike a training that is planned with fewer steps."""
    rates: list[float] = []
    states: list[dict[str, torch.Tensor]] = []

    class Remember(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, lr_scheduler: Any, **_: Any) -> None:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
            rates.extend(lr_scheduler.get_last_lr())

    torch.manual_seed(0)
    fit(Network(), request_.retain, request_.collator, request_.training, callbacks=[Remember()])
    stopped = dataclasses.replace(request_, stopped_after=0.25)
    report = Retrain().unlearn(stopped)
    assert report.training is not None and report.training.ended == "share"
    steps = report.training.steps
    assert steps == round(0.25 * len(states)) and rates[steps - 1] > rates[-1]
    found = request_.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in states[steps - 1].items())
    assert "where the original's training was stopped too" in report.notes()[0]
    tuned = Finetune(max_steps=8).unlearn(stopped).training
    assert tuned is not None and tuned.steps == 8, "what a method plans it does to the end"
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="`stopped_after` must be a number above 0 and at most 1"):
            dataclasses.replace(request_, stopped_after=share)


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


@pytest.mark.parametrize("method", [Retrain, Rewind])
def test_statistics_that_hold_the_forget_set_are_put_back_or_refused(method: Any, request_: Request) -> None:
    buffers = {name: value.clone() for name, value in request_.model.named_buffers()}
    request_.model.train()(**request_.collator([request_.forget[i] for i in range(16)]))
    before = {name: value.clone() for name, value in request_.model.state_dict().items()}
    initial = {**request_.initial, **buffers}

    def serve(reference: Any, **options: Any) -> dict[str, torch.Tensor]:
        model = changed(request_).model
        try:
            method().fit(model, *loaders(request_), reference=reference, training=request_.training, **options)
        except ValueError:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            raise
        return model.state_dict()

    for reference in (request_.initial, initial):
        with pytest.raises(ValueError, match="must know whether .* Give eval_mode=True if .* eval_mode=False, and a"):
            serve(reference)
    with pytest.raises(ValueError, match="`initial` lacks 3 of those buffers, such as 'norm.num_batches_tracked'"):
        serve(request_.initial, eval_mode=False)
    kept = serve(request_.initial, eval_mode=True)
    assert all(torch.equal(kept[name], before[name]) for name in buffers)
    found, expected = serve(initial, eval_mode=False), changed(request_, initial=initial, eval_mode=False)
    method().unlearn(expected)
    assert all(torch.equal(value, found[name]) for name, value in expected.model.state_dict().items())
    assert not torch.equal(found["norm.running_mean"], before["norm.running_mean"])


def test_a_forget_set_smaller_than_a_batch_is_trained_on(request_: Request, tmp_path: Path) -> None:
    training = arguments(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=64)
    request = changed(request_, training=training)
    report = GradientAscent(epochs=2, max_loss=50).unlearn(request)
    assert report.training.steps == 2 and report.shift > 0 and training.dataloader_drop_last
    before = trainable_state(request_.model)
    training.max_steps = 3
    small = changed(request_, training=training)  # retraining leaves out what the model's training would have
    with pytest.raises(ValueError, match="training of Retrain took no step.*`dataloader_drop_last` to False"):
        Retrain().unlearn(small)
    assert all(torch.equal(value, before[name]) for name, value in trainable_state(small.model).items())


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


def test_the_bound_on_the_gradient_is_for_what_may_change_alone(request_: Request, tmp_path: Path) -> None:
    training = arguments(
        tmp_path, optim="sgd", max_grad_norm=1e-3, weight_decay=0.0, per_device_train_batch_size=64, learning_rate=0.5
    )
    report = SalUn(max_steps=1, share=0.2).unlearn(changed(request_, training=training))
    assert report.shift == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_the_mask_takes_the_largest_gradients_of_the_forget_loss(request_: Request) -> None:
    request_.training.per_device_train_batch_size = 5  # 16 samples: the last batch is a single one
    found = forget_gradient(request_)
    batch = default_data_collator([request_.forget[i] for i in range(16)])
    (16 * request_.model.eval()(**batch).loss).backward()
    for name, parameter in request_.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)
    masks = saliency_masks({"a": torch.tensor([[3.0, -5.0], [0.0, 1.0]]), "b": torch.tensor([-4.0])}, 0.4)
    assert masks["a"].tolist() == [[False, True], [False, False]] and masks["b"].tolist() == [True]
    least = saliency_masks({"a": torch.tensor([1.0, -3.0, 2.0])}, 0.01)
    assert least["a"].tolist() == [False, True, False], "a share that rounds to nothing would unlearn nothing"


def test_the_gradients_of_many_batches_in_half_precision_add_up(request_: Request) -> None:
    request_.model.to(torch.bfloat16)
    request_.training.per_device_train_batch_size = 1
    row = {**samples()[0], "x": samples()[0]["x"].bfloat16()}
    one, many = (forget_gradient(changed(request_, forget=[row] * count)) for count in (1, 300))
    assert any(part.any() for part in one.values())
    for name, part in many.items():
        torch.testing.assert_close(part, 300 * one[name], rtol=1e-4, atol=0)


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


def test_a_ridge_pulls_to_the_initial_parameters(tmp_path: Path) -> None:
    """With plain SGD a step of the ridge alone is known: with no loss left, the distance shrinks by a fixed factor."""
    model = problems.Regression()
    reference = {name: value + 1 for name, value in trainable_state(model).items()}
    rows = [{"pixel_values": torch.zeros(4), "labels": torch.tensor(-100)}] * 4

    class NoLoss(EvaluationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 0.0 * sum(p.sum() for p in model.parameters())

    training = TrainingArguments(
        output_dir=str(tmp_path), optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True, max_grad_norm=1e-3,
    )  # fmt: skip
    before = trainable_state(model)
    fit(model, rows, default_data_collator, training, NoLoss, ridge=Ridge(model, reference, 0.5))
    for name, value in trainable_state(model).items():
        assert torch.allclose(value, reference[name] + (before[name] - reference[name]) * 0.95**3, atol=1e-5)


def test_reports_hold_numbers_that_are_not_finite() -> None:
    steps = [Step(math.inf, math.inf, 0.3, False, 0.1), Step(1.0, 0.5, 1.2, True, -math.inf)]
    solution = Solution("kernel", CurvatureEstimate(3, 4, 2, "signs", 0.1), steps, 0.05, "gain")
    report = UnlearningReport("gauss_newton", 7, 0.1, 2.0, (0.1, math.inf), None, solution)
    assert UnlearningReport.from_dict(report.to_dict()) == report


def test_without_arguments_a_training_takes_the_loaders_batches(request_: Request) -> None:
    before = loss(request_, request_.retain)
    report = Finetune(learning_rate=0.01).fit(
        request_.model, request_.loader(request_.retain, 6), [*loaders(request_)[1]]
    )
    assert report.training.steps == 2 * 8 and report.training.learning_rate == 0.01  # 48 samples twice
    assert loss(request_, request_.retain) < before
    assert Finetune().fit(changed(request_).model, *loaders(request_)).training.learning_rate == 1e-3


def test_only_what_a_loader_reads_is_trained_on() -> None:
    rows = samples()
    plain, shuffled = DataLoader(rows, 4), DataLoader(rows, 4, shuffle=True)  # type: ignore[arg-type]
    for loader in (plain, shuffled):
        assert rows_of(loader)[0][0] is rows
    part = DataLoader(rows, 4, sampler=SubsetRandomSampler([3, 5, 9]))  # type: ignore[arg-type]
    ((found,), collator) = rows_of(part)
    assert sorted(row["x"].tolist() for row in found) == sorted(rows[i]["x"].tolist() for i in (3, 5, 9))
    assert collator(found)["labels"].tolist() == [row["labels"] for row in found]
    with_rest = DataLoader(rows, 5, drop_last=True)  # type: ignore[arg-type]
    assert len(rows_of(with_rest)[0][0]) == 60


def test_samples_of_batches_are_padded_again() -> None:
    batches = [padded([text_row([5], [6, 7])]), padded([text_row([5, 6], [8, 9, 2])])]
    ((rows,), collator) = rows_of(batches)
    found = collator(rows)
    expected = padded([text_row([5], [6, 7]), text_row([5, 6], [8, 9, 2])])
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for batch in batches:
        del batch["attention_mask"]
    ((rows,), collator) = rows_of(batches)
    with pytest.raises(ValueError, match="different lengths"):
        collator(rows)


def request_of(name: str, folder: Path) -> Request:
    make, data = problems.PROBLEMS[name]
    model = make()
    training = arguments(folder, per_device_train_batch_size=2)
    return Request(model, data(6, 1), data(5, 2), default_data_collator, training, trainable_state(model))


@pytest.mark.parametrize("name", ["GPT-2, prompt, whole texts", "BERT, token classes", "BERT, masked tokens", "T5"])
def test_every_target_counts_once_in_the_gradient_of_the_forget_loss(name: str, tmp_path: Path) -> None:
    request = request_of(name, tmp_path)
    found = forget_gradient(request)
    batch = default_data_collator(list(request.forget))
    targets = batch["labels"] != -100
    (targets.sum() * request.model(**batch).loss).backward()
    for key, parameter in request.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[key], parameter.grad, msg=key)


@pytest.mark.parametrize(("name", "classes"), [("GPT-2, prompt", 24), ("BERT, token classes", 3), ("T5", 24)])
def test_classes_are_counted(name: str, classes: int, tmp_path: Path) -> None:
    assert count_classes(request_of(name, tmp_path)) == classes


def test_wrong_labels_for_tokens_are_refused_by_name(tmp_path: Path) -> None:
    request = request_of("BERT, token classes", tmp_path)
    with pytest.raises(ValueError, match="BertForTokenClassification has labels for tokens"):
        mislabelled(request, request.rng())


def test_a_training_that_breaks_off_leaves_the_model_as_it_was(request_: Request, tmp_path: Path) -> None:
    """With bf16 Accelerate puts a cast around the forward pass, which must not stay."""

    class Stops(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    training = arguments(tmp_path, bf16=True)
    with pytest.raises(KeyboardInterrupt):
        fit(request_.model, request_.retain, request_.collator, training, callbacks=[Stops()])
    fresh = Network()
    fresh.load_state_dict(request_.model.state_dict())
    x = request_.collator([request_.retain[i] for i in range(8)])["x"]
    assert torch.equal(request_.model(x).logits, fresh.eval()(x).logits)


def test_settings_of_evaluations_change_nothing(request_: Request, tmp_path: Path) -> None:
    expected = copy.deepcopy(request_.model)
    fit(expected, request_.retain, request_.collator, arguments(tmp_path))
    training = arguments(tmp_path, bf16_full_eval=True, eval_on_start=True)
    before = mean_loss(request_.model, request_.retain, request_.collator, training)
    assert before == mean_loss(request_.model, request_.retain, request_.collator, arguments(tmp_path))
    fit(request_.model, request_.retain, request_.collator, training)
    for found, parameter in zip(request_.model.parameters(), expected.parameters()):
        assert torch.equal(found, parameter)


def test_a_trainer_that_is_still_there_hides_no_samples(request_: Request, tmp_path: Path) -> None:
    """A Trainer leaves Accelerate's state at its last batch, of 6 samples here, as long as it lives."""
    rows = [request_.retain[i] for i in range(30)]
    trainer = Trainer(request_.model, arguments(tmp_path, num_train_epochs=1), train_dataset=rows)
    trainer.train()
    assert GradientState().end_of_dataloader and GradientState().remainder == 6
    loader = DataLoader(rows, batch_size=10, collate_fn=request_.collator)  # type: ignore[arg-type]
    prepared = Accelerator().prepare_data_loader(loader)
    for each in (loader, list(loader), prepared, Chain([prepared]), trainer.get_train_dataloader()):
        assert len(sample_keys(each)) == 30
    assert len(sample_keys(Chain([loader, prepared]))) == 60
    del trainer
