"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel

from ..checkpoint.card import About
from ..checkpoint.hub import upload
from ..tuners.description import describe, is_described


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    **about: Any,
) -> CommitInfo:
    """Saves an adapter and uploads it with its model card to the Hugging Face hub.

    The text of a card that is in the repository at that revision is kept, such as what transformers' Trainer wrote.

    `model.push_to_hub` uploads the same files, but puts the card that main had, or an empty one, over ours after we
    wrote it, and asks nobody. So it keeps a description that is on the hub already, and loses a new one. The Trainer's
    own uploads keep the description with `peft_ext.adapters.trainer.DescribingTrainer`.

    Args:
        model: with adapters of this package; those of other methods get the card that PEFT writes.
        repo_id: `"user/name"`, or a name among your own. Made unless it is there.
        private: whether a new repository is private.
        token: of the hub; by default the one that is logged in.
        revision: the branch, by default main. A new one starts at main, as it is there.
        commit_message: its first line.
        create_pr: propose the commit in place of making it.
        **about: `license`, `datasets`, `metrics` and `tags` for the card, as in `peft_ext.describe`.

    Returns:
        The commit, which as a text is its address.
    """

    def save(folder: str, about: About) -> None:
        model.save_pretrained(folder)
        for name in model.peft_config:
            subfolder = None if name == "default" else name
            place = os.path.join(folder, subfolder or "")
            if is_described(place):
                describe(place, **{**vars(about), "subfolder": subfolder})

    return upload(repo_id, save, About(**about), private, token, revision, commit_message, create_pr)
