"""What PRANC alone has: one vector for all layers, which the first layer owns; biases and norms."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from dense import PREFIX, close, coefficients_of, dense_gradients, layer_update, run_dense, updates
from methods import METHODS, adapt, adapts_norms, config_of
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from peft_ext import PrancConfig, SeededNetwork, to_lora
from peft_ext.tuners.pranc import PrancLayer, PrancVector

DOUBLE = torch.float64
KINDS = [name for name, (config, _) in METHODS.items() if config is PrancConfig]
kinds = pytest.mark.parametrize("method", KINDS)
WITH_NORMS = [name for name in KINDS if adapts_norms(name)]


def targets_of(method: str) -> list[str]:
    """`norm` is the last one alone."""
    return ["q_proj", "v_proj", "norm" if adapts_norms(method) else "layers.3.mlp.up_proj"]


def layers_of(model: nn.Module, adapter: str = "default") -> dict[str, PrancLayer]:
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, PrancLayer) and layer.container(adapter) is not None
    }


# One vector


@kinds
def test_one_vector_for_the_whole_adapter(method: str, tmp_path: Path) -> None:
    """However many layers read it, the model, a state dict and a file hold it once."""
    model, _ = adapt(tiny_models.llama(4), method, target_modules=targets_of(method))
    assert len(layers_of(model)) == 9
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (name,) = trainable
    assert name == "base_model.model.model.layers.0.self_attn.q_proj.pranc_coefficients.default.values"
    assert trainable[name].shape == (13,)
    assert [key for key in model.state_dict() if "pranc" in key] == [name]
    assert model.get_nb_trainable_parameters()[0] == 13
    model(tiny_models.tokens())
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    vector = name.replace(".default.", ".")
    assert saved.keys() == {vector, vector.replace("coefficients.values", "identity")}
    assert torch.equal(saved[vector], trainable[name])
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 13 + 512 + 384


def test_starts_at_zero() -> None:
    model, _ = adapt(tiny_models.llama(), "PRANC", target_modules=["q_proj"], init_weights=True)
    (parameter,) = coefficients_of(model).values()
    assert not parameter.any()


@kinds
def test_layers_are_not_copies_of_each_other(method: str) -> None:
    model, _ = adapt(tiny_models.llama(), method, target_modules=["q_proj", "o_proj"])
    deltas = [layer.get_delta_weight("default") for layer in layers_of(model).values()]
    correlations = torch.corrcoef(torch.stack([delta.flatten() for delta in deltas])) - torch.eye(4)
    assert len(deltas) == 4 and correlations.abs().max() < 0.2


@kinds
def test_the_gradient_is_the_sum_over_layers(method: str) -> None:
    base = tiny_models.Layers().to(DOUBLE)
    norm = ("norm",) if adapts_norms(method) else ()
    model, config = adapt(base, method, target_modules=["first", "second", "wide", *norm])
    x, path = torch.randn(3, 8, dtype=DOUBLE), ("first", *norm, "second", "first", "wide")
    (vector,) = coefficients_of(model).values()
    model(x, path).square().sum().backward()

    # The gradient of every updated parameter by torch, mapped to the vector layer by layer.
    merged = copy.deepcopy(base)
    for name, delta in updates(config, base, coefficients_of(model)).items():
        merged.get_parameter(name).data += delta.detach()
    merged(x, path).square().sum().backward()
    total = torch.zeros_like(vector)
    for name in ("first", "second", "wide", *norm):
        leaf = vector.detach().clone().requires_grad_()
        update = layer_update(config, base, name, {"first": leaf})
        layer = merged.get_submodule(name)
        if name == "norm":
            pulled = (update.weight.flatten() * torch.cat((layer.weight.grad, layer.bias.grad))).sum()
        else:
            pulled = (update.weight * layer.weight.grad).sum()
            if update.bias is not None:
                pulled = pulled + (update.bias * layer.bias.grad).sum()
        (gradient,) = torch.autograd.grad(pulled, leaf)
        assert gradient.abs().max() > 0
        total += gradient
    close(vector.grad, total)


@kinds
def test_layers_follow_the_vector(method: str) -> None:
    """Whatever replaces the parameter in the layer that owns it is what all layers read."""
    base = tiny_models.Layers()
    model, config = adapt(base, method, target_modules=["first", "second", "wide"])
    x, path = torch.randn(3, 8), ("second", "wide")  # the owner is not called

    def check() -> None:
        (parameter,) = coefficients_of(model).values()
        assert all(layer.container("default")["default"] is parameter for layer in layers_of(model).values())
        expected = run_dense(base, config, coefficients_of(model), lambda m: m(x.to(base.first.weight.dtype), path))
        close(model(x.to(base.first.weight.dtype), path), expected, tolerance=1e-4)

    check()
    owner = model.base_model.model.first.pranc_coefficients
    owner["default"] = nn.Parameter(torch.randn(13))
    check()
    state = {name: torch.randn_like(value) if "pranc" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    check()
    model.to(DOUBLE), base.to(DOUBLE)
    check()
    saved, (parameter,) = copy.deepcopy(get_peft_model_state_dict(model)), coefficients_of(model).values()
    before = parameter.detach().clone()
    nn.init.normal_(parameter)
    set_peft_model_state_dict(model, saved)
    assert torch.equal(*(value.detach() for value in (before, *coefficients_of(model).values())))
    check()
    duplicate = copy.deepcopy(model)
    owner["default"].data.zero_()
    check()
    model = duplicate
    check()
    model = pickle.loads(pickle.dumps(model))
    check()


@kinds
def test_copies_have_vectors_of_their_own(method: str) -> None:
    model, _ = adapt(tiny_models.Layers(), method, target_modules=["first", "second"])
    x, path = torch.randn(3, 8), ("first", "second")
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(x, path), model(x, path))
        (one,), (other,) = (coefficients_of(each).values() for each in (model, duplicate))
        assert one is not other
        other.data.add_(1)
        assert not torch.equal(duplicate(x, path), model(x, path))
        duplicate(x, path).sum().backward()
        assert other.grad is not None and one.grad is None


@kinds
def test_dtypes(method: str) -> None:
    """Half precision bases train the one vector in float32; a cast model casts it once."""
    base = tiny_models.Layers().bfloat16()
    model = get_peft_model(copy.deepcopy(base), config_of(method, target_modules=["first", "second"]))
    (parameter,) = coefficients_of(model).values()
    assert parameter.dtype == torch.float32
    x = torch.randn(3, 8)
    model(x.bfloat16(), ("first", "second")).sum().backward()
    assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        (parameter,) = coefficients_of(model).values()
        assert parameter.dtype == dtype
        assert model(x.to(dtype), ("first", "second")).dtype == dtype


class OneDevice(TorchFunctionMode):
    """Refuses operations on tensors of several devices, which the meta device does not always refuse."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert len({tensor.device for tensor in tensors}) <= 1, function
        return function(*args, **(kwargs or {}))


