"""The model that benchmarks time, and the machine that they run on."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


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


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
