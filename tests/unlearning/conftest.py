"""What several tests of unlearning need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import unlearning_worker


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
