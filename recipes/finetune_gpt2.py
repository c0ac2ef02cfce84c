"""Adapt a causal language model to a text task with NOLA, beside any other PEFT method.

``python -m recipes.finetune_gpt2`` runs the quickstart, which needs no hub; ``--help`` lists the arguments. It runs
under ``accelerate launch -m`` unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, TrainingArguments

from recipes.support.arguments import (
    MethodArguments,
    UserError,
    check_output_dir,
    claim_output_dir,
    parse_arguments,
    parse_methods,
    run_main,
)
from recipes.support.reporting import RunResult, by_label, plot_losses, write_report
from recipes.tasks import restaurants
from recipes.tasks.causal_lm import (
    DataArguments,
    GenerationArguments,
    ModelArguments,
    TextData,
    generate,
    load_model,
    load_text_data,
    mean_token_loss,
    score,
    token_losses,
)
from recipes.tasks.training import UNTRAINED, Task, evaluate_untrained, run_all, set_up, train


@dataclass
class QuickstartArguments:
    """The self-made task."""

    restaurants: bool = field(
        default=False,
        metadata={
            "help": "Make the data (columns meaning and text) and a small GPT-2 that knows the plain texts, "
            "in --output_dir, in place of --model_name_or_path and --dataset_name."
        },
    )


@dataclass
class TextTask(Task):
    """Writing targets after prompts."""

    base: PreTrainedModel
    data: TextData
    generation: GenerationArguments
    max_source_length: int

    task_type = "CAUSAL_LM"
    loss = "eval_token_loss"

    def fresh_model(self) -> PreTrainedModel:
        """A copy of the base model."""
        return copy.deepcopy(self.base)

    def trainer_arguments(self) -> dict[str, Any]:
        """Data sets, collator and metric for the Trainer."""
        return {
            "train_dataset": self.data.train,
            "eval_dataset": self.data.validation,
            "data_collator": DataCollatorForSeq2Seq(self.processor),
            "compute_metrics": mean_token_loss,
            "preprocess_logits_for_metrics": token_losses,
        }

    def score(self, model: PeftModel, evaluation: Mapping[str, float], result: RunResult) -> None:
        """Write the texts and score them in the main process."""
        if not self.data.prompts:
            return
        batch_size = self.training.per_device_eval_batch_size
        result.outputs = generate(
            model, self.processor, self.data.prompts, self.generation, self.max_source_length, batch_size
        )
        if PartialState().is_main_process:
            result.metrics = score(result.outputs, self.data.references)

    def probes(self) -> list[dict[str, torch.Tensor]]:
        """Two pairs."""
        rows = self.data.validation.select(range(2))
        lengths = [max(1, labels.count(-100)) for labels in rows["labels"]]
        return [
            {"ids": torch.tensor(ids), "prompt_length": torch.tensor(length)}
            for ids, length in zip(rows["input_ids"], lengths)
        ]


def samples(task: TextTask, results: Sequence[RunResult], count: int = 3) -> str:
    """Markdown with the first outputs of every method's first seed below a reference."""
    lines = []
    for index, (prompt, references) in enumerate(zip(task.data.prompts[:count], task.data.references)):
        lines.append(f"Prompt: {prompt!r}\n\n- reference: {references[0]}")
        for label, runs in by_label(results).items():
            text = runs[0].outputs[index].replace("\n", " ")
            lines.append(f"- {label}: {text}")
        lines.append("")
    return "\n".join(lines)


def check_lengths(task: TextTask, data: DataArguments) -> None:
    """The longest sequence must fit the model's positions."""
    positions = getattr(task.base.config, "max_position_embeddings", None)
    tail = max(data.max_target_length, task.generation.max_new_tokens if task.data.prompts else 0)
    if positions is not None and data.max_source_length + tail > positions:
        raise UserError(
            f"max_source_length ({data.max_source_length}) and the longer of max_target_length and max_new_tokens "
            f"({tail}) exceed the {positions} positions of the model"
        )


def main(argv: Sequence[str]) -> None:
    """Run the recipe."""
    arguments = parse_arguments(
        "finetune_gpt2",
        [ModelArguments, DataArguments, GenerationArguments, MethodArguments, QuickstartArguments, TrainingArguments],
        argv,
    )
    model_args, data_args, generation_args, method_args, quickstart_args, training = arguments
    methods = parse_methods(method_args.methods)
    seeds = method_args.seeds or [training.seed]
    for method in methods:
        method.config("CAUSAL_LM", seeds[0])
    set_up(training)
    is_main = PartialState().is_main_process
    if quickstart_args.restaurants and (model_args.model_name_or_path or data_args.dataset_name):
        raise UserError("restaurants makes its own model and data: leave out --model_name_or_path and --dataset_name")
    record = check_output_dir(training, arguments, method_args.overwrite_output_dir)
    PartialState().wait_for_everyone()  # no process may write before all have looked
    output_dir = Path(training.output_dir)

    if quickstart_args.restaurants:
        data_args.dataset_name = restaurants.prepare_data(output_dir)
        model_args.model_name_or_path = restaurants.prepare_base(output_dir, training.use_cpu)
    with PartialState().main_process_first():
        base, tokenizer = load_model(model_args)
        data = load_text_data(data_args, tokenizer)
    task = TextTask(model_args, tokenizer, training, base, data, generation_args, data_args.max_source_length)
    check_lengths(task, data_args)
    for method in methods:
        task.adapt(method, seeds[0])  # whether it fits the model shows here, before hours of training
    if is_main:
        claim_output_dir(training, record)
    PartialState().wait_for_everyone()

    runs: dict[str, Callable[[Path], RunResult]] = {UNTRAINED: partial(evaluate_untrained, task, methods[0])}
    for method in methods:
        for seed in seeds:
            verify = method_args.verify_adapters and seed == seeds[0]
            runs[f"{method.folder}-seed{seed}"] = partial(train, task, method, seed, verify)
    results = run_all(training, runs)
    if is_main:
        plots = {"loss.png": partial(plot_losses, results, unit="target token")}
        write_report(results, output_dir, samples(task, results), plots)


if __name__ == "__main__":
    run_main(main)
