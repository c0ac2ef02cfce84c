"""E2E: descriptions of restaurants, with SmolLM2-135M."""

from __future__ import annotations

from transformers import TrainingArguments

from recipes.tasks import causal_lm
from recipes.tasks.base import Task

from .task import QualityTask


class E2E(QualityTask):
    """40 steps of 8 pairs, and the loss of a target token on 64 pairs."""

    name = "e2e"
    title = "E2E, SmolLM2-135M"
    targets = ("q_proj", "v_proj")
    steps = 40
    batch_size = 8
    eval_batch_size = 16
    sampling = "group_by_length"
    known_source = "a75bfa3c9e71"

    def load(self, training: TrainingArguments) -> Task:
        source = causal_lm.ModelArguments(self.sources.need("e2e_model"), gguf_file=self.sources.e2e_gguf)
        args = causal_lm.DataArguments(
            self.sources.need("e2e_data"),
            source_column="mr",
            target_column="ref",
            prompt_template="{source}\nDescription:",
            max_source_length=96,
            max_target_length=96,
            max_train_samples=480,
            max_eval_samples=64,
        )
        base, tokenizer = causal_lm.load_model(source)
        data = causal_lm.load_text_data(args, tokenizer)
        generation = causal_lm.GenerationArguments()
        return causal_lm.TextTask(source, tokenizer, training, base, data, generation, args.max_source_length)
