"""The methods through what people use around PEFT: transformers' own adapters, auto classes, Trainer, the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
import transformers
from dense import coefficients_of
from methods import METHODS, ONE_OF_EACH, config_of, lower
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    TaskType,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
)
from torch import nn
from transformers import AutoModelForCausalLM

X = tiny_models.tokens()


TARGETS = ["q_proj", "v_proj"]

every_method = pytest.mark.parametrize("method", METHODS, indirect=True)


def randomised(model: nn.Module, adapter: str = "default") -> None:
    torch.manual_seed(3)
    for parameter in coefficients_of(model, adapter).values():
        parameter.data.normal_(std=0.1)


@pytest.fixture(params=ONE_OF_EACH)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base_folder(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    tiny_models.llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(base_folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base_folder)


@pytest.fixture
def model(base: nn.Module, method: str) -> PeftModel:
    config = config_of(method, target_modules=TARGETS, task_type=TaskType.CAUSAL_LM, init_weights=True)
    adapted = get_peft_model(base, config)
    randomised(adapted)
    return adapted.eval()


@pytest.fixture
def adapter_folder(model: PeftModel, tmp_path: Path) -> str:
    model.save_pretrained(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(X).logits


# transformers' own adapters


@every_method
def test_add_adapter(model: PeftModel, method: str, base_folder: str, tmp_path: Path) -> None:
    """`add_adapter` gives the model that `get_peft_model` gives; what it saves loads in both ways."""
    own = AutoModelForCausalLM.from_pretrained(base_folder)
    own.add_adapter(config_of(method, target_modules=TARGETS, init_weights=True))
    assert torch.equal(logits(own), logits(AutoModelForCausalLM.from_pretrained(base_folder)))
    randomised(own)
    assert torch.equal(logits(own), logits(model))

    own.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "adapter_config.json").exists() and not (tmp_path / "own" / "model.safetensors").exists()
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert config["fingerprint"]
    loaded = AutoModelForCausalLM.from_pretrained(base_folder)
    loaded.load_adapter(str(tmp_path / "own"))
    assert torch.equal(logits(loaded), logits(model))
    peft_loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(tmp_path / "own"))
    assert torch.equal(logits(peft_loaded), logits(model))


@every_method
def test_load_adapter(adapter_folder: str, base_folder: str, model: PeftModel, method: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(base_folder)
    plain = logits(loaded)
    loaded.load_adapter(adapter_folder, adapter_name="first")
    assert torch.equal(logits(loaded), logits(model))
    loaded.add_adapter(config_of(method, seed=5, target_modules=["o_proj", "v_proj"]), "second")
    loaded.set_adapter("first")
    assert torch.equal(logits(loaded), logits(model))
    loaded.set_adapter("second")
    assert not torch.equal(logits(loaded), logits(model))
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), plain)
    loaded.enable_adapters()
    loaded.set_adapter("first")
    loaded.delete_adapter("second")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.active_adapters() == ["first"]


def test_training_of_an_adapter_of_transformers(base_folder: str, method: str) -> None:
    own = AutoModelForCausalLM.from_pretrained(base_folder)
    own.add_adapter(config_of(method, target_modules=["q_proj"], init_weights=True))
    trainable = [name for name, p in own.named_parameters() if p.requires_grad]
    assert trainable and all(f"{lower(method)}_coefficients" in name for name in trainable)
    own.train()
    optimizer = torch.optim.Adam([p for p in own.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = own(input_ids=X, labels=X).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_auto_model_from_an_adapter_folder(adapter_folder: str, model: PeftModel) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter_folder)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(logits(loaded), logits(model))


def test_auto_peft_model(adapter_folder: str, base: nn.Module, model: PeftModel, tmp_path: Path) -> None:
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter_folder)
    assert isinstance(loaded, PeftModel) and torch.equal(logits(loaded), logits(model))

    model.peft_config["default"].task_type = None  # then the class of the base model is recorded
    model.save_pretrained(str(tmp_path / "without task"))
    loaded = AutoPeftModel.from_pretrained(str(tmp_path / "without task"))
    assert isinstance(loaded, PeftModel) and torch.equal(logits(loaded), logits(model))


def test_inject_adapter_in_model(method: str) -> None:
    model = inject_adapter_in_model(config_of(method, target_modules=["first"]), tiny_models.Layers())
    assert not torch.equal(model(torch.ones(1, 8), ("first",)), tiny_models.Layers()(torch.ones(1, 8), ("first",)))


def test_vision_transformer_with_a_new_classifier(method: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_models.vit(), config_of(method, modules_to_save=["classifier"]))
    images = torch.randn(2, 3, 16, 16)
    model(images).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.vit(), str(tmp_path))
    assert torch.equal(loaded(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="got adapter_model.bin .*, a pickle, which is not read. `safe_serialization`"):
        model.save_pretrained(str(tmp_path / "pickle"), safe_serialization=False)


# Generation


@pytest.mark.parametrize("cache", [True, False])
def test_generation_equals_that_of_the_merged_model(model: PeftModel, cache: bool) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
    prompt = X[:2, :4]
    found = model.generate(input_ids=prompt, **settings)
    assert found.shape[1] > 4
    with model.disable_adapter():
        plain = model.generate(input_ids=prompt, **settings)
    assert not torch.equal(found, plain)
    assert torch.equal(found, model.generate(input_ids=prompt, **{**settings, "use_cache": not cache}))
    assert torch.equal(found, model.merge_and_unload().generate(input_ids=prompt, **settings))


def test_generation_between_training_steps(model: PeftModel) -> None:
    """As in reinforcement learning: text is generated from the weights of the last step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    for _ in range(3):
        found = model.generate(input_ids=X[:2, :4], output_logits=True, **settings)
        with torch.no_grad():
            expected = model(found.sequences[:, :-1]).logits[:, 3:]
        torch.testing.assert_close(torch.stack(found.logits, 1), expected, rtol=1e-4, atol=1e-5)
        model(input_ids=X, labels=X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_pipeline(adapter_folder: str, base_folder: str, model: PeftModel) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(tiny_models.VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")
    tokenizer.save_pretrained(base_folder)
    settings: dict[str, Any] = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "return_full_text": False,
    }
    texts = [
        transformers.pipeline("text-generation", model=each, tokenizer=tokenizer)("w5 w9 w31", **settings)
        for each in (adapter_folder, model, model.merge_and_unload())
    ]
    texts.append(transformers.pipeline("text-generation", model=adapter_folder)("w5 w9 w31", **settings))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert texts[0][0]["generated_text"].split()


# Training, conversion, sharing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(model: PeftModel, checkpointing: bool, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tiny_models.tokens(batch=8)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        save_steps=1,
        use_cpu=True,
        logging_steps=1,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("_coefficients." in name), name
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 8192
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(checkpoint))
    assert torch.equal(logits(loaded), logits(model.eval()))

    resumed = get_peft_model(tiny_models.llama(), model.peft_config["default"])
    trainer = transformers.Trainer(model=resumed, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert torch.equal(logits(resumed.eval()), logits(loaded))


def test_converting_to_lora(model: PeftModel, method: str, base_folder: str, tmp_path: Path) -> None:
    """Factors have a rank, and a LoRA of the same rank holds them without loss; a whole update needs more."""
    rank = 0.999999 if method == "PRANC" else 2  # below 1: that part of the squared singular values
    config, state_dict = convert_to_lora(model, rank=rank)
    assert isinstance(config, LoraConfig) and state_dict
    if method != "PRANC":
        assert config.r == rank
    save_as_lora(tmp_path / "lora", model, rank=rank)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-4)


