"""Rows: several adapters in one model, mixed batches, combining, scaling, merging."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale

import peft_ext

from .models import X, llama, logits
from .rows import Method, adapted_layers, close, dense, different, row

GROUP = "Several adapters"
BATCHES = "Mixed batches"
COMBINING = "Combining and scaling"
MERGING = "Merging"
NAMES = ["default", "__base__", "second", "default"]


def two(method: Method, **options: Any) -> tuple[Any, Any]:
    """A base model, and a copy with the adapters "default" (active) and "second" on other modules."""
    base = llama()
    adapted = method.adapt(base)
    adapted.add_adapter("second", method.config(**{"target_modules": ["v_proj", "o_proj"], **options}))
    return base, adapted.eval()


@row(GROUP, "`add_adapter`, `set_adapter`")
def switched(method: Method) -> None:
    base, adapted = two(method)
    close(logits(adapted), logits(dense(base, adapted)))
    adapted.set_adapter("second")
    close(logits(adapted), logits(dense(base, adapted, second=1.0)))
    different(logits(dense(base, adapted, second=1.0)), logits(dense(base, adapted)))
    assert all(".second" in name for name, each in adapted.named_parameters() if each.requires_grad)
    adapted.set_adapter("default")
    close(logits(adapted), logits(dense(base, adapted)))


@row(GROUP, "two adapters active at once")
def both(method: Method) -> None:
    base, adapted = two(method)
    adapted.base_model.set_adapter(["default", "second"])
    close(logits(adapted), logits(dense(base, adapted, default=1.0, second=1.0)))


@row(GROUP, "`delete_adapter`")
def deleted(method: Method) -> None:
    base, adapted = two(method)
    expected = logits(dense(base, adapted, second=1.0))
    adapted.delete_adapter("default")
    adapted.set_adapter("second")
    close(logits(adapted), expected)
    assert list(adapted.peft_config) == ["second"] and not adapted_layers(adapted, "default")


@row(GROUP, "`disable_adapter`")
def disabled(method: Method) -> None:
    base, adapted = two(method)
    with adapted.disable_adapter():
        close(logits(adapted), logits(base), 1e-6)
    close(logits(adapted), logits(dense(base, adapted)))


@row(GROUP, "`get_layer_status`, `get_model_status`")
def status(method: Method) -> None:
    _, adapted = two(method)
    layers = {each.name.removeprefix("model.model."): each for each in adapted.get_layer_status()}
    expected = adapted_layers(adapted).keys() | adapted_layers(adapted, "second").keys()
    assert {name.removeprefix("model.") for name in expected} == layers.keys(), f"layers: {sorted(layers)}"
    for name, each in layers.items():
        names = [] if "o_proj" in name else ["default"]
        names += [] if "q_proj" in name else ["second"]
        assert sorted(each.available_adapters) == names, f"{name}: {each.available_adapters}, expected {names}"
        assert each.active_adapters == ["default"] and each.merged_adapters == []
        assert each.requires_grad == {key: key == "default" for key in names}, f"{name}: {each.requires_grad}"
    whole = adapted.get_model_status()
    assert whole.active_adapters == ["default"] and whole.enabled and whole.requires_grad["second"] is False


@row(BATCHES, "`adapter_names` in `forward`")
def batch(method: Method) -> None:
    base, adapted = two(method)
    expected = torch.stack(
        [
            logits(base if name == "__base__" else dense(base, adapted, **{name: 1.0}), X[[i]])[0]
            for i, name in enumerate(NAMES)
        ]
    )
    close(logits(adapted, adapter_names=NAMES), expected)


@row(BATCHES, "`adapter_names` in `generate`, greedy and with beams")
def batch_generated(method: Method) -> None:
    base, adapted = two(method)
    prompt = X[:, :4]
    for beams in (1, 2):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
        found = adapted.generate(input_ids=prompt, adapter_names=NAMES, **settings)
        for i, name in enumerate(NAMES):
            alone = base if name == "__base__" else dense(base, adapted, **{name: 1.0})
            assert torch.equal(found[i], alone.generate(input_ids=prompt[[i]], **settings)[0]), f"row of {name}"


def refused_names(method: Method, names: Any, training: bool = False, merged: bool = False) -> None:
    """Runs a batch whose names must be refused: silence is wrong."""
    _, adapted = two(method)
    adapted.train(training)
    if merged:
        adapted.merge_adapter(["default"])
    logits(adapted, adapter_names=names)
    raise AssertionError("accepted without a word")


@row(BATCHES, "an unknown name")
def unknown_name(method: Method) -> None:
    refused_names(method, ["default", "__base__", "third", "default"])


@row(BATCHES, "more names than rows")
def too_many_names(method: Method) -> None:
    refused_names(method, [*NAMES, "default"])


@row(BATCHES, "in training mode")
def names_in_training(method: Method) -> None:
    refused_names(method, NAMES, training=True)


@row(BATCHES, "with merged adapters")
def names_while_merged(method: Method) -> None:
    refused_names(method, NAMES, merged=True)


@row(COMBINING, '`add_weighted_adapter(combination_type="linear")`')
def weighted(method: Method) -> str | None:
    base, adapted = llama(), None
    adapted = method.adapt(base)
    adapted.add_adapter("second", method.config())
    adapted.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="linear")
    adapted.set_adapter("both")
    parts = {name: adapted_layers(adapted, name) for name in ("default", "second", "both")}
    for name, layer in parts["both"].items():
        found = layer.get_delta_weight("both")
        if method.name == "PRANC":
            one, other = (parts[each][name].get_delta_weight(each) for each in ("default", "second"))
            close(found, 0.7 * one + 0.3 * other)
        else:
            factors = [factors_of(parts[each][name], each) for each in ("default", "second")]
            A = sum(w**0.5 * each[0] for w, each in zip((0.7, 0.3), factors))
            B = sum(w**0.5 * each[1] for w, each in zip((0.7, 0.3), factors))
            close(found, parts["both"][name].scaling["default"] * B @ A)
    close(logits(adapted), logits(dense(base, adapted, both=1.0)))
    if method.name == "PRANC":
        return "the combination of the updates is exact; LoRA's is of the factors, which is another weight"
    return None


def factors_of(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of an adapter in a layer."""
    if hasattr(layer, "lora_A"):
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.update(adapter)[0]


