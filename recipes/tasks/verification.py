"""Whether a saved adapter computes in another process what the trained model computed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.tasks import causal_lm, image_classification

EXPECTED = "expected.safetensors"
KINDS: dict[str, Any] = {"causal_lm": causal_lm, "image_classification": image_classification}
"""What base models do. Each has `ModelArguments`, `load_saved`, `compute`, `describe` and `OUTPUT`."""


def verify_in_fresh_process(
    model: PeftModel,
    processor: Any,
    rows: Sequence[dict[str, torch.Tensor]],
    adapter: Path,
    base: inputs.ModelArguments,
) -> None:
    """Has ``recipes.reload_adapter`` load a saved adapter in a fresh process and compare; it prints what it finds.

    Args:
        model: the trained model.
        processor: its tokenizer or image processor.
        rows: examples to compare on.
        adapter: folder that the adapter was saved in.
        base: how the base model is loaded.

    Raises:
        UserError: the loaded adapter computes something else, or cannot be loaded.
    """
    name, kind = next((name, kind) for name, kind in KINDS.items() if isinstance(base, kind.ModelArguments))
    model.eval()
    tensors = {}
    for index, row in enumerate(rows):
        logits, output = kind.compute(model, processor, row)
        for key, tensor in {**row, "logits": logits, "output": output}.items():
            tensors[f"{index}.{key}"] = tensor.contiguous()
    save_file(tensors, adapter.parent / EXPECTED, metadata={"device": model.device.type})
    command = [sys.executable, "-m", "recipes.reload_adapter", "--kind", name, "--adapter", str(adapter)]
    for key, value in vars(base).items():
        command += [f"--{key}", str(value)] if value is not None else []
    paths = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    # Equal to the bit only with as many threads as here.
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    sys.stdout.flush()
    if subprocess.run(command, env={**os.environ, **environment}).returncode:
        raise UserError(
            f"{adapter}: a process of its own that loaded the adapter did not get the model that was trained; what it "
            "said is above"
        )


def read_expected(adapter: Path) -> tuple[list[dict[str, torch.Tensor]], str]:
    """Returns the examples with what the trained model computed for them, and the kind of device that it was on."""
    rows: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(adapter.parent / EXPECTED, "pt") as file:
        for key in sorted(file.keys()):
            index, _, name = key.partition(".")
            rows.setdefault(index, {})[name] = file.get_tensor(key)
        return list(rows.values()), file.metadata()["device"]
