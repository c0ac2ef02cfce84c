"""Memory of updates of whole weights: at most three copies of the weights that they are for."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import threading, time
import peft, torch
from torch import nn
from peft_ext import McncConfig, PrancConfig

torch.set_num_threads(1)
LAYERS, WIDTH = 12, 1024
model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
model = peft.get_peft_model(model, {config})
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def watch():
    global peak
    while watching:
        peak = max(peak, resident())
        time.sleep(0.0005)

before = peak = resident()
watching = True
thread = threading.Thread(target=watch)
thread.start()
for _ in range(3):
    model(torch.randn(64, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
watching = False
thread.join()
print((peak - before) / (LAYERS * WIDTH * WIDTH * 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "config",
    [
        "PrancConfig(target_modules='all-linear')",
        "McncConfig(apply_to='weight', target_modules='all-linear')",
    ],
)
def test_peak_of_a_training_step(config: str) -> None:
    # Large blocks go back to the system as soon as they are free, as long as their size is above this threshold.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = ["env", *(f"{key}={value}" for key, value in environment.items()), sys.executable]
    done = subprocess.run([*command, "-c", SCRIPT.format(config=config)], check=True, capture_output=True, text=True)
    copies = float(done.stdout)
    assert 0.9 < copies <= 3
