"""Copies of a loaded adapter beside it, made from its configuration: as trl makes its reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from dense import coefficients_of
from methods import METHODS, config_of
from peft import PeftModel, get_peft_model


def loaded(method: str, folder: Path) -> PeftModel:
    config = config_of(method, target_modules=["q_proj", "v_proj"])
    get_peft_model(tiny_models.llama(), config).save_pretrained(str(folder / "policy"))
    return PeftModel.from_pretrained(tiny_models.llama(), str(folder / "policy"), is_trainable=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_configuration_makes_a_new_adapter_in_its_model(method: str, tmp_path: Path) -> None:
    model = loaded(method, tmp_path)
    x = tiny_models.tokens()
    expected = model(x).logits
    model.add_adapter("copy", model.peft_config["default"])
    for name, parameter in coefficients_of(model, "default").items():
        coefficients_of(model, "copy")[name].data.copy_(parameter)
    model.set_adapter("copy")
    assert torch.equal(model(x).logits, expected)
    model.save_pretrained(str(tmp_path / "both"))
    for name in ("", "copy"):
        alone = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "both" / name))
        torch.testing.assert_close(alone(x).logits, expected)


def test_a_configuration_without_its_coefficients_makes_none(tmp_path: Path) -> None:
    config = loaded("NOLA", tmp_path).peft_config["default"]
    elsewhere = get_peft_model(tiny_models.llama(), config)
    with pytest.raises(ValueError, match="No coefficients were loaded for adapter 'default'"):
        elsewhere.add_adapter("copy", config)


@pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC"])
def test_a_configuration_that_transformers_loaded(method: str, tmp_path: Path) -> None:
    loaded(method, tmp_path)
    own = tiny_models.llama()
    own.load_adapter(str(tmp_path / "policy"), is_trainable=True)  # verified at the first use of its coefficients
    own.add_adapter(own.peft_config["default"], "copy")
    for name, parameter in coefficients_of(own, "default").items():
        coefficients_of(own, "copy")[name].data.copy_(parameter)
    x = tiny_models.tokens()
    own.set_adapter("default")
    expected = own(x).logits
    own.set_adapter("copy")
    assert torch.equal(own(x).logits, expected)
