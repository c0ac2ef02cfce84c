"""Checkpoints on the Hugging Face hub: up with their card, and down without what is not needed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from .card import CARD_NAME, About, is_repository


def upload(
    repo_id: str,
    save: Callable[[str, About], None],
    about: About,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
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
        tags = list(about.tags)
        try:
            found = hub.hf_hub_download(repo_id, CARD_NAME, revision=revision)
            shutil.copyfile(found, os.path.join(folder, CARD_NAME))
            tags += ModelCard.load(found).data.tags or []  # which PEFT does not keep
        except RemoteEntryNotFoundError:
            pass
        save(folder, dataclasses.replace(about, repository=repo_id, revision=revision, tags=tags))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return hub.create_commit(  # one for all files, where `upload_folder` may make several
            repo_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def local_folder(
    place: str | os.PathLike[str], files: Sequence[str], revision: str | None, token: str | bool | None
) -> Path:
    """The folder itself, or one on this machine with some files of a repository of the hub.

    Args:
        place: a folder, or the id of a repository, which a folder of that name here hides.
        files: the only ones that are downloaded.
        revision: branch, tag or commit of a repository.
        token: of the hub; by default the one that is logged in.

    Raises:
        FileNotFoundError: neither a folder nor what could be the id of a repository, or the revision of a folder.
    """
    if os.path.isdir(place):
        if revision is not None:
            raise FileNotFoundError(
                f"`revision` must be left out for a folder on this machine, which has no revisions, got {revision!r} "
                f"for {str(place)!r}. For a repository of that name on the hub, call this from where no such folder is."
            )
        return Path(place)
    if not isinstance(place, str) or not is_repository(place):
        raise FileNotFoundError(f"`folder` must be a folder or the id of a repository on the hub, got {str(place)!r}.")
    return Path(snapshot_download(place, revision=revision, token=token, allow_patterns=list(files)))
