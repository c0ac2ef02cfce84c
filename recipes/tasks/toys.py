"""What the makers of the quickstarts' own models and data share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, Trainer, TrainingArguments

from peft_ext.checks import default_of
from recipes.support import inputs
from recipes.support.arguments import UserError


def refuse_other_inputs(flag: str, model: inputs.ModelArguments, data: inputs.DataArguments) -> None:
    """Refuses a model or a data set beside those that a quickstart makes."""
    if model.model_name_or_path or data.dataset_name:
        raise UserError(f"{flag} makes its own model and data: leave out --model_name_or_path and --dataset_name")


def refuse_all(reason: str, *arguments: Any) -> None:
    """Refuses whatever was given of some arguments, which have no use for a reason."""
    for each in arguments:
        for field in dataclasses.fields(each):
            if getattr(each, field.name) != default_of(each, field.name):
                raise UserError(f"{field.name}: {reason}; leave it out")


def make_once(folder: Path, what: str, make: Callable[[Path], None]) -> str:
    """Makes a quickstart's base model in a folder, unless an interrupted run has left it there.

    Args:
        folder: where the model goes.
        what: what is made, for a message.
        make: makes it with all processes, whole or not at all.

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
    """Has the main process write a quickstart's data into a folder, and returns the folder."""
    state = PartialState()
    if state.is_main_process:
        write(folder)
    state.wait_for_everyone()
    return str(folder)


def train_base(folder: Path, model: PreTrainedModel, processor: Any, settings: dict[str, Any], **data: Any) -> None:
    """Trains a whole model and saves it with its processor, whole or not at all.

    Args:
        folder: where the model goes.
        model: what is trained.
        processor: its tokenizer or image processor.
        settings: the Trainer's arguments.
        **data: data set and collator for the Trainer.
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
