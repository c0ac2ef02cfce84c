"""A training without a word, a file or an evaluation, and its Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from .callbacks import DropChanges, Ridge, trainable_parameters
from .modes import check_dependence
from .prefix_in_training import PrefixInTraining


class CheckedTrainer(Trainer):
    """A Trainer that says so if there is nothing to train."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        found: Any = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        loss = found[0] if return_outputs else found
        check_dependence(loss, sum(parameter.numel() for parameter in trainable_parameters(model).values()))
        return found


class EvaluationTrainer(CheckedTrainer):
    """A Trainer that keeps the model in evaluation mode: no dropout, batch-norm statistics as they are.

    Gradient checkpointing rests in that mode, as transformers has it. Blocks below everything that can change give the
    same in every pass over the data; from the second pass on they are passed over, see `PrefixInTraining`. The loss of
    every step and the trained weights are the same to the bit.

    Attributes:
        prefix_memory: bytes that may be kept for that; none with 0.
    """

    prefix_memory: ClassVar[float] = 1e9
    _prefix: PrefixInTraining | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.train_dataset
        assert isinstance(self.model, nn.Module)
        self._prefix = PrefixInTraining(self.model, self.prefix_memory, len(rows) if has_length(rows) else 0)
        try:
            with self._prefix.remembering():
                return super().train(*args, **kwargs)
        finally:
            self._prefix = None

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._prefix is None or not self.prefix_memory or self.state.num_train_epochs <= 1:
            return super().training_step(model, *args, **kwargs)
        with self._prefix.step(model, self.state.epoch or 0):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the model's loss; a method that descends another one overrides this."""
        model.eval()  # the Trainer has just put it in training mode
        return super().compute_loss(model, inputs, *args, **kwargs)


def fit(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    training: TrainingArguments,
    trainer_class: Callable[..., Trainer] = EvaluationTrainer,
    ridge: Ridge | None = None,
    **options: Any,
) -> Trainer:
    """Trains a model on some rows, without a word, a file or an evaluation.

    Args:
        model: changed in place.
        dataset: rows that it is trained on.
        collator: makes a batch of rows.
        training: arguments of the training, which are left as they are.
        trainer_class: makes the Trainer, which computes the loss.
        ridge: pulls the parameters back.
        **options: what else the Trainer takes.

    Returns:
        The Trainer; its state says how many steps it took.
    """
    _unmark(model)
    trainer = trainer_class(
        model=model, args=_quiet(training), train_dataset=dataset, data_collator=collator, **options
    )
    trainer.remove_callback(PrinterCallback)
    if ridge is not None and ridge.strength:
        trainer.add_callback(ridge)
    try:
        with ExitStack() as stack:
            for callback in options.get("callbacks") or []:
                if isinstance(callback, DropChanges):
                    stack.enter_context(callback)
            trainer.train()
    finally:
        _unwrap(trainer, model)
    return trainer


def mean_loss(
    model: nn.Module, dataset: Any, collator: Callable[[list[Any]], Mapping[str, Any]], training: TrainingArguments
) -> float:
    """Returns a model's own loss on some rows in evaluation mode: the mean over samples of those of their batches.

    Args:
        model: left in evaluation mode.
        dataset: the rows.
        collator: makes a batch of rows, which holds `labels`.
        training: says in which batches the rows are read, and where.
    """
    training = _quiet(training)
    training.label_names = ["labels"]  # PEFT's wrapper hides them from the Trainer
    trainer = Trainer(model=model, args=training, data_collator=collator)  # type: ignore[arg-type]
    try:
        found = trainer.evaluation_loop(trainer.get_eval_dataloader(dataset), "loss", prediction_loss_only=True)
    finally:
        _unwrap(trainer, model)
    assert found.metrics is not None
    return float(found.metrics["eval_loss"])


def _unwrap(trainer: Trainer, model: nn.Module) -> None:
    """Undoes the autocast that Accelerate puts around the forward pass with bf16 or fp16: models outlive Trainers."""
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    _unmark(model)
    model.eval()


def _unmark(model: nn.Module) -> None:
    """Takes off the mark that Accelerate puts on a model which is evaluated.

    The next Trainer would not wrap it, and each of several processes would train a model of its own.
    """
    for module in model.modules():
        vars(module).pop("_is_accelerate_prepared", None)


def _quiet(training: TrainingArguments) -> TrainingArguments:
    training = copy.copy(training)
    training.remove_unused_columns = False  # rows are as the collator takes them
    training.eval_strategy = training.logging_strategy = IntervalStrategy.NO
    training.save_strategy = SaveStrategy.NO
    training.load_best_model_at_end = training.eval_on_start = False
    training.bf16_full_eval = training.fp16_full_eval = False  # they cast the model for good
    training.dataloader_persistent_workers = False  # which would not see what is drawn anew in every pass
    training.disable_tqdm = True
    return training