@pytest.fixture
def uploaded() -> Iterator[dict[str, bytes]]:
    """What is sent to the hub, by file name; nothing leaves the machine."""
    files: dict[str, bytes] = {}

    def commit(self: Any, *args: Any, **arguments: Any) -> Any:
        for operation in arguments["operations"]:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        return mock.Mock(commit_url="https://hub/commit")

    created = mock.Mock(repo_id="somebody/adapter")
    with (
        mock.patch("huggingface_hub.HfApi.create_commit", commit),
        mock.patch("huggingface_hub.HfApi.create_repo", return_value=created),
    ):
        yield files


def test_push_to_hub(model: PeftModel, uploaded: dict[str, bytes]) -> None:
    """PEFT's method uploads the adapter; transformers puts a card of its own in place of that of the adapter."""
    model.push_to_hub("somebody/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(uploaded)
    assert json.loads(uploaded["adapter_config.json"])["fingerprint"]
    assert len(uploaded["adapter_model.safetensors"]) < 8192


def test_trainable_parameters_and_status(model: PeftModel, method: str) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    expected = {
        "NOLA": 4 * 12,
        "PRANC": 13,
        "MCNC": 2 * (7 + 7 + 7 + 4) * 4,
    }  # factors of 64 and 32 numbers in chunks of 10
    assert trainable == expected[method] == sum(p.numel() for p in coefficients_of(model).values())
    assert total == trainable + sum(p.numel() for p in tiny_models.llama().parameters())
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM" and status.adapter_model_type == f"{method.title()}Model"
    assert status.peft_types == {"default": method}
    assert status.num_adapter_layers == 4 and status.enabled and status.active_adapters == ["default"]
    assert status.available_adapters == ["default"] and status.requires_grad == {"default": True}
    layers = model.get_layer_status()
    assert [layer.available_adapters for layer in layers] == [["default"]] * 4
    assert f"{lower(method)}.{method.title()}Linear" in repr(model)


def test_mixed_adapter_types_are_refused(base: nn.Module, method: str) -> None:
    with pytest.raises(ValueError, match=method):
        get_peft_model(base, config_of(method, target_modules=["q_proj"]), mixed=True)
