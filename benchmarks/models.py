"""The model that benchmarks time, and what the generators of its adapters hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_ext.tuners.layers import SeededLayer


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="", metadata={"help": "A causal language model; by default a random Llama shaped like SmolLM2-135M."}
    )
    gguf_file: str = field(default="", metadata={"help": "The GGUF file of the model, if it has one."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Modules to adapt, the query projection first."}
    )


def load_model(arguments: ModelArguments) -> Any:
    if not arguments.model_name_or_path:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    return AutoModelForCausalLM.from_pretrained(
        arguments.model_name_or_path, gguf_file=arguments.gguf_file or None, dtype=torch.float32
    )


def generator_bytes(model: torch.nn.Module) -> int:
    """Returns what the generators of a model's adapters hold; a tensor that several share counts once."""
    held = {
        id(tensor): tensor.nbytes
        for layer in model.modules()
        if isinstance(layer, SeededLayer)
        for expansions in layer.expansions.values()
        for expansion in expansions
        for tensor in expansion.generator.frozen
    }
    return sum(held.values())
