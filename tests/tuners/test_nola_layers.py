"""Layers adapted with NOLA: outputs against dense matrices, merging, several adapters, dtypes, quantized bases."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from dense_nola import coefficients_of, dense_gradients, factors, run_dense, update
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import NolaConfig
from peft_ext.tuners.nola import NolaConv2d, NolaEmbedding, NolaLayer, NolaLinear

DOUBLE = torch.float64


class One(nn.Module):
    """A model of one layer called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapt(base: nn.Module, adapter: str = "default", **options: Any) -> tuple[PeftModel, NolaConfig]:
    config = NolaConfig(**{"r": 2, "num_basis": (5, 3), "target_modules": ["layer"], "init_weights": False, **options})
    dtype = next(base.parameters()).dtype
    return get_peft_model(copy.deepcopy(base), config, adapter).to(dtype), config


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


# name: (layer, its input, the class that adapts it)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], type]] = {
    "linear": (lambda: nn.Linear(6, 9), lambda: torch.randn(4, 6), NolaLinear),
    "linear without bias, 3-d input": (lambda: nn.Linear(6, 9, bias=False), lambda: torch.randn(2, 4, 6), NolaLinear),
    "linear, empty batch": (lambda: nn.Linear(6, 9), lambda: torch.randn(0, 6), NolaLinear),
    "Conv1D": (lambda: Conv1D(9, 6), lambda: torch.randn(2, 4, 6), NolaLinear),
    "conv": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(2, 3, 7, 8), NolaConv2d),
    "conv, unbatched": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(3, 7, 8), NolaConv2d),
    "conv, 1x1": (lambda: nn.Conv2d(3, 5, 1, bias=False), lambda: torch.randn(2, 3, 7, 8), NolaConv2d),
    "conv, stride": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 3)), lambda: torch.randn(2, 3, 9, 8), NolaConv2d),
    "conv, padding": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1)), lambda: torch.randn(2, 3, 5, 6), NolaConv2d),
    "conv, same": (lambda: nn.Conv2d(3, 5, (3, 4), padding="same"), lambda: torch.randn(2, 3, 5, 6), NolaConv2d),
    "conv, dilation": (lambda: nn.Conv2d(3, 5, 3, dilation=(1, 2)), lambda: torch.randn(2, 3, 8, 8), NolaConv2d),
    "conv, groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), lambda: torch.randn(2, 6, 7, 8), NolaConv2d),
    "conv, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: torch.randn(2, 6, 7, 8), NolaConv2d),
    "conv, reflect": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 3, 7, 8),
        NolaConv2d,
    ),
    "conv, circular groups": (
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", groups=2, stride=2),
        lambda: torch.randn(2, 4, 7, 8),
        NolaConv2d,
    ),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (3, 4)), NolaEmbedding),
    "embedding, padding": (
        lambda: nn.Embedding(11, 6, padding_idx=2),
        lambda: torch.tensor([[0, 2, 2, 5], [1, 2, 10, 10]]),
        NolaEmbedding,
    ),
    "embedding, by frequency": (
        lambda: nn.Embedding(11, 6, scale_grad_by_freq=True),
        lambda: torch.tensor([[0, 2, 2, 5], [1, 2, 10, 10]]),
        NolaEmbedding,
    ),
}


def layer_case(name: str) -> tuple[One, torch.Tensor, type]:
    make_layer, make_input, adapted = LAYERS[name]
    torch.manual_seed(0)
    base, x = One(make_layer()).to(DOUBLE), make_input()
    return base, x.to(DOUBLE) if x.is_floating_point() else x, adapted


