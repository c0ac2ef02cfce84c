"""Scales of adapters: LoRA's methods on layers of every method, merged layers, what is saved."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from dense import close, coefficients_of, updates
from methods import METHODS, ONE_OF_EACH, Config, adapt, adapts_norms, config_of
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_ext import VisualPromptConfig, rescale_adapter_scale
from peft_ext.tuners.layers import SeededLayer

DOUBLE = torch.float64

# name of a layer: its input. From 16 rows on, updates of whole weights are added to them.
INPUTS = {
    "first": lambda: torch.randn(3, 8),
    "wide": lambda: torch.randn(2, 9, 8),
    "conv1d": lambda: torch.randn(2, 9, 24),
    "conv2d": lambda: torch.randn(2, 3, 7, 8),
    "embedding": lambda: torch.randint(0, 11, (3, 4)),
    "norm": lambda: torch.randn(4, 8),
}
LAYERS = list(INPUTS)

every_method = pytest.mark.parametrize("method", METHODS)
several = pytest.mark.parametrize("method", ONE_OF_EACH)


def input_of(name: str) -> torch.Tensor:
    x = INPUTS[name]()
    return x.to(DOUBLE) if x.is_floating_point() else x


def model_of(method: str, *names: str) -> tuple[PeftModel, nn.Module, Config]:
    """A model with adapters in some layers, in double precision, its base and its configuration."""
    base = tiny_models.Layers().to(DOUBLE)
    model, config = adapt(base, method, target_modules=list(names))
    return model, base, config


def layers_of(model: nn.Module) -> list[SeededLayer]:
    return [module for module in model.modules() if isinstance(module, SeededLayer)]


def scaled(base: nn.Module, model: nn.Module, config: Config, scale: float, adapter: str = "default") -> nn.Module:
    """The base model with `scale` times the dense updates of an adapter added to its weights."""
    combined = copy.deepcopy(base)
    for key, delta in updates(config, base, coefficients_of(model, adapter)).items():
        combined.get_parameter(key).data += scale * delta.detach()
    return combined


def cases() -> list[tuple[str, str]]:
    return [(method, name) for method in METHODS for name in LAYERS if name != "norm" or adapts_norms(method)]


@pytest.mark.parametrize(("method", "name"), cases(), ids=map("-".join, cases()))
def test_scales_multiply_the_update(method: str, name: str) -> None:
    model, base, config = model_of(method, name)
    x, (layer,) = input_of(name), layers_of(model)
    initial = layer.scaling["default"]

    def check(scale: float) -> None:
        assert layer.scaling["default"] == pytest.approx(scale * initial)
        expected = scaled(base, model, config, scale)
        close(model(x, (name,)), expected(x, (name,)))
        with torch.no_grad():
            close(model(x, (name,)), expected(x, (name,)))
        model.merge_adapter()
        close(model(x, (name,)), expected(x, (name,)))
        close(model.base_model.model.get_submodule(name).get_base_layer()(x), expected.get_submodule(name)(x))
        model.unmerge_adapter()
        for key, parameter in base.named_parameters():
            found = model.base_model.model.get_parameter(key.replace(f"{name}.", f"{name}.base_layer."))
            close(found, parameter)

    check(1)
    for scale in (0.5, -2, 0):
        layer.set_scale("default", scale)  # of what it was at first, not of what it is
        check(scale)
    layer.set_scale("default", 2)
    layer.scale_layer(0.25)
    check(0.5)
    layer.scale_layer(0.5)
    check(0.25)
    layer.unscale_layer(0.5)
    check(0.5)
    layer.unscale_layer()
    check(1)
    layer.scale_layer(0)
    layer.unscale_layer()
    check(1)


@every_method
def test_gradients_follow_the_scale(method: str) -> None:
    model, _, _ = model_of(method, "first", "wide")
    x = torch.randn(9, 8, dtype=DOUBLE)
    weight = torch.randn(9, 24, dtype=DOUBLE)

    def gradients() -> list[torch.Tensor]:
        parameters = list(coefficients_of(model).values())
        return list(torch.autograd.grad((model.base_model.model.wide(x) * weight).sum(), parameters, allow_unused=True))

    before = gradients()
    for layer in layers_of(model):
        layer.set_scale("default", 0.5)
    for found, full in zip(gradients(), before):
        assert (found is None) == (full is None)
        if found is not None:
            close(found, 0.5 * full)


@several
def test_several_adapters(method: str) -> None:
    model, base, config = model_of(method, "first", "wide")
    other = config_of(method, seed=3, target_modules=["wide", "second"])
    model.add_adapter("other", other)
    model.to(DOUBLE).base_model.set_adapter(["default", "other"])
    wide = model.base_model.model.wide
    x = torch.randn(2, 9, 8, dtype=DOUBLE)

    def check(first: float, second: float) -> None:
        expected = scaled(scaled(base, model, config, first), model, other, second, "other")
        close(model(x, ("first", "second", "wide")), expected(x, ("first", "second", "wide")))

    for layer in layers_of(model):
        layer.set_scale("other", 0.5)
        layer.set_scale("nobody", 7)  # left out, as in LoRA
    check(1, 0.5)
    for layer in layers_of(model):
        layer.scale_layer(0.5)  # all active adapters
    check(0.5, 0.25)
    model.set_adapter("default")
    for layer in layers_of(model):
        layer.unscale_layer()  # that of "other" stays
    assert (wide.scale_of("default"), wide.scale_of("other")) == (1, 0.25)
    model.delete_adapter("other")
    wide.set_scale("other", 5)
    assert "other" not in wide.scaling
    model.add_adapter("other", config_of(method, seed=3, target_modules=["wide", "second"]))
    assert wide.scale_of("other") == 1


@every_method
def test_merged_adapters_keep_their_scale(method: str) -> None:
    """LoRA changes the scale, with no effect on the outputs, and unmerges another update than it has merged."""
    model, base, config = model_of(method, "first", "wide")
    x = torch.randn(2, 9, 8, dtype=DOUBLE)
    for layer in layers_of(model):
        layer.set_scale("default", 0.5)
    expected = scaled(base, model, config, 0.5)(x, ("first", "wide"))
    model.merge_adapter()
    before = [dict(layer.scaling) for layer in layers_of(model)]
    message = "The scale of adapter 'default' cannot change while it is merged.*Unmerge it first"
    for layer in layers_of(model):
        with pytest.raises(ValueError, match=message):
            layer.set_scale("default", 0.25)
        with pytest.raises(ValueError, match=message):
            layer.scale_layer(0.5)
        for scale in (0.5, None):
            with pytest.raises(ValueError, match=message):
                layer.unscale_layer(scale)
        layer.set_scale("default", 0.5)  # what it is
        layer.scale_layer(1)
        layer.unscale_layer(1)
    with pytest.raises(ValueError, match="`model` must not be merged: the scale of 'default'"):
        rescale_adapter_scale(model, 0.5).__enter__()
    assert [dict(layer.scaling) for layer in layers_of(model)] == before
    close(model(x, ("first", "wide")), expected)
    model.unmerge_adapter()
    for key, parameter in base.named_parameters():
        for name in ("first", "wide"):
            key = key.replace(f"{name}.", f"{name}.base_layer.")
        close(model.base_model.model.get_parameter(key), parameter)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "0.5", True, None, torch.tensor(0.5)])
def test_scales_are_numbers(scale: Any) -> None:
    model, _, _ = model_of("NOLA", "first")
    (layer,) = layers_of(model)
    changes = [lambda: layer.set_scale("default", scale), lambda: layer.scale_layer(scale)]
    if scale is not None:
        changes.append(lambda: layer.unscale_layer(scale))
    for change in changes:
        with pytest.raises(ValueError, match="`scale` must be a finite number, got"):
            change()
    with pytest.raises(ValueError, match="`multiplier` must be a finite number, got"):
        rescale_adapter_scale(model, scale).__enter__()
    with pytest.raises(ValueError, match=r"`scale` must not be 0.*`unscale_layer\(\)`"):
        layer.unscale_layer(0)
    assert layer.scale_of("default") == 1


# What is saved


@every_method
def test_a_scale_is_not_saved_and_saving_says_so(method: str, tmp_path: Path) -> None:
    base = tiny_models.Layers()
    model, _ = adapt(base, method, target_modules=["first", "wide"])
    x = torch.randn(2, 9, 8)
    full = model(x, ("first", "wide"))
    layers = layers_of(model)
    for layer in layers:
        layer.set_scale("default", 0.5)
    with pytest.warns(UserWarning, match=r"Adapter 'default' is saved without its scale, 0.5: .*`set_scale`"):
        model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path))
    assert torch.equal(loaded(x, ("first", "wide")), full)
    assert not torch.equal(model(x, ("first", "wide")), full)

    layers[0].set_scale("default", 2)
    with pytest.warns(UserWarning, match="without its scale, from 0.5 to 2 in its layers: "):
        model.save_pretrained(str(tmp_path))
    for layer in layers:
        layer.unscale_layer()
        layer.scale_layer(0.3)
        layer.unscale_layer(0.3)  # but for rounding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(str(tmp_path))
        with rescale_adapter_scale(model, 0.5):
            pass
        model.save_pretrained(str(tmp_path))
    with rescale_adapter_scale(model, 0.5), pytest.warns(UserWarning, match="without its scale"):
        model.save_pretrained(str(tmp_path))


# The context manager


@several
def test_what_is_done_while_it_is_rescaled(method: str) -> None:
    model, base, config = model_of(method, "first")
    x, (layer,) = input_of("first"), layers_of(model)
    weight = layer.get_base_layer().weight.detach().clone()
    before, full = layer.scaling["default"], model(x, ("first",))
    with (
        pytest.raises(ValueError, match="'default' was merged inside the block"),
        rescale_adapter_scale(model, 0.5),
    ):
        model.merge_adapter()
    assert not layer.merged and layer.scaling["default"] == before
    close(layer.get_base_layer().weight, weight)
    with (
        pytest.raises(ValueError, match="the scale of 'default' was changed inside the block"),
        rescale_adapter_scale(model, 0.5),
    ):
        layer.set_scale("default", 3)
    close(model(x, ("first",)), full)
    with rescale_adapter_scale(model, 0.5):
        model.add_adapter("other", config)
        half = model(x, ("first",))
    model.set_adapter("other")
    model(x, ("first",))  # it has a scale
    model.set_adapter("default")
    with rescale_adapter_scale(model, 0.5):
        model.delete_adapter("other")
        merged = model.merge_and_unload()
    close(merged(x, ("first",)), half)


@several
def test_rescaling_for_a_while(method: str) -> None:
    model, base, config = model_of(method, "first", "wide")
    x, path = torch.randn(2, 9, 8, dtype=DOUBLE), ("first", "wide")
    full = model(x, path)
    layers_of(model)[1].set_scale("default", 3)
    with rescale_adapter_scale(model, 0.5):
        assert [layer.scale_of("default") for layer in layers_of(model)] == [0.5, 1.5]
    assert [layer.scale_of("default") for layer in layers_of(model)] == [1, 3]
    layers_of(model)[1].unscale_layer()
    with pytest.raises(KeyError), rescale_adapter_scale(model, 0.5):
        close(model(x, path), scaled(base, model, config, 0.5)(x, path))
        raise KeyError
    assert torch.equal(model(x, path), full)


def test_rescaling_beside_lora() -> None:
    """As in a pipeline of several models: one has adapters of ours, the other of LoRA."""
    ours, _, config = model_of("NOLA", "first")
    lora = get_peft_model(tiny_models.Layers(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    both = nn.ModuleList([ours, lora])
    before = lora.base_model.model.first.scaling["default"]
    with rescale_adapter_scale(both, 0.25):
        assert layers_of(ours)[0].scale_of("default") == 0.25
        assert lora.base_model.model.first.scaling["default"] == before / 4
    assert lora.base_model.model.first.scaling["default"] == before
    lora.merge_adapter()
    with pytest.raises(ValueError, match="`model` must not be merged"):
        rescale_adapter_scale(both, 0.25).__enter__()
    assert layers_of(ours)[0].scale_of("default") == 1


def test_what_cannot_be_rescaled() -> None:
    with pytest.raises(ValueError, match="`model` must have adapters, got Layers without any"):
        rescale_adapter_scale(tiny_models.Layers(), 0.5).__enter__()
    vera = get_peft_model(tiny_models.Layers(), VeraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="adapters of a Linear have no scaling"):
        rescale_adapter_scale(vera, 0.5).__enter__()


def test_prompts_have_no_scale() -> None:
    model = get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=2))
    block = model.base_model.model.vit.layers[0]
    message = "Visual prompts are tokens in the input of the blocks: they cannot be scaled"
    for change in (
        lambda: block.set_scale("default", 0.5),
        lambda: block.scale_layer(0.5),
        lambda: block.unscale_layer(0.5),
    ):
        with pytest.raises(ValueError, match=message):
            change()
    with pytest.raises(ValueError, match="adapters of a VisualPromptLayer have no scaling"):
        rescale_adapter_scale(model, 0.5).__enter__()
    block.set_scale("default", 1.0)
    block.scale_layer(1)
    block.unscale_layer()


def test_adapters_of_transformers(tmp_path: Path) -> None:
    model = tiny_models.llama()
    x = tiny_models.tokens()
    inject_adapter_in_model(config_of("NOLA", target_modules=["q_proj", "v_proj"]), model)
    full = model(x).logits
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(model(x).logits, tiny_models.llama()(x).logits)
    assert torch.equal(model(x).logits, full)
