"""Learning tasks in turn: what is remembered of a task, against dense references; k-winners; dropout by use."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_ext import McncConfig, NolaConfig, PrancConfig, SeededNetwork, to_lora
from peft_ext.adapters.continual import TaskMemory
from peft_ext.adapters.winners import KWinners, k_winners
from peft_ext.training.callbacks import DropChanges, Ridge, trainable_parameters
from peft_ext.training.projection import ProjectUpdates
from peft_ext.training.trainer import fit


class Classifier(nn.Module):
    """Five inputs, three classes."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.last(self.act(self.first(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def adapted(config: PeftConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = config or NolaConfig(r=3, num_basis=20, target_modules=["first", "last"], seed=1)
    model = get_peft_model(Classifier(), config)  # type: ignore[arg-type]
    with torch.no_grad():  # as if it were trained: NOLA's B is no longer zero
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def rows(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return [{"x": each, "labels": torch.tensor(place % 3)} for place, each in enumerate(x)]


def loader(samples: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [default_data_collator(samples[start : start + 4]) for start in range(0, len(samples), 4)]


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in trainable_parameters(model).values()])


def differences(model: nn.Module, samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Outputs less their mean over classes, which no prediction depends on."""
    logits = model(torch.stack([row["x"] for row in samples])).logits
    return logits - logits.mean(1, keepdim=True)


def dense_jacobian(model: nn.Module, samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The derivatives of `differences`, an output at a time, by ordinary backward passes."""
    parameters = list(trainable_parameters(model).values())
    outputs = differences(model, samples).flatten()
    found = [torch.autograd.grad(each, parameters, retain_graph=True) for each in outputs]
    return torch.stack([torch.cat([part.double().flatten() for part in parts]) for parts in found])


def training(folder: Path, **options: object) -> TrainingArguments:
    settings = {"max_steps": 6, "learning_rate": 0.02, "per_device_train_batch_size": 4, **options}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["nola", "lora"])
