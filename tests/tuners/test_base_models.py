"""Base models that are not held in memory as they are: offloaded, quantized by other libraries, tied."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from dense import coefficients_of
from methods import METHODS, ONE_OF_EACH, config_of
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import NolaConfig, NolaModel

one_of_each = pytest.mark.parametrize("method", ONE_OF_EACH)
X = tiny_models.tokens()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(X).logits


def offloaded(kind: str, folder: Path) -> nn.Module:
    model = tiny_models.llama()
    if kind == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if kind == "disk":
        return disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    parts["model.layers.1"] = "disk"
    return dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["cpu", "disk", "device map"])
def test_offloaded(kind: str, method: str, tmp_path: Path) -> None:
    """Adapted, loaded, merged and saved: as the model in memory. (LoRA's factors are lost on the meta device.)"""
    config = config_of(method, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(3)
    reference = get_peft_model(tiny_models.llama(), config)
    reference.save_pretrained(str(tmp_path / "adapter"))
    expected = logits(reference)

    torch.manual_seed(3)
    model = get_peft_model(offloaded(kind, tmp_path / "first"), copy.deepcopy(config))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model(input_ids=X, labels=X).loss.backward()
    reference(input_ids=X, labels=X).loss.backward()
    for name, parameter in coefficients_of(reference).items():
        torch.testing.assert_close(coefficients_of(model)[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)

    folder = {"offload_folder": str(tmp_path / "again")} if kind == "device map" else {}
    loaded = PeftModel.from_pretrained(offloaded(kind, tmp_path / "second"), str(tmp_path / "adapter"), **folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "saved"))
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@one_of_each
def test_merging_that_has_no_effect_is_refused(method: str) -> None:
    """The weight of a layer with a parametrization is computed at each use: what is set as its numbers is lost."""
    base = tiny_models.One(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model = get_peft_model(base, config_of(method, target_modules=["layer"]))
    x = torch.randn(20, 8)
    before = model(x)
    assert not torch.allclose(before, base.layer.base_layer(x), atol=1e-3)
    with pytest.raises(TypeError, match="weight of a ParametrizedLinear.* cannot be changed: merging has no effect"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), before)


@one_of_each
def test_quanto(method: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")

    def make() -> nn.Module:
        base = tiny_models.llama()
        quanto.quantize(base, weights=quanto.qint8)
        quanto.freeze(base)
        return base

    model = get_peft_model(make(), config_of(method, target_modules=["q_proj"]))
    adapted, plain = logits(model), logits(make())
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj.weight).__name__ == "WeightQBytesTensor"
    assert (logits(merged) - adapted).norm() < 0.1 * (adapted - plain).norm()  # what rounding to 8 bits changes


@one_of_each
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings(targets: list[str], method: str, tmp_path: Path) -> None:
    """An update of one of two tied modules is an update of that one: merging unties them, and says so."""
    base = tiny_models.llama(tie_word_embeddings=True)
    model = get_peft_model(base, config_of(method, target_modules=targets))
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_models.llama(tie_word_embeddings=True), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(saved), expected, rtol=1e-4, atol=1e-5)


@one_of_each
def test_a_tied_head_that_is_trained_whole(method: str, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_models.llama(tie_word_embeddings=True),
        config_of(method, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(tie_word_embeddings=True), str(tmp_path))
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_layers_cannot_be_chosen_where_the_default_modules_are_a_pattern() -> None:
    class Model(nn.Module):
        config = {"model_type": "gemma4"}

        def __init__(self) -> None:
            super().__init__()
            self.language_model = nn.Module()
            self.language_model.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(3))

    assert isinstance(NolaModel.target_module_mapping["gemma4"], str)
    with pytest.raises(ValueError, match=r"`layers_to_transform` selects .* here '.*', got \[0\]"):
        get_peft_model(Model(), NolaConfig(num_basis=10, layers_to_transform=[0]))  # type: ignore[arg-type]
    model = get_peft_model(Model(), NolaConfig(num_basis=10, target_modules=["q_proj"], layers_to_transform=[0]))  # type: ignore[arg-type]
    assert model.base_model.targeted_module_names == ["language_model.layers.0.q_proj"]
