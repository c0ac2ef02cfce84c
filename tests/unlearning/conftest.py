"""What several tests of unlearning need."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import unlearning_worker
from method_cases import Network, arguments, loss, samples
from torch.utils.data import Subset
from transformers import default_data_collator

from peft_ext.training.callbacks import trainable_state
from peft_ext.training.trainer import fit
from peft_ext.unlearning import Request


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the two processes of `unlearning_worker.py` found."""
    folder = tmp_path_factory.mktemp("two_processes")
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])}
    processes = []
    for rank in range(unlearning_worker.WORLD):
        command = [sys.executable, unlearning_worker.__file__, str(rank), str(folder)]
        with open(folder / f"log.{rank}", "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (folder / "log.0").read_text()[-3000:] + (folder / "log.1").read_text()[-3000:]
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A network that was trained on four classes, the first of which is to be forgotten."""
    torch.manual_seed(0)
    model, rows = Network(), samples()
    initial = trainable_state(model)
    forget = [i for i, row in enumerate(rows) if row["labels"] == 0]
    retain = [i for i, row in enumerate(rows) if row["labels"] != 0]
    training = arguments(tmp_path_factory.mktemp("run"))
    request = Request(model, Subset(rows, retain), Subset(rows, forget), default_data_collator, training, initial)
    fit(model, rows, default_data_collator, copy.copy(training))
    assert loss(request, request.forget) < 0.2 and loss(request, request.retain) < 0.2
    return request


@pytest.fixture
def request_(trained: Request) -> Request:
    """A fresh copy of it."""
    return dataclasses.replace(trained, model=copy.deepcopy(trained.model), training=copy.copy(trained.training))