def test_protected_outputs_stay_to_first_order(method: str) -> None:
    """The plane that is protected is that of the dense Jacobian; along the others outputs change by the square."""
    lora = LoraConfig(r=2, target_modules=["first", "last"])
    model, samples = adapted(lora if method == "lora" else None), rows(6)
    memory = TaskMemory(energy=1.0)
    memory.remember(model, loader(samples))
    assert memory.projection is not None
    J = dense_jacobian(model, samples)
    assert memory.projection.basis.shape[1] == int(torch.linalg.matrix_rank(J, rtol=1e-4)) == 12
    free = torch.randn(J.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = memory.projection(free)
    assert float((J @ step).norm()) < 1e-5 * float((J @ free).norm())

    def change(direction: torch.Tensor, size: float) -> float:
        moved = copy.deepcopy(model).double()
        nn.utils.vector_to_parameters(vector(model) + size * direction, trainable_parameters(moved).values())
        doubled = [{"x": row["x"].double()} for row in samples]
        with torch.no_grad():
            return float((differences(moved, doubled) - differences(copy.deepcopy(model).double(), doubled)).norm())

    assert change(step, 1e-2) < 0.1 * change(free, 1e-2)
    assert change(step, 1e-3) / change(step, 1e-2) == pytest.approx(1e-2, rel=0.1)  # by the square
    assert change(free, 1e-3) / change(free, 1e-2) == pytest.approx(1e-1, rel=0.1)


def test_a_training_keeps_to_what_no_earlier_task_needs(tmp_path: Path) -> None:
    model, first, second = adapted(), rows(3), rows(3, seed=1)
    memory, before = TaskMemory(energy=1.0), vector(model)
    J = [dense_jacobian(model, first)]
    for samples in (first, second):
        memory.remember(model, loader(samples))
    J.append(dense_jacobian(model, second))
    assert memory.tasks == 2 and memory.projection is not None and memory.projection.basis.shape[1] == 12
    fit(model, rows(8, seed=2), default_data_collator, training(tmp_path), callbacks=memory.callbacks(model))
    step = vector(model) - before
    assert float(step.norm()) > 0.1
    assert all(float((each @ step).norm()) < 1e-4 * float(each.norm() * step.norm()) for each in J)


def test_a_bound_on_the_directions_of_a_task() -> None:
    memory, model = TaskMemory(energy=1.0, components=4), adapted()
    for seed in (0, 1):
        memory.remember(model, loader(rows(6, seed)))
    assert memory.projection is not None and memory.projection.basis.shape[1] == 8


class Softmax(nn.Module):
    """A linear model, whose Fisher matrix is known."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.linear(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def test_the_penalty_of_ewc_is_that_of_the_closed_form() -> None:
    """Of a linear softmax model the Fisher matrix has the diagonal `mean p (1 - p) x^2`."""
    torch.manual_seed(0)
    model, memory = Softmax(), TaskMemory(elastic=7.0)
    weight = model.linear.weight
    expected = torch.zeros_like(weight)
    assert memory.callbacks(model) == []
    at = torch.randn(3, 5)
    for seed in (0, 1):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        samples = rows(9, seed)
        memory.remember(model, loader(samples))
        x = torch.stack([row["x"] for row in samples])
        p = (x @ weight.T).softmax(1).detach()
        fisher = torch.einsum("nc,nj->cj", p * (1 - p), x.square()) / len(x)
        expected += 7.0 * fisher * (at - weight.detach())
    (ridge,) = memory.callbacks(model)
    assert isinstance(ridge, Ridge)
    with torch.no_grad():
        weight.copy_(at)
    weight.grad = torch.ones_like(weight)
    ridge.on_pre_optimizer_step(None, None, None)
    torch.testing.assert_close(weight.grad - 1, expected, rtol=1e-4, atol=1e-5)


def test_numbers_that_earlier_tasks_used_are_dropped_more_often() -> None:
    torch.manual_seed(0)
    model, memory = Softmax(), TaskMemory(dropout=2.0)
    memory.callbacks(model)
    with torch.no_grad():
        moved = torch.randn(3, 5) * torch.tensor([0.0, 1, 1, 1, 1])  # the first column was not touched
        model.linear.weight += moved
    samples = rows(9)
    memory.remember(model, loader(samples))
    x = torch.stack([row["x"] for row in samples])
    # At a high temperature all classes count alike: p (1 - p) = 2 / 9.
    use = moved.abs() * (x.square().mean(0) * 2 / 9).sqrt()
    (callback,) = memory.callbacks(model)
    assert isinstance(callback, DropChanges)
    torch.testing.assert_close(
        callback.rates["linear.weight"], 1 - torch.exp(-2 * use / use.max()), rtol=0.02, atol=1e-3
    )
    assert float(callback.rates["linear.weight"].max()) == pytest.approx(1 - torch.e**-2, abs=1e-6)


def test_dropping_changes() -> None:
    """Rates are kept over steps, the change that is kept is scaled, and what is dropped gets no gradient."""
    start, rate = torch.arange(4.0), torch.tensor([0.0, 0.2, 0.5, 0.9])
    parameter = nn.Parameter(start.clone())
    callback = DropChanges({"p": parameter}, {"p": rate}, seed=0)
    with torch.no_grad():
        parameter.add_(1.0)
    kept = []
    for step in range(600):
        callback.on_step_begin(None, SimpleNamespace(global_step=step), None)
        on = parameter.detach() != start
        torch.testing.assert_close(parameter.detach(), start + on / (1 - rate))
        parameter.grad = torch.ones(4)
        callback.on_pre_optimizer_step(None, SimpleNamespace(global_step=step), None)
        torch.testing.assert_close(parameter.detach(), start + 1)
        torch.testing.assert_close(parameter.grad, on / (1 - rate))
        kept.append(on)
    torch.testing.assert_close(torch.stack(kept).float().mean(0), 1 - rate, atol=0.06, rtol=0)
    with pytest.raises(ValueError, match="`rates` must be from 0 to 1, got others for 'p'"):
        DropChanges({"p": parameter}, {"p": rate + 0.2}, seed=0)
    always = DropChanges({"p": parameter}, {"p": torch.ones(4)}, seed=0)
    with torch.no_grad():
        parameter.add_(1.0)
    always.on_step_begin(None, SimpleNamespace(global_step=0), None)
    torch.testing.assert_close(parameter.detach(), start + 1)


def test_a_step_that_breaks_off_leaves_nothing_dropped(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        """Remembers the last whole step, and ends the training within one."""

        def __init__(self, breaks: bool) -> None:
            self.breaks, self.last = breaks, torch.empty(0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.last = vector(model)

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                control.should_training_stop = True
                if self.breaks:
                    raise KeyboardInterrupt

    for breaks in (True, False):
        model, memory = adapted(), TaskMemory(dropout=2.0)
        fit(model, rows(8), default_data_collator, training(tmp_path), callbacks=memory.callbacks(model))
        memory.remember(model, loader(rows(4)))
        stops, half = Stops(breaks), training(tmp_path)
        half.gradient_accumulation_steps, half.num_train_epochs = 2, 9
        with pytest.raises(KeyboardInterrupt) if breaks else nullcontext():
            fit(model, rows(8, seed=1), default_data_collator, half, callbacks=[*memory.callbacks(model), stops])
        assert len(stops.last) and torch.equal(vector(model), stops.last)


def test_all_ways_at_once(tmp_path: Path) -> None:
    """They are called in an order in which the projection comes last."""
    model, memory = adapted(), TaskMemory(energy=0.9, elastic=1.0, dropout=1.0)
    fit(model, rows(8), default_data_collator, training(tmp_path), callbacks=memory.callbacks(model))
    memory.remember(model, loader(rows(4)))
    before, callbacks = vector(model), memory.callbacks(model)
    assert [type(each) for each in callbacks] == [Ridge, DropChanges, ProjectUpdates]
    fit(model, rows(8, seed=1), default_data_collator, training(tmp_path), callbacks=callbacks)
    assert memory.projection is not None
    step = vector(model) - before
    assert float((memory.projection.basis.T @ step).norm()) < 1e-5 < float(step.norm())


def test_winners_are_exactly_k_and_have_their_gradient() -> None:
    units = torch.randn(6, 4, 10, requires_grad=True)
    found = k_winners(units, 3)
    on = found != 0
    assert (on.sum(-1) == 3).all()
    assert (units.abs()[on].view(-1, 3).min(1).values >= units.abs()[~on].view(-1, 7).max(1).values).all()
    torch.testing.assert_close(found[on], units[on])
    weights = torch.randn_like(units)
    (found * weights).sum().backward()
    torch.testing.assert_close(units.grad, weights * on)
    assert (k_winners(torch.zeros(2, 5), 5) == 0).all()
    with pytest.raises(ValueError, match="`k` must be at most the number of units, 10, got 11"):
        k_winners(units, 11)


@pytest.mark.parametrize(
    "config",
    [
        NolaConfig(r=3, num_basis=20, target_modules=["first"], seed=1),
        McncConfig(r=3, k=2, d=20, widths=[8], target_modules=["first"], seed=1),
        PrancConfig(r=3, num_coefficients=12, apply_to="factors", target_modules=["first"], seed=1),
        LoraConfig(r=3, lora_alpha=3, target_modules=["first"]),
    ],
    ids=["nola", "mcnc", "pranc", "lora"],
)
def test_winners_on_the_units_of_an_update(config: PeftConfig) -> None:
    model = adapted(config)
    layer = model.base_model.model.first
    x, base = torch.randn(7, 5), layer.base_layer
    A, B = (
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if isinstance(config, LoraConfig)
        else layer.update("default")[0]
    )
    whole = layer(x)
    with KWinners(model, 2):
        expected = base(x) + layer.scaling["default"] * k_winners(x @ A.T, 2) @ B.T
        torch.testing.assert_close(layer(x), expected)
        assert not torch.allclose(whole, expected)
    torch.testing.assert_close(layer(x), whole)


def test_winners_on_convolutions_and_embeddings() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(9, 4), nn.Unflatten(-1, (4, 1)), nn.Conv2d(3, 5, 1))
    model = get_peft_model(network, NolaConfig(r=3, num_basis=20, target_modules=["0", "2"]))  # type: ignore[arg-type]
    nn.init.normal_(model.base_model.model[0].nola_coefficients["default"])
    nn.init.normal_(model.base_model.model[2].nola_coefficients["default"])
    embedding, conv = model.base_model.model[0], model.base_model.model[2]
    tokens, image = torch.arange(6).view(2, 3), torch.randn(2, 3, 4, 4)
    with KWinners(model, 1):
        (A, B), scaling = embedding.update("default")[0], embedding.scaling["default"]
        expected = embedding.base_layer(tokens) + scaling * k_winners(A.T[tokens], 1) @ B.T
        torch.testing.assert_close(embedding(tokens), expected)
        (A, B), scaling = conv.update("default")[0], conv.scaling["default"]
        units = k_winners(torch.einsum("rc,nchw->nhwr", A, image), 1)
        expected = conv.base_layer(image) + scaling * torch.einsum("or,nhwr->nohw", B, units)
        torch.testing.assert_close(conv(image), expected)


def test_winners_in_a_whole_network() -> None:
    network = SeededNetwork(Classifier(), PrancConfig(num_coefficients=20, seed=0))
    seen = []
    network.network.last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with KWinners(network, 3, r"\.act$"):
        network(torch.randn(4, 5))
        TaskMemory(energy=0.9).remember(network, loader(rows(4)))  # its derivatives go through them
    assert ((seen[0] != 0).sum(1) == 3).all()


def test_winners_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no update that is a product B A.* and PRANC with apply_to='factors'"):
        KWinners(adapted(PrancConfig(num_coefficients=10, target_modules=["first"])), 2)
    with pytest.raises(ValueError, match="no units to choose from: the model has no module whose name contains 'gelu'"):
        KWinners(Classifier(), 2, "gelu")
    with pytest.raises(ValueError, match="`k` must be at most the number of units, 3, got 4"):
        KWinners(adapted(), 4)
    with pytest.raises(ValueError, match="`k` must be a positive integer, got 0"):
        KWinners(adapted(), 0)
    model = adapted()
    with KWinners(model, 2), pytest.raises(ValueError, match="has k-winners on 'base_model.model.first'"):
        KWinners(model, 1)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ValueError, match="grouped convolution 'base_model.model.0' does not compute"):
        KWinners(get_peft_model(grouped, NolaConfig(r=3, num_basis=20, target_modules=["0"])), 2)  # type: ignore[arg-type]
    lora = adapted(LoraConfig(r=3, target_modules=["first"]))
    with KWinners(lora, 2), pytest.raises(ValueError, match="The model has k-winners. Call `remove`"):
        KWinners(lora, 1)
    gives_two = nn.Sequential(nn.LSTM(4, 4))
    with KWinners(gives_two, 2, "0"), pytest.raises(ValueError, match="must be tensors .*; a LSTM gives a tuple"):
        gives_two(torch.randn(2, 4))
    with pytest.raises(ValueError, match="linear layers; 'base_model.model.0' is none"):
        KWinners(get_peft_model(nn.Sequential(nn.Embedding(9, 4)), LoraConfig(target_modules=["0"])), 2)  # type: ignore[arg-type]
    model = adapted()
    with KWinners(model, 2), pytest.raises(ValueError, match="not linear: it cannot be merged or exported"):
        model.merge_adapter()  # type: ignore[operator]
    with KWinners(model, 2), pytest.raises(ValueError, match="not linear: it cannot be merged or exported"):
        to_lora(model, tmp_path / "lora")


def test_what_cannot_be_remembered() -> None:
    with pytest.raises(ValueError, match="The task has no samples"):
        TaskMemory(energy=0.9).remember(adapted(), [])
    model = adapted()
    size = len(vector(model))
    with pytest.raises(ValueError, match=f"`components` must be less than the {size} numbers of a vector, got {size}"):
        TaskMemory(energy=0.9, components=size).remember(model, loader(rows(4)))
    few = adapted(NolaConfig(r=3, num_basis=2, target_modules=["first"], seed=1))
    with pytest.raises(ValueError, match="All 4 directions would be protected, and nothing could change"):
        TaskMemory(energy=1.0).remember(few, loader(rows(8)))
    with pytest.raises(ValueError, match="`components` bounds what is protected: give `energy` too"):
        TaskMemory(components=3)
    for options in ({"energy": 0}, {"elastic": -1}, {"dropout": -1}, {"temperature": 0}, {"draws": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            TaskMemory(**options)  # type: ignore[arg-type]
    memory = TaskMemory(energy=0.9, elastic=1.0)
    memory.remember(model, loader(rows(4)))
    with pytest.raises(ValueError, match=f"earlier tasks trained {size} numbers; this model has 15 to train"):
        memory.callbacks(Softmax())