@pytest.mark.parametrize("share_basis", [True, False], ids=["shared basis", "own bases"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_dense_matrices(name: str, share_basis: bool) -> None:
    base, x, adapted = layer_case(name)
    model, config = adapt(base, alpha=3.0, seed=2**64 - 1, share_basis=share_basis)
    assert isinstance(model.base_model.model.layer, adapted)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    found = model(x)
    if found.numel():
        close(found, expected)
    assert found.shape == expected.shape
    found.square().sum().backward()
    if isinstance(base.layer, nn.Embedding):
        # padding_idx and scale_grad_by_freq act on the gradients of table entries: here of A, as in LoRA, not of B A.
        (leaf,) = (p.detach().clone().requires_grad_() for p in coefficients_of(model).values())
        A, B = factors(config, (6, 11), leaf, "layer")
        options = {"padding_idx": base.layer.padding_idx, "scale_grad_by_freq": base.layer.scale_grad_by_freq}
        output = base.layer(x) + config.alpha / config.r * F.embedding(x, A.T, **options) @ B.T
        gradients = {"layer": torch.autograd.grad(output.square().sum(), leaf)[0]}
    else:
        gradients = dense_gradients(base, config, model, lambda m: m(x).square().sum())
    for layer, parameter in coefficients_of(model).items():
        close(parameter.grad, gradients[layer])


@pytest.mark.parametrize("name", ["linear", "Conv1D", "conv", "conv, groups", "embedding"])
def test_gradients_against_finite_differences(name: str) -> None:
    base, x, _ = layer_case(name)
    model, _ = adapt(base)
    (parameter,) = coefficients_of(model).values()

    def loss() -> torch.Tensor:
        return torch.sin(model(x)).sum()

    loss().backward()
    step = 1e-5
    for i in range(parameter.numel()):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[i] += sign * step
                values.append(loss().item())
                parameter[i] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(parameter.grad[i].item(), rel=1e-5, abs=1e-7)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    r=st.integers(1, 12),
    num_basis=st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))),
    alpha=st.floats(-4, 4),
    seed=st.integers(0, 2**64 - 1),
    share_basis=st.booleans(),
    kind=st.sampled_from(["linear", "Conv1D", "embedding", "conv"]),
)
def test_any_shape_and_configuration(
    sizes: tuple[int, int], r: int, num_basis: Any, alpha: float, seed: int, share_basis: bool, kind: str
) -> None:
    fan_in, fan_out = sizes
    torch.manual_seed(0)
    layer, x = {
        "linear": lambda: (nn.Linear(fan_in, fan_out), torch.randn(3, fan_in)),
        "Conv1D": lambda: (Conv1D(fan_out, fan_in), torch.randn(3, fan_in)),
        "embedding": lambda: (nn.Embedding(fan_in, fan_out), torch.randint(0, fan_in, (3,))),
        "conv": lambda: (nn.Conv2d(fan_in, fan_out, (2, 1)), torch.randn(3, fan_in, 2, 1)),
    }[kind]()
    base = One(layer)
    model, config = adapt(base, r=r, num_basis=num_basis, alpha=alpha, seed=seed, share_basis=share_basis)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(config.num_basis_per_factor)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
def test_any_convolution(
    groups: int, channels: tuple[int, int], kernel: Any, stride: int, padding: int, dilation: int, padding_mode: str
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
    model, config = adapt(base)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# Initialisation, dropout


@pytest.mark.parametrize("name", LAYERS)
def test_identity_at_initialisation(name: str) -> None:
    base, x, _ = layer_case(name)
    model, _ = adapt(base, init_weights=True)
    assert torch.equal(model(x), base(x))
    (parameter,) = coefficients_of(model).values()
    assert not parameter.any() and parameter.requires_grad


def test_first_step_moves_the_output() -> None:
    """A0 is not zero: at the start the coefficients of B have gradients and those of A do not."""
    base, x, _ = layer_case("linear")
    model, _ = adapt(base, init_weights=True)
    model(x).square().sum().backward()
    (parameter,) = coefficients_of(model).values()
    assert not parameter.grad[:5].any() and parameter.grad[5:].all()


def test_dropout_in_training_only() -> None:
    base = One(nn.Linear(6, 9, bias=False))
    model, config = adapt(base, nola_dropout=0.5)
    x = torch.ones(2000, 6)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x))
    model.eval()
    torch.testing.assert_close(model(x), expected)
    model.train()
    assert not torch.equal(model(x)[0], model(x)[1])
    torch.testing.assert_close(model(x).mean(0), expected[0], rtol=0.1, atol=0.1)  # right on average


