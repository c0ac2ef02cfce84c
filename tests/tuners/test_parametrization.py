"""Coefficients that are scaled take LoRA's learning rate: a step of Adam does as much to the loss as one of LoRA."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import METHODS, adapt, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_ext import McncConfig, NolaConfig, PrancConfig
from peft_ext.tuners.target import Target, together

SEEDED = [name for name, (config, _) in METHODS.items() if config in (NolaConfig, PrancConfig, McncConfig)]


def network() -> nn.Module:
    return nn.ModuleDict({"wide": nn.Linear(48, 96), "narrow": nn.Linear(96, 32)})


def first_order(config: Any, draws: int = 12) -> float:
    """The change of random linear losses by a step of Adam at a learning rate of 1: the gradients' absolute values.

    It is about the first step: all but what is zero at the start (B, amplitudes, dense updates) has no gradient yet.
    """
    total = 0.0
    for draw in range(draws):
        torch.manual_seed(draw)
        base = network()
        slopes = {name: torch.randn(len(layer.weight), layer.in_features) for name, layer in base.items()}
        if hasattr(config, "seed"):
            config.seed = draw
        model: Any = get_peft_model(base, config)
        for name, slope in slopes.items():
            (model.base_model.model[name](torch.eye(slope.shape[1])).T * slope).sum().backward()
        total += sum(
            float(parameter.grad.abs().sum()) for parameter in model.parameters() if parameter.grad is not None
        )
    return total / draws


@pytest.mark.parametrize(
    "config",
    [
        NolaConfig(r=4, num_basis=8),
        NolaConfig(r=4, num_basis=(16, 64), share_basis=False),
        McncConfig(r=4, k=2, d=8, widths=(16,)),
        McncConfig(r=4, k=2, d=64, widths=(16,)),
        PrancConfig(r=4, num_coefficients=20, apply_to="factors"),
        PrancConfig(r=4, num_coefficients=100, nnz=3, apply_to="factors"),
    ],
    ids=[
        "8 bases",
        "16 and 64 bases",
        "chunks of 8",
        "chunks of 64",
        "one vector of 20",
        "one of 100, three a number",
    ],
)
def test_a_first_step_of_factors_is_one_of_lora(config: Any) -> None:
    config.target_modules = {"wide", "narrow"}
    config.alpha = 4.0
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["wide", "narrow"])
    # Of the coefficients of a chunk only the amplitude has a gradient yet; A starts at a tenth of LoRA's but in NOLA.
    waiting = {McncConfig: 10 * math.sqrt(getattr(config, "k", 0) + 1), PrancConfig: 10.0}.get(type(config), 1.0)
    assert first_order(config) * waiting == pytest.approx(first_order(lora), rel=0.15)
    assert first_order(config) != pytest.approx(first_order(plain(config)), rel=0.3)


@pytest.mark.parametrize(
    ("config", "shared"),
    [
        (NolaConfig(r=4, num_basis=(8, 2)), 4 * 40 / 8),
        (NolaConfig(r=4, num_basis=(40, 2), share_basis=False), 4 * 40 / 40),
        (McncConfig(r=4, k=2, d=20, widths=(16,)), 20 / 3),
        (PrancConfig(r=4, num_coefficients=20, apply_to="factors"), 4 * 40 / 20),
    ],
    ids=["8 bases", "40 bases", "chunks of 20", "one vector"],
)
def test_a_step_of_a_moves_it_between_where_lora_would_and_what_its_length_asks_for(config: Any, shared: float) -> None:
    """Its entries move by the fourth root of the numbers for a coefficient: 1 would be as far as LoRA's move."""
    generator = config.generators(together([Target("layer", 24, 40)])[0])[0]
    sizes = []
    for draw in range(20):
        torch.manual_seed(draw)
        step = torch.randint(0, 2, (generator.num_coefficients,)) * 2.0 - 1
        moved = generator.expand(step) - generator.expand(torch.zeros_like(step))
        sizes.append(float(moved.square().mean()))
    assert math.sqrt(sum(sizes) / len(sizes)) == pytest.approx(shared**0.25, rel=0.1)


@pytest.mark.parametrize(
    "config",
    [
        PrancConfig(num_coefficients=20),
        PrancConfig(num_coefficients=200, nnz=3),
        PrancConfig(num_coefficients=20, basis="dense"),
        McncConfig(k=2, d=64, widths=(16,), apply_to="weight"),
    ],
    ids=["20", "200, three a weight", "20, dense", "chunks of 64"],
)
def test_a_first_step_of_weights_is_one_of_weights_of_unit_variance(config: Any) -> None:
    """That is, of weights which are parameters times `1 / sqrt(fan_in)`."""
    config.target_modules = {"wide", "narrow"}
    expected = math.sqrt(2 / math.pi) * (96 * 48 / math.sqrt(48) + 32 * 96 / math.sqrt(96))
    if isinstance(config, PrancConfig):  # its coefficients see the gradients of all layers in one norm
        expected = math.sqrt(2 / math.pi) * math.sqrt(96 * 48 + 32 * 96) * math.sqrt(96 + 32)
    assert first_order(config) == pytest.approx(expected, rel=0.15)
    assert first_order(plain(config)) != pytest.approx(expected, rel=0.3)