TWO_DEVICES = {
    "second": (3, 8),
    "conv1d": (3, 24),
    "conv2d": (2, 3, 5, 5),
    "norm": (3, 8),
    "embedding": (2, 3),
}


@kinds
@pytest.mark.parametrize("name", TWO_DEVICES)
def test_layers_on_other_devices_than_the_vector(name: str, method: str) -> None:
    if name == "norm" and not adapts_norms(method):
        pytest.skip("norms have no factors")
    model, _ = adapt(tiny_models.Layers(), method, target_modules=["first", name])
    model.base_model.model.get_submodule(name).get_base_layer().to("meta")
    assert all(vector.device.type == "cpu" for vector in coefficients_of(model).values())
    x = torch.empty(*TWO_DEVICES[name], device="meta", dtype=torch.long if name == "embedding" else torch.float32)
    with OneDevice():
        assert model(x, (name,)).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@kinds
def test_layers_on_a_gpu_beside_the_vector_on_the_cpu(method: str) -> None:
    base = tiny_models.Layers()
    model, _ = adapt(base, method, target_modules=["first", "second", "norm"])
    x = torch.randn(3, 8)
    expected = model(x, ("second", "norm"))
    for name in ("second", "norm"):
        model.base_model.model.get_submodule(name).to("cuda")
    found = model(x.cuda(), ("second", "norm"))
    torch.testing.assert_close(found.cpu(), expected)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in coefficients_of(model).values())


# Several adapters


