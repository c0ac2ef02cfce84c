"""Input and output embeddings that share their weight, and stay equal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from methods import METHODS, config_of
from peft import LoraConfig, PeftModel, get_peft_model

import peft_ext

every_method = pytest.mark.parametrize("method", METHODS)


def tied(method: str, **options: Any) -> PeftModel:
    config = config_of(method, ensure_weight_tying=True, **options)
    return get_peft_model(tiny_models.llama(tie_word_embeddings=True), config).eval()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens(2), **inputs).logits


def dense(model: PeftModel) -> torch.Tensor:
    """The right output: both embeddings of the base model have the weight of the input embedding with its update."""
    base = model.base_model.model
    embedding = base.get_input_embeddings()
    plain = tiny_models.llama(tie_word_embeddings=True)
    reference = get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).unload()
    state = {name.replace(".base_layer.", "."): value for name, value in base.state_dict().items()}
    reference.load_state_dict({name: state[name] for name in reference.state_dict()})
    weight = embedding.get_base_layer().weight + embedding.get_delta_weight("default")
    reference.get_input_embeddings().weight = torch.nn.Parameter(weight.detach())
    reference.tie_weights()
    return logits(reference)


@every_method
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], r".*embed_tokens|lm_head"]
)
def test_both_have_the_update_of_the_input_embedding(targets: Any, method: str, tmp_path: Path) -> None:
    model = tied(method, target_modules=targets)
    expected = dense(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    alone = get_peft_model(
        tiny_models.llama(tie_word_embeddings=True), config_of(method, target_modules=["embed_tokens"])
    )
    assert model.get_nb_trainable_parameters()[0] == alone.get_nb_trainable_parameters()[0]
    assert (logits(alone.eval()) - expected).abs().max() > 1e-3  # which adapts the input embedding alone

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(tie_word_embeddings=True), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))

    found = logits(model, adapter_names=["__base__", "default"])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(found[0], logits(model)[0], rtol=1e-4, atol=1e-5)

    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings


@every_method
def test_gradients_come_from_both(method: str) -> None:
    model = tied(method, target_modules=["embed_tokens"]).double()
    x = tiny_models.tokens(2)
    model(x).logits.square().mean().backward()
    (parameter,) = (p for p in model.parameters() if p.requires_grad)
    embedding = model.base_model.model.get_input_embeddings()
    weight = embedding.get_base_layer().weight.detach() + embedding.get_delta_weight("default")
    plain = tiny_models.llama(tie_word_embeddings=True).double()
    reference = torch.func.functional_call(plain, {"model.embed_tokens.weight": weight}, (x,)).logits
    (expected,) = torch.autograd.grad(reference.square().mean(), parameter)
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"]])
def test_modules_that_are_trained_whole(modules: list[str], tmp_path: Path) -> None:
    """As PEFT does it for LoRA: the input embedding is trained, and the output embedding has its weight."""
    model = tied("NOLA", modules_to_save=modules)
    weights = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert len(weights) == 1
    weights[0].data.normal_()
    base = model.base_model.model
    assert base.get_output_embeddings().weight is weights[0] or torch.equal(
        base.get_output_embeddings().weight, weights[0]
    )
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(tie_word_embeddings=True), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_several_adapters_and_deleting_one() -> None:
    model = tied("NOLA", target_modules=["embed_tokens", "q_proj"])
    expected = logits(model)
    model.add_adapter("alone", config_of("NOLA", target_modules=["embed_tokens"], seed=2))
    model.add_adapter("other", config_of("NOLA", target_modules=["lm_head"], ensure_weight_tying=True, seed=3))
    model.eval()
    assert model.base_model.model.lm_head.tied_to.keys() == {"default", "other"}
    model.set_adapter("other")
    with_other = logits(model)
    found = logits(model, adapter_names=["default", "other"])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], with_other[1], rtol=1e-4, atol=1e-5)
    model.merge_adapter(["default"])
    model.set_adapter("default") if not model.base_model.model.lm_head.merged else None
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert "other" not in model.base_model.model.lm_head.tied_to
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@every_method
def test_a_second_adapter_is_tied_as_the_first(method: str, tmp_path: Path) -> None:
    config = config_of(method, target_modules=["embed_tokens"], ensure_weight_tying=True, seed=5)
    alone = get_peft_model(tiny_models.llama(tie_word_embeddings=True), copy.deepcopy(config)).eval()
    model = tied(method, target_modules=["embed_tokens"])
    model.add_adapter("second", config)
    model.eval()
    model.set_adapter("second")
    for name, parameter in alone.named_parameters():
        if "_coefficients." in name:
            model.get_parameter(name.replace(".default.", ".second.")).data.copy_(parameter)
    torch.testing.assert_close(logits(model), logits(alone), rtol=1e-5, atol=1e-6)
    alone.save_pretrained(str(tmp_path))
    base = tiny_models.llama(tie_word_embeddings=True)
    for name in ("first", "second"):  # through transformers
        base.load_adapter(str(tmp_path), adapter_name=name)
        base.set_adapter(name)
        torch.testing.assert_close(logits(base), logits(alone), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_tied(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no tied modules were found in the model"):
        get_peft_model(
            tiny_models.llama(), config_of("NOLA", target_modules=["embed_tokens"], ensure_weight_tying=True)
        )
    with pytest.raises(ValueError, match="`ensure_weight_tying` needs the input embedding to be adapted"):
        tied("NOLA", target_modules=["lm_head", "q_proj"], exclude_modules=["embed_tokens"])
    model = tied("NOLA", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        peft_ext.to_lora(model, tmp_path / "lora")
    model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        peft_ext.to_lora(tmp_path / "saved", tmp_path / "lora", base=copy.deepcopy(model.base_model.model))
    edited = tmp_path / "saved" / "adapter_config.json"
    edited.write_text(edited.read_text().replace('"ensure_weight_tying": true', '"ensure_weight_tying": false'))
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        PeftModel.from_pretrained(tiny_models.llama(tie_word_embeddings=True), str(tmp_path / "saved"))


@every_method
def test_merged_updates_come_off_both_when_one_works_alone(method: str) -> None:
    model = tied(method, target_modules=["embed_tokens"])
    vectors = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def of_vectors() -> torch.Tensor:
        return model(inputs_embeds=vectors).logits

    adapted = logits(model)
    with model.disable_adapter():
        base = of_vectors()
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(of_vectors(), base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