@row(COMBINING, '`add_weighted_adapter(combination_type="svd")`')
def weighted_svd(method: Method) -> None:
    adapted = method.adapt(llama())
    adapted.add_adapter("second", method.config())
    adapted.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="svd", svd_rank=4)
    for name, layer in adapted_layers(adapted, "both").items():
        one, other = (adapted_layers(adapted, each)[name].get_delta_weight(each) for each in ("default", "second"))
        close(layer.get_delta_weight("both"), 0.7 * one + 0.3 * other, 1e-3)


@row(COMBINING, "`set_scale`, `scale_layer`, `unscale_layer`")
def scaled(method: Method) -> None:
    base, adapted = two(method)
    reference = dense(base, adapted, default=3.0)
    plain = logits(adapted)
    for layer in adapted_layers(adapted).values():
        layer.set_scale("default", 2.0)
        layer.scale_layer(1.5)
    close(logits(adapted), logits(reference))
    for layer in adapted_layers(adapted).values():
        layer.unscale_layer(1.5)
        layer.set_scale("default", 1.0)
    close(logits(adapted), plain)


@row(COMBINING, "`rescale_adapter_scale`")
def rescaled(method: Method) -> str | None:
    base, adapted = two(method)
    reference, plain = dense(base, adapted, default=0.5), logits(adapted)
    own = getattr(peft_ext, "rescale_adapter_scale", None)
    with rescale_adapter_scale(adapted, 0.5) if method.is_lora or own is None else own(adapted, 0.5):
        close(logits(adapted), logits(reference))
    close(logits(adapted), plain)
    return None if method.is_lora else "`peft_ext.rescale_adapter_scale`; PEFT's function looks for LoRA's layers alone"


@row(MERGING, "`merge_and_unload`, `unload`")
def merged(method: Method) -> None:
    base, adapted = two(method)
    expected = logits(dense(base, adapted))
    close(logits(copy.deepcopy(adapted).unload()), logits(base), 1e-6)
    plain = adapted.merge_and_unload()
    close(logits(plain), expected)
    assert type(plain) is type(base) and not adapted_layers(plain)


@row(MERGING, "`merge_adapter`, `unmerge_adapter`, two adapters")
def merged_both(method: Method) -> None:
    base, adapted = two(method)
    expected = logits(dense(base, adapted, default=1.0, second=1.0))
    plain = logits(adapted)
    adapted.merge_adapter(["default", "second"])
    close(logits(adapted), expected)
    adapted.unmerge_adapter()
    close(logits(adapted), plain)
    close(
        adapted.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight,
        base.model.layers[0].self_attn.q_proj.weight,
    )


@row(MERGING, "`safe_merge` of a broken adapter")
def merged_safely(method: Method) -> None:
    base, adapted = two(method)
    logits(adapted)  # a loaded adapter is looked at before its first use
    layer = next(iter(adapted_layers(adapted).values()))
    weight = layer.get_base_layer().weight
    before = weight.clone()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    try:
        adapted.merge_adapter(safe_merge=True)
    except ValueError:
        assert torch.equal(weight, before), "the base weight has changed"
        return
    raise AssertionError("accepted without a word")
