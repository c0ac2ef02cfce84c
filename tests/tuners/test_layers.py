"""Adapted layers of every method: outputs against dense matrices, merging, several adapters, dtypes, quantization."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from dense import close, coefficients_of, dense_gradients, layer_update, run_dense, updates
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from methods import FURTHER, METHODS, ONE_OF_EACH, Config, adapt, adapts_norms, config_of, lower
from peft import PeftModel, get_peft_model
from tiny_models import One
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from transformers.pytorch_utils import Conv1D

from peft_ext.tuners import weight_layers
from peft_ext.tuners.layers import SeededLayer
from peft_ext.tuners.pranc import PrancVector
from peft_ext.tuners.weight_layers import SeededConv2d, SeededEmbedding, SeededLinear

DOUBLE = torch.float64

Case = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], type]

# name: (layer, its input, the class that adapts it). From 16 inputs on, updates of whole weights are added to them.
LAYERS: dict[str, Case] = {
    "linear": (lambda: nn.Linear(6, 9), lambda: torch.randn(4, 6), SeededLinear),
    "linear without bias, 3-d input": (lambda: nn.Linear(6, 9, bias=False), lambda: torch.randn(2, 9, 6), SeededLinear),
    "linear, empty batch": (lambda: nn.Linear(6, 9), lambda: torch.randn(0, 6), SeededLinear),
    "Conv1D": (lambda: Conv1D(9, 6), lambda: torch.randn(2, 9, 6), SeededLinear),
    "conv": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(2, 3, 7, 8), SeededConv2d),
    "conv, unbatched": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(3, 7, 8), SeededConv2d),
    "conv, 1x1": (lambda: nn.Conv2d(3, 5, 1, bias=False), lambda: torch.randn(2, 3, 7, 8), SeededConv2d),
    "conv, stride": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 3)), lambda: torch.randn(2, 3, 9, 8), SeededConv2d),
    "conv, padding": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1)), lambda: torch.randn(2, 3, 5, 6), SeededConv2d),
    "conv, same": (lambda: nn.Conv2d(3, 5, (3, 4), padding="same"), lambda: torch.randn(2, 3, 5, 6), SeededConv2d),
    "conv, dilation": (lambda: nn.Conv2d(3, 5, 3, dilation=(1, 2)), lambda: torch.randn(2, 3, 8, 8), SeededConv2d),
    "conv, groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), lambda: torch.randn(2, 6, 7, 8), SeededConv2d),
    "conv, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: torch.randn(2, 6, 7, 8), SeededConv2d),
    "conv, reflect": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 3, 7, 8),
        SeededConv2d,
    ),
    "conv, circular groups": (
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", groups=2, stride=2),
        lambda: torch.randn(2, 4, 7, 8),
        SeededConv2d,
    ),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (3, 4)), SeededEmbedding),
    "embedding, padding": (
        lambda: nn.Embedding(11, 6, padding_idx=2),
        lambda: torch.tensor([[0, 2, 2, 5], [1, 2, 10, 10]]),
        SeededEmbedding,
    ),
    "embedding, by frequency": (
        lambda: nn.Embedding(11, 6, scale_grad_by_freq=True),
        lambda: torch.tensor([[0, 2, 2, 5], [1, 2, 10, 10]]),
        SeededEmbedding,
    ),
}
SOME = ["linear", "Conv1D", "conv", "conv, groups", "embedding"]

# What PRANC alone adapts: modules that hold vectors only.
VECTORS: dict[str, Case] = {
    "layer norm": (lambda: nn.LayerNorm(20), lambda: torch.randn(4, 20), PrancVector),
    "layer norm without bias": (lambda: nn.LayerNorm(20, bias=False), lambda: torch.randn(2, 4, 20), PrancVector),
    "RMS norm": (lambda: nn.RMSNorm(20), lambda: torch.randn(4, 20), PrancVector),
    "llama's norm": (
        lambda: copy.deepcopy(tiny_models.llama(1).model.norm),
        lambda: torch.randn(2, 4, 32),
        PrancVector,
    ),
    "batch norm": (lambda: nn.BatchNorm2d(20).eval(), lambda: torch.randn(2, 20, 3, 3), PrancVector),
    "group norm": (lambda: nn.GroupNorm(4, 20), lambda: torch.randn(2, 20, 3), PrancVector),
}
CASES = {**LAYERS, **VECTORS}


def pairs(layers: list[str], methods: list[str], vectors: bool = False) -> pytest.MarkDecorator:
    """Layers with methods; and those that PRANC alone adapts, if asked for or where all layers are."""
    found = [(layer, method) for layer in layers for method in methods]
    if vectors or layers == list(LAYERS):
        found += [(layer, method) for layer in VECTORS for method in methods if adapts_norms(method)]
    return pytest.mark.parametrize(("name", "method"), found, ids=map("-".join, found))


def layer_case(name: str) -> tuple[One, torch.Tensor, type]:
    make_layer, make_input, adapted = CASES[name]
    torch.manual_seed(0)
    base, x = One(make_layer()).to(DOUBLE), make_input()
    return base, x.to(DOUBLE) if x.is_floating_point() else x, adapted


def adapt_layer(base: One, method: str, **options: Any) -> tuple[PeftModel, Config]:
    return adapt(base, method, target_modules=["layer"], **options)


@pairs(list(LAYERS), list(METHODS))
def test_output_and_gradients_are_those_of_dense_matrices(name: str, method: str) -> None:
    base, x, adapted = layer_case(name)
    model, config = adapt_layer(base, method, seed=2**64 - 1)
    layer = model.base_model.model.layer
    assert isinstance(layer, adapted) and type(layer).__name__.startswith(config.method_name.title())
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    found = model(x)
    if found.numel():
        close(found, expected)
    assert found.shape == expected.shape
    assert name == "linear, empty batch" or not torch.allclose(found, base(x))
    found.square().sum().backward()
    if isinstance(base.layer, nn.Embedding):
        # padding_idx and scale_grad_by_freq act on the gradients of table entries: with factors of A, as in LoRA.
        (leaf,) = (p.detach().clone().requires_grad_() for p in coefficients_of(model).values())
        update = layer_update(config, base, "layer", {"layer": leaf})
        options = {"padding_idx": base.layer.padding_idx, "scale_grad_by_freq": base.layer.scale_grad_by_freq}
        if update.factors:
            A, B = update.factors
            output = base.layer(x) + update.scaling * F.embedding(x, A.T, **options) @ B.T
        else:
            output = base.layer(x) + F.embedding(x, update.weight.T, **options)
        gradients = {"layer": torch.autograd.grad(output.square().sum(), leaf)[0]}
    else:
        gradients = dense_gradients(base, config, model, lambda m: m(x).square().sum())
    for key, parameter in coefficients_of(model).items():
        close(parameter.grad, gradients[key])


@pairs(SOME, ["NOLA", "PRANC, two a weight, biases", "MCNC", "MCNC, weight"])
def test_gradients_against_finite_differences(name: str, method: str) -> None:
    base, x, _ = layer_case(name)
    model, _ = adapt_layer(base, method)
    (parameter,) = coefficients_of(model).values()

    def loss() -> torch.Tensor:
        return torch.sin(model(x)).sum()

    loss().backward()
    step = 1e-6  # phases of MCNC move 150 times as far
    for i in range(parameter.numel()):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[i] += sign * step
                values.append(loss().item())
                parameter[i] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(parameter.grad[i].item(), rel=1e-5, abs=1e-7)


def any_options(data: st.DataObject, method: str, fan_in: int, fan_out: int) -> tuple[dict[str, Any], int]:
    """Fields for a layer of any size, and the number of coefficients that they promise."""
    r, alpha = data.draw(st.integers(1, 12)), data.draw(st.floats(-4, 4))
    weights = fan_in * fan_out
    if lower(method) == "nola":
        num_basis = data.draw(st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))))
        count = sum(num_basis) if isinstance(num_basis, tuple) else 2 * num_basis
        return {"r": r, "num_basis": num_basis, "alpha": alpha}, count
    if lower(method) == "pranc":
        on_factors = "factors" in method
        count = data.draw(st.integers(1, r * (fan_in + fan_out) if on_factors else weights))
        options = {"r": r, "alpha": alpha} if on_factors else {}
        return {**options, "num_coefficients": count, "nnz": data.draw(st.integers(1, min(3, count)))}, count
    sizes = [weights] if "weight" in method else [r * fan_in, fan_out * r]
    assume(max(sizes) > 1)
    d = data.draw(st.integers(2, max(sizes)))
    k = data.draw(st.integers(1, d - 1))
    options = {"r": r, "alpha": alpha, "d": d, "k": k, "widths": data.draw(st.lists(st.integers(1, 6), max_size=3))}
    return {**options, "normalize": False}, sum(-(-size // d) for size in sizes) * (k + 1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**64 - 1),
    kind=st.sampled_from(["linear", "Conv1D", "embedding", "conv"]),
    data=st.data(),
)
@pytest.mark.parametrize("method", METHODS)
def test_any_shape_and_configuration(
    method: str, sizes: tuple[int, int], seed: int, kind: str, data: st.DataObject
) -> None:
    fan_in, fan_out = sizes
    torch.manual_seed(0)
    layer, x = {
        "linear": lambda: (nn.Linear(fan_in, fan_out), torch.randn(3, fan_in)),
        "Conv1D": lambda: (Conv1D(fan_out, fan_in), torch.randn(3, fan_in)),
        "embedding": lambda: (nn.Embedding(fan_in, fan_out), torch.randint(0, fan_in, (3,))),
        "conv": lambda: (nn.Conv2d(fan_in, fan_out, (2, 1)), torch.randn(3, fan_in, 2, 1)),
    }[kind]()
    options, count = any_options(data, method, fan_in * (2 if kind == "conv" else 1), fan_out)
    base = One(layer)
    model, config = adapt_layer(base, method, seed=seed, **options)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@settings(max_examples=10, deadline=None)
@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    kernel=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
@pytest.mark.parametrize("method", ["NOLA", "PRANC, two a weight, biases", "MCNC", "MCNC, weight"])
def test_any_convolution(
    method: str,
    groups: int,
    channels: tuple[int, int],
    kernel: Any,
    stride: int,
    padding: int,
    dilation: int,
    padding_mode: str,
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(
        groups * channels[0],
        groups * channels[1],
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
    )
    base, x = One(conv), torch.randn(2, groups * channels[0], 6, 7)
    model, config = adapt_layer(base, method)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# Initialisation, dropout


@pairs(list(LAYERS), list(METHODS))
def test_identity_at_initialisation(name: str, method: str) -> None:
    base, x, _ = layer_case(name)
    model, _ = adapt_layer(base, method, init_weights=True)
    assert torch.equal(model(x), base(x))
    (parameter,) = coefficients_of(model).values()
    assert parameter.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_first_step_moves_the_output(method: str) -> None:
    """Updates do not start in a dead end: the outermost coefficients have gradients, and they alone."""
    base, x, _ = layer_case("linear")
    model, config = adapt_layer(base, method, init_weights=True)
    model(x).square().sum().backward()
    (parameter,) = coefficients_of(model).values()
    moves = parameter.grad != 0
    if lower(method) == "nola":
        assert not moves[:5].any() and moves[5:].all()  # those of B
    elif lower(method) == "pranc":
        assert moves.all()
    else:
        alpha, beta = moves.view(-1, config.k + 1).split([config.k, 1], 1)
        first = 0 if config.apply_to == "weight" else 2  # chunks of the 12 numbers of A, which B = 0 multiplies
        assert not alpha.any() and not beta[:first].any() and beta[first:].all()


@pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC", "MCNC, weight"])
def test_dropout_in_training_only(method: str) -> None:
    base = One(nn.Linear(6, 9, bias=False))
    model, config = adapt_layer(base, method, **{f"{lower(method)}_dropout": 0.5})
    x = torch.ones(2000, 6)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    model.eval()
    torch.testing.assert_close(model(x), expected)
    model.train()
    assert not torch.equal(model(x)[0], model(x)[1])
    torch.testing.assert_close(model(x).mean(0), expected[0], rtol=0.1, atol=0.1)  # right on average


# Updates of whole weights, added to the weight before the one product, or multiplied alone

WHOLE = ["PRANC, two a weight, biases", "MCNC, weight"]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`products(call)`: how often a call runs the forward method of a base layer."""
    count = 0

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return forward(*args, **kwargs)

        return counted

    for layer in (nn.Linear, Conv1D, nn.Conv2d):
        monkeypatch.setattr(layer, "forward", counting(layer.forward))

    def counted_in(call: Callable[[], Any]) -> int:
        before = count
        call()
        return count - before

    return counted_in


