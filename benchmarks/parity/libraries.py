"""Rows: the libraries around PEFT."""

from __future__ import annotations

import copy
from typing import Any

import torch

from . import models
from .models import llama, logits
from .rows import Method, close, dense, different, folder, need, row

DIFFUSERS = "diffusers"
SENTENCES = "sentence-transformers, SetFit"
TRL = "trl"


def unet() -> Any:
    diffusers = need("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def denoised(model: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return model(image, 3, text, **options).sample


@row(DIFFUSERS, "`add_adapter`, `set_adapter`, `disable_adapters`")
def unet_adapter(method: Method) -> None:
    base = unet()
    adapted = copy.deepcopy(base)
    adapted.add_adapter(method.config(target_modules=["to_q", "to_v"]), "one")
    different(denoised(adapted), denoised(base))
    close(denoised(adapted), denoised(dense(base, adapted, one=1.0)))
    adapted.disable_adapters()
    close(denoised(adapted), denoised(base), 1e-6)


@row(DIFFUSERS, "`set_adapters` with weights")
def unet_weights(method: Method) -> None:
    base = unet()
    adapted = copy.deepcopy(base)
    adapted.add_adapter(method.config(target_modules=["to_q", "to_v"]), "one")
    adapted.add_adapter(method.config(target_modules=["to_v", "conv1"]), "two")
    both, one = denoised(dense(base, adapted, one=0.5, two=-2.0)), denoised(dense(base, adapted, one=3.0))
    adapted.set_adapters(["one", "two"], [0.5, -2.0])
    close(denoised(adapted), both)
    adapted.set_adapters("one", 3.0)
    close(denoised(adapted), one)


@row(DIFFUSERS, '`cross_attention_kwargs={"scale": ...}`')
def unet_scale(method: Method) -> None:
    base = unet()
    adapted = copy.deepcopy(base)
    adapted.add_adapter(method.config(target_modules=["to_q", "to_v"]), "one")
    close(denoised(adapted, cross_attention_kwargs={"scale": 0.25}), denoised(dense(base, adapted, one=0.25)))
    close(denoised(adapted), denoised(dense(base, adapted, one=1.0)))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def sentence_model(path: Any) -> Any:
    library = need("sentence_transformers")
    models.bert().save_pretrained(path / "bert")
    tokenizer().save_pretrained(path / "bert")
    modules = need("sentence_transformers.models")
    body = modules.Transformer(str(path / "bert"))
    return library.SentenceTransformer(modules=[body, modules.Pooling(32)], device="cpu")


SENTENCE = ["w5 w9 w31", "w7 w8"]
BERT = ["query", "value"]


@row(SENTENCES, "`SentenceTransformer.add_adapter`, `encode`, `save`, `load_adapter`")
def sentences(method: Method) -> None:
    with folder() as path:
        model = sentence_model(path)
        plain = torch.tensor(model.encode(SENTENCE))
        model.add_adapter(method.config(target_modules=BERT))
        found = torch.tensor(model.encode(SENTENCE))
        different(found, plain)
        base = models.bert()
        (path / "other").mkdir()
        reference = sentence_model(path / "other")
        reference[0].auto_model.load_state_dict(dense(base, model[0].auto_model).state_dict())
        close(found, torch.tensor(reference.encode(SENTENCE)))
        model[0].auto_model.save_pretrained(str(path / "adapter"))
        (path / "third").mkdir()
        other = sentence_model(path / "third")
        other.load_adapter(str(path / "adapter"))
        close(torch.tensor(other.encode(SENTENCE)), found, 1e-5)


@row(SENTENCES, "SetFit on a body with an adapter", slow=True)
def setfit(method: Method) -> None:
    library = need("setfit")
    from datasets import Dataset

    with folder() as path:
        body = sentence_model(path)
        body.add_adapter(method.config(target_modules=BERT, zero=True))
        before = {n: p.clone() for n, p in body.named_parameters()}
        model = library.SetFitModel(model_body=body, model_head=library.SetFitHead(32, 2))
        rows = Dataset.from_dict({"text": ["w5 w9", "w7 w8", "w5 w4", "w7 w6"], "label": [0, 1, 0, 1]})
        arguments = library.TrainingArguments(
            output_dir=str(path / "out"), batch_size=2, num_epochs=1, body_learning_rate=0.05, report_to="none"
        )
        library.Trainer(model=model, args=arguments, train_dataset=rows).train()
        changed = {n for n, p in body.named_parameters() if not torch.equal(p, before[n])}
        prefix = f"{method.name.lower()}_"
        assert changed and all(prefix in name for name in changed), f"changed: {sorted(changed)[:3]}"


def trained(method: Method, trainer_class: Any, arguments: Any, rows: Any, model: Any, **options: Any) -> Any:
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **options)
    trainer.train()
    return trainer


def settings(path: Any, **options: Any) -> dict[str, Any]:
    common = {"output_dir": str(path), "max_steps": 4, "logging_steps": 1, "report_to": [], "use_cpu": True}
    return {**common, "bf16": False, "disable_tqdm": True, "per_device_train_batch_size": 2, **options}


@row(TRL, "`SFTTrainer(peft_config=...)`", slow=True)
def supervised(method: Method) -> None:
    trl = need("trl")
    from datasets import Dataset

    with folder() as path:
        base = llama()
        rows = Dataset.from_dict({"text": ["w5 w9 w31 w7", "w7 w8 w3 w4"] * 2})
        arguments = trl.SFTConfig(**settings(path, learning_rate=0.05))
        config = method.config(zero=True, task_type="CAUSAL_LM")
        trainer = trained(method, trl.SFTTrainer, arguments, rows, llama(), peft_config=config)
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        assert losses[-1] < losses[0], f"losses {losses}"
        model = trainer.model.eval()
        close(logits(model), logits(dense(base, model)))


@row(TRL, "`DPOTrainer` on a trained adapter: the reference is the policy", slow=True)
def preferences(method: Method) -> None:
    trl = need("trl")
    from datasets import Dataset

    with folder() as path:
        adapted = method.adapt(llama(), task_type="CAUSAL_LM")
        row_of = {"prompt": ["w5 w9"], "chosen": [" w31 w7"], "rejected": [" w8 w3"]}
        rows = Dataset.from_dict({name: value * 4 for name, value in row_of.items()})
        arguments = trl.DPOConfig(**settings(path, learning_rate=0.0, max_steps=1))
        trainer = trained(method, trl.DPOTrainer, arguments, rows, adapted)
        (loss,) = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        assert abs(loss - 0.6931) < 1e-3, f"the first loss is {loss:.4f}, log 2 is right"