def plain(config: Any) -> Any:
    others = ("method", "parametrization", "factors_version")
    fields = {name: getattr(config, name) for name in config.generating() if name not in others}
    return type(config)(**fields, target_modules=sorted(config.target_modules), parametrization="plain")


@pytest.mark.parametrize("method", SEEDED)
def test_an_adapter_from_before_there_was_a_choice(method: str, tmp_path: Path) -> None:
    base = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 8)})
    model, _ = adapt(base, method, target_modules=["first", "second"], parametrization="plain")
    expected = {name: model.base_model.model[name].get_delta_weight("default") for name in base}
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved.pop("parametrization") == "plain" and "parametrization" not in saved["identity"]
    file.write_text(json.dumps(saved))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert loaded.peft_config["default"].parametrization == "plain"
    for name, update in expected.items():
        assert torch.equal(loaded.base_model.model[name].get_delta_weight("default"), update) and update.any()
    file.write_text(json.dumps({**saved, "parametrization": "scaled"}))
    with pytest.raises(ValueError, match="`parametrization` of the saved adapter was 'not there'"):
        PeftModel.from_pretrained(base, str(tmp_path))


def test_what_a_parametrization_can_be() -> None:
    assert config_of("NOLA").parametrization == "scaled"
    with pytest.raises(ValueError, match="`parametrization` must be .*'scaled'.*'plain'.* got 'published'"):
        NolaConfig(parametrization="published")


@pytest.mark.parametrize("method", ["NOLA", "MCNC"])
def test_an_adapter_that_was_scaled_by_the_first_rule_is_refused(method: str, tmp_path: Path) -> None:
    base = nn.ModuleDict({"first": nn.Linear(16, 16)})
    model, config = adapt(base, method, target_modules=["first"])
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    newest = saved.pop("factors_version")
    assert saved["identity"].pop("factors_version") == newest == config.factors_versions[-1]
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"`factors_version` of the saved adapter was 'not there' .* is {newest} here"):
        PeftModel.from_pretrained(base, str(tmp_path))


def test_an_adapter_of_an_earlier_rule_stays_one(tmp_path: Path) -> None:
    """Its file names the rule in the identity alone, as files did when there was no other."""

    def weight_of(model: Any) -> torch.Tensor:
        return model.base_model.model["first"].get_delta_weight("default")

    base = nn.ModuleDict({"first": nn.Linear(16, 16)})
    options: dict[str, Any] = {"target_modules": ["first"], "init_weights": False}
    model, _ = adapt(base, "MCNC", factors_version=2, **options)
    expected = weight_of(model)
    assert not torch.allclose(expected, weight_of(adapt(base, "MCNC", **options)[0]))
    model.save_pretrained(str(tmp_path / "first"))
    file = tmp_path / "first" / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved.pop("factors_version") == saved["identity"]["factors_version"] == 2
    file.write_text(json.dumps(saved))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "first"))
    assert torch.equal(weight_of(loaded), expected)
    loaded.save_pretrained(str(tmp_path / "again"))
    again = PeftModel.from_pretrained(base, str(tmp_path / "again"))
    assert again.peft_config["default"].factors_version == 2  # type: ignore[union-attr]
    assert torch.equal(weight_of(again), expected)


@pytest.mark.parametrize("method", SEEDED)
def test_a_parametrization_that_is_set_later(method: str, tmp_path: Path) -> None:
    """The version of the factors goes with it."""
    base = nn.ModuleDict({"first": nn.Linear(16, 16)})
    config = config_of(method, target_modules=["first"], parametrization="plain")
    config.parametrization = "scaled"
    model = get_peft_model(base, config)
    expected = model.base_model.model["first"].get_delta_weight("default")  # type: ignore[operator]
    model.save_pretrained(str(tmp_path))
    loaded: Any = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(loaded.base_model.model["first"].get_delta_weight("default"), expected)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["factors_version"] == saved["identity"].get("factors_version") == config.rule


def test_what_the_version_of_the_factors_can_be() -> None:
    for config, message in (
        (lambda: McncConfig(factors_version=1), "`factors_version` must be 2 or 3 or 4, got 1"),
        (lambda: NolaConfig(factors_version=3), "`factors_version` must be 2, got 3"),
        (lambda: PrancConfig(factors_version=2), "`factors_version` must be left out, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            config()
    assert dataclasses.replace(McncConfig(), parametrization="plain").factors_version is None


@pytest.mark.parametrize("frequency", [0.5, 5.0, 40.0])
def test_a_step_moves_the_phases_of_mcnc_alike_at_every_frequency(frequency: float) -> None:
    config = McncConfig(k=2, d=8, frequency=frequency)
    target = together([Target("layer", 24, 40)])[0]
    manifold = config.generators(target)[0]
    assert manifold.frequency == pytest.approx(150)  # of a coefficient
    start = config.initial(target, config.generators(target))[: manifold.num_coefficients].view(-1, 3)[:, :2]
    assert (manifold.frequency * start).abs().max() == pytest.approx(frequency, rel=0.1)