# Merging


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_merging(name: str, safe: bool) -> None:
    base, x, _ = layer_case(name)
    model, config = adapt(base)
    before = model(x).detach()
    weight = base.layer.weight.detach().clone()
    model.merge_adapter(safe_merge=safe)
    (coefficients,) = coefficients_of(model).values()
    merged = model.base_model.model.layer.get_base_layer().weight
    close(merged, weight + update(config, base.layer, coefficients, "layer"))
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    close(model.base_model.model.layer.get_base_layer().weight, weight)
    torch.testing.assert_close(model(x), before)
    merged_model = model.merge_and_unload(safe_merge=safe)
    assert type(merged_model.layer) is type(base.layer)
    torch.testing.assert_close(merged_model(x), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(bad: float) -> None:
    base, x, _ = layer_case("linear")
    model, _ = adapt(base)
    model(x)  # the coefficients are checked when they are expanded for the first time: these are fine
    (parameter,) = coefficients_of(model).values()
    parameter.data[-1] = bad
    with pytest.raises(ValueError, match="'default' seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.layer.get_base_layer().weight, base.layer.weight)
    assert not model.base_model.model.layer.merged


def test_merged_model_is_a_constant_when_the_coefficients_change() -> None:
    base, x, _ = layer_case("linear")
    model, _ = adapt(base)
    model.merge_adapter()
    merged = model(x)
    (parameter,) = coefficients_of(model).values()
    with torch.inference_mode():
        assert torch.equal(model(x), merged)
    model.unmerge_adapter()
    parameter.data.zero_()
    torch.testing.assert_close(model(x), base(x))


def test_unload_gives_the_base_model_back() -> None:
    base, x, _ = layer_case("conv")
    model, _ = adapt(base)
    model(x)
    unloaded = model.unload()
    assert type(unloaded.layer) is nn.Conv2d and torch.equal(unloaded(x), base(x))


# Several adapters

SECOND = {
    "seed": 7,
    "r": 3,
    "num_basis": 4,
    "alpha": 2.0,
    "target_modules": ["first", "wide"],
    "init_weights": False,
}
THIRD = {"target_modules": ["second", "first"], "r": 2, "num_basis": (2, 6), "init_weights": False}
PATH = ("embedding", "first", "second", "wide", "conv1d", "first")


def three_adapters(order: tuple[str, ...]) -> tuple[PeftModel, nn.Module, dict[str, NolaConfig]]:
    """A model with three adapters, whose coefficients depend on their names and layers alone."""
    configs = {
        "one": NolaConfig(r=2, num_basis=5, target_modules=["first", "second", "conv1d", "embedding"]),
        "two": NolaConfig(**SECOND),
        "three": NolaConfig(**THIRD),
    }
    base = tiny_models.Layers().to(DOUBLE)
    model = get_peft_model(copy.deepcopy(base), configs[order[0]], order[0])
    for name in order[1:]:
        model.add_adapter(name, configs[name])
    model.to(DOUBLE)
    for name in order:
        for layer, parameter in coefficients_of(model, name).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name + layer)))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model, base, configs


def expected_of(
    model: PeftModel, base: nn.Module, configs: dict[str, NolaConfig], active: list[str], x: torch.Tensor
) -> torch.Tensor:
    combined = copy.deepcopy(base)
    for name in active:
        for layer, parameter in coefficients_of(model, name).items():
            target = combined.get_submodule(layer)
            target.weight.data += update(configs[name], target, parameter.detach(), layer)
    return combined(x, PATH)


ORDERS = [("one", "two", "three"), ("three", "one", "two"), ("two", "three", "one")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_adapters_in_any_order(order: tuple[str, ...]) -> None:
    model, base, configs = three_adapters(order)
    x = torch.randint(0, 11, (2, 5))
    for name in (*order, *reversed(order)):
        model.set_adapter(name)
        close(model(x, PATH), expected_of(model, base, configs, [name], x))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in model.named_parameters() if n.endswith(f".nola_coefficients.{name}")}


@pytest.mark.filterwarnings("ignore:Already unmerged")  # of layers that none of the adapters is in
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_several_active_adapters(order: tuple[str, ...]) -> None:
    model, base, configs = three_adapters(order)
    x = torch.randint(0, 11, (2, 5))
    for active in (list(order), list(order[1:]), list(order[:2])):
        model.base_model.set_adapter(active)
        expected = expected_of(model, base, configs, active, x)
        close(model(x, PATH), expected)
        model.merge_adapter()
        close(model(x, PATH), expected)
        model.unmerge_adapter()
        close(model(x, PATH), expected)