@pairs([name for name, (_, _, kind) in LAYERS.items() if kind is not SeededEmbedding and "empty" not in name], WHOLE)
def test_one_product_equals_two(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch, products: Callable[..., int]
) -> None:
    base, x, _ = layer_case(name)
    model, _ = adapt_layer(base, method)
    model.base_model.model.layer.get_base_layer().requires_grad_(True)  # as with `bias="all"`, or trained alongside
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = (torch.cat([x] * 5) if "unbatched" not in name else x).requires_grad_()
    found = []
    for fewest, of_base_layer in ((weight_layers._FEWEST_ROWS, 0), (10**6, 1)):
        monkeypatch.setattr(weight_layers, "_FEWEST_ROWS", fewest)
        assert products(lambda: model(x)) == of_base_layer
        output = model(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *parameters], create_graph=True)
        second = torch.autograd.grad(gradients[0].square().sum(), parameters, allow_unused=True)
        found.append([output, *gradients, *(g for g in second if g is not None)])
    assert len(found[0]) == len(found[1]) >= 5
    for one, two in zip(*found):
        close(one, two, tolerance=1e-12)


@pytest.mark.parametrize("method", WHOLE)
def test_a_few_inputs_are_multiplied_twice(method: str, products: Callable[..., int]) -> None:
    """A generated token at a time, an addition to the whole weight takes longer than a product with the update."""
    model, _ = adapt_layer(One(nn.Linear(6, 9)), method)
    assert products(lambda: model(torch.randn(15, 6))) == 1
    assert products(lambda: model(torch.randn(16, 6))) == 0


class Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class OtherTensor(torch.Tensor):
    """Stands for sharded and quantized weights."""


def replace_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def change_class(layer: nn.Module) -> None:
    layer.__class__ = Doubling


def change_weight(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OtherTensor))  # type: ignore[arg-type]


SPECIAL: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda module, args, output: 2 * output),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],)),
    "hook on all modules": lambda layer: nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if module is layer else None
    ),
    "forward of the object": replace_forward,
    "subclass": change_class,
    "parametrized": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight of another class": change_weight,
}


@pytest.mark.parametrize("change", SPECIAL)
@pytest.mark.parametrize("method", WHOLE)
def test_base_layers_that_do_something_else_are_called(method: str, change: str, products: Callable[..., int]) -> None:
    base, x, _ = layer_case("linear")
    x = torch.cat([x] * 5).requires_grad_()
    model, config = adapt_layer(base, method)
    layer = model.base_model.model.layer
    plain = layer.get_base_layer()
    update = updates(config, base, coefficients_of(model))
    handle = SPECIAL[change](plain)
    try:
        assert products(lambda: model(x)) == 1
        output = model(x)
        close(output, plain(x) + F.linear(x, update["layer.weight"], update.get("layer.bias")))
        (found,) = torch.autograd.grad(output.sum(), x)
        (of_base,) = torch.autograd.grad(plain(x).sum(), x)
        close(found, of_base + update["layer.weight"].sum(0))
    finally:
        if change == "hook on all modules":
            handle.remove()


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("how", ["autocast", "half precision adapter"])
def test_small_updates_are_not_rounded_away(how: str, method: str, products: Callable[..., int]) -> None:
    """Ones plus small updates are ones in half precision."""
    base = One(nn.Linear(6, 9, bias=False))
    nn.init.ones_(base.layer.weight)
    model, config = adapt(base, method, target_modules=["layer"])
    (parameter,) = coefficients_of(model).values()
    with torch.no_grad():
        (parameter if lower(method) == "pranc" else parameter.view(-1, 3)[:, 2]).mul_(1e-3)  # of chunks, the factors
    x = torch.tensor([1.0, 1, 1, -1, -1, -1])[torch.stack([torch.randperm(6) for _ in range(20)])]
    expected = run_dense(base.double(), config, coefficients_of(model), lambda m: m(x.double()))
    assert 0 < expected.abs().max() < 1e-2
    if how == "autocast":
        context: Any = torch.autocast("cpu", dtype=torch.bfloat16)
    else:
        model, x, context = model.to(torch.bfloat16), x.to(torch.bfloat16), contextlib.nullcontext()
    with context:
        assert products(lambda: model(x)) == 1
        found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize(("of_base", "of_adapter"), [(torch.float32, DOUBLE), (DOUBLE, torch.float32)])
