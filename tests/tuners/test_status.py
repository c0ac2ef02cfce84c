"""What PEFT tells of adapters in their layers: which there are, whether they are trained, and where they are."""

from __future__ import annotations

import pytest
import tiny_models
from methods import METHODS, config_of, lower
from peft import get_layer_status, get_model_status, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_ext import VisualPromptConfig

TARGETS = {"one": ["first", "second", "wide"], "two": ["second", "wide", "conv1d"]}


def two_adapters(method: str) -> nn.Module:
    """The first layer owns PRANC's vector of "one", the second that of "two"."""
    model = get_peft_model(tiny_models.Layers(), config_of(method, target_modules=TARGETS["one"]), "one")
    model.add_adapter("two", config_of(method, target_modules=TARGETS["two"], seed=3))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_tells_of_every_adapter_that_it_has(method: str) -> None:
    model = two_adapters(method)
    for active in ("one", "two", "one"):
        model.set_adapter(active)
        layers = model.get_layer_status()
        assert [layer.name.rpartition(".")[2] for layer in layers] == ["first", "second", "wide", "conv1d"]
        for layer in layers:
            here = [name for name, targets in TARGETS.items() if layer.name.rpartition(".")[2] in targets]
            assert layer.available_adapters == here
            assert layer.requires_grad == {name: name == active for name in here}
            assert layer.devices == dict.fromkeys(here, ["cpu"])
            assert layer.active_adapters == [active] and layer.enabled and not layer.merged_adapters
        status = model.get_model_status()
        assert status.requires_grad == {"one": active == "one", "two": active == "two"}
        assert status.available_adapters == ["one", "two"] and status.devices == {"one": ["cpu"], "two": ["cpu"]}
        assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert status.total_params == sum(p.numel() for p in model.parameters())
        assert get_model_status(model) == status
    with model.disable_adapter():
        assert not any(any(layer.requires_grad.values()) for layer in model.get_layer_status())
    model.merge_adapter()
    assert [layer.merged_adapters for layer in model.get_layer_status()] == [["one"]] * 3 + [[]]
    model.unmerge_adapter()

    model.delete_adapter("two")
    layers = model.get_layer_status()
    assert [layer.requires_grad for layer in layers] == [{"one": True}] * 3 + [{}]
    assert [layer.available_adapters for layer in layers] == [["one"]] * 3 + [[]]


@pytest.mark.parametrize("method", METHODS)
def test_a_further_adapter_is_not_trained_before_it_is_active(method: str) -> None:
    """In layers that have no other adapter too, whether they own the coefficients or not."""
    model = get_peft_model(tiny_models.Layers(), config_of(method, target_modules=["first"]), "one")
    model.add_adapter("two", config_of(method, target_modules=["second", "wide", "conv1d"]))
    assert model.get_model_status().requires_grad == {"one": True, "two": False}
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".two." in n] == []
    frozen = [layer.requires_grad["two"] for layer in model.get_layer_status() if "two" in layer.requires_grad]
    assert frozen == [False] * 3


@pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC"])
def test_layers_own_what_they_owned(method: str) -> None:
    """What PEFT is shown is no submodule: names and numbers of parameters stay."""
    model = two_adapters(method)
    named = [name for name, _ in model.named_parameters() if f"{lower(method)}_" in name]
    assert len(named) == (2 if method == "PRANC" else 6)
    assert [key for key in model.state_dict() if "_vectors" in key] == []
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        layer.set_requires_grad("one", False)
    assert model.get_model_status().requires_grad["one"] is False


@pytest.mark.parametrize("deep", [False, True])
def test_prompts(deep: bool) -> None:
    """All blocks pass prompts on; those without tokens of their own have nothing that could be trained."""
    model = get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=2, deep=deep), "one")
    model.add_adapter("two", VisualPromptConfig(num_prompts=3))
    first, second = get_layer_status(model)
    assert first.available_adapters == second.available_adapters == ["one", "two"]
    assert first.requires_grad == {"one": True, "two": False} and first.devices == {"one": ["cpu"], "two": ["cpu"]}
    assert second.requires_grad == ({"one": True} if deep else {})
    assert second.devices == ({"one": ["cpu"]} if deep else {})
    status = model.get_model_status()
    assert status.requires_grad == {"one": True, "two": False} and status.available_adapters == ["one", "two"]
    assert status.active_adapters == ["one"] and status.num_adapter_layers == 2
