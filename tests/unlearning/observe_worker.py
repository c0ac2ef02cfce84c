"""One of the two processes of test_metrics.py: observes tiny models with loaders of both kinds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

WORLD = 2


def rows(number: int) -> list[dict[str, torch.Tensor]]:
    """Twelve tokens each, some of the last ones are targets; in half of the rows those that the model writes itself."""
    tokens = tiny_models.tokens(number)
    labels = tokens.clone()
    for index, row in enumerate(labels):
        row[: 4 + index % 3] = -100
    with torch.no_grad():
        guesses = tiny_models.llama()(input_ids=tokens).logits.argmax(2)
    # A target that equals the guess after the true tokens is right; the tokens themselves stay.
    for index in range(0, number, 2):
        labels[index, 9:] = guesses[index, 8:-1]
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels)]


def tasks() -> dict[str, tuple[nn.Module, list[dict[str, Any]]]]:
    """A classifier and a language model with eleven samples each."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 16, 16, generator=generator) for _ in range(11)]
    pictures = [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(images)]
    return {"vit": (tiny_models.vit(), pictures), "llama": (tiny_models.llama(), rows(11))}


def main(rank: int, folder: Path) -> None:
    from accelerate import Accelerator

    from peft_ext.unlearning.metrics import observe

    torch.set_num_threads(1)
    # Accelerate asks for an address, which the group that is there already has not.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost")
    store = dist.FileStore(str(folder / "store"), WORLD)  # no port that another program could take
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    for name, (model, data) in tasks().items():
        plain = DataLoader(data, batch_size=2)
        for kind, loader in {"prepared": accelerator.prepare(plain), "plain": plain}.items():
            arrays = {key: value for key, value in vars(observe(model, loader)).items() if value is not None}
            np.savez(folder / f"{name}.{kind}.{rank}.npz", **arrays)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
