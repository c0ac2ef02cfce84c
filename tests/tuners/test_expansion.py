"""SharedExpansion: one product for many layers, made again exactly when it must be."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import tiny_models
import torch
from methods import METHODS, config_of
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_ext.generators import Generator, RandomBasis, SineManifold, SparseBasis
from peft_ext.tuners import expansion as expansion_module
from peft_ext.tuners.expansion import PartialExpansion, SharedExpansion

COUNT, SHAPE = 4, (2, 3)


def counting(kind: type[Generator]) -> type[Generator]:
    """A generator that notes for every product the number of coefficient vectors in it."""

    class Counting(kind):
        def __post_init__(self) -> None:
            super().__post_init__()
            object.__setattr__(self, "products", [])

        def expand(self, coefficients: torch.Tensor) -> torch.Tensor:
            self.products.append(coefficients.reshape(-1, COUNT).shape[0])
            return super().expand(coefficients)

    return Counting


OFFSET = {"offset_stream": ("test", "offset"), "offset_size": 3, "offset_scale": 0.5}
GENERATORS: dict[str, Callable[[], Generator]] = {
    "dense": lambda: counting(RandomBasis)(0, ("test",), COUNT, 6, scale=0.5, offset_scale=0.5),
    "sparse": lambda: counting(SparseBasis)(0, ("test",), COUNT, 6, scale=0.5),
    "manifold": lambda: counting(SineManifold)(0, ("test",), 6, 3, 6, (5,), scale=0.5, **OFFSET),
}
Case = tuple[SharedExpansion, list[nn.ParameterDict], list[int]]


@pytest.fixture(params=GENERATORS)
def make(request: pytest.FixtureRequest) -> Callable[..., Case]:
    def build(layers: int = 3) -> Case:
        torch.manual_seed(0)
        generator = GENERATORS[request.param]()
        expansion = SharedExpansion(generator, SHAPE, "default", slice(1, 1 + COUNT))
        containers = [nn.ParameterDict({"default": nn.Parameter(torch.randn(1 + COUNT))}) for _ in range(layers)]
        for container in containers:
            expansion.add(container)
        return expansion, containers, generator.products

    return build


def expected(expansion: SharedExpansion, container: nn.ParameterDict) -> torch.Tensor:
    generator = expansion.generator
    return type(generator).__base__.expand(generator, container["default"].detach()[1:]).view(SHAPE)


def expected_gradient(expansion: SharedExpansion, container: nn.ParameterDict, factor: float = 1.0) -> torch.Tensor:
    """Of `factor` times the sum of a layer's weights."""
    return expansion.generator.vjp(container["default"].detach()[1:], torch.full((6,), float(factor)))


def assert_right(expansion: SharedExpansion, containers: list[nn.ParameterDict]) -> None:
    for container in containers:
        torch.testing.assert_close(expansion(container).detach(), expected(expansion, container))


def test_with_gradients_every_pass_makes_one_product(make):
    expansion, containers, products = make()
    for passes in range(1, 4):
        assert_right(expansion, containers)
        assert products == [3] * passes


def test_without_gradients_one_product_serves_all_passes(make):
    expansion, containers, products = make()
    with torch.no_grad():
        for _ in range(3):
            assert_right(expansion, containers)
    assert products == [3]


def test_gradients_reach_every_layer_alone(make):
    expansion, containers, _ = make()
    weights = [expansion(container) for container in containers]
    (weights[0].sum() + 2 * weights[2].sum()).backward()
    for container, factor in zip(containers, (1, 0, 2)):
        grad = container["default"].grad
        assert grad is not None and grad[0] == 0
        torch.testing.assert_close(grad[1:], expected_gradient(expansion, container, factor))


def test_two_passes_have_graphs_of_their_own(make):
    expansion, containers, _ = make()
    first = [expansion(container) for container in containers]
    second = [expansion(container) for container in containers]
    sum(weight.sum() for weight in first).backward()
    once = containers[0]["default"].grad.clone()
    sum(weight.sum() for weight in second).backward()
    torch.testing.assert_close(containers[0]["default"].grad, 2 * once)


def test_a_pass_over_some_layers_leaves_a_graph_for_the_others(make):
    expansion, containers, products = make()
    expansion(containers[0]).sum().backward()
    expansion(containers[1]).sum().backward()
    assert products == [3]
    torch.testing.assert_close(containers[1]["default"].grad[1:], expected_gradient(expansion, containers[1]))


