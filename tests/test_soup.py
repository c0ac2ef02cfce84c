"""Soups of adapters: what they are against dense weights, how coefficients are learned, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import close, coefficients_of, layer_update
from methods import config_of, lower
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_ext import VisualPromptConfig
from peft_ext.adapters import soup as soups
from peft_ext.adapters.soup import Soup, best_adapter, greedy_soup, learn_soup, uniform_soup

ADDED = ["PRANC", "PRANC, two a weight, biases", "PRANC, dense"]
FACTORS = ["NOLA", "NOLA, own bases", "PRANC, factors"]
Loader = list[dict[str, torch.Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def net() -> Net:
    return Net().double()


def config(method: str, **options: Any) -> Any:
    options = {"target_modules": ["first", "second"], "modules_to_save": ["head"], **options}
    return (
        LoraConfig(init_lora_weights=False, r=2, lora_dropout=0.5, **options)
        if method == "LoRA"
        else config_of(method, **options)
    )


X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LOADER: Loader = [{"x": part, "labels": part[:, :3].argmax(1)} for part in X.split(8)]


@pytest.fixture
def kitchen(tmp_path: Path) -> Callable[..., list[str]]:
    """Saves adapters with random numbers and heads of their own, or opposite ones in pairs; returns their folders."""

    def save(method: str, number: int = 4, spread: float = 0.3, paired: bool = False, **options: Any) -> list[str]:
        places = []
        for index in range(number):
            model = get_peft_model(net(), config(method, **options)).double()
            torch.manual_seed(index // 2 if paired else index)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += spread * (-1) ** (index * paired) * torch.randn_like(parameter)
            places.append(str(tmp_path / f"{lower(method) if method != 'LoRA' else 'lora'}{index}"))
            model.save_pretrained(places[-1])
        return places

    return save


def loaded(place: str) -> PeftModel:
    return PeftModel.from_pretrained(net(), place)


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(
            sum(nn.functional.cross_entropy(model(each["x"]), each["labels"], reduction="sum") for each in LOADER)
        ) / len(X)


def mixture(found: Soup, module: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    shares = found.coefficients.get(module, found.coefficients["first"])  # PRANC has one vector for all layers
    return sum(float(share) * tensor for share, tensor in zip(shares, tensors, strict=True))


@pytest.mark.parametrize("method", ADDED)
def test_a_soup_of_pranc_is_the_weighted_sum_of_merged_weights(method: str, kitchen: Callable[..., list[str]]) -> None:
    places = kitchen(method)
    found = learn_soup(net(), places, LOADER, lr=0.3, epochs=3)
    assert len({tuple(column.tolist()) for column in found.coefficients.values()}) > 1
    merged = copy.deepcopy(found.model).merge_and_unload()
    singles = [dict(loaded(place).merge_and_unload().named_parameters()) for place in places]
    for name, parameter in merged.named_parameters():
        close(parameter, mixture(found, name.partition(".")[0], [single[name] for single in singles]), 1e-6)


@pytest.mark.parametrize("method", [*FACTORS, "LoRA"])
def test_factors_and_heads_are_weighted_sums(method: str, kitchen: Callable[..., list[str]]) -> None:
    places = kitchen(method)
    found = learn_soup(net(), places, LOADER, lr=0.3, epochs=3)

    def parts(model: PeftModel, module: str) -> list[torch.Tensor]:
        layer = model.base_model.model.get_submodule(module)
        if module == "head":
            return list(layer.modules_to_save["default"].parameters())
        if method == "LoRA":
            return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        coefficients = coefficients_of(model, "default")
        return list(layer_update(config(method), net(), module, coefficients).factors)

    for module in ("first", "second", "head"):
        singles = [parts(loaded(place), module) for place in places]
        for index, tensor in enumerate(parts(found.model, module)):
            close(tensor, mixture(found, module, [single[index] for single in singles]), 1e-6)


@pytest.mark.parametrize("method", ["PRANC", "NOLA", "LoRA"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_the_gradient_is_that_of_finite_differences(
    method: str, per_layer: bool, kitchen: Callable[..., list[str]]
) -> None:
    with soups._Ingredients(net(), kitchen(method), per_layer) as found:
        start = found.share([0, 2, 3])
        plane = soups.Hyperplane(start, found.distances())
        with torch.no_grad():
            plane.position += 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
        coefficients = plane.coefficients()
        coefficients.backward(found.gradient(coefficients.detach(), LOADER))
        assert start.shape == (4, len(found.modules) if per_layer else 1)
        numbers = torch.zeros_like(start)
        for place in range(start.numel()):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    plane.position.view(-1)[place] += step
                    values.append(found.loss(plane.coefficients(), LOADER))
                    plane.position.view(-1)[place] -= step
            numbers.view(-1)[place] = (values[0] - values[1]) / 2e-5
        assert plane.position.grad is not None and plane.position.grad.abs().max() > 1e-3
        torch.testing.assert_close(plane.position.grad, numbers, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("method", ["PRANC", "NOLA"])
def test_coefficients_sum_to_one_and_the_order_of_adapters_does_not_matter(
    method: str, per_layer: bool, kitchen: Callable[..., list[str]]
) -> None:
    places = kitchen(method)
    found = learn_soup(net(), places, LOADER, per_layer, lr=0.1)
    other = learn_soup(net(), places[::-1], LOADER, per_layer, lr=0.1)
    assert list(found.coefficients) == (["first", "head"] if method == "PRANC" else ["first", "second", "head"])
    if not per_layer:
        assert len({tuple(column.tolist()) for column in found.coefficients.values()}) == 1
    for module, column in found.coefficients.items():
        assert column.shape == (4,) and column.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(column, other.coefficients[module].flip(0))
    torch.testing.assert_close(found.model(X), other.model(X))
    assert found.losses == pytest.approx(other.losses[::-1])


@pytest.mark.parametrize("paired", [True, False])
def test_a_learned_soup_is_no_worse_than_its_adapters(paired: bool, kitchen: Callable[..., list[str]]) -> None:
    """Learning starts at the mean, which is good of adapters that are opposite, or at the best one."""
    places = kitchen("NOLA", spread=3.0, paired=paired)
    uniform = uniform_soup(net(), places)
    best, greedy, learned = (make(net(), places, LOADER) for make in (best_adapter, greedy_soup, learn_soup))
    singles = [loss(loaded(place)) for place in places]
    for each in (best, greedy, learned):
        assert each.losses == pytest.approx(singles) and each.loss == pytest.approx(loss(each.model))
        assert each.loss <= min(singles)
    assert learned.loss < min(*singles, loss(uniform.model)) and best.loss == min(best.losses)
    assert (loss(uniform.model) < min(singles)) == paired
    assert uniform.loss is None and uniform.losses == []
    again = learn_soup(net(), places, LOADER)
    assert torch.equal(again.model(X), learned.model(X))


def test_a_step_goes_equally_far_towards_every_adapter(kitchen: Callable[..., list[str]]) -> None:
    """However far that is from the mean: one that is at the mean has no direction."""
    near, *_ = kitchen("NOLA", spread=0.1)
    with soups._Ingredients(net(), [near, *kitchen("NOLA", spread=2.0)[1:]]) as found:
        start, distances = found.share([1]), found.distances()
        assert (distances.max(0).values > 1.2 * distances.min(0).values).all()
        for index in range(4):
            plane = soups.Hyperplane(start, distances)
            with torch.no_grad():
                plane.position[index] = 1
            moved = found.mixed(plane.coefficients().detach()) - found.mixed(start)
            close(found._by_group(moved.square()).sqrt(), distances.mean(0))
    still = soups.Hyperplane(torch.full((2, 1), 0.5), torch.zeros(2, 1))
    assert torch.isfinite(still.scale).all() and still.coefficients().flatten().tolist() == [0.5, 0.5]


def test_a_soup_that_learns_nothing_is_its_start(kitchen: Callable[..., list[str]]) -> None:
    places = kitchen("NOLA", spread=3.0)
    found = learn_soup(net(), places, LOADER, lr=1e3, epochs=1)
    best = min(range(4), key=found.losses.__getitem__)
    assert found.loss == found.losses[best]
    for column in found.coefficients.values():
        assert column.tolist() == [float(index == best) for index in range(4)]
    assert torch.equal(found.model(X), loaded(places[best])(X))


def test_greedy_adds_from_the_best_what_does_no_harm(kitchen: Callable[..., list[str]]) -> None:
    order = sorted(kitchen("PRANC", number=5, spread=1.0), key=lambda place: loss(loaded(place)))
    places = order[::-1]
    found = greedy_soup(net(), places, LOADER)
    chosen = order[:1]
    for place in order[1:]:
        if loss(uniform_soup(net(), [*chosen, place]).model) <= loss(uniform_soup(net(), chosen).model):
            chosen.append(place)
    assert 1 < len(chosen) < 5
    for column in found.coefficients.values():
        assert {place for place, share in zip(places, column) if share} == set(chosen)
    close(found.model(X), uniform_soup(net(), chosen).model(X))


@pytest.mark.parametrize("method", ["PRANC", "NOLA", "LoRA"])
def test_the_result_is_one_adapter_of_the_usual_size(
    method: str, kitchen: Callable[..., list[str]], tmp_path: Path
) -> None:
    places = kitchen(method)
    found = learn_soup(net().float(), places, [{**each, "x": each["x"].float()} for each in LOADER])
    assert list(found.model.peft_config) == ["default"] and found.adapters == places and not found.model.training
    outputs = found.model(X.float())
    found.model.save_pretrained(str(tmp_path / "soup"))
    alone = PeftModel.from_pretrained(net().float(), str(tmp_path / "soup"))
    assert torch.equal(alone(X.float()), outputs)
    single = PeftModel.from_pretrained(net().float(), places[0])
    single.save_pretrained(str(tmp_path / "single"))
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("soup", "single")]
    assert sizes[0] == sizes[1]
    again = learn_soup(net().float(), [tmp_path / "soup", *places[:1]], [{**LOADER[0], "x": X[:8].float()}], epochs=1)
    assert again.loss <= min(again.losses)


def test_one_adapter_is_its_own_soup(kitchen: Callable[..., list[str]]) -> None:
    (place,) = kitchen("NOLA", number=1)
    for found in (uniform_soup(net(), [place]), learn_soup(net(), [place, place], LOADER)):
        assert torch.equal(found.model(X), loaded(place)(X))


# What is refused


def refused(message: str, adapters: Any, loader: Any = LOADER, **options: Any) -> None:
    base = net()
    with pytest.raises(ValueError, match=message):
        learn_soup(base, adapters, loader, **options)
    assert [name for name, _ in base.named_modules()] == [name for name, _ in net().named_modules()]


def test_other_adapters(kitchen: Callable[..., list[str]], tmp_path: Path) -> None:
    first, *_ = kitchen("NOLA", number=2)

    def other(method: str, **options: Any) -> list[str]:
        model = get_peft_model(net(), config(method, **options)).double()
        model.save_pretrained(str(tmp_path / "other"))
        return [first, str(tmp_path / "other")]

    refused(r"`seed` is 0 in '.*nola0' and 1 in '.*other'", other("NOLA", seed=1))
    refused(r"`num_basis` is \(5, 7\) in '.*nola0' and \(5, 6\)", other("NOLA", num_basis=(5, 6)))
    refused(
        "must adapt the same modules, which '.*nola0' and '.*other' do not", other("NOLA", target_modules=["first"])
    )
    refused("'head.* is of shape .* in '.*nola0' and missing in '.*other'", other("NOLA", modules_to_save=None))
    refused("`peft_type` is 'NOLA' in '.*nola0' and 'PRANC' in '.*other'", other("PRANC"))
    lora = kitchen("LoRA", number=1)
    refused("`lora_alpha` is 8 in '.*lora0' and 4 in", [*lora, other("LoRA", lora_alpha=4)[1]])
    refused("`adapters` must have bias='none', got 'all'", [*lora, other("LoRA", bias="all")[1]])
    refused("`adapters` must be of LoRA, NOLA or PRANC, got LOHA in", [*lora, str(loha(tmp_path))])


def loha(folder: Path) -> Path:
    from peft import LoHaConfig

    get_peft_model(net(), LoHaConfig(target_modules=["first"])).save_pretrained(str(folder / "loha"))
    return folder / "loha"


def test_methods_whose_numbers_cannot_be_mixed(kitchen: Callable[..., list[str]], tmp_path: Path) -> None:
    refused("MCNC cannot be combined: .* phi is not linear in alpha.*to_lora", kitchen("MCNC"))
    import tiny_models

    vit = get_peft_model(tiny_models.vit(), VisualPromptConfig())
    vit.save_pretrained(str(tmp_path / "prompts"))
    refused("must be of LoRA, NOLA or PRANC, got VISUAL_PROMPT in", [tmp_path / "prompts"])


def test_arguments(kitchen: Callable[..., list[str]]) -> None:
    places = kitchen("PRANC", number=2)
    refused(r"`adapters` must be a list of at least one saved adapter, got \[\]", [])
    refused("`adapters` must be a list of at least one saved adapter, got '.*pranc0'", places[0])
    refused("`loader` must give at least one batch, got an empty one", places, [])
    refused("must be one that can be read several times", places, iter(LOADER))
    refused("a tensor 'labels' among them, got the keys", places, [{"x": X}])
    refused("`lr` must be above 0, got 0", places, lr=0)
    refused("`epochs` must be a positive integer, got 0", places, epochs=0)
    with pytest.raises(ValueError, match="`model` must be a base model without adapters"):
        learn_soup(loaded(places[0]), places, LOADER)
    bad = [{**LOADER[0], "x": LOADER[0]["x"] * float("inf")}]
    refused(f"finite losses on the loader, got nan of '{re.escape(places[0])}': leave it out", places, bad)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))


def test_running_statistics_are_not_mixed(tmp_path: Path) -> None:
    get_peft_model(Normed(), config("NOLA")).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="must have no buffers, such as running statistics, .* got 'head'"):
        uniform_soup(Normed(), [tmp_path])


@pytest.mark.parametrize("place", [0, 1])
def test_a_head_of_another_size(place: int, tmp_path: Path) -> None:
    """Wherever loading breaks off, the base model is as it was."""

    def base(classes: int = 3) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, classes))

    for name, classes in (("three", 3), ("five", 5)):
        options = config("NOLA", target_modules=["0"], modules_to_save=["1"])
        get_peft_model(base(classes), options).save_pretrained(str(tmp_path / name))  # type: ignore[arg-type]
    order = ["five", "three"] if place == 0 else ["three", "five"]
    model = base()
    with pytest.raises(ValueError, match="five' does not fit the model: .*size mismatch"):
        uniform_soup(model, [str(tmp_path / name) for name in order])
    assert [type(module) for module in model.modules()] == [type(module) for module in base().modules()]
    uniform_soup(model, [str(tmp_path / "three")] * 2)
