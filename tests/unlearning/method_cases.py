"""What every unlearning method promises, as tests: a method is tested by a subclass that names it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import get_peft_model
from tiny_models import llama
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from peft_ext import NolaConfig
from peft_ext.training.callbacks import trainable_state
from peft_ext.unlearning import Request, UnlearningMethod, UnlearningReport

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


@torch.no_grad()
def loss(request: Request, dataset: Any) -> float:
    batch = request.collator([dataset[i] for i in range(len(dataset))])
    return float(request.model.eval()(**batch).loss)


def text_row(prompt: list[int], target: list[int]) -> dict[str, list[int]]:
    ids = prompt + target
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + target}


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["labels"]) for row in rows)
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
        for key, value in filling.items()
    }


def loaders(request: Request) -> tuple[DataLoader, DataLoader]:
    """The sets of a request, in batches that the second door takes."""
    return request.loader(request.retain), request.loader(request.forget)


def changed(request: Request, **changes: Any) -> Request:
    """A request with another model of the same weights."""
    return dataclasses.replace(request, model=copy.deepcopy(request.model), **changes)


class MethodCases:
    """A subclass names the method and its wrong options.

    Attributes:
        method: the class.
        options: what it is made with.
        text_options: what it is made with for a language model.
        wrong: options that are refused, each by its name.
        trains: whether `fit` takes `training`.
        exact: whether both doors agree to the bit: they read the same batches.
    """

    method: ClassVar[type[UnlearningMethod]]
    options: ClassVar[dict[str, Any]] = {}
    text_options: ClassVar[dict[str, Any]] = {}
    wrong: ClassVar[list[dict[str, Any]]] = []
    trains: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    def make(self, **options: Any) -> UnlearningMethod:
        return self.method(**{**self.options, **options})

    def through_fit(self, request: Request, *sets: Any) -> UnlearningReport:
        """Serves a request by the second door."""
        context: dict[str, Any] = {"training": request.training} if self.trains else {}
        request.model.eval()
        sets = sets or loaders(request)
        return self.make().fit(request.model, *sets, reference=request.initial, ridge=request.ridge, **context)

    # What is done

    def test_both_doors_do_the_same(self, request_: Request) -> None:
        request_.ridge = 0.01
        by_request, by_loaders, by_batches = (changed(request_) for _ in range(3))
        start = trainable_state(request_.model)
        first = self.make().unlearn(by_request)
        second = self.through_fit(by_loaders)
        third = self.through_fit(by_batches, *map(list, loaders(request_)))
        expected = trainable_state(by_request.model)
        assert any(not torch.equal(value, start[name]) for name, value in expected.items())
        for other, report in ((by_loaders, second), (by_batches, third)):
            for name, value in trainable_state(other.model).items():
                tolerance = 0.0 if self.exact else 1e-5
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)
            assert (report.method, report.parameters) == (first.method, first.parameters)
            assert math.isclose(report.shift, first.shift, rel_tol=1e-4)

    @pytest.mark.parametrize("door", ["unlearn", "fit"])
    def test_only_trainable_parameters_change(self, door: str, request_: Request) -> None:
        before = {key: value.clone() for key, value in request_.model.state_dict().items()}
        trainable = set(trainable_state(request_.model))
        settings = request_.training.to_dict()
        if door == "fit":
            self.through_fit(request_)
        else:
            method = self.make()
            method.prepare(request_)
            method.unlearn(request_)
        after = request_.model.state_dict()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == trainable
        assert not request_.model.training
        assert request_.training.to_dict() == settings
        required = {name for name, parameter in request_.model.named_parameters() if parameter.requires_grad}
        assert required == changed

    def test_the_same_seed_gives_the_same(self, request_: Request) -> None:
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            again = changed(request_)
            self.make().unlearn(again)
            found.append(trainable_state(again.model))
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())

    def test_a_language_model_with_an_adapter(self, tmp_path: Path) -> None:
        config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        rows = [text_row([5, i], [20 + i, 30 + i, 2][i % 2 :]) for i in range(8)]
        training = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=3)
        model = get_peft_model(llama(), config)
        initial = trainable_state(model)
        frozen = {key: value.clone() for key, value in model.state_dict().items() if key not in initial}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        request = Request(model, Subset(rows, range(5)), Subset(rows, range(5, 8)), padded, training, initial)
        start = trainable_state(model)
        method = self.make(**self.text_options)
        method.prepare(request)
        method.unlearn(request)
        assert all(not torch.equal(start[key], value) for key, value in trainable_state(model).items())
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in frozen.items())

    def test_a_training_that_breaks_off_leaves_the_parameters_as_they_were(
        self, request_: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not self.trains:
            pytest.skip("it makes no training")
        before, moved = trainable_state(request_.model), []

        def breaks_off(*args: Any, **kwargs: Any) -> None:
            found = trainable_state(request_.model)
            moved.append(any(not torch.equal(value, before[name]) for name, value in found.items()))
            raise KeyboardInterrupt

        monkeypatch.setattr("transformers.trainer_callback.CallbackHandler.on_step_end", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            self.make().unlearn(request_)
        assert moved == [True]
        assert all(torch.equal(value, before[name]) for name, value in trainable_state(request_.model).items())

    # What is reported

    def test_the_report_is_of_facts_and_goes_through_json(self, request_: Request) -> None:
        start = trainable_state(request_.model)
        report = self.make().unlearn(request_)
        assert report.method == self.method.name
        assert report.parameters == sum(value.numel() for value in start.values())
        away = [value - start[name] for name, value in trainable_state(request_.model).items()]
        assert math.isclose(report.shift, float(torch.cat([part.flatten() for part in away]).norm()), rel_tol=1e-3)
        assert report.seconds > 0
        again = UnlearningReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
        assert again == report and again.notes() == report.notes()
        assert report.notes() and all(isinstance(note, str) for note in report.notes())

    # What is refused

    def test_wrong_options_are_refused_by_name(self) -> None:
        assert self.wrong or not [field for field in dataclasses.fields(self.method) if field.init]  # type: ignore
        for options in self.wrong:
            (name,) = options
            with pytest.raises(ValueError, match=f"`{name}` must be"):
                self.method(**options)

    def test_wrong_sets_are_refused(self, request_: Request) -> None:
        before = trainable_state(request_.model)
        retain, forget = loaders(request_)
        with pytest.raises(ValueError, match="the forget set is empty"):
            self.make().unlearn(changed(request_, forget=[]))
        with pytest.raises(ValueError, match="The forget set is empty"):
            self.through_fit(request_, retain, [])
        with pytest.raises(ValueError, match="The retain set is empty"):
            self.through_fit(request_, [], forget)
        rows = list(request_.retain)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="overlap: they share 2 samples"):
            self.make().unlearn(changed(request_, retain=rows[:5], forget=rows[3:6]))
        with pytest.raises(ValueError, match=f"overlap: {len(request_.forget)} samples are in both"):  # type: ignore[arg-type]
            self.through_fit(request_, [*retain, *forget], forget)
        assert all(torch.equal(value, before[name]) for name, value in trainable_state(request_.model).items())

    def test_a_model_without_trainable_parameters_is_refused(self, request_: Request) -> None:
        request_.model.requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameters"):
            self.make().unlearn(changed(request_))
        with pytest.raises(ValueError, match="no trainable parameters|no parameter that could change"):
            self.through_fit(request_)


class RestoringCases(MethodCases):
    """A method that leaves the model as it was when it fails."""

    def test_a_failure_leaves_the_model_as_it_was(self, request_: Request) -> None:
        rows = [{**row, "x": torch.full((6,), math.nan)} for row in request_.forget]  # type: ignore[attr-defined]
        before = {key: value.clone() for key, value in request_.model.state_dict().items()}
        with pytest.raises(ValueError):
            self.make().unlearn(dataclasses.replace(request_, forget=rows))
        assert all(torch.equal(value, before[key]) for key, value in request_.model.state_dict().items())