def test_adapters_with_different_owners(tmp_path: Path) -> None:
    """The layer that owns one adapter's vector only reads another's; each can be deleted and saved alone."""
    base = tiny_models.Layers().to(DOUBLE)
    fields: dict[str, dict[str, Any]] = {
        "a": {"num_coefficients": 10, "target_modules": ["second", "wide"]},
        "b": {"num_coefficients": 12, "target_modules": ["first", "second"], "nnz": 2},
        "c": {"num_coefficients": 8, "target_modules": ["wide", "norm"], "basis": "dense"},
    }
    x, path = torch.randn(3, 8, dtype=DOUBLE), ("first", "second", "norm", "wide")
    for order in (("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")):
        model: Any = None
        for name in order:
            config = PrancConfig(init_weights=False, **fields[name])
            if model is None:
                model = get_peft_model(copy.deepcopy(base), config, name).to(DOUBLE)
            else:
                model.add_adapter(name, config)
                model.to(DOUBLE)
        owners = {name: list(coefficients_of(model, name)) for name in "abc"}
        assert owners == {"a": ["second"], "b": ["first"], "c": ["wide"]}

        def check(names: str, model: Any = model) -> None:
            for name in names:
                model.set_adapter(name)
                config = model.peft_config[name]
                expected = run_dense(base, config, coefficients_of(model, name), lambda m: m(x, path))
                close(model(x, path), expected)

        check("abc")
        for name in "abc":
            model.save_pretrained(str(tmp_path / "-".join(order)), selected_adapters=[name])
            folder = str(tmp_path / "-".join(order) / name)
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).to(DOUBLE)
            model.set_adapter(name)
            close(loaded(x, path), model(x, path))
        model.delete_adapter(order[0])
        check("".join(order[1:]))
        model.delete_adapter(order[1])
        check(order[2])
        assert set(layers_of(model, order[2])) == {n for n in fields[order[2]]["target_modules"]}
        assert not layers_of(model, order[0]) and not coefficients_of(model, order[0])


def test_requires_grad_follows_the_active_adapter() -> None:
    """Layers that do not own the vector do not freeze it for those that do, nor the other way round."""
    model = get_peft_model(tiny_models.Layers(), config_of("PRANC", target_modules=["first", "second"]), "a")
    model.add_adapter("b", config_of("PRANC", target_modules=["second", "wide"]))
    model.add_adapter("c", config_of("PRANC", target_modules=["conv1d", "second", "first"]))
    for active in ("b", "c", "a", "b"):
        model.set_adapter(active)
        trained = {name for name in "abc" for p in coefficients_of(model, name).values() if p.requires_grad}
        assert trained == {active}
    model.set_adapter("a", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


# Biases and norms


def test_norms_of_a_language_model(tmp_path: Path) -> None:
    base = tiny_models.llama().to(DOUBLE)
    targets = ["input_layernorm", "post_attention_layernorm", "norm", "q_proj"]
    model, config = adapt(base, "PRANC", target_modules=targets)
    layers = layers_of(model)
    assert sum(isinstance(layer, PrancVector) for layer in layers.values()) == 5 and len(layers) == 7
    x = tiny_models.tokens()

    def loss(model: nn.Module) -> torch.Tensor:
        return model(input_ids=x).logits.square().mean()

    expected = run_dense(base, config, coefficients_of(model), loss)
    torch.testing.assert_close(loss(model), expected, rtol=1e-5, atol=1e-5)
    loss(model).backward()
    for name, gradient in dense_gradients(base, config, model, loss).items():
        close(coefficients_of(model)[name].grad, gradient, tolerance=1e-4)
    before = loss(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).to(DOUBLE)
    torch.testing.assert_close(loss(loaded), before)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_shapes"] == {"32 x 1": 5, "32 x 32": 2}
    merged = model.merge_and_unload()
    assert not any(isinstance(module, PrancLayer) for module in merged.modules())
    torch.testing.assert_close(loss(merged), before, rtol=1e-6, atol=1e-6)


def test_batch_norm_in_training() -> None:
    """Running statistics are those of the base layer, updated once a pass."""
    base = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20)).to(DOUBLE)
    model, config = adapt(base, "PRANC", target_modules=["0", "1"])
    x = torch.randn(4, 3, 6, 6, dtype=DOUBLE)
    model.train(), base.train()
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    close(model(x), expected)
    adapted = model.base_model.model[1].get_base_layer()
    assert adapted.num_batches_tracked == 1 == base[1].num_batches_tracked
    close(adapted.running_mean, base[1].running_mean)
    close(adapted.running_var, base[1].running_var)
    keys = [key for key in model.state_dict() if "running" in key]
    assert keys == ["base_model.model.1.base_layer.running_mean", "base_model.model.1.base_layer.running_var"]