@pytest.mark.parametrize("method", WHOLE)
def test_an_adapter_in_another_precision_than_the_base(
    method: str, of_base: torch.dtype, of_adapter: torch.dtype, products: Callable[..., int]
) -> None:
    base, x, _ = layer_case("linear without bias, 3-d input")
    model, config = adapt_layer(base, method)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    model.to(of_base)
    for parameter in coefficients_of(model).values():
        parameter.data = parameter.data.to(of_adapter)
    x = x.to(of_base)
    assert products(lambda: model(x)) == 1
    assert model(x).dtype == of_base
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dropout", "training", "of_base_layer"), [(0.5, True, 1), (0.5, False, 0), (0.0, True, 0)])
@pytest.mark.parametrize("method", WHOLE)
def test_dropout_is_of_the_input_of_the_update_alone(
    method: str, dropout: float, training: bool, of_base_layer: int, products: Callable[..., int]
) -> None:
    base, x, _ = layer_case("linear without bias, 3-d input")
    model, _ = adapt_layer(base, method, **{f"{lower(method)}_dropout": dropout})
    assert products(lambda: model.train(training)(x)) == of_base_layer


def test_some_adapters_in_the_weight_and_some_beside_it(products: Callable[..., int]) -> None:
    """Updates of whole weights, of two adapters here, join the weight; factors and those with dropout do not."""
    configs = {
        "whole": config_of("MCNC, weight", target_modules=["layer"]),
        "factors": config_of("MCNC", target_modules=["layer"]),
        "whole too": config_of("MCNC, weight", target_modules=["layer"], seed=1),
        "dropped": config_of("MCNC, weight", target_modules=["layer"], seed=2, mcnc_dropout=0.5),
    }
    base, x, _ = layer_case("Conv1D")
    model = get_peft_model(copy.deepcopy(base), configs["whole"], "whole")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    model.to(DOUBLE).base_model.set_adapter(list(configs))
    assert products(lambda: model.eval()(x)) == 0
    close(model(x), add(base, model, configs, list(configs))(x))

    torch.manual_seed(1)
    found = model.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    (update,) = updates(configs["dropped"], base, coefficients_of(model, "dropped")).values()
    close(found, add(base, model, configs, list(configs)[:3])(x) + dropped @ update)


# Merging


