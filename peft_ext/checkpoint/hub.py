"""Checkpoints on the Hugging Face hub: up with their card, and down without what is not needed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from .card import CARD_NAME, About, is_repository


def upload(
    repo_id: str,
    save: Callable[[str, About], None],
    about: About,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload checkpoint",
    create_pr: bool = False,
) -> CommitInfo:
    """Makes a repository, and the branch, unless they are there, and uploads a checkpoint in one commit.

    Args:
        repo_id: `"user/name"`, or a name among those of the token's owner.
        save: writes the checkpoint into a folder, where the `README.md` of that revision lies if there is one, and
            puts what it is told into that card.
        about: what the checkpoint itself does not tell; the repository and the revision are filled in.
        private: whether a new repository is private.
        token: of the hub; by default the one that is logged in.
        revision: the branch; a new one starts at main, as it is there.
        commit_message: its first line.
        create_pr: propose the commit in place of making it.

    Returns:
        The commit, which as a text is its address.
    """
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            shutil.copyfile(hub.hf_hub_download(repo_id, CARD_NAME, revision=revision), os.path.join(folder, CARD_NAME))
        except RemoteEntryNotFoundError:
            pass
        save(folder, About(**{**vars(about), "repository": repo_id, "revision": revision}))
        return hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def local_folder(
    place: str | os.PathLike[str], files: Sequence[str], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder itself, or one on this machine with some files of a repository of the hub.

    Args:
        place: a folder, or the id of a repository, which a folder of that name here hides.
        files: the only ones that are downloaded.
        revision: branch, tag or commit of a repository.
        token: of the hub; by default the one that is logged in.

    Raises:
        FileNotFoundError: neither a folder nor what could be the id of a repository.
    """
    if os.path.isdir(place):
        return Path(place)
    if not isinstance(place, str) or not is_repository(place):
        raise FileNotFoundError(f"`folder` must be a folder or the id of a repository on the hub, got {str(place)!r}.")
    return Path(snapshot_download(place, revision=revision, token=token, allow_patterns=list(files)))
