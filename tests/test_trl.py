"""trl's trainers on a model whose adapter is trained already: they compare the policy with a frozen copy of it.

trl adds an adapter "ref" of the policy's configuration and copies every parameter whose name contains `.default.`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from methods import METHODS, config_of
from peft import LoraConfig, PeftModel, get_peft_model

trl = pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets", reason="needs datasets")

PROMPTS = ["w5 w6 w7", "w8 w9"]
SOURCES = ["fresh", "loaded", "loaded, int8"]


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(tiny_models.VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")


def policy(method: str, source: str, folder: Path, **options: Any) -> PeftModel:
    """A model with a trained adapter, as `get_peft_model` leaves it or loaded."""
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    if method == "LoRA":
        config: Any = LoraConfig(r=2, init_lora_weights=False, **options)
    else:
        config = config_of(method, coefficient_dtype="int8" if "int8" in source else "float32", **options)
    torch.manual_seed(0)
    model = get_peft_model(tiny_models.llama(), config)
    if source == "fresh":
        return model
    model.save_pretrained(str(folder / "policy"))
    return PeftModel.from_pretrained(tiny_models.llama(), str(folder / "policy"), is_trainable=True)


def trainer(kind: str, model: PeftModel, tokenizer: Any, folder: Path) -> Any:
    data: dict[str, list[Any]] = {"prompt": PROMPTS}
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if kind == "DPO":
        data |= {"chosen": ["w10 w11", "w12 w13"], "rejected": ["w14", "w15 w16"]}
    elif kind == "KTO":
        data = {"prompt": PROMPTS * 2, "completion": ["w10 w11", "w12", "w20", "w21"], "label": [True, False] * 2}
    else:
        options["reward_funcs"] = lambda completions, **_: [float(len(set(text.split()))) for text in completions]
        settings |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        learning_rate=0.1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer,
        **options,
    )


def check(kind: str, model: PeftModel, tokenizer: Any, folder: Path) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    running = trainer(kind, model, tokenizer, folder)
    reference = {name: p for name, p in running.model.named_parameters() if ".ref." in name}
    assert len(reference) == len([name for name in before if ".default." in name]) > 0
    for name, parameter in reference.items():
        assert torch.equal(parameter, before[name.replace(".ref.", ".default.")]) and parameter.any()
        assert not parameter.requires_grad
    running.train()
    logs = running.state.log_history
    if kind == "DPO":
        assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    elif kind == "KTO":
        assert logs[0]["loss"] == pytest.approx(0.5, abs=1e-6) and logs[0]["kl"] == 0
    else:
        assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(entry["loss"]) for entry in logs if "loss" in entry)
    for name, parameter in running.model.named_parameters():
        if ".ref." in name:
            assert torch.equal(parameter, before[name.replace(".ref.", ".default.")])
        elif ".default." in name:
            assert not torch.equal(parameter, before[name])
    assert "loss" in logs[1] and (kind != "DPO" or logs[1]["rewards/margins"] != 0)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", [*METHODS, "LoRA"])
def test_dpo(method: str, source: str, tokenizer: Any, tmp_path: Path) -> None:
    if method == "LoRA" and "int8" in source:
        pytest.skip("LoRA has no int8")
    check("DPO", policy(method, source, tmp_path), tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["GRPO", "KTO", "RLOO"])
@pytest.mark.parametrize("source", SOURCES[:2])
@pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC"])
def test_other_trainers(method: str, source: str, kind: str, tokenizer: Any, tmp_path: Path) -> None:
    check(kind, policy(method, source, tmp_path), tokenizer, tmp_path)


@pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC"])
def test_the_policy_is_saved_and_resumed(method: str, tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint holds both adapters; the policy's loads by itself, and training goes on from it."""
    running = trainer("DPO", policy(method, "loaded", tmp_path), tokenizer, tmp_path)
    running.train()
    x = tiny_models.tokens()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(checkpoint), is_trainable=True)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, running.model.eval()(x).logits)
        reference = PeftModel.from_pretrained(tiny_models.llama(), str(checkpoint / "ref"))
        running.model.set_adapter("ref")
        assert torch.equal(reference(x).logits, running.model(x).logits)
    again = trainer("DPO", loaded, tokenizer, tmp_path / "second")
    again.train()
    assert again.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC"])
def test_modules_beside_the_adapter_are_copied_too(method: str, tokenizer: Any, tmp_path: Path) -> None:
    check("DPO", policy(method, "loaded", tmp_path, modules_to_save=["lm_head"]), tokenizer, tmp_path)