@pytest.mark.parametrize("safe", [False, True])
@pairs(list(LAYERS), list(METHODS))
def test_merging(name: str, method: str, safe: bool) -> None:
    base, x, _ = layer_case(name)
    model, config = adapt_layer(base, method)
    before = model(x).detach()
    added = updates(config, base, coefficients_of(model))
    assert added

    def check(sign: int) -> None:
        layer = model.base_model.model.layer.get_base_layer()
        for key, parameter in base.layer.named_parameters():
            close(layer.get_parameter(key), parameter + sign * added.get(f"layer.{key}", torch.zeros(())))

    model.merge_adapter(safe_merge=safe)
    check(1)
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    check(0)
    torch.testing.assert_close(model(x), before)
    merged_model = model.merge_and_unload(safe_merge=safe)
    assert type(merged_model.layer) is type(base.layer)
    torch.testing.assert_close(merged_model(x), before)
    assert merged_model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "method"),
    [("linear", "NOLA"), ("linear", "PRANC"), ("conv", "PRANC, two a weight, biases"), ("layer norm", "PRANC"),
     ("linear", "MCNC"), ("linear", "MCNC, weight")],
)  # fmt: skip
def test_safe_merge_refuses_what_is_not_finite(name: str, method: str, bad: float) -> None:
    base, x, _ = layer_case(name)
    model, _ = adapt_layer(base, method)
    model(x)  # the coefficients are checked when they are expanded for the first time: these are fine
    (parameter,) = coefficients_of(model).values()
    parameter.data[-1] = bad
    with pytest.raises(ValueError, match="'default' seems to be broken"):
        model.merge_adapter(safe_merge=True)
    for key, value in base.layer.named_parameters():
        assert torch.equal(model.base_model.model.layer.get_base_layer().get_parameter(key), value)
    assert not model.base_model.model.layer.merged


@pytest.mark.parametrize("method", METHODS)
def test_merged_model_is_a_constant_when_the_coefficients_change(method: str) -> None:
    base, x, _ = layer_case("linear")
    model, _ = adapt_layer(base, method)
    model.merge_adapter()
    merged = model(x)
    (parameter,) = coefficients_of(model).values()
    with torch.inference_mode():
        assert torch.equal(model(x), merged)
    model.unmerge_adapter()
    parameter.data.zero_()
    torch.testing.assert_close(model(x), base(x))


@pairs(["conv"], ONE_OF_EACH)
def test_unload_gives_the_base_model_back(name: str, method: str) -> None:
    base, x, _ = layer_case(name)
    model, _ = adapt_layer(base, method)
    model(x)
    unloaded = model.unload()
    assert type(unloaded.layer) is nn.Conv2d and torch.equal(unloaded(x), base(x))


# Several adapters

PATH = ("embedding", "first", "norm", "second", "wide", "conv1d", "first")
ORDERS = [("one", "two", "three"), ("three", "one", "two"), ("two", "three", "one")]


def three_adapters(method: str, order: tuple[str, ...]) -> tuple[PeftModel, nn.Module, dict[str, Config]]:
    """A model with three adapters of other kinds and targets; their coefficients depend on names and layers alone."""
    config = METHODS[method][0]
    second, third = FURTHER[lower(method)]
    norm = ["norm"] if adapts_norms(method) else []
    configs = {
        "one": config_of(method, target_modules=["first", "second", "conv1d", "embedding"], init_weights=True),
        "two": config(**second, seed=7, target_modules=["first", "wide", *norm], init_weights=False),
        "three": config(**third, target_modules=["second", "first", *norm], init_weights=False),
    }
    base = tiny_models.Layers().to(DOUBLE)
    model = get_peft_model(copy.deepcopy(base), configs[order[0]], order[0])
    for name in order[1:]:
        model.add_adapter(name, configs[name])
    model.to(DOUBLE)
    for name in order:
        for layer, parameter in coefficients_of(model, name).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name + layer)))
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, base, configs


def add(base: nn.Module, model: PeftModel, configs: dict[str, Config], names: set[str] | list[str]) -> nn.Module:
    """The base model with the updates of adapters added to its weights."""
    combined = copy.deepcopy(base)
    for name in names:
        for key, delta in updates(configs[name], base, coefficients_of(model, name)).items():
            combined.get_parameter(key).data += delta.detach()
    return combined


def expected_of(
    model: PeftModel, base: nn.Module, configs: dict[str, Config], active: list[str], x: torch.Tensor
) -> torch.Tensor:
    return add(base, model, configs, active)(x, PATH)


several = pytest.mark.parametrize("method", ONE_OF_EACH)


@several
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_adapters_in_any_order(order: tuple[str, ...], method: str) -> None:
    model, base, configs = three_adapters(method, order)
    x = torch.randint(0, 11, (2, 9))
    for name in (*order, *reversed(order)):
        model.set_adapter(name)
        close(model(x, PATH), expected_of(model, base, configs, [name], x))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert trainable == {
            n for n, _ in model.named_parameters() if n.endswith(f".{lower(method)}_coefficients.{name}.values")
        }


@several
def test_a_further_adapter_is_frozen_until_it_is_activated(method: str) -> None:
    model, _, _ = three_adapters(method, ORDERS[0])
    trained = {name for name in ORDERS[0] for p in coefficients_of(model, name).values() if p.requires_grad}
    assert trained == {"one"} and model.active_adapters == ["one"]


@several
@pytest.mark.filterwarnings("ignore:Already unmerged")  # of layers that none of the adapters is in
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_several_active_adapters(order: tuple[str, ...], method: str) -> None:
    model, base, configs = three_adapters(method, order)
    x = torch.randint(0, 11, (2, 9))
    for active in (list(order), list(order[1:]), list(order[:2])):
        model.base_model.set_adapter(active)
        expected = expected_of(model, base, configs, active, x)
        close(model(x, PATH), expected)
        model.merge_adapter()
        close(model(x, PATH), expected)
        model.unmerge_adapter()
        close(model(x, PATH), expected)


