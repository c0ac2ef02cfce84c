"""Adapt a causal language model to a text task with NOLA, beside any other PEFT method.

``python -m recipes.finetune_gpt2`` runs the quickstart, which needs no hub; ``--help`` lists the arguments. It runs
under ``accelerate launch -m`` unchanged.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from recipes import restaurants
from recipes.causal_lm import (
    DataArguments,
    GenerationArguments,
    ModelArguments,
    TextData,
    generate,
    load_model,
    load_text_data,
    score,
)
from recipes.common import (
    Method,
    MethodArguments,
    UserError,
    check_output_dir,
    claim_output_dir,
    parse_arguments,
    parse_methods,
    run_main,
)
from recipes.reload_adapter import verify_in_fresh_process
from recipes.reporting import RunResult, by_label, write_report

UNTRAINED = "untrained"


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
class Task:
    """What all runs share."""

    source: ModelArguments
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TextData
    generation: GenerationArguments
    max_source_length: int
    training: TrainingArguments


class StepClock(TrainerCallback, ExportableState):
    """Seconds spent in training steps, without evaluation and saving; survives an interruption."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds += time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def make_trainer(task: Task, model: torch.nn.Module, training: TrainingArguments) -> Trainer:
    """A Trainer on the task's data."""
    return Trainer(
        model=model,
        args=training,
        train_dataset=task.data.train,
        eval_dataset=task.data.validation,
        data_collator=DataCollatorForSeq2Seq(task.tokenizer),
        processing_class=task.tokenizer,
        callbacks=[StepClock()],
    )


def write_and_score(task: Task, model: PeftModel, result: RunResult) -> None:
    """Fill in the outputs and, in the main process, their scores."""
    if not task.data.prompts:
        return
    batch_size = task.training.per_device_eval_batch_size
    result.outputs = generate(
        model, task.tokenizer, task.data.prompts, task.generation, task.max_source_length, batch_size
    )
    if PartialState().is_main_process:
        result.metrics = score(result.outputs, task.data.references)


def adapt(task: Task, method: Method, seed: int) -> PeftModel:
    """A copy of the base model with a fresh adapter."""
    set_seed(seed)
    config = method.config("CAUSAL_LM", seed)
    try:
        return get_peft_model(copy.deepcopy(task.base), config)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {method.label!r}: {error}") from error


def evaluate_untrained(task: Task, method: Method) -> RunResult:
    """The base model as it is.

    It is evaluated below a disabled adapter, since the Trainer refuses a quantized model without one.
    """
    model = adapt(task, method, task.training.seed)
    trainer = make_trainer(task, model, task.training)
    result = RunResult(UNTRAINED, seed=task.training.seed)
    with model.disable_adapter():
        result.validation_loss = trainer.evaluate()["eval_loss"]
        write_and_score(task, model, result)
    return result


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the Trainer writes its state last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(task: Task, method: Method, seed: int, folder: Path, verify: bool) -> RunResult:
    """Train one adapter with one seed, save it, and score it."""
    training = copy.copy(task.training)
    training.output_dir = str(folder)
    training.seed = seed
    training.learning_rate = method.learning_rate or training.learning_rate

    model = adapt(task, method, seed)
    trainer = make_trainer(task, model, training)
    checkpoint = last_checkpoint(folder) if training.resume_from_checkpoint else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if not any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
        trainer.evaluate()

    training_curve = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    validation_curve = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    result = RunResult(
        method.label,
        seed,
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        training_loss=mean(loss for step, loss in training_curve if step >= 0.9 * state.global_step),
        validation_loss=validation_curve[-1][1],
        seconds=next(cb.seconds for cb in trainer.callback_handler.callbacks if isinstance(cb, StepClock)),
        training_curve=training_curve,
        validation_curve=validation_curve,
    )
    write_and_score(task, model, result)
    if PartialState().is_main_process:
        adapter = folder / "adapter"
        model.save_pretrained(str(adapter))
        result.adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
        if verify:
            # Undo the autocast that Accelerate puts around the forward pass under --bf16.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            verify_in_fresh_process(model, task.tokenizer, task.data.validation.select(range(2)), adapter, task.source)
    return result


def samples(task: Task, results: Sequence[RunResult], count: int = 3) -> str:
    """Markdown with the first outputs of every method's first seed below a reference."""
    lines = []
    for index, (prompt, references) in enumerate(zip(task.data.prompts[:count], task.data.references)):
        lines.append(f"Prompt: {prompt!r}\n\n- reference: {references[0]}")
        for label, runs in by_label(results).items():
            text = runs[0].outputs[index].replace("\n", " ")
            lines.append(f"- {label}: {text}")
        lines.append("")
    return "\n".join(lines)


def check_lengths(task: Task, data: DataArguments) -> None:
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
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.label_names = ["labels"]  # hidden from the Trainer by PEFT's wrapper
    training.restore_callback_states_from_checkpoint = True  # StepClock's
    is_main = PartialState().is_main_process
    if quickstart_args.restaurants and (model_args.model_name_or_path or data_args.dataset_name):
        raise UserError("restaurants makes its own model and data: leave out --model_name_or_path and --dataset_name")
    record = check_output_dir(training, arguments, method_args.overwrite_output_dir)
    PartialState().wait_for_everyone()  # no process may write before all have looked
    output_dir = Path(training.output_dir)

    if quickstart_args.restaurants:
        # So small a model gains little from more threads, and waits long for them where others use the cores too.
        torch.set_num_threads(1)
        model_args.model_name_or_path, data_args.dataset_name = restaurants.prepare(output_dir, training.use_cpu)
    with PartialState().main_process_first():
        base, tokenizer = load_model(model_args)
        data = load_text_data(data_args, tokenizer)
    task = Task(model_args, base, tokenizer, data, generation_args, data_args.max_source_length, training)
    check_lengths(task, data_args)
    for method in methods:
        adapt(task, method, seeds[0])  # whether it fits the model shows here, before hours of training
    if is_main:
        claim_output_dir(training, record)
    PartialState().wait_for_everyone()

    def run_once(folder: Path, run: Callable[[], RunResult]) -> RunResult:
        path = folder / "result.json"
        if training.resume_from_checkpoint and path.is_file():
            return RunResult.load(path)
        result = run()
        if is_main:
            folder.mkdir(exist_ok=True)
            result.save(path)
        PartialState().wait_for_everyone()
        return result

    results = [run_once(output_dir / UNTRAINED, partial(evaluate_untrained, task, methods[0]))]
    for method in methods:
        for seed in seeds:
            folder = output_dir / f"{method.folder}-seed{seed}"
            results.append(run_once(folder, partial(train, task, method, seed, folder, method_args.verify_adapters)))
    if is_main:
        write_report(results, output_dir, samples(task, results))


if __name__ == "__main__":
    run_main(main)
