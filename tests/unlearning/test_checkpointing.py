"""A model that was trained with gradient checkpointing is one like any other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from tempfile import mkdtemp

import pytest
import torch
from peft import get_peft_model
from problems import bert, classified_texts, images, loader, texts
from test_prefix import everything, frozen_calls, gpt2, llama, vit
from tiny_models import gpt2 as plain_gpt2
from torch import nn

from peft_ext import NolaConfig
from peft_ext.training.modes import no_input_gradients
from peft_ext.unlearning import GaussNewton, UnlearningLedger
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import CrossEntropy

MODELS = {
    "GPT-2": (gpt2, texts),
    "Llama": (llama, texts),
    "ViT": (vit, images),
    "BERT": (lambda: bert("BertForSequenceClassification", 3, 2), classified_texts),
}


def enabled(model: nn.Module, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that the Trainer of older releases calls
        model.gradient_checkpointing_enable(options or None)
    return model


def disabled(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enabled(model).gradient_checkpointing_disable()
    return model


def before_the_adapter(model: nn.Module) -> nn.Module:
    """As trl does: what is adapted has a hook already."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
            module.register_forward_hook(lambda module, args, output: setattr(output, "requires_grad", True))
        elif isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, args: (args[0].requires_grad_(True),))
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "on": enabled,
    "on, reentrant": lambda model: enabled(model, use_reentrant=True),
    "off again": disabled,
    "a hook of one's own": before_the_adapter,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_everything_works_as_without_it(name, way, tmp_path):
    make, samples = MODELS[name]
    rows = samples(6)
    sets = loader(rows[:4]), loader(rows[4:])

    def results(model: nn.Module) -> list[torch.Tensor]:
        found = everything(AdapterFunction(model, CrossEntropy()), rows)
        ledger = UnlearningLedger.create(mkdtemp(dir=tmp_path), model, loader(rows), damping=1.0)
        shifts = [ledger.forget(model, sets[1]).shift, GaussNewton(max_steps=1).fit(model, *sets).shift]
        return [*found, torch.tensor(shifts)]

    for expected, found in zip(results(make()), results(WAYS[way](make())), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_frozen_blocks_are_computed_once(name):
    make, samples = MODELS[name]
    model, rows = enabled(make()), samples(6)
    function = AdapterFunction(model, CrossEntropy())
    calls = frozen_calls(model)
    with function.prefix.remembering():
        function.loss_and_gradient(loader(rows))
        calls.clear()
        function.loss_and_gradient(loader(rows))
        assert not calls


def test_the_model_is_as_it_was_afterwards():
    """Training goes on as before: without the hook, a reentrant checkpoint would cut the gradient off."""
    model = get_peft_model(plain_gpt2(vocab_size=24), NolaConfig(r=2, num_basis=6, init_weights=False))
    enabled(model, use_reentrant=True)
    rows = texts(6)
    batch = next(iter(loader(rows)))

    def gradient() -> list[torch.Tensor | None]:
        torch.manual_seed(0)  # dropout
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    before = gradient()
    assert all(part is not None for part in before)
    model.eval()
    function = AdapterFunction(model, CrossEntropy())
    assert len(list(function.linearise(loader(rows), 2))) > 0
    with pytest.raises(ValueError, match="labels"):
        function.loss_and_gradient([{"input_ids": batch["input_ids"]}])
    for old, new in zip(before, gradient(), strict=True):
        assert torch.equal(old, new)
    with no_input_gradients(model), no_input_gradients(model):
        assert not model.get_input_embeddings()(batch["input_ids"]).requires_grad
    assert model.get_input_embeddings()(batch["input_ids"]).requires_grad