@several
def test_gradients_with_several_active_adapters(method: str) -> None:
    model, base, configs = three_adapters(method, ORDERS[0])
    model.base_model.set_adapter(list(ORDERS[0]))
    x = torch.randint(0, 11, (2, 9))
    model(x, PATH).square().sum().backward()
    for name in ORDERS[0]:
        others = add(base, model, configs, set(ORDERS[0]) - {name})
        leaves = {layer: p.detach().clone().requires_grad_() for layer, p in coefficients_of(model, name).items()}
        loss = run_dense(others, configs[name], leaves, lambda m: m(x, PATH).square().sum())
        for found, right in zip(
            coefficients_of(model, name).values(), torch.autograd.grad(loss, list(leaves.values()))
        ):
            close(found.grad, right)


@several
def test_switching_in_the_middle_of_training(method: str) -> None:
    model, base, configs = three_adapters(method, ORDERS[0])
    x = torch.randint(0, 11, (2, 9))
    for step in range(6):
        name = ORDERS[0][step % 3]
        model.set_adapter(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model(x, PATH).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        close(model(x, PATH), expected_of(model, base, configs, [name], x))


@several
def test_disabling(method: str) -> None:
    model, base, configs = three_adapters(method, ORDERS[0])
    model.base_model.set_adapter(list(ORDERS[0]))
    x = torch.randint(0, 11, (2, 9))
    enabled = model(x, PATH)
    with model.disable_adapter():
        assert torch.equal(model(x, PATH), base(x, PATH))
        with torch.no_grad():
            assert torch.equal(model(x, PATH), base(x, PATH))
    assert torch.equal(model(x, PATH), enabled)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges
        torch.testing.assert_close(model(x, PATH), base(x, PATH))


@several
@pytest.mark.parametrize("gone", ["one", "two", "three"])
def test_deleting_and_adding_again(gone: str, method: str) -> None:
    model, base, configs = three_adapters(method, ORDERS[0])
    x = torch.randint(0, 11, (2, 9))
    left = [name for name in ORDERS[0] if name != gone]
    model.set_adapter(left[0])
    model(x, PATH)
    model.delete_adapter(gone)
    for name in left:
        model.set_adapter(name)
        close(model(x, PATH), expected_of(model, base, configs, [name], x))
    for layer in model.modules():
        if isinstance(layer, SeededLayer):
            names = {*layer.adapter_layer_names, *layer.other_param_names}
            assert names == {name for name in vars(layer) | layer._modules if name.startswith(lower(method))} | (
                {"r", "alpha", "scaling", "initial_scaling", "tied_to", "_pranc_vectors"} & names
            )
            assert all(gone not in getattr(layer, name) for name in names)
            assert gone not in layer._get_available_adapters()
    # The same name again, with another seed, other sizes and other targets.
    options = {**FURTHER[lower(method)][1], "seed": 3, "target_modules": ["second", "first"], "init_weights": False}
    configs[gone] = METHODS[method][0](**options)
    model.add_adapter(gone, configs[gone])
    model.to(DOUBLE)
    model.set_adapter(gone)
    close(model(x, PATH), expected_of(model, base, configs, [gone], x))
    model.base_model.set_adapter(["two", "one", "three"])
    close(model(x, PATH), expected_of(model, base, configs, ["two", "one", "three"], x))
    owners = {"first"} if lower(method) == "pranc" else {"first", "second"}
    assert set(coefficients_of(model, gone)) == owners


@several
def test_another_adapter_does_not_change_the_first(method: str) -> None:
    """Random numbers are named by what they are for, not drawn in turn."""
    alone, _, _ = three_adapters(method, ("one",))
    model, _, _ = three_adapters(method, ORDERS[1])
    model.set_adapter("one")
    x = torch.randint(0, 11, (2, 9))
    assert torch.equal(model(x, PATH), alone(x, PATH))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "PRANC, factors"])
def test_fewer_targets_leave_the_others_alone(method: str) -> None:
    """An update does not depend on what else is adapted; where layers have bases of their own, they differ."""
    found = []
    for targets in (["first", "second"], ["second"], ["wide", "second", "embedding"]):
        # Scaled, those of PRANC get smaller by one factor for all, the more weights read its coefficients.
        model, _ = adapt(tiny_models.Layers(), method, target_modules=targets, parametrization="plain")
        for parameter in coefficients_of(model).values():
            parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()))
        layers = [model.base_model.model.get_submodule(name) for name in targets]
        updates = dict(zip(targets, (layer.get_delta_weight("default") for layer in layers)))
        found.append(updates["second"])
        if "first" in updates:
            assert torch.allclose(updates["first"], updates["second"]) == (method not in OWN_BASES)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


OWN_BASES = {"NOLA, own bases", *(method for method in METHODS if lower(method) == "pranc")}


# Placement and other fields of the configuration


