"""Trainings that compute frozen blocks once a sample end with the weights of those that compute them in every step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from problems import images, texts
from test_prefix import LAST, Skipping
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput

from peft_ext import NolaConfig
from peft_ext.training.callbacks import trainable_parameters, trainable_state
from peft_ext.training.prefix_in_training import PrefixInTraining
from peft_ext.training.trainer import CheckedTrainer, EvaluationTrainer, fit

EPOCHS, BATCHES = 4, 3


def vit(**options: Any) -> nn.Module:
    return get_peft_model(tiny_models.vit(3), NolaConfig(**{**LAST, **options}, modules_to_save=["classifier"]))


def llama_classifier() -> nn.Module:
    config = tiny_models.llama(3, vocab_size=24, num_labels=3).config
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    return get_peft_model(model, NolaConfig(**LAST, modules_to_save=["score"]))


def pixels(n: int = 12) -> list[dict[str, torch.Tensor]]:
    return images(n, dtype=torch.float32)


def sentences(n: int = 12) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 3)}
        for i, ids in enumerate(tiny_models.tokens(n, 6) % 24)
    ]


def computations(model: nn.Module) -> list[bool]:
    """Grows with every computation of the first block; says whether it was in training mode."""
    calls: list[bool] = []
    first = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)[0]
    inner = next((module for module in first.modules() if "Norm" in type(module).__name__), first)
    original = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(inner.training)
        return original(*args, **kwargs)

    if inner is not first:  # a block of its own is passed over as a whole
        inner.forward = forward  # type: ignore[method-assign]
    return calls


class Watch(TrainerCallback):
    """Notes how often the first block had been computed at the end of every pass over the data."""

    def __init__(self, calls: list[bool]) -> None:
        self.calls, self.after = calls, [0]

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.after.append(len(self.calls))


def trained(
    model: nn.Module, rows: Any, folder: Path, memory: float, trainer: type[Trainer] = EvaluationTrainer,
    collator: Any = default_data_collator, callbacks: Any = (), **options: Any,
) -> tuple[list[torch.Tensor], list[int]]:  # fmt: skip
    """Trains; returns the losses of all steps and the weights, and the computations of the first block in each pass."""
    losses: list[torch.Tensor] = []

    class Telling(trainer):  # type: ignore[misc, valid-type]
        prefix_memory = memory

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    settings = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 4, "learning_rate": 0.01, "seed": 1}
    training = TrainingArguments(str(folder), use_cpu=True, report_to=[], **{**settings, **options})
    watch = Watch(computations(model))
    fit(model, rows, collator, training, Telling, callbacks=[watch, *callbacks])
    after = watch.after
    for module in model.modules():
        assert not module._forward_pre_hooks or "Embedding" in type(module).__name__
    return [*losses, *trainable_state(model).values()], [b - a for a, b in zip(after, after[1:])]


def both(make: Any, rows: Any, folder: Path, **options: Any) -> tuple[list[int], list[int]]:
    """The computations with and without, after a check that both give the same."""
    found, kept = trained(make(), rows, folder, 1e9, **options)
    expected, whole = trained(make(), rows, folder, 0, **options)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert not all(map(torch.equal, found[-1:], trainable_state(make()).values()))
    return kept, whole


@pytest.mark.parametrize(("make", "rows"), [(vit, pixels), (llama_classifier, sentences)])
def test_the_same_to_the_bit_with_less_work(make, rows, tmp_path):
    kept, whole = both(make, rows(), tmp_path)
    assert whole == [BATCHES] * EPOCHS
    # One computation finds the blocks; the first batch whose samples are all known is compared.
    assert kept == [BATCHES + 1, 1, 0, 0]


def test_batches_of_several_sizes_and_steps_of_several_batches(tmp_path):
    kept, whole = both(vit, pixels(9), tmp_path, gradient_accumulation_steps=2)
    assert whole == [3] * EPOCHS and sum(kept) < sum(whole) and kept[-1] < 3


def test_autocast(tmp_path):
    kept, whole = both(vit, pixels(), tmp_path, bf16=True)
    assert kept == [BATCHES + 1, 1, 0, 0] and whole == [BATCHES] * EPOCHS


class Comparing(EvaluationTrainer):
    """Its loss is of the batch, another batch, the model without its adapter, hidden states and a copy of the model."""

    other = default_data_collator(images(3, 9, dtype=torch.float32))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        with torch.no_grad(), model.disable_adapter():
            before = model(**inputs).logits
        hidden = model(**inputs, output_hidden_states=True)
        apart = (hidden.logits - before - copy.deepcopy(model)(**inputs).logits + hidden.hidden_states[1].sum()).tanh()
        return loss - 0.1 * model(**self.other).loss + apart.sum()


def test_a_loss_of_several_forward_passes(tmp_path):
    kept, whole = both(vit, pixels(), tmp_path, trainer=Comparing)
    assert whole == [5 * BATCHES] * EPOCHS and sum(kept) <= sum(whole) + EPOCHS * BATCHES


class Zero(Skipping):
    """What it reads of the first block has no effect before the first step."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutput:
        found = super().forward(pixel_values)
        found.loss = nn.functional.cross_entropy(found.logits, labels)
        return found


