"""What MCNC alone has: chunks of every layer, inputs of the frozen network that start at random."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from dense import close, coefficients_of, run_dense, updates
from methods import METHODS, adapt, config_of
from peft import get_peft_model
from torch import nn

from peft_ext import McncConfig, randomness
from peft_ext.tuners.mcnc import McncLayer
from peft_ext.tuners.target import Target

KINDS = [name for name, (config, _) in METHODS.items() if config is McncConfig]
kinds = pytest.mark.parametrize("method", KINDS)


def parts(parameter: torch.Tensor, config: McncConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, beta): one row a chunk."""
    alpha, beta = parameter.view(-1, config.k + 1).split([config.k, 1], 1)
    return alpha, beta


@kinds
def test_initialisation(method: str) -> None:
    """No update, random inputs from the seed alone, and a gradient for every amplitude that is worth following."""
    base = tiny_models.llama()
    torch.manual_seed(1)
    model, config = adapt(base, method, target_modules=["q_proj", "v_proj"], init_weights=True, seed=3)
    torch.manual_seed(2)
    again, _ = adapt(base, method, target_modules=["v_proj", "q_proj", "o_proj"], init_weights=True, seed=3)
    other, _ = adapt(base, method, target_modules=["q_proj", "v_proj"], init_weights=True, seed=4)
    x = tiny_models.tokens()
    assert torch.equal(model(x).logits, base(x).logits)
    found = coefficients_of(model)
    for name, parameter in found.items():
        alpha, beta = parts(parameter, config)
        assert not beta.any() and alpha.all() and alpha.abs().max() < 1
        drawn = randomness.uniform(3, ("mcnc", "alpha", name), parameter.numel()).view(alpha.shape[0], -1)
        factor = (150 if config.apply_to == "factors" else 50) / config.frequency
        torch.testing.assert_close(factor * alpha, drawn[:, : config.k], rtol=1e-6, atol=0)
        assert torch.equal(parameter, coefficients_of(again)[name])
        assert not torch.equal(alpha, parts(coefficients_of(other)[name], config)[0])
    starts = [parameter[:10] for parameter in found.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])

    def loss() -> torch.Tensor:
        return model(input_ids=x, labels=x).loss

    before = loss()
    before.backward()
    steps = []
    for parameter in found.values():
        alpha, beta = parts(parameter.grad, config)
        assert not alpha.any() and beta.any()
        steps.append(parameter.grad)
    length = math.sqrt(sum(step.square().sum() for step in steps))
    with torch.no_grad():
        for parameter, step in zip(found.values(), steps):
            parameter -= 1e-3 * step / length
    assert loss() < before


@kinds
def test_random_amplitudes_for_tests(method: str) -> None:
    """`init_weights=False` depends on the seed alone as well."""
    models = [adapt(tiny_models.Layers(), method, target_modules=["first"])[0] for _ in range(2)]
    (one,), (two,) = (coefficients_of(model).values() for model in models)
    assert torch.equal(one, two)
    _, beta = parts(one, config_of(method))
    assert beta.all() and beta.abs().max() < 0.1


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"r": 2}, {"first": (16, 16), "wide": (16, 48), "conv2d": (54, 12), "embedding": (22, 16)}),
        ({"r": 3}, {"first": (24, 24), "wide": (24, 72), "conv2d": (81, 18), "embedding": (33, 24)}),
        ({"r": 2, "parametrization": "plain"}, {"first": (32,), "wide": (64,), "conv2d": (66,), "embedding": (38,)}),
        ({"apply_to": "weight"}, {"first": (64,), "wide": (192,), "conv2d": (162,), "embedding": (88,)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [7, 32, 54])
def test_every_factor_or_weight_is_cut_into_chunks(
    options: dict[str, Any], numbers: dict[str, tuple[int, ...]], d: int
) -> None:
    config = McncConfig(**options, k=3, d=d, widths=(5,), target_modules=list(numbers))
    model = get_peft_model(tiny_models.Layers(), config)
    found = {name: parameter.numel() for name, parameter in coefficients_of(model).items()}
    assert found == {name: sum(math.ceil(size / d) for size in sizes) * 4 for name, sizes in numbers.items()}


@pytest.mark.parametrize(
    ("layers", "hidden", "inner", "r", "published"), [(32, 4096, 11008, 8, 25_152), (40, 5120, 13824, 16, 77_280)]
)
def test_the_published_numbers_of_coefficients(layers: int, hidden: int, inner: int, r: int, published: int) -> None:
    """LLaMA-2 7B and 13B, all linear layers (paper, table of language models): A and B are cut apart."""
    shapes = [*4 * [(hidden, hidden)], *2 * [(inner, hidden)], (hidden, inner)]
    config = McncConfig(r=r, d=5000)
    targets = [Target(f"{layer}.{i}", *shape) for layer in range(layers) for i, shape in enumerate(shapes)]
    assert sum(config.vector_sizes(targets)) == published


def test_layers_whose_factors_have_other_numbers_of_chunks() -> None:
    """B of two layers comes from chunks at other places, and A of a third has as many numbers as their B."""
    base = tiny_models.Layers().double()
    names = ["embedding", "first", "wide", "conv1d"]
    model, config = adapt(base, "MCNC", target_modules=names, d=13)
    model.double()
    found = {f"{name}.weight" for name in names}
    for name, delta in updates(config, base, coefficients_of(model)).items():
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        close(layer.get_delta_weight("default"), delta)
        found.remove(name)
    assert not found


@pytest.mark.parametrize(
    ("options", "d"),
    [
        ({}, 500),
        ({"factors_version": 3}, 5000),
        ({"factors_version": 2}, 5000),
        ({"parametrization": "plain"}, 5000),
        ({"apply_to": "weight"}, 5000),
    ],
)
def test_the_default_length_of_a_chunk(options: dict[str, Any], d: int) -> None:
    """Adapters that were saved without one keep that of their time."""
    assert McncConfig(**options).chunk_size == d


def test_the_default_length_of_a_chunk_fits_every_layer() -> None:
    """A factor smaller than a chunk has one, of which the beginning is used."""
    base = tiny_models.Layers().double()
    model, config = adapt(base, "MCNC", target_modules=["first", "wide"], d=None)
    assert [parameter.numel() for parameter in coefficients_of(model).values()] == [8, 8]
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x, ("first", "wide")))
    close(model(x, ("first", "wide")), expected)