CHANGES: dict[str, Callable[[nn.ParameterDict], object]] = {
    "in place": lambda container: container["default"].detach().add_(1),
    "through .data": lambda container: container["default"].data.add_(1),
    "replaced .data": lambda container: setattr(container["default"], "data", container["default"].data + 1),
    "new parameter": lambda container: container.update({"default": nn.Parameter(torch.randn(1 + COUNT))}),
    "loaded": lambda container: container.load_state_dict({"default": torch.randn(1 + COUNT)}),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("seen", [1, 3], ids=["before its first read", "after a whole pass"])
def test_a_change_is_noticed(make, change, gradients, seen):
    expansion, containers, _ = make()
    with torch.set_grad_enabled(gradients):
        for container in containers[:seen]:
            expansion(container)
        change(containers[1])
        assert_right(expansion, containers[1:])


def test_frozen_then_trained_without_a_change_of_values(make):
    expansion, containers, _ = make()
    containers[1]["default"].requires_grad_(False)
    expansion(containers[0])
    containers[1]["default"].requires_grad_(True)
    expansion(containers[1]).sum().backward()
    assert containers[1]["default"].grad is not None


def test_frozen_layers_get_values_without_a_graph(make):
    expansion, containers, _ = make()
    containers[1]["default"].requires_grad_(False)
    assert expansion(containers[0]).requires_grad
    assert not expansion(containers[1]).requires_grad


def test_inference_mode_then_training(make):
    expansion, containers, _ = make()
    with torch.inference_mode():
        expansion(containers[0])
    (expansion(containers[0]) ** 2).sum().backward()
    assert containers[0]["default"].grad is not None


def test_what_inference_mode_kept_can_be_saved_for_backward(make):
    expansion, containers, products = make()
    for container in containers:
        container["default"].requires_grad_(False)
    with torch.inference_mode():
        expansion(containers[0])
    x = torch.ones(3, requires_grad=True)
    (expansion(containers[0]) @ x).sum().backward()
    assert x.grad is not None and products == [3]


def test_a_container_that_never_joined_is_expanded_alone(make):
    expansion, containers, products = make()
    stranger = nn.ParameterDict({"default": nn.Parameter(torch.randn(1 + COUNT))})
    assert_right(expansion, [containers[0], stranger])
    assert products[-1] == 1


def test_a_layer_that_lost_the_adapter_is_left_out(make):
    expansion, containers, products = make()
    del containers[1]["default"]
    assert_right(expansion, [containers[0], containers[2]])
    assert products == [2]


def test_mixed_precisions_are_expanded_alone(make):
    expansion, containers, products = make(2)
    containers[1]["default"] = nn.Parameter(containers[1]["default"].detach().double())
    assert expansion(containers[1]).dtype == torch.float64
    assert expansion(containers[0]).dtype == torch.float32
    assert products == [1, 1]


def test_recomputed_inside_a_backward_pass(make):
    """What activation checkpointing does: the same bits, and gradients for the layer alone."""
    expansion, containers, products = make()
    seen: list[torch.Tensor] = []

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.no_grad():
                seen.append(expansion(containers[1]))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                seen.append(expansion(containers[1]))
                seen[-1].sum().backward()
            return grad

    Recompute.apply(torch.ones(1, requires_grad=True)).backward()
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(containers[1]["default"].grad[1:], expected_gradient(expansion, containers[1]))
    assert containers[0]["default"].grad is None
    assert products == [3]


def test_broken_coefficients_are_refused_at_first_use(make):
    expansion, containers, _ = make()
    containers[2]["default"].data[2] = float("nan")
    with pytest.raises(ValueError, match="coefficients of an adapter must be finite, got NaN or infinity"):
        expansion(containers[0])


def test_copies_expand_their_own_layers(make):
    expansion, containers, _ = make()
    expansion(containers[0])
    other, others = copy.deepcopy((expansion, containers))
    others[1]["default"].data.zero_()
    assert_right(other, others)
    assert_right(expansion, containers)


def test_a_parameter_container_does_not_outlive_its_model(make):
    expansion, containers, _ = make()
    expansion(containers[0])
    reference = weakref.ref(containers[0])
    del expansion, containers
    gc.collect()
    assert reference() is None


# One vector that many layers read: each with an expansion of its own, or a part of one.


def share(joined: bool, layers: int = 3) -> tuple[list[SharedExpansion], nn.ParameterDict]:
    container = nn.ParameterDict({"default": nn.Parameter(torch.randn(COUNT))})
    expansions: list[SharedExpansion] = []
    for i in reversed(range(layers)):
        if joined:
            part = SparseBasis(0, ("test",), COUNT, 6 + i, 1.0, 1, 0.1 * i, 6 * i + i * (i - 1) // 2, 6 * layers + 3)
            expansion: SharedExpansion = PartialExpansion(part, "default", expansions[0] if expansions else None)
        else:
            basis = SparseBasis(0, ("test", i), COUNT, 6)
            expansion = SharedExpansion(basis, SHAPE, "default", slice(0, COUNT), one_vector=True)
        expansion.add(container)
        expansions.append(expansion)
    return expansions, container


@pytest.fixture(params=[False, True], ids=["alone", "parts"])
def shared(request) -> tuple[list[SharedExpansion], nn.ParameterDict]:
    return share(request.param)


def test_one_vector_collects_the_gradients_of_all_layers(shared):
    expansions, container = shared
    for passes in (1, 2):
        sum((i + 1) * expansion(container).sum() for i, expansion in enumerate(expansions)).backward()
        total = sum(
            expansion.generator.vjp(
                container["default"].detach(), torch.full((expansion.generator.size,), float(i + 1))
            )
            for i, expansion in enumerate(expansions)
        )
        torch.testing.assert_close(container["default"].grad, passes * total)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_one_vector_is_noticed_by_all(change, shared):
    expansions, container = shared
    change = (
        (lambda container: container.update({"default": nn.Parameter(torch.randn(COUNT))}))
        if change is CHANGES["new parameter"]
        else (lambda container: container.load_state_dict({"default": torch.randn(COUNT)}))
        if change is CHANGES["loaded"]
        else change
    )
    with torch.no_grad():
        for expansion in expansions:
            expansion(container)
        change(container)
        for expansion in expansions:
            right = expansion.generator.expand(container["default"]).view(expansion.shape)
            assert torch.equal(expansion(container), right)


@pytest.mark.parametrize("numbers", [0, COUNT - 1])
def test_one_vector_that_is_not_whole_is_refused(numbers, shared):
    """What FSDP leaves of a parameter outside of its unit."""
    expansions, container = shared
    container["default"] = nn.Parameter(torch.randn(numbers))
    with pytest.raises(RuntimeError, match=r"cannot be read.*Wrap the whole model as one unit: `fully_shard\(model\)`"):
        expansions[1](container)


def test_parts_are_made_in_one_product(monkeypatch):
    products = []
    expand = SparseBasis.expand
    monkeypatch.setattr(SparseBasis, "expand", lambda self, given: products.append(self.size) or expand(self, given))
    expansions, container = share(True)
    sum(expansion(container).sum() for expansion in expansions).backward()
    assert products == [6 + 7 + 8]
    with torch.no_grad():
        for _ in range(2):
            for expansion in expansions:
                expansion(container)
    assert len(products) == 1
    other, (copied, *_) = copy.deepcopy((container, expansions))
    copied(other).sum().backward()
    assert len(copied.parts) == 3 and copied.kept is copied.parts[0].kept is not expansions[0].kept
    assert len(products) == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("several", [True, False], ids=["several processes", "one process"])
def test_parts_in_recomputed_blocks(reentrant, several, monkeypatch, shared):
    """Beside one that is not recomputed. In several processes gradients would be reduced before all are there."""
    expansions, container = shared
    monkeypatch.setattr(expansion_module, "_is_distributed", lambda: several)
    x = torch.ones((), requires_grad=True)

    def weigh(i: int, x: torch.Tensor) -> torch.Tensor:
        return x * expansions[i](container).square().sum()

    def losses(recomputed: bool) -> torch.Tensor:
        parts = [weigh(0, x)]
        for i in (1, 2):
            parts.append(checkpoint(weigh, i, x, use_reentrant=reentrant) if recomputed else weigh(i, x))
        return sum(parts[1:], parts[0])

    losses(False).backward()
    expected, container["default"].grad = container["default"].grad, None
    if reentrant and several:
        with pytest.raises(RuntimeError, match="Use non-reentrant checkpointing"):
            losses(True).backward()
        return
    losses(True).backward()
    torch.testing.assert_close(container["default"].grad, expected)


def test_a_pass_of_a_part_where_passes_are_compared_once(make, monkeypatch):
    """As on a GPU: what decodes has many passes, in which what encodes has no part."""
    monkeypatch.setattr(expansion_module, "_CHEAP", "none")
    expansion, containers, products = make()
    with torch.no_grad():
        for part in (containers, containers[1:], containers[1:]):
            for container in part:
                expansion(container)
        assert products == [3]
        for container in containers:
            container["default"].data.mul_(3)
        assert_right(expansion, containers)
    assert products == [3, 3]


def test_layers_in_another_order_where_passes_are_compared_once(make, monkeypatch):
    """As on a GPU: averaged weights, for one, are put in place through `.data` between two evaluations."""
    monkeypatch.setattr(expansion_module, "_CHEAP", "none")
    expansion, containers, products = make()
    with torch.no_grad():
        for _ in range(2):
            for container in reversed(containers):
                expansion(container)
        assert products == [3]
        for container in containers:
            container["default"].data.mul_(3)
        assert_right(expansion, list(reversed(containers)))
    assert products == [3, 3]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_deleted_adapter_is_kept(method: str) -> None:
    model = get_peft_model(tiny_models.llama(), config_of(method, target_modules=["q_proj"]))
    model.add_adapter("second", config_of(method, target_modules=["q_proj"]))
    model.set_adapter("second")
    with torch.no_grad():
        model(tiny_models.tokens(2))
    model.set_adapter("default")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    kept = [weakref.ref(expansion) for expansion in layer.expansions["second"]]
    model.delete_adapter("second")
    gc.collect()
    assert kept and not any(each() for each in kept)
