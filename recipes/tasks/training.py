"""Trains and scores one method on a task, and lists all runs of a comparison."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from peft_ext.training.flat import FlatTraining, check_perturbable
from recipes.support.arguments import UserError
from recipes.support.methods import Method
from recipes.support.reporting import RunResult
from recipes.support.runs import last_checkpoint
from recipes.tasks.base import Task
from recipes.tasks.verification import verify_in_fresh_process

UNTRAINED = "untrained"


class StepClock(TrainerCallback, ExportableState):
    """Counts the seconds in training steps, without evaluation and saving, and survives an interruption."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def make_trainer(task: Task, model: nn.Module, training: TrainingArguments) -> Trainer:
    """Returns a Trainer of a model on the task's data."""
    return task.trainer(
        model=model,
        args=training,
        processing_class=task.processor,
        callbacks=[StepClock()],
        **task.trainer_arguments(model),
    )


def evaluate_untrained(task: Task, method: Method, folder: Path) -> RunResult:
    """Scores the base model as it is.

    It is evaluated below a disabled adapter, since the Trainer refuses a quantized model without one.

    Args:
        task: what the model is scored on.
        method: the adapter.
        folder: not used; all runs of a recipe have one.
    """
    model: Any = task.adapt(method, task.training.seed)
    trainer = make_trainer(task, model, task.training)
    result = RunResult(UNTRAINED, seed=task.training.seed)
    with model.disable_adapter():
        evaluation = trainer.evaluate()
        result.validation_loss = evaluation[task.loss]
        task.score(model, evaluation, result)
    return result


def try_out(task: Task, method: Method, seed: int, flat_sigma: float | None) -> None:
    """Puts an adapter on a task's model, once, to see whether they fit together.

    Args:
        task: has the model.
        method: the adapter.
        seed: the run's seed.
        flat_sigma: as for `trainings`.

    Raises:
        UserError: they do not fit, or the adapter cannot be trained with that noise.
    """
    model = task.adapt(method, seed)
    if flat_sigma is not None:
        try:
            FlatTraining(flat_sigma)
            check_perturbable(model)
        except ValueError as error:
            raise UserError(f"flat_sigma: method {method.label!r}: {error}") from error


def train(task: Task, method: Method, seed: int, verify: bool, flat_sigma: float | None, folder: Path) -> RunResult:
    """Trains one adapter with one seed, saves it and scores it.

    Args:
        task: what it is trained on.
        method: the adapter.
        seed: the run's seed.
        verify: whether a fresh process loads the saved adapter and compares it.
        flat_sigma: as for `trainings`.
        folder: where checkpoints and adapter go.
    """
    training = copy.copy(task.training)
    training.output_dir = str(folder)
    training.seed = seed
    training.learning_rate = method.learning_rate or training.learning_rate

    model: Any = task.adapt(method, seed)
    trainer = make_trainer(task, model, training)
    checkpoint = last_checkpoint(folder) if training.resume_from_checkpoint else None
    with FlatTraining(flat_sigma, seed) if flat_sigma is not None else nullcontext() as flat:
        if flat:
            trainer.add_callback(flat)
        trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    evaluations = [entry for entry in state.log_history if task.loss in entry]
    evaluated = bool(evaluations) and evaluations[-1]["step"] == state.global_step
    if training.load_best_model_at_end or not evaluated:  # the best model is the one that is saved
        trainer.evaluate()
        scores = next(entry for entry in reversed(state.log_history) if task.loss in entry)
        evaluations += [] if evaluated or training.load_best_model_at_end else [scores]
    else:
        scores = evaluations[-1]
    training_curve = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    last_losses = [loss for step, loss in training_curve if step >= 0.9 * state.global_step]
    trainable = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = RunResult(
        method.label,
        seed,
        trainable_parameters=sum(trainable.values()),
        head_parameters=sum(size for name, size in trainable.items() if ".modules_to_save." in name),
        training_loss=mean(last_losses) if last_losses else trained.training_loss,
        validation_loss=scores[task.loss],
        seconds=next(cb.seconds for cb in trainer.callback_handler.callbacks if isinstance(cb, StepClock)),
        training_curve=training_curve,
        validation_curve=[(entry["step"], entry[task.loss]) for entry in evaluations],
    )
    task.score(model, scores, result)
    if PartialState().is_main_process:
        adapter = folder / "adapter"
        task.save(model, adapter)
        task.describe(adapter, result)
        result.adapter_bytes = (adapter / task.weights_file).stat().st_size
        if verify:
            # Undo the autocast that Accelerate puts around the forward pass under --bf16.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            verify_in_fresh_process(model, task.processor, task.probes(), adapter, task.source)
    return result


def trainings(
    tasks: Mapping[str, Task],
    methods: Sequence[Method],
    seeds: Sequence[int],
    verify: bool = False,
    flat_sigma: float | None = None,
) -> dict[str, Callable[[Path], RunResult]]:
    """Returns a training of every method on every task with every seed, by the names of their folders.

    Args:
        tasks: the tasks, by what tells them apart in those names.
        methods: what is trained.
        seeds: the seeds of the runs.
        verify: whether the first adapter of every method is compared in a fresh process.
        flat_sigma: size of the noise on the merged weights in training; None for none.
    """
    runs: dict[str, Callable[[Path], RunResult]] = {}
    for method in methods:
        first = verify
        for mark, task in tasks.items():
            for seed in seeds:
                runs[f"{method.folder}{mark}-seed{seed}"] = partial(train, task, method, seed, first, flat_sigma)
                first = False
    return runs