def test_gradients_with_several_active_adapters() -> None:
    model, base, configs = three_adapters(ORDERS[0])
    model.base_model.set_adapter(list(ORDERS[0]))
    x = torch.randint(0, 11, (2, 5))
    model(x, PATH).square().sum().backward()
    for name in ORDERS[0]:
        others = copy.deepcopy(base)
        for other in set(ORDERS[0]) - {name}:
            for layer, parameter in coefficients_of(model, other).items():
                target = others.get_submodule(layer)
                target.weight.data += update(configs[other], target, parameter.detach(), layer)
        leaves = {layer: p.detach().clone().requires_grad_() for layer, p in coefficients_of(model, name).items()}
        loss = run_dense(others, configs[name], leaves, lambda m: m(x, PATH).square().sum())
        for found, right in zip(
            coefficients_of(model, name).values(), torch.autograd.grad(loss, list(leaves.values()))
        ):
            close(found.grad, right)


def test_switching_in_the_middle_of_training() -> None:
    model, base, configs = three_adapters(ORDERS[0])
    x = torch.randint(0, 11, (2, 5))
    for step in range(6):
        name = ORDERS[0][step % 3]
        model.set_adapter(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model(x, PATH).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        close(model(x, PATH), expected_of(model, base, configs, [name], x))


def test_disabling() -> None:
    model, base, configs = three_adapters(ORDERS[0])
    x = torch.randint(0, 11, (2, 5))
    enabled = model(x, PATH)
    with model.disable_adapter():
        assert torch.equal(model(x, PATH), base(x, PATH))
        with torch.no_grad():
            assert torch.equal(model(x, PATH), base(x, PATH))
    assert torch.equal(model(x, PATH), enabled)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges
        torch.testing.assert_close(model(x, PATH), base(x, PATH))


def test_deleting_and_adding_again() -> None:
    model, base, configs = three_adapters(ORDERS[0])
    x = torch.randint(0, 11, (2, 5))
    model.set_adapter("one")
    model(x, PATH)
    model.delete_adapter("two")
    close(model(x, PATH), expected_of(model, base, configs, ["one"], x))
    for layer in model.modules():
        if isinstance(layer, NolaLayer):
            names = ("nola_coefficients", "r", "alpha", "scaling", "nola_dropout", "nola_expansions")
            assert all("two" not in getattr(layer, name) for name in names)
    # The same name again, with another seed, other sizes and other targets.
    configs["two"] = NolaConfig(r=1, num_basis=2, seed=3, target_modules=["second", "first"], init_weights=False)
    model.add_adapter("two", configs["two"])
    model.to(DOUBLE)
    model.set_adapter("two")
    close(model(x, PATH), expected_of(model, base, configs, ["two"], x))
    model.base_model.set_adapter(["two", "one", "three"])
    close(model(x, PATH), expected_of(model, base, configs, ["two", "one", "three"], x))
    assert {layer for layer in coefficients_of(model, "two")} == {"first", "second"}


def test_another_adapter_does_not_change_the_first() -> None:
    """Random numbers are named by what they are for, not drawn in turn."""
    alone, _, _ = three_adapters(("one",))
    model, _, _ = three_adapters(ORDERS[1])
    model.set_adapter("one")
    x = torch.randint(0, 11, (2, 5))
    assert torch.equal(model(x, PATH), alone(x, PATH))


def test_fewer_targets_leave_the_others_alone() -> None:
    configs = [
        NolaConfig(r=2, num_basis=4, target_modules=targets, share_basis=share)
        for share in (True, False)
        for targets in (["first", "second"], ["second"], ["wide", "second", "embedding"])
    ]
    updates = []
    for config in configs:
        model = get_peft_model(tiny_models.Layers(), config)
        layer = model.base_model.model.second
        layer.nola_coefficients["default"].data.fill_(1.0)
        updates.append(layer.get_delta_weight("default"))
    torch.testing.assert_close(updates[0], updates[1])
    torch.testing.assert_close(updates[0], updates[2])
    torch.testing.assert_close(updates[3], updates[4])
    torch.testing.assert_close(updates[3], updates[5])
    assert not torch.allclose(updates[0], updates[3])


# Placement and other fields of the configuration


def test_rank_and_alpha_patterns() -> None:
    base = tiny_models.llama().to(DOUBLE)
    config = NolaConfig(
        r=2,
        num_basis=3,
        alpha=1.0,
        rank_pattern={"q_proj": 4, "o_proj": 1},
        alpha_pattern={"v_proj": 0.5},
        target_modules=["q_proj", "v_proj", "o_proj"],
        init_weights=False,
    )
    model = get_peft_model(copy.deepcopy(base), config).to(DOUBLE)
    attention = model.base_model.model.model.layers[0].self_attn
    assert [attention.get_submodule(n).r["default"] for n in ("q_proj", "v_proj", "o_proj")] == [4, 2, 1]
    assert [attention.get_submodule(n).scaling["default"] for n in ("q_proj", "v_proj", "o_proj")] == [0.25, 0.25, 1.0]
    x = tiny_models.tokens()
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x).logits)
    close(model(x).logits, expected, tolerance=1e-4)


