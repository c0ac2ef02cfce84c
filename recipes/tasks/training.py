"""Training and comparing adapters: what the recipes' runs have in common."""

from __future__ import annotations

import copy
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from peft import get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

from recipes.reload_adapter import verify_in_fresh_process
from recipes.support import inputs
from recipes.support.arguments import Method, UserError
from recipes.support.reporting import RunResult

UNTRAINED = "untrained"


@dataclass
class Task(ABC):
    """What is trained on what; the same for all methods.

    Attributes:
        source: How the base model is loaded.
        processor: What turns data into the model's inputs: a tokenizer or an image processor.
        training: The Trainer's arguments.
    """

    source: inputs.ModelArguments
    processor: Any
    training: TrainingArguments

    task_type: ClassVar[str | None] = None
    loss: ClassVar[str] = "eval_loss"  # of what the Trainer's evaluation gives
    weights_file: ClassVar[str] = "adapter_model.safetensors"  # what `save` writes the weights to

    @property
    def head(self) -> Sequence[str]:
        """Modules that are trained and saved whole beside every adapter."""
        return ()

    @abstractmethod
    def fresh_model(self) -> nn.Module:
        """A copy of the base model."""

    def adapt(self, method: Method, seed: int) -> nn.Module:
        """A copy of the base model with a fresh adapter."""
        set_seed(seed)
        config, model = method.config(self.task_type, seed, self.head), self.fresh_model()
        names = {name.rpartition(".")[-1] for name, module in model.named_modules() if hasattr(module, "weight")}
        try:
            return get_peft_model(model, config)  # type: ignore[arg-type]
        except NoMatchingPeftModuleError as error:
            targets = method.options.get("target_modules", "of its own")
            raise UserError(
                f"method {method.label!r}: target_modules {targets} names nothing that it can adapt; the model has "
                f"{', '.join(sorted(names))}"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(f"method {method.label!r}: {error}") from error

    @abstractmethod
    def trainer_arguments(self) -> dict[str, Any]:
        """Data sets, collator and metrics for the Trainer."""

    @abstractmethod
    def score(self, model: Any, evaluation: Mapping[str, float], result: RunResult) -> None:
        """Fill in a result's outputs and, in the main process at least, its metrics.

        Args:
            model: What is scored.
            evaluation: What the Trainer's evaluation of it gave.
            result: Where to.
        """

    def save(self, model: Any, folder: Path) -> None:
        """Save what was trained, and what else it takes to use it."""
        model.save_pretrained(str(folder))

    @abstractmethod
    def probes(self) -> list[dict[str, torch.Tensor]]:
        """Examples on which a loaded adapter is compared with the trained one."""


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


def set_up(training: TrainingArguments) -> None:
    """Change the Trainer's arguments to what the recipes need."""
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.label_names = ["labels"]  # hidden from the Trainer by PEFT's wrapper
    training.restore_callback_states_from_checkpoint = True  # StepClock's


def make_trainer(task: Task, model: nn.Module, training: TrainingArguments) -> Trainer:
    """A Trainer on the task's data."""
    return Trainer(
        model=model,
        args=training,
        processing_class=task.processor,
        callbacks=[StepClock()],
        **task.trainer_arguments(),
    )


def evaluate_untrained(task: Task, method: Method, folder: Path) -> RunResult:
    """The base model as it is.

    It is evaluated below a disabled adapter, since the Trainer refuses a quantized model without one.
    """
    model: Any = task.adapt(method, task.training.seed)
    trainer = make_trainer(task, model, task.training)
    result = RunResult(UNTRAINED, seed=task.training.seed)
    with model.disable_adapter():
        evaluation = trainer.evaluate()
        result.validation_loss = evaluation[task.loss]
        task.score(model, evaluation, result)
    return result


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the Trainer writes its state last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(task: Task, method: Method, seed: int, verify: bool, folder: Path) -> RunResult:
    """Train one adapter with one seed, save it, and score it."""
    training = copy.copy(task.training)
    training.output_dir = str(folder)
    training.seed = seed
    training.learning_rate = method.learning_rate or training.learning_rate

    model: Any = task.adapt(method, seed)
    trainer = make_trainer(task, model, training)
    checkpoint = last_checkpoint(folder) if training.resume_from_checkpoint else None
    trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if not any(task.loss in entry and entry["step"] == state.global_step for entry in state.log_history):
        trainer.evaluate()

    evaluations = [entry for entry in state.log_history if task.loss in entry]
    training_curve = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    last_losses = [loss for step, loss in training_curve if step >= 0.9 * state.global_step]
    trainable = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = RunResult(
        method.label,
        seed,
        trainable_parameters=sum(trainable.values()),
        head_parameters=sum(size for name, size in trainable.items() if ".modules_to_save." in name),
        training_loss=mean(last_losses) if last_losses else trained.training_loss,
        validation_loss=evaluations[-1][task.loss],
        seconds=next(cb.seconds for cb in trainer.callback_handler.callbacks if isinstance(cb, StepClock)),
        training_curve=training_curve,
        validation_curve=[(entry["step"], entry[task.loss]) for entry in evaluations],
    )
    task.score(model, evaluations[-1], result)
    if PartialState().is_main_process:
        adapter = folder / "adapter"
        task.save(model, adapter)
        result.adapter_bytes = (adapter / task.weights_file).stat().st_size
        if verify:
            # Undo the autocast that Accelerate puts around the forward pass under --bf16.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            verify_in_fresh_process(model, task.processor, task.probes(), adapter, task.source)
    return result


def run_all(training: TrainingArguments, runs: Mapping[str, Callable[[Path], RunResult]]) -> list[RunResult]:
    """Do some runs, each in a folder of its name; a resumed recipe takes the results of the finished ones."""
    state = PartialState()
    results = []
    for name, run in runs.items():
        folder = Path(str(training.output_dir)) / name
        path = folder / "result.json"
        if training.resume_from_checkpoint and path.is_file():
            results.append(RunResult.load(path))
            continue
        result = run(folder)
        if state.is_main_process:
            folder.mkdir(exist_ok=True)
            result.save(path)
        state.wait_for_everyone()
        results.append(result)
    return results


def make_once(folder: Path, what: str, make: Callable[[Path], None]) -> str:
    """Make a quickstart's base model in a folder, unless an interrupted run has left it there.

    Args:
        folder: Where to.
        what: What is made, for a message.
        make: Makes it with all processes, whole or not at all.

    Returns:
        The folder.
    """
    state = PartialState()
    # So small a model gains little from more threads, and waits long for them where others use the cores too.
    torch.set_num_threads(1)
    made = folder.exists()
    state.wait_for_everyone()  # no process may look after another has made it
    if not made:
        state.print(f"Making {what} in {folder}", flush=True)
        make(folder)
    state.wait_for_everyone()
    return str(folder)


def write_data(folder: Path, write: Callable[[Path], None]) -> str:
    """Have the main process write a quickstart's data into a folder; the folder."""
    state = PartialState()
    if state.is_main_process:
        write(folder)
    state.wait_for_everyone()
    return str(folder)


def train_base(folder: Path, model: PreTrainedModel, processor: Any, settings: dict[str, Any], **data: Any) -> None:
    """Train a whole model and save it with its processor, whole or not at all.

    Args:
        folder: Where to.
        model: What is trained.
        processor: Its tokenizer or image processor.
        settings: The Trainer's arguments.
        **data: Data set and collator for the Trainer.
    """
    partial = folder.with_name(folder.name + ".partial")
    arguments = TrainingArguments(
        output_dir=str(partial), save_strategy="no", dataloader_pin_memory=False, logging_steps=50, **settings
    )
    Trainer(model=model, args=arguments, **data).train()
    if PartialState().is_main_process:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        os.replace(partial, folder)
