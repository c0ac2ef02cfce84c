"""Tiny models with random weights, made from configurations alone: no hub, no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

VOCABULARY = 64


def llama(layers: int = 2, **options: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **options})).eval()


def tied() -> transformers.LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def gpt2(layers: int = 2, **options: Any) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **options})).eval()


def vit(layers: int = 2, labels: int = 3) -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=labels,
    )
    return transformers.ViTForImageClassification(config).eval()


def tokens(batch: int = 4, length: int = 12, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


class Layers(nn.Module):
    """One layer of every kind that can be adapted, called by name, in any order and any number of times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.wide = nn.Linear(8, 24)
        self.conv1d = Conv1D(8, 24)
        self.conv2d = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, path: tuple[str, ...]) -> torch.Tensor:
        for name in path:
            x = torch.tanh(getattr(self, name)(x))
        return x


class One(nn.Module):
    """A model of one layer called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Mixed(nn.Module):
    """Every kind of parameter and buffer that a network from a seed can have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.randn(1, 4))
        self.first = Conv1D(6, 4)
        self.second = nn.Linear(6, 3)


class Embedded(Mixed):
    """Also parameters of several dimensions that are no layer's weight, and a layer of one output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.positions = nn.Parameter(torch.randn(1, 3, 4))
        self.score = nn.Linear(6, 1)


def mixture(kind: str, experts: int = 4, layers: int = 2, **options: Any) -> transformers.PreTrainedModel:
    """A language model whose layers are mixtures of experts: `"mixtral"`, `"qwen3_moe"` or `"gpt_oss"`."""
    torch.manual_seed(0)
    names = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **({"moe_intermediate_size": 24, "num_experts": experts} if kind == "qwen3_moe" else {}),
        **({} if kind == "qwen3_moe" else {"num_local_experts": experts}),
        **({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}} if kind == "gpt_oss" else {}),
    }
    model_class = getattr(transformers, names[kind])
    model = model_class(model_class.config_class(**{**settings, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def experts() -> transformers.PreTrainedModel:
    """A mixture that stores its experts transposed."""
    return mixture("gpt_oss", experts=3, hidden_size=16, intermediate_size=12)


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    """Returns arguments for a few steps of four rows in order, at a constant rate and without clipping."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **options})