@several
@pytest.mark.parametrize(
    ("build", "adapted"),
    [
        (tiny_models.llama, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (tiny_models.gpt2, {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_all_linear(build: Callable[[], nn.Module], adapted: set[str], method: str) -> None:
    model = get_peft_model(build(), config_of(method, target_modules="all-linear"))
    found = {name.rpartition(".")[-1] for name, m in model.named_modules() if isinstance(m, SeededLayer)}
    assert found == adapted


@several
@pytest.mark.parametrize(
    ("build", "adapted"),
    [
        (tiny_models.llama, {"q_proj", "v_proj"}),
        (tiny_models.gpt2, {"c_attn"}),
        (tiny_models.vit, {"q_proj", "v_proj"}),
    ],
)
def test_default_targets(build: Callable[[], nn.Module], adapted: set[str], method: str) -> None:
    model = get_peft_model(build(), config_of(method))
    found = {name.rpartition(".")[-1] for name, m in model.named_modules() if isinstance(m, SeededLayer)}
    assert found == adapted


@several
@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": r".*layers\.[02].*"},
    ],
    ids=["layers_to_transform", "exclude_modules"],
)
def test_some_layers(options: dict[str, Any], method: str) -> None:
    model = get_peft_model(tiny_models.llama(3), config_of(method, target_modules=["q_proj", "v_proj"], **options))
    found = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, SeededLayer)}
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


@several
@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", set()),
        ("only", {"first.base_layer.bias"}),
        ("all", {"first.base_layer.bias", "wide.bias", "conv1d.bias", "conv2d.bias", "norm.bias"}),
    ],
)
def test_bias(bias: str, trained: set[str], method: str, tmp_path: Any) -> None:
    bias = f"{lower(method)}_only" if bias == "only" else bias
    model = get_peft_model(tiny_models.Layers(), config_of(method, target_modules=["first", "second"], bias=bias))
    found = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in found if "_coefficients" not in n} == trained
    x = torch.randn(3, 8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path))
    assert torch.equal(loaded(x, ("first", "second", "wide")), model(x, ("first", "second", "wide")))


@several
def test_modules_to_save(method: str, tmp_path: Any) -> None:
    model = get_peft_model(
        tiny_models.Layers(), config_of(method, target_modules=["first"], modules_to_save=["second", "norm"])
    )
    x = torch.randn(3, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    path = ("first", "second", "norm")
    model(x, path).sum().backward()
    optimizer.step()
    trained = model(x, path)
    with model.disable_adapter():
        assert torch.equal(model(x, path), tiny_models.Layers()(x, path))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path))
    assert torch.equal(loaded(x, path), trained)


