"""What agents exchange: averages of vectors against averages of weights, and whose vectors do not mean the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from methods import config_of
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ext import McncConfig, PrancConfig, SeededNetwork
from peft_ext.adapters.federated import Exchange, check_agents

SHARES = (0.2, 0.3, 0.5)
NORMS = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(config: Any) -> Any:
    config.target_modules, config.modules_to_save = {"first", "second"}, ["head"]
    return get_peft_model(Net(), config)


def whole(method: str) -> Callable[[], SeededNetwork]:
    return lambda: SeededNetwork(Net(), config_of(method))


def weights_of(make: Callable[[], Any], vector: torch.Tensor) -> dict[str, torch.Tensor]:
    model = make()
    Exchange(model).vector = vector
    if isinstance(model, SeededNetwork):
        return model.weights()
    return dict(model.merge_and_unload().named_parameters())


def averages(make: Callable[[], Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights that the average of random vectors gives, and the averages of weights."""
    size, rng = Exchange(make()).size, torch.Generator().manual_seed(1)
    vectors = [torch.randn(size, generator=rng) for _ in SHARES]
    found = weights_of(make, sum(share * vector for share, vector in zip(SHARES, vectors)))  # type: ignore[arg-type]
    every = [weights_of(make, vector) for vector in vectors]
    return found, {name: sum(share * each[name] for share, each in zip(SHARES, every)) for name in found}  # type: ignore[misc]


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(config_of("PRANC")),
        lambda: adapted(config_of("PRANC, two a weight, biases")),
        lambda: adapted(config_of("PRANC, dense")),
        whole("PRANC"),
        whole("PRANC, dense"),
    ],
    ids=["adapter", "adapter with biases", "dense adapter", "network", "dense network"],
)
def test_averaged_coefficients_are_averaged_weights(make: Callable[[], Any]) -> None:
    found, expected = averages(make)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=1e-5, msg=name)
    moved = weights_of(make, torch.zeros(Exchange(make()).size))
    assert (found["first.weight"] - moved["first.weight"]).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [lambda: config_of("NOLA"), lambda: config_of("PRANC, factors"), lambda: LoraConfig(r=2)],
    ids=["NOLA", "PRANC on factors", "LoRA"],
)
def test_averages_of_factors_are_no_averages_of_products(config: Callable[[], Any]) -> None:
    found, expected = averages(lambda: adapted(config()))
    torch.testing.assert_close(found["head.weight"], expected["head.weight"])  # what is trained whole is linear
    assert (found["first.weight"] - expected["first.weight"]).abs().max() > 0.05


def test_a_vector_is_all_that_is_trained() -> None:
    model = adapted(PrancConfig(num_coefficients=13))
    exchange = Exchange(model)
    assert exchange.size == 13 + 8 * 3 + 3 == len(exchange.vector)
    exchange.vector = torch.arange(40.0)
    trained = torch.cat([each.flatten() for each in model.parameters() if each.requires_grad])
    assert torch.equal(trained, torch.arange(40.0)) and torch.equal(exchange.vector, torch.arange(40.0))
    with pytest.raises(ValueError, match=r"`vector` must have the shape \(40,\), got \(39,\)"):
        exchange.vector = torch.zeros(39)
    with pytest.raises(ValueError, match="finite numbers, got 1 that are not"):
        exchange.vector = torch.tensor([*[0.0] * 39, float("nan")])
    assert Exchange(Net()).size == sum(each.numel() for each in Net().parameters())


def other_base() -> Any:
    model = adapted(config_of("PRANC"))
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight += 1
    return model


@pytest.mark.parametrize(
    ("first", "other", "field"),
    [
        (
            lambda: adapted(config_of("PRANC")),
            lambda: adapted(config_of("PRANC", seed=1)),
            "`seed` is 0 for a and 1 for",
        ),
        (lambda: adapted(config_of("PRANC")), lambda: adapted(config_of("PRANC", num_coefficients=12)), "`num_coeff"),
        (lambda: adapted(config_of("PRANC")), other_base, "`base weights` is '"),
        (lambda: adapted(LoraConfig(r=2)), lambda: adapted(LoraConfig(r=3)), "`r` is 2 for a and 3 for b"),
        (lambda: adapted(LoraConfig(r=2)), lambda: adapted(config_of("NOLA")), "for b. Give all the same"),
        (whole("PRANC"), lambda: SeededNetwork(Net(), config_of("PRANC", seed=1)), "`seed` is 0 for a and 1 for b"),
        (Net, lambda: nn.Linear(2, 3), "`tensors` is "),
    ],
    ids=["seed", "size", "base", "rank", "method", "network", "shapes"],
)
def test_agents_of_another_kind_are_refused(first: Callable[[], Any], other: Callable[[], Any], field: str) -> None:
    same, again, strange = (Exchange(make()).description for make in (first, first, other))
    check_agents([same, json.loads(json.dumps(again))], ["a", "b"])  # as it comes from elsewhere
    with pytest.raises(ValueError, match=field):
        check_agents([same, strange], ["a", "b"])
    with pytest.raises(ValueError, match="for a and .* for c"):
        check_agents([same, again, strange], ["a", "b", "c"])
    for descriptions in ([], [same, again, strange]):
        with pytest.raises(ValueError, match=f"must have a description and a name, got {len(descriptions)} and 2"):
            check_agents(descriptions, ["a", "b"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted(McncConfig(r=2, k=3, d=10, widths=(5,))), "Coefficients of MCNC cannot be combined"),
        (lambda: SeededNetwork(Net(), config_of("MCNC, weight")), "Coefficients of MCNC cannot be combined"),
        (lambda: Net().requires_grad_(False), "must have parameters that require gradients"),
        (lambda: NORMS, "no modules with running statistics, .* got '1'"),
        (lambda: SeededNetwork(NORMS, PrancConfig(num_coefficients=9)), "no modules with running statistics"),
    ],
)
def test_what_cannot_be_averaged(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Exchange(make())


def test_one_adapter_is_active() -> None:
    model = adapted(config_of("PRANC"))
    model.add_adapter("second", config_of("PRANC", target_modules=["first"]))
    Exchange(model)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="must have one active adapter"):
        Exchange(model)


def test_a_merged_adapter_takes_no_vector() -> None:
    model = adapted(PrancConfig(num_coefficients=20, target_modules=["first"]))
    exchange = Exchange(model)
    exchange.vector = np.ones(exchange.size)  # type: ignore[assignment]
    assert torch.equal(exchange.vector, torch.ones(exchange.size))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        exchange.vector = torch.zeros(exchange.size)
    model.unmerge_adapter()
    exchange.vector = torch.zeros(exchange.size)
