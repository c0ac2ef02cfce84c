"""What all tests share."""

from __future__ import annotations

import os

# Nothing here needs a hub: a test that reaches for one fails at once instead of waiting for retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.register_assert_rewrite("dense", "generator_cases", "method_cases")

# The models are so small that threads cost more than they save.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seeds torch, and puts back the global state that tests change."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture
def shared() -> Path:
    """A folder with real models and data beside the checkout, if there is one."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with models and data")
    return SHARED


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, object]]:
    """Returns a function that records what a refused call must leave alone: module types and every tensor."""

    def record(model: nn.Module) -> dict[str, object]:
        return {
            "modules": [(name, type(module)) for name, module in model.named_modules()],
            "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        }

    return record
