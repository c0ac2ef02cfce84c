"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel


def push_to_hub(model: PeftModel, repo_id: str, **options: Any) -> str:
    """Saves an adapter and uploads it with its model card to the Hugging Face hub.

    `model.push_to_hub` uploads the same files, but puts an empty card in place of ours. The text of a card that is in
    the repository is kept.

    Args:
        options: `private` and `token`; `revision`, `commit_message` and `create_pr` of `HfApi.upload_folder`.

    Returns:
        The address of the commit.
    """
    token = options.pop("token", None)
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        try:
            ModelCard.load(repo_id, token=token).save(os.path.join(folder, "README.md"))
        except EntryNotFoundError:
            pass
        model.save_pretrained(folder)
        return hub.upload_folder(repo_id=repo_id, folder_path=folder, **{"commit_message": "Upload adapter", **options})