class Coupled(Zero):
    """A network in which samples see one another."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutput:
        hidden = pixel_values - pixel_values.mean(0)
        for block in self.blocks:
            hidden = torch.relu(block(hidden))
        logits = self.head(torch.cat((hidden, hidden), 1))
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@pytest.mark.parametrize("make", [Zero, Coupled])
def test_networks_whose_blocks_cannot_be_passed_over(make, tmp_path):
    both(make, images(12, shape=(8,), dtype=torch.float32), tmp_path)


def mixture() -> nn.Module:
    model = tiny_models.mixture("mixtral", layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2.self_attn" in name)
    return model


def prompts() -> nn.Module:
    return get_peft_model(tiny_models.llama(3), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "every layer": (lambda: vit(layers_to_transform=None), pixels, {}),
    "one pass over the data": (vit, pixels, {"num_train_epochs": 1}),
    "gradient checkpointing": (llama_classifier, sentences, {"gradient_checkpointing": True}),
    "training mode": (vit, pixels, {"trainer": CheckedTrainer}),
    "soft prompts": (prompts, lambda: texts(12), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_more_is_computed_where_nothing_can_be_kept(case, tmp_path):
    make, rows, options = CASES[case]
    kept, whole = both(make, rows(), tmp_path, **options)
    assert sum(kept) <= sum(whole) + 1


def test_mixtures_of_experts_are_computed_whole(tmp_path):
    kept, whole = both(mixture, texts(12), tmp_path)
    assert sum(kept) == sum(whole) + 1


def shorter(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch as wide as its longest text."""
    batch = default_data_collator(rows)
    width = int(batch["attention_mask"].sum(1).max())
    return {name: value[:, :width] if value.dim() > 1 else value for name, value in batch.items()}