@several
def test_a_head_of_several_layers(method: str, tmp_path: Any) -> None:
    """As RoBERTa's: it has no weight of its own, which PEFT looks for when the adapter is taken off."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)))

    model = get_peft_model(base(), config_of(method, target_modules=["0"], modules_to_save=["1"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    expected = model(x)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base(), str(tmp_path))
    close(loaded.merge_and_unload()(x), expected)
    weights = tmp_path / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 64
    weights.write_bytes(damaged)
    plain = base()
    with pytest.raises(ValueError, match="damaged"):
        PeftModel.from_pretrained(plain, str(tmp_path))
    assert torch.equal(plain(x), base()(x))


# Dtypes, devices, quantized bases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pairs(SOME, ["NOLA", "PRANC, two a weight, biases", "MCNC", "MCNC, weight"], vectors=True)
def test_half_precision_bases(name: str, method: str, dtype: torch.dtype) -> None:
    base, x, _ = layer_case(name)
    base = base.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    config = config_of(method, target_modules=["layer"])
    model = get_peft_model(copy.deepcopy(base), config)
    (parameter,) = coefficients_of(model).values()
    assert parameter.dtype == torch.float32
    found = model(x)
    assert found.dtype == dtype
    expected = run_dense(
        base.float(), config, coefficients_of(model), lambda m: m(x.float() if x.is_floating_point() else x)
    )
    close(found.float(), expected, tolerance=0.02)
    found.float().sum().backward()
    assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
    model.merge_adapter()
    assert all(p.dtype == dtype for p in model.base_model.model.layer.get_base_layer().parameters())
    close(model(x).float(), expected, tolerance=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_generated_weights_do_not_depend_on_the_dtype_of_the_base(method: str) -> None:
    deltas = []
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(One(nn.Linear(6, 9)).to(dtype), config_of(method, target_modules=["layer"]))
        (parameter,) = coefficients_of(model).values()
        parameter.data.fill_(0.3)
        deltas.append(model.base_model.model.layer.get_delta_weight("default"))
    assert torch.equal(*deltas) and deltas[0].dtype == torch.float32


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta"), contextlib.nullcontext])
@pytest.mark.parametrize("method", METHODS)
def test_surroundings_do_not_change_the_numbers(context: Callable[[], Any], method: str) -> None:
    """A model wrapped and first used in another state of torch is the same model."""
    base = One(nn.Linear(6, 9))
    model = get_peft_model(copy.deepcopy(base), config_of(method, target_modules=["layer"]))
    (values,) = coefficients_of(model).values()
    values.data.fill_(0.3)
    x = torch.randn(4, 6)
    expected = model(x).detach()
    del model  # its random numbers are made again
    torch.set_default_dtype(torch.float64)
    with context():
        other = get_peft_model(copy.deepcopy(base), config_of(method, target_modules=["layer"], inference_mode=False))
    if context is torch.inference_mode:
        with context():
            other(x)
    parameter = nn.Parameter(values.detach().clone())
    layer = other.base_model.model.layer
    layer.container("default")["default"] = parameter
    found = other(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert parameter.grad is not None


@pytest.mark.parametrize("method", METHODS)
def test_low_cpu_mem_usage(method: str, tmp_path: Any) -> None:
    model = get_peft_model(tiny_models.llama(), config_of(method, target_modules=["q_proj", "lm_head"]))
    x = tiny_models.tokens()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(loaded(x).logits, model(x).logits)

    config = config_of(method, target_modules=["q_proj"], init_weights=True)
    added = get_peft_model(tiny_models.llama(), config, low_cpu_mem_usage=True)
    assert coefficients_of(added) and all(p.device.type == "meta" for p in coefficients_of(added).values())


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def quantized(kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = TwoLinears()
    for name in ("first", "second"):
        layer = getattr(model, name)
        if kind == "4bit":
            new = bnb.nn.Linear4bit(64, layer.out_features, quant_type="nf4", compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(64, layer.out_features, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        setattr(model, name, new)
    try:
        model.to("cpu")(torch.randn(2, 64))
    except Exception as error:
        pytest.skip(f"bitsandbytes has no {kind} on this CPU: {error}")
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["NOLA", "PRANC, two a weight, biases", "MCNC", "MCNC, weight"])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantized_base(kind: str, method: str) -> None:
    base = quantized(kind)
    config = config_of(method, target_modules=["first", "second"])
    model = get_peft_model(copy.deepcopy(base), config)
    assert isinstance(model.base_model.model.first, SeededLinear)
    for parameter in coefficients_of(model).values():  # updates of the size of the weights
        if lower(method) == "mcnc":
            parameter.data.view(-1, config.k + 1)[:, -1] *= 6.0 if config.apply_to == "factors" else 10.0
        else:
            parameter.data *= 0.5
    x = torch.randn(5, 64)
    dense = TwoLinears()
    added = updates(config, dense, coefficients_of(model))
    zero = torch.zeros(())
    hidden = torch.tanh(base.first(x) + F.linear(x, added["first.weight"]) + added.get("first.bias", zero))
    expected = base.second(hidden) + F.linear(hidden, added["second.weight"]) + added.get("second.bias", zero)
    found = model(x)
    close(found, expected, tolerance=1e-4 if kind == "4bit" else 2e-2)
    found.square().sum().backward()
    gradients = torch.autograd.grad(expected.square().sum(), list(coefficients_of(model).values()))
    for parameter, gradient in zip(coefficients_of(model).values(), gradients):
        close(parameter.grad, gradient, tolerance=1e-3 if kind == "4bit" else 5e-2)

    with torch.no_grad():
        mixed = model.eval()(x, adapter_names=["default", "__base__", "default", "default", "__base__"])
        close(mixed[[0, 2, 3]], model(x)[[0, 2, 3]], tolerance=1e-4)
        close(mixed[[1, 4]], copy.deepcopy(base).eval()(x)[[1, 4]], tolerance=1e-4)  # in training it computes otherwise
    model.train()

    # Merging quantizes again: close, not equal.
    def near(output: torch.Tensor) -> bool:
        return bool((output - found).norm() < 0.5 * (base(x) - found).norm())

    model.merge_adapter()
    assert near(model(x))
    assert model.base_model.model.first.get_base_layer().weight.dtype in (torch.uint8, torch.int8)
    model.unmerge_adapter()
    assert near(model(x))
    merged = model.merge_and_unload()
    assert type(merged.first) is type(base.first)
    assert near(merged(x))


@pytest.mark.parametrize(
    "made", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: l1_unstructured(layer, "weight", 3)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_are_made_anew_cannot_be_merged_into(made: Any) -> None:
    model = get_peft_model(nn.Sequential(made(nn.Linear(8, 8))), config_of("NOLA", target_modules=["0"]))
    with pytest.raises(TypeError, match="The weight of a Linear.* cannot be changed: merging has no effect"):
        model.merge_adapter()
    assert not model.base_model.model[0].merged


def test_an_embedding_that_normalises_its_rows_cannot_be_merged_into() -> None:
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 8, max_norm=1.0)), config_of("NOLA", target_modules=["0"]))
    with pytest.raises(ValueError, match="An embedding with `max_norm` changes the rows that it looks up"):
        model.merge_adapter()


def test_a_bias_that_is_not_finite_is_not_merged_safely() -> None:
    config = config_of("PRANC, two a weight, biases", target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    layer: Any = model.base_model.model[0]
    before = layer.base_layer.weight.clone()
    layer.base_layer.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