def test_several_adapters_of_a_norm() -> None:
    base = tiny_models.One(nn.LayerNorm(20)).to(DOUBLE)
    model, one = adapt(base, "PRANC", target_modules=["layer"])
    two = config_of("PRANC", target_modules=["layer"], seed=5)
    model.add_adapter("two", two)
    model.to(DOUBLE)
    model.base_model.set_adapter(["default", "two"])
    x = torch.randn(3, 20, dtype=DOUBLE)
    combined = copy.deepcopy(base)
    for name, config in (("default", one), ("two", two)):
        for key, delta in updates(config, base, coefficients_of(model, name)).items():
            combined.get_parameter(key).data += delta.detach()
    close(model(x), combined(x))
    model.merge_adapter()
    close(model(x), combined(x))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))


def test_biases_are_part_of_the_update() -> None:
    base = tiny_models.Layers().to(DOUBLE)
    for adapt_bias in (False, True):
        model, config = adapt(base, "PRANC", target_modules=["first", "second", "conv2d"], adapt_bias=adapt_bias)
        before = copy.deepcopy(base)
        merged = model.merge_and_unload()
        for name, layer in (("first", merged.first), ("conv2d", merged.conv2d)):
            assert torch.equal(layer.bias, before.get_submodule(name).bias) != adapt_bias
        assert merged.second.bias is None and not torch.equal(merged.second.weight, before.second.weight)


def test_the_size_of_updates() -> None:
    """`1 / sqrt(fan_in)` for scaled coefficients of 1, whatever the basis; a norm's update is as large as they are."""
    for method in WITH_NORMS:
        model, config = adapt(
            tiny_models.llama(1, hidden_size=64), method, target_modules=["q_proj", "down_proj", "norm"]
        )
        (vector,) = coefficients_of(model).values()
        weights = sum(layer.fan_out * layer.fan_in for layer in layers_of(model).values())
        vector.data = vector.data.sign() / math.sqrt(weights / config.num_coefficients)
        for name, layer in layers_of(model).items():
            rms = layer.get_delta_weight("default").square().mean().sqrt() * layer.fan_in**0.5
            assert 0.7 < rms < 1.4, (method, name)


# Refusals


@pytest.mark.parametrize("targets", [["first"], ["first", "norm"]])
def test_more_coefficients_than_weights(targets: list[str], snapshot: Callable[[nn.Module], dict[str, Any]]) -> None:
    base = tiny_models.Layers()
    weights = 64 + (16 if "norm" in targets else 0)
    before = snapshot(base)
    message = (
        rf"`num_coefficients` must be at most the number of weights that they update, {weights} in the "
        rf"{len(targets)} target modules, got {weights + 1}"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, PrancConfig(num_coefficients=weights + 1, target_modules=targets))
    after = snapshot(base)
    assert before["modules"] == after["modules"] and before["tensors"].keys() == after["tensors"].keys()
    get_peft_model(base, PrancConfig(num_coefficients=weights, target_modules=targets))


def test_more_coefficients_than_weights_in_a_further_adapter() -> None:
    model, _ = adapt(tiny_models.Layers(), "PRANC", target_modules=["first"])
    x = torch.randn(3, 8)
    expected = model(x, ("first", "second"))
    with pytest.raises(ValueError, match="`num_coefficients` must be at most"):
        model.add_adapter("other", PrancConfig(num_coefficients=65, target_modules=["second"]))
    assert torch.equal(model(x, ("first", "second")), expected)
    assert list(model.peft_config) == ["default"]


def test_targets_from_a_state_dict_are_refused(snapshot: Callable[[nn.Module], dict[str, Any]]) -> None:
    base = tiny_models.Layers()
    before = snapshot(base)
    with pytest.raises(ValueError, match="`state_dict` must be None for PRANC.*does not say which layers read it"):
        inject_adapter_in_model(
            config_of("PRANC"), base, state_dict={"first.pranc_coefficients.values": torch.zeros(13)}
        )
    assert before["modules"] == snapshot(base)["modules"]


