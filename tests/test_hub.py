"""The hub: uploads, downloads and cards, through huggingface_hub's client and a server on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hub_programs
import hub_server
import pytest
import torch
from huggingface_hub import ModelCard

TESTS = Path(__file__).parent
KINDS = [*hub_programs.KINDS, "NETWORK"]


@dataclass
class Session:
    """What a program of `hub_programs` did: what it told, the requests that it made, and where its files are."""

    told: dict[str, Any]
    requests: list[tuple[str, str]]
    folder: Path


def run(hub: hub_server.Hub, program: str, folder: Path, token: str | None) -> Session:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", str(TESTS.parent))]),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {}),
    }
    folder.mkdir()
    before = len(hub.requests)
    command = [sys.executable, str(TESTS / "hub_programs.py"), program, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return Session(json.loads((folder / f"{program}.json").read_text()), hub.requests[before:], folder)


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.running() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return run(hub, "publish", tmp_path_factory.mktemp("ann") / "home", "hf_ann")


@pytest.fixture(scope="module")
def loaded(hub: hub_server.Hub, published: Session, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return run(hub, "load", tmp_path_factory.mktemp("anybody") / "home", None)


def card(hub: hub_server.Hub, repository: str, revision: str = "main", path: str = "README.md") -> str:
    return hub.repositories[repository].files(revision)[path].decode()


def described_once(text: str) -> bool:
    return text.count("<!-- peft_ext adapter -->") == text.count("## Loading") == text.count("# Options") == 1


@pytest.mark.parametrize("revision", ["main", "branch"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_bit_from_the_hub(kind: str, revision: str, loaded: Session) -> None:
    seed = 1 if revision == "main" else 2
    model = hub_programs.network(seed) if kind == "NETWORK" else hub_programs.adapter(kind, seed)
    expected = hub_programs.logits(model, kind)
    assert torch.equal(torch.load(loaded.folder / f"{kind} {revision}.pt"), expected)


def test_main_and_branch_differ(loaded: Session) -> None:
    """What the test above compares with is not the same thing twice."""
    for kind in KINDS:
        one, two = (torch.load(loaded.folder / f"{kind} {revision}.pt") for revision in ("main", "branch"))
        assert not torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_says_how_to_load_that_revision(kind: str, hub: hub_server.Hub, published: Session) -> None:
    name = f"ann/{kind.lower()}"
    for revision, argument, seed in [("main", "", 1), ("branch", ', revision="branch"', 2)]:
        text = card(hub, name, revision)
        assert described_once(text) and f"| seed | {seed} |" in text
        assert "`pip install peft-ext`" in text and f'"{name}"{argument})' in text
        assert "<this folder" not in text and "(not recorded)" not in text
        files = hub.repositories[name].files(revision)
        weights = files.get("adapter_model.safetensors") or files["model.safetensors"]
        assert f", {len(weights):,} bytes |" in text


def test_the_code_of_a_networks_card(hub: hub_server.Hub, published: Session) -> None:
    text = card(hub, "ann/network", "branch")
    assert 'network = load_from_seed("ann/network", revision="branch")\n' in text
    assert "from peft_ext import load_from_seed" in text and "PeftModel" not in text
    text = card(hub, "ann/network")
    assert "| `E2E` | `bleu` | `0.66` |" in text and "| licence | `mit` |" in text
    data = ModelCard(text).data
    assert data.license == "mit" and data.library_name == "peft_ext" and data.metrics == ["bleu"]
    assert data.eval_results == [hub_programs.RESULT] and data.model_name == "ann/network"


def test_the_commit_is_returned(hub: hub_server.Hub, published: Session) -> None:
    is_commit, address = published.told["network"]
    assert is_commit and re.fullmatch(rf"{hub.endpoint}/ann/network/commit/[0-9a-f]{{40}}", address)
    assert address.rsplit("/", 1)[1] == hub.repositories["ann/network"].branches["main"]


def test_files_of_a_repository(hub: hub_server.Hub, published: Session) -> None:
    adapter = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    network = {".gitattributes", "README.md", "seed_config.json", "model.safetensors", "config.json"}
    for kind in KINDS:
        expected = network if kind == "NETWORK" else adapter
        assert set(hub.repositories[f"ann/{kind.lower()}"].files()) == expected


def test_a_network_needs_three_files(loaded: Session) -> None:
    downloads = {
        path.rsplit("/", 1)[1] for verb, path in loaded.requests if verb == "GET" and "ann/network/resolve" in path
    }
    assert downloads == {"seed_config.json", "model.safetensors", "config.json"}
    assert loaded.told["given"]


def test_a_branch_keeps_its_own_card(hub: hub_server.Hub, published: Session) -> None:
    main, two = card(hub, "ann/branches"), card(hub, "ann/branches", "two")
    assert described_once(main) and described_once(two)
    assert "| seed | 1 |" in main and "| seed | 3 |" in two
    for text, own, other in [(main, "Words of main.", "Words of two."), (two, "Words of two.", "Words of main.")]:
        assert own in text and other not in text and "# Before\n\nWords from before." in text
        data = ModelCard(text).data
        assert data.license == "mit" and {"restaurants", "nola", "peft_ext"} <= set(data.tags)
    assert ModelCard(two).data.datasets == ["e2e_nlg"] and "Trained on `e2e_nlg`." in two
    assert ModelCard(main).data.datasets is None and "Data and results" not in main


def test_a_proposal_leaves_main_alone(hub: hub_server.Hub, published: Session) -> None:
    repository = hub.repositories["ann/branches"]
    assert "| seed | 4 |" in card(hub, "ann/branches", "refs/pr/1") and "| seed | 1 |" in card(hub, "ann/branches")
    assert repository.messages[-1] == "Better"
    assert "Words of main." in card(hub, "ann/branches", "refs/pr/1")


def test_private_repositories_need_a_token(hub: hub_server.Hub, loaded: Session) -> None:
    private = {name for name, repository in hub.repositories.items() if repository.private}
    assert private == {"ann/secret", "ann/secret-network"}
    nobody, bob, ann = loaded.told["secret"]  # PEFT's error, whatever the hub said
    assert nobody == bob == "ValueError: Can't find 'adapter_config.json' at 'ann/secret'" and ann == ""
    nobody, bob, ann = loaded.told["secret network"]
    assert nobody.startswith("RepositoryNotFoundError: 401") and bob.startswith("RepositoryNotFoundError: 404")
    assert "make sure you are authenticated" in nobody and ann == ""


def test_errors_are_those_of_the_client(published: Session, loaded: Session) -> None:
    foreign, folder, good = published.told["refused"]
    assert "403" in foreign and "namespace 'bob'" in foreign
    assert "ValueError" in folder and "base_model" in folder  # the server's check can refuse a card
    assert good == ""
    assert "401" in loaded.told["no token"]
    assert "RepositoryNotFoundError" in loaded.told["missing"]
    assert "RevisionNotFoundError" in loaded.told["revision"]
    assert "`folder` must be a folder or the id of a repository on the hub" in loaded.told["no name"]


def test_quantizing_from_the_hub_takes_small_files_along(loaded: Session) -> None:
    expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert loaded.told["fewer"] == expected
    assert not any("ann/several/resolve" in path and "training_args" in path for _, path in loaded.requests)


def test_several_adapters(hub: hub_server.Hub, loaded: Session) -> None:
    first, second = card(hub, "ann/several"), card(hub, "ann/several", path="other/README.md")
    assert described_once(first) and described_once(second)
    assert "# NOLA adapter" in first and '"ann/several")' in first
    assert "| seed | 6 |" in second and '"ann/several", subfolder="other")' in second
    several = hub_programs.several()
    several.set_adapter("other")
    assert torch.equal(torch.load(loaded.folder / "several.pt"), hub_programs.logits(several, "NOLA"))


def test_the_push_of_peft_loses_a_new_description_and_keeps_one_that_is_there(
    hub: hub_server.Hub, published: Session
) -> None:
    """As the docstring of `push_to_hub` says. If the first half fails, ours is not needed any more."""
    assert "<!-- peft_ext adapter -->" not in published.told["theirs"]
    text = card(hub, "ann/theirs")
    assert described_once(text) and "Model Card for Model ID" not in text


def test_uploads_of_the_trainer(hub: hub_server.Hub, published: Session) -> None:
    repository = hub.repositories["ann/trained"]
    texts = [files["README.md"].decode() for files in repository.commits.values() if "README.md" in files]
    assert len(texts) >= 2 and all(described_once(text) for text in texts)
    during, end = texts[0], card(hub, "ann/trained")
    assert "Training hyperparameters" not in during
    assert "Training hyperparameters" in end and '"ann/trained")' in end and "| seed | 1 |" in end
    assert {"nola", "peft_ext"} <= set(ModelCard(end).data.tags)


def test_after_the_plain_trainer_our_push_adds_the_description(hub: hub_server.Hub, published: Session) -> None:
    assert "<!-- peft_ext adapter -->" not in published.told["plain"]
    text = card(hub, "ann/plain")
    assert described_once(text) and "Training hyperparameters" in text
