"""transformers' Trainer, whose model cards describe our adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.card import CARD_NAME
from ..tuners.description import describe, is_described


class DescribingTrainer(Trainer):
    """A Trainer that leaves the description of an adapter in the model card that it writes.

    `Trainer.create_model_card`, which `Trainer.push_to_hub` and `save_model` with `push_to_hub=True` call, writes a
    card of its own over ours, and no callback comes after it; so this is a class. Both texts are in the card then.
    Uploads during training have the description too.

    For another Trainer, such as one of trl: `class MyTrainer(DescribingTrainer, SFTTrainer): ...`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_CardOfCheckpoint())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card of the Trainer, and describes the adapter that is saved in the output folder in it."""
        super().create_model_card(*args, **kwargs)
        folder = str(self.args.output_dir)
        if self.is_world_process_zero() and is_described(folder):
            repository = getattr(self, "hub_model_id", None)
            describe(folder, repository=repository, revision=self.args.hub_revision if repository else None)


class _CardOfCheckpoint(TrainerCallback):
    """Puts the card of a checkpoint beside the weights that the Trainer is about to upload during training."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        card = Path(args.output_dir, CARD_NAME)
        saved = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", CARD_NAME)
        if state.is_world_process_zero and saved.is_file() and not card.exists():
            shutil.copyfile(saved, card)