def test_patterns_by_regular_expression() -> None:
    config = NolaConfig(target_modules=["q_proj"], rank_pattern={r"layers\.1\.self_attn\.q_proj": 3})
    model = get_peft_model(tiny_models.llama(), config)
    layers = model.base_model.model.model.layers
    assert [layer.self_attn.q_proj.r["default"] for layer in layers] == [8, 3]


@pytest.mark.parametrize(
    ("build", "adapted"),
    [
        (tiny_models.llama, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (tiny_models.gpt2, {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_all_linear(build: Callable[[], nn.Module], adapted: set[str]) -> None:
    model = get_peft_model(build(), NolaConfig(target_modules="all-linear"))
    found = {name.rpartition(".")[-1] for name, m in model.named_modules() if isinstance(m, NolaLayer)}
    assert found == adapted


@pytest.mark.parametrize(
    ("build", "adapted"),
    [
        (tiny_models.llama, {"q_proj", "v_proj"}),
        (tiny_models.gpt2, {"c_attn"}),
        (tiny_models.vit, {"q_proj", "v_proj"}),
    ],
)
def test_default_targets(build: Callable[[], nn.Module], adapted: set[str]) -> None:
    model = get_peft_model(build(), NolaConfig())
    found = {name.rpartition(".")[-1] for name, m in model.named_modules() if isinstance(m, NolaLayer)}
    assert found == adapted


def test_layers_to_transform_and_exclude() -> None:
    config = NolaConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers")
    model = get_peft_model(tiny_models.llama(3), config)
    assert set(coefficients_of(model)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    config = NolaConfig(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.0.*")
    model = get_peft_model(tiny_models.llama(2), config)
    assert set(coefficients_of(model)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", set()),
        ("nola_only", {"first.base_layer.bias"}),
        (
            "all",
            {"first.base_layer.bias", "wide.bias", "conv1d.bias", "conv2d.bias", "norm.bias"},
        ),
    ],
)
def test_bias(bias: str, trained: set[str], tmp_path: Any) -> None:
    config = NolaConfig(target_modules=["first", "second"], bias=bias)
    model = get_peft_model(tiny_models.Layers(), config)
    found = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in found if "nola_" not in n} == trained
    x = torch.randn(3, 8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path))
    assert torch.equal(loaded(x, ("first", "second", "wide")), model(x, ("first", "second", "wide")))


def test_modules_to_save(tmp_path: Any) -> None:
    config = NolaConfig(target_modules=["first"], modules_to_save=["second", "norm"], init_weights=False)
    model = get_peft_model(tiny_models.Layers(), config)
    x = torch.randn(3, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x, ("first", "second", "norm")).sum().backward()
    optimizer.step()
    path = ("first", "second", "norm")
    trained = model(x, path)
    with model.disable_adapter():
        assert torch.equal(model(x, path), tiny_models.Layers()(x, path))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path))
    assert torch.equal(loaded(x, path), trained)


def test_one_basis_per_shape() -> None:
    """Layers of a shape read one copy of their basis, and adapters of one seed too."""
    model = get_peft_model(tiny_models.llama(4), NolaConfig(target_modules=["q_proj", "o_proj"], num_basis=16))
    model.add_adapter("again", NolaConfig(target_modules=["q_proj"], num_basis=16))
    model(tiny_models.tokens())
    model.set_adapter("again")
    model(tiny_models.tokens())
    tensors = {
        id(tensor): tensor
        for layer in model.modules()
        if isinstance(layer, NolaLayer)
        for pair in layer.nola_expansions.values()
        for expansion in pair
        for tensor in expansion.generator.frozen
    }
    assert len(tensors) == 3  # A, its offset, and B, of 32 x 32
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * (2 * 16 * 8 * 32 + 8 * 32)
    assert len(model.state_dict()) - len(tiny_models.llama(4).state_dict()) == 12  # coefficients: no basis


def test_own_bases_keep_nothing() -> None:
    model = get_peft_model(tiny_models.llama(), NolaConfig(target_modules=["q_proj"], share_basis=False))
    model(tiny_models.tokens()).logits.sum().backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert all(expansion.generator.nbytes == 0 for expansion in layer.nola_expansions["default"])


# Dtypes, devices, quantized bases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "Conv1D", "conv", "conv, groups", "embedding"])
def test_half_precision_bases(name: str, dtype: torch.dtype) -> None:
    base, x, _ = layer_case(name)
    base = base.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    config = NolaConfig(r=2, num_basis=5, alpha=1.0, target_modules=["layer"], init_weights=False)
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
    assert model.base_model.model.layer.get_base_layer().weight.dtype == dtype
    close(model(x).float(), expected, tolerance=0.02)


def test_generated_weights_do_not_depend_on_the_dtype_of_the_base() -> None:
    deltas = []
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(One(nn.Linear(6, 9)).to(dtype), NolaConfig(target_modules=["layer"]))
        model.base_model.model.layer.nola_coefficients["default"].data.fill_(0.3)
        deltas.append(model.base_model.model.layer.get_delta_weight("default"))
    assert torch.equal(*deltas)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta"), contextlib.nullcontext])
def test_surroundings_do_not_change_the_numbers(context: Callable[[], Any]) -> None:
    """A model wrapped and first used in another state of torch is the same model."""
    base = One(nn.Linear(6, 9))
    config = {"r": 2, "num_basis": 5, "target_modules": ["layer"]}
    model = get_peft_model(copy.deepcopy(base), NolaConfig(**config))
    model.base_model.model.layer.nola_coefficients["default"].data.fill_(0.3)
    x = torch.randn(4, 6)
    expected = model(x)
    torch.set_default_dtype(torch.float64)
    with context():
        other = get_peft_model(copy.deepcopy(base), NolaConfig(**{**config, "inference_mode": False}))
    if context is torch.inference_mode:
        with context():
            other(x)
    parameter = nn.Parameter(torch.full((10,), 0.3, dtype=torch.float32, device="cpu"))
    other.base_model.model.layer.nola_coefficients["default"] = parameter
    found = other(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert parameter.grad is not None


def test_low_cpu_mem_usage(tmp_path: Any) -> None:
    model = get_peft_model(tiny_models.llama(), NolaConfig(target_modules=["q_proj", "lm_head"], init_weights=False))
    x = tiny_models.tokens()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(loaded(x).logits, model(x).logits)

    added = get_peft_model(tiny_models.llama(), NolaConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    assert all(p.device.type == "meta" for p in coefficients_of(added).values())


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
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantized_base(kind: str) -> None:
    base = quantized(kind)
    config = NolaConfig(r=2, num_basis=16, alpha=0.2, target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    assert isinstance(model.base_model.model.first, NolaLinear)
    x = torch.randn(5, 64)
    hidden = base.first(x)
    dense = TwoLinears()
    first, second = (update(config, dense.get_submodule(n), p, n) for n, p in coefficients_of(model).items())
    hidden = torch.tanh(hidden + F.linear(x, first))
    expected = base.second(hidden) + F.linear(hidden, second)
    found = model(x)
    close(found, expected, tolerance=1e-4 if kind == "4bit" else 2e-2)
    found.square().sum().backward()
    expected = torch.autograd.grad(expected.square().sum(), list(coefficients_of(model).values()))
    for parameter, gradient in zip(coefficients_of(model).values(), expected):
        close(parameter.grad, gradient, tolerance=1e-3 if kind == "4bit" else 5e-2)

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
