"""One training of one contestant: loss, score, coefficients, bytes, seconds, and the step where it diverged."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PrinterCallback, Trainer

from peft_ext.training.trainer import EvaluationTrainer, fit
from recipes.support.methods import Method

from .task import QualityTask

_HEAD = ".modules_to_save."


class WatchedTrainer(EvaluationTrainer):
    """Stops at the first loss that is no number; the head has a learning rate of its own.

    Attributes:
        diverged_at: the step where the loss was no number.

    Args:
        head_rate: of the modules that are trained whole beside the adapter.
        **options: what else the Trainer takes.
    """

    diverged_at: int | None = None

    def __init__(self, head_rate: float, **options: Any) -> None:
        super().__init__(**options)
        self.head_rate = head_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        assert isinstance(self.model, nn.Module)
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        groups = [
            {"params": [value for name, value in trained if (_HEAD in name) == head], "lr": rate}
            for head, rate in ((False, self.args.learning_rate), (True, self.head_rate))
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found: Any = super().compute_loss(model, inputs, *args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        if torch.is_grad_enabled() and not torch.isfinite(loss):
            self.diverged_at = self.state.global_step + 1
            self.control.should_training_stop = True
        return found


def trained(task: QualityTask, method: Method, rate: float, seed: int, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Trains a contestant once.

    Args:
        task, method, rate, seed: those of `measure`.
        **options: what else the Trainer takes.

    Returns:
        The model, and the seconds and the step where the training diverged, None if it did not.
    """
    training = copy.copy(task.training)
    training.seed, training.learning_rate = seed, rate
    model: Any = task.task.adapt(method, seed)
    parts = task.trainer_arguments(model)
    train, collator = parts["train_dataset"], parts["data_collator"]
    wall, processor = time.perf_counter(), time.process_time()
    trainer: Any = fit(model, train, collator, training, partial(WatchedTrainer, task.head_rate), **options)
    return model, {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "diverged_at": trainer.diverged_at,
    }


def measure(task: QualityTask, method: Method, rate: float, seed: int, dtypes: Sequence[str] = ()) -> dict[str, Any]:
    """Trains and evaluates a contestant once.

    Args:
        task: what it is trained on.
        method: the contestant.
        rate: the adapter's learning rate.
        seed: of the training and, where it has one, of the method's random numbers.
        dtypes: types in which an adapter of ours is saved and evaluated again.

    Returns:
        What was measured. `loss` and `score` are None for a training that diverged, and `diverged_at` is its step.
    """
    model, found = trained(task, method, rate, seed)
    found |= {
        "coefficients": sum(
            value.numel() for name, value in model.named_parameters() if value.requires_grad and _HEAD not in name
        ),
        "loss": None,
        "score": None,
    }
    if found["diverged_at"] is None:
        found |= evaluated(task, model)
        if found["loss"] is None:
            found["diverged_at"] = task.steps
    found["saved"] = _saved(task, model, dtypes if found["diverged_at"] is None else ())
    return found


def evaluated(task: QualityTask, model: Any) -> dict[str, Any]:
    """Returns loss and score on a task's evaluation rows, None for both if the loss is no number."""
    # Not with the Trainer of the training, which wants a gradient.
    trainer = Trainer(model=model, args=task.training, **task.trainer_arguments(model))
    trainer.remove_callback(PrinterCallback)
    values = trainer.evaluate()
    loss = values[task.task.loss]
    if not math.isfinite(loss):
        return {"loss": None, "score": None}
    return {"loss": round(loss, 5), "score": values.get(f"eval_{task.metric}")}


def _saved(task: QualityTask, model: Any, dtypes: Sequence[str]) -> dict[str, Any]:
    """What the adapter takes in its own type and, if it is one of ours, in others, and what it is worth in those."""
    found: dict[str, Any] = {}
    config = model.peft_config[model.active_adapter]
    with tempfile.TemporaryDirectory() as folder:
        task.task.save(model, Path(folder))
        found["float32"] = _sizes(task, Path(folder))
    for dtype in dtypes if hasattr(config, "coefficient_dtype") else ():
        with tempfile.TemporaryDirectory() as folder:
            kept, config.coefficient_dtype = config.coefficient_dtype, dtype
            task.task.save(model, Path(folder))
            config.coefficient_dtype = kept
            again: Any = PeftModel.from_pretrained(task.task.fresh_model(), folder).eval()  # type: ignore[arg-type]
            found[dtype] = {**_sizes(task, Path(folder)), **evaluated(task, again)}
    return found


def _sizes(task: QualityTask, folder: Path) -> dict[str, int]:
    """Bytes of the adapter's tensors, and of the file without the head's."""
    file = folder / task.task.weights_file
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).nbytes for name in opened.keys()}
    head = sum(size for name, size in tensors.items() if any(f".{part}." in name for part in task.task.head))
    return {"bytes": sum(tensors.values()) - head, "file_bytes": file.stat().st_size - head}