def test_padded_texts_are_kept_with_their_padding_and_given_up_if_they_do_not_come_again(tmp_path):
    rows = sentences(24)
    for i, row in enumerate(rows):
        row["attention_mask"][2 + i % 5 :] = 0
        row["input_ids"][2 + i % 5 :] = 0
    kept, whole = both(llama_classifier, rows, tmp_path, collator=shorter)
    assert whole == [6] * EPOCHS and sum(kept) <= sum(whole) + 1

    class Changing(list):  # type: ignore[type-arg]
        def __getitem__(self, place: int) -> Any:
            row = super().__getitem__(place)
            return {**row, "pixel_values": row["pixel_values"] + torch.rand(())}

    sizes: list[int] = []

    class Sizes(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            sizes.append(len(prefixes[-1]._kept))

    prefixes: list[Any] = []

    class Seen(EvaluationTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            prefixes.append(self._prefix)
            return super().training_step(*args, **kwargs)

    kept, _ = both(vit, Changing(pixels()), tmp_path, trainer=Seen, callbacks=[Sizes()])
    assert kept == [BATCHES + 1, BATCHES, BATCHES, BATCHES]
    assert sizes[: 2 * BATCHES] == [4 * step for step in range(1, 2 * BATCHES + 1)] and sizes[2 * BATCHES] == 0


@pytest.mark.parametrize("room", [4, 11.5])
def test_what_does_not_fit_is_not_kept_in_part(room, tmp_path):
    one = 5 * 32 * 4  # tokens, hidden size, bytes
    found, kept = trained(vit(), pixels(), tmp_path, room * one)
    expected, _ = trained(vit(), pixels(), tmp_path, 0)
    assert kept == [BATCHES + 1, *[BATCHES] * (EPOCHS - 1)] and all(map(torch.equal, found, expected))


class InTheMiddle(TrainerCallback):
    """Changes a frozen block after the second pass, or lets it change from there on."""

    def __init__(self, thaw: bool) -> None:
        self.thaw = thaw

    @torch.no_grad()
    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if state.epoch == 2:
            weight = dict(model.named_parameters())["base_model.model.vit.layers.0.mlp.fc1.weight"]
            weight.requires_grad_(True) if self.thaw else weight.mul_(2)


@pytest.mark.parametrize("thaw", [False, True])
def test_frozen_blocks_that_change_in_the_middle(thaw, tmp_path):
    kept, _ = both(vit, pixels(), tmp_path, callbacks=[InTheMiddle(thaw)])
    assert kept[:2] == [BATCHES + 1, 1] and kept[2] >= BATCHES


def other_adapter(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Makes the adapter that is active another one, which cannot be trained and stands in the first block, too."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter("other", inference_mode=True)
    assert not any("other" in name for name in trainable_parameters(model))


def hook(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.get_submodule("base_model.model.vit.layers.0").register_forward_hook(lambda *_: None)


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    batch["pixel_values"] = batch["pixel_values"].clone().requires_grad_()


CHANGES: dict[str, Any] = {
    "another option": lambda model, batch: batch.update(interpolate_pos_encoding=True),
    "other adapter": other_adapter,
    "hook": hook,
    "training mode": lambda model, batch: model.train(),
    "gradients of the inputs": gradients,
}


@pytest.fixture
def settled() -> Iterator[tuple[nn.Module, PrefixInTraining, dict[str, Any], list[bool]]]:
    """Gives a model, a prefix that passes over its first block, a batch and the computations of that block."""
    model = vit()
    model.add_adapter("other", NolaConfig(r=2, num_basis=4, target_modules=["q_proj"], init_weights=False))
    model.eval()
    calls = computations(model)
    prefix = PrefixInTraining(model, 1e9, samples=4)
    batch = default_data_collator(pixels(4))
    with prefix.remembering():
        for _ in range(3):
            before = len(calls)
            with prefix.step(model, 0):
                model(**batch)
        assert len(calls) == before
        yield model, prefix, batch, calls


@pytest.mark.parametrize("change", CHANGES)
def test_forward_passes_of_another_kind_are_computed_whole(change, settled):
    model, prefix, batch, calls = settled
    CHANGES[change](model, batch)
    for _ in range(3):
        before = len(calls)
        with prefix.step(model, 0):
            model(**batch)
        assert len(calls) > before


def test_derivatives_are_taken_through_all_blocks(settled):
    model, prefix, batch, _ = settled

    def logits(images: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivatives
            return model(pixel_values=images).logits

    expected = torch.func.jvp(logits, (batch["pixel_values"],), (batch["pixel_values"],))[1]
    with prefix.step(model, 0):
        found = torch.func.jvp(logits, (batch["pixel_values"],), (batch["pixel_values"],))[1]
    assert torch.equal(found, expected) and found.abs().max() > 0


def test_blocks_with_hooks_are_computed(tmp_path):
    seen: list[int] = []

    def make() -> nn.Module:
        model = vit()
        model.get_submodule("base_model.model.vit.layers.0").register_forward_hook(lambda *_: seen.append(1))
        return model

    both(make, pixels(), tmp_path)
    assert len(seen) == 2 * BATCHES * EPOCHS + 2  # those of the search
    assert trainable_parameters(make())