# Factors


def test_what_fills_factors_has_no_biases_and_no_norms() -> None:
    with pytest.raises(ValueError, match="`adapt_bias` must be False with apply_to='factors'"):
        PrancConfig(apply_to="factors", adapt_bias=True)
    with pytest.raises(ValueError, match="`basis` must be 'sparse' with apply_to='factors', got 'dense'"):
        PrancConfig(apply_to="factors", basis="dense")
    with pytest.raises(ValueError, match="`target_modules` matches 'norm', a LayerNorm, which PRANC cannot adapt"):
        get_peft_model(tiny_models.Layers(), config_of("PRANC, factors", target_modules=["first", "norm"]))
    with pytest.raises(ValueError, match="`apply_to` must be 'weight' for PRANC to make a whole network"):
        SeededNetwork(nn.Linear(8, 8), PrancConfig(num_coefficients=10, apply_to="factors"))


def test_the_numbers_of_the_factors_bound_the_coefficients() -> None:
    base = tiny_models.Layers()  # `first` is 8 x 8
    factors: dict[str, Any] = {"apply_to": "factors", "r": 3, "target_modules": ["first"]}
    with pytest.raises(ValueError, match="at most the number of entries of the factors that they fill, 48 in the 1"):
        get_peft_model(base, PrancConfig(num_coefficients=49, **factors))
    with pytest.raises(ValueError, match="`r` must be at most 128, 16 times the 8 columns or rows"):
        get_peft_model(base, PrancConfig(num_coefficients=4, **{**factors, "r": 129}))
    get_peft_model(base, PrancConfig(num_coefficients=48, **factors))


def test_what_fills_factors_starts_with_an_update_of_zero() -> None:
    """A is uniform on +- 0.1 / sqrt(fan_in), of every layer its own, and B is zero; coefficients move both."""
    model, _ = adapt(tiny_models.llama(1), "PRANC, factors", target_modules=["q_proj", "o_proj"], init_weights=True)
    (vector,) = coefficients_of(model).values()
    starts = []
    for layer in layers_of(model).values():
        A, B = layer.update("default")[0]
        assert 0.09 * 32**-0.5 < A.abs().max() <= 0.1 * 32**-0.5 and not B.any()
        starts.append(A)
    assert not torch.equal(*starts)
    vector.data.fill_(1)
    for start, layer in zip(starts, layers_of(model).values()):
        A, B = layer.update("default")[0]
        # 128 / 13 numbers of all A read a coefficient, and as many of all B.
        for moved, power in ((A - start, 0.25), (B, 0.5)):
            close(moved.abs(), torch.full_like(moved, (128 / 13) ** power), tolerance=0.1)


@pytest.mark.parametrize("options", [{}, {"adapt_bias": True}, {"target_modules": ["first", "norm"]}])
def test_biases_trained_beside_it(options: dict[str, Any]) -> None:
    base = tiny_models.Layers()
    model, _ = adapt(base, "PRANC", **{"target_modules": ["first"], "bias": "pranc_only", **options})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"{PREFIX}{name}.base_layer.bias" for name in options.get("target_modules", ["first"])}
    assert {name for name in trained if "coefficients" not in name} == expected
    assert model.peft_config["default"].bias == "pranc_only"


@pytest.mark.parametrize("options", [{"adapt_bias": True}, {"target_modules": ["norm"]}])
def test_merged_biases_are_not_saved_beside_coefficients(options: dict[str, Any], tmp_path: Path) -> None:
    """They would have the update in them, which the coefficients make again when the file is loaded."""
    model, _ = adapt(tiny_models.Layers(), "PRANC", **{"target_modules": ["first"], "bias": "all", **options})
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged in '.*', whose bias has its update in it.*unmerge it"):
        model.save_pretrained(str(tmp_path))
    if "adapt_bias" in options:
        with pytest.raises(ValueError, match="whose bias has its update in it"):
            to_lora(model, str(tmp_path / "lora"), error=0)
    model.unmerge_adapter()
    model.save_pretrained(str(tmp_path))