def test_factors_and_weights_in_one_model() -> None:
    base = tiny_models.Layers().double()
    model, factors = adapt(base, "MCNC", target_modules=["first", "second"])
    weights = config_of("MCNC, weight", target_modules=["second", "wide"])
    model.add_adapter("weights", weights)
    model.double()
    x, path = torch.randn(3, 8, dtype=torch.float64), ("first", "second", "wide")
    second = model.base_model.model.second
    assert second.r == {"default": 2, "weights": 0} and second.scaling == {"default": 0.5, "weights": 1.0}
    for name, config in (("default", factors), ("weights", weights)):
        model.set_adapter(name)
        close(model(x, path), run_dense(base, config, coefficients_of(model, name), lambda m: m(x, path)))
    model.base_model.set_adapter(["default", "weights"])
    both = copy.deepcopy(base)
    for name in ("default", "weights"):
        for layer in coefficients_of(model, name):
            both.get_submodule(layer).weight.data += model.base_model.model.get_submodule(layer).get_delta_weight(name)
    close(model(x, path), both(x, path))
    model(x, path).sum().backward()
    assert all(parameter.grad.any() for parameter in coefficients_of(model, "weights").values())


@kinds
def test_the_size_of_updates(method: str) -> None:
    """With a scaled amplitude of 1, a weight is as large as a fresh one, and the entries of a factor are 1."""
    model, config = adapt(tiny_models.llama(1, hidden_size=64), method, target_modules=["q_proj"], d=64)
    (parameter,) = coefficients_of(model).values()
    parts(parameter.data, config)[1].fill_(1.0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        alpha, beta = parts(parameter.data, config)
        if config.apply_to == "factors":
            shared = 64 / (config.k + 1)
            beta /= torch.tensor([shared**0.25] * 2 + [shared**0.5] * 2).view_as(beta)  # two chunks of A, two of B
        else:
            beta /= 8
        update, _ = layer.update("default")
    if isinstance(update, tuple):
        A, B = update
        start = randomness.uniform(0, ("mcnc", "A", 2, 64, "offset"), 128).view(2, 64) / 80
        assert (A - start).square().mean().sqrt().item() == pytest.approx(1, rel=0.3)
        assert B.square().mean().sqrt().item() == pytest.approx(1, rel=0.3)
    else:
        assert update.square().mean().sqrt().item() == pytest.approx(1 / 8, rel=0.05)


@kinds
def test_phi_is_held_once(method: str) -> None:
    model, config = adapt(tiny_models.llama(3), method, target_modules=["q_proj", "v_proj", "up_proj"])
    model(tiny_models.tokens())
    layers = [layer for layer in model.modules() if isinstance(layer, McncLayer)]
    tensors = [{id(t): t.nbytes for t in layer.mcnc_expansions["default"][0].generator._layers} for layer in layers]
    assert len(layers) == 9 and all(found == tensors[0] for found in tensors)
    sizes = (config.k, *config.widths, config.d)
    assert sum(tensors[0].values()) == 4 * sum(a * b for a, b in zip(sizes, sizes[1:]))
    assert not any("phi" in name or "layer_0" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"d": 49},
            r"`d` must be .* 48 in the largest factor of the 2 .*`apply_to='factors'` and `r=2`, got 49",
        ),
        (
            {"d": 193, "apply_to": "weight"},
            r"`d` must be .* 192 in the largest of the 2 target modules with `apply_to='weight'`, got 193: a longer",
        ),
    ],
)
def test_a_chunk_longer_than_everything(
    options: dict[str, Any], message: str, snapshot: Callable[[nn.Module], dict[str, Any]]
) -> None:
    base = tiny_models.Layers()
    before = snapshot(base)
    fields = {"target_modules": ["first", "wide"], "r": 2, **options}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, McncConfig(**fields))
    after = snapshot(base)
    assert before["modules"] == after["modules"] and before["tensors"].keys() == after["tensors"].keys()
    get_peft_model(base, McncConfig(**{**fields, "d": options["d"] - 1}))
