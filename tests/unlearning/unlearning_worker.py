"""One of two processes that observe tiny models and make them forget, with loaders that Accelerate has prepared."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import problems
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


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parameter": ("gauss_newton", {"form": "parameter", "draws": None, "max_steps": 2}),
    "kernel": ("gauss_newton", {"form": "kernel", "draws": 2, "curvature_samples": 6, "max_steps": 2}),
    "matrix_free": ("gauss_newton", {"form": "matrix_free", "max_steps": 1}),
    "fast_ntk": ("fast_ntk", {"form": "parameter"}),
    "fast_ntk, kernel": ("fast_ntk", {"form": "kernel"}),
}


def forgotten(prepare: Callable[..., Any], folder: Path) -> dict[str, torch.Tensor]:
    """The parameters after every solver and after two requests to a ledger of either form.

    Args:
        prepare: what is done to a model and to loaders.
        folder: for the ledgers.
    """
    from peft_ext.unlearning import METHODS, UnlearningLedger

    found = {}

    def loader(rows: list[Any]) -> Any:
        return prepare(DataLoader(rows, batch_size=2))  # type: ignore[arg-type]

    rows = problems.images(16, 4)
    for name, (method, options) in SOLVERS.items():
        model = problems.batch_norm()
        METHODS[method](**options).fit(prepare(model), loader(rows[:11]), loader(rows[11:]))
        found[name] = torch.cat(list(map(torch.flatten, problems.trainable(model).values())))
    for name, draws in (("rows", 1), ("gram", None)):
        model = problems.batch_norm()
        ledger = UnlearningLedger.create(folder / name, model, loader(rows), draws=draws)
        assert ledger._state.quadratic.form == {"rows": "kernel", "gram": "parameter"}[name]
        for request in (rows[:3], rows[7:8]):
            ledger.forget(model, loader(request))
        UnlearningLedger(folder / name).restore(model)
        found[f"ledger, {name}"] = torch.cat(list(map(torch.flatten, problems.trainable(model).values())))
    return found


def trained(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """What methods make of a model: those that train in steps of SGD, of which each reads half of the rows.

    Args:
        folder: for the trainings.
        processes: that share the rows.
    """
    from transformers import TrainingArguments, default_data_collator

    from peft_ext.training.callbacks import trainable_state
    from peft_ext.unlearning import MUSO, Ledger, Request, Rewind

    rows, found = problems.images(32, 4, dtype=torch.float32), {}
    ledger = Ledger(damping=1.0, draws=None)
    for name, method in {"muso": MUSO(draws=None, max_steps=1), "rewind": Rewind(), "ledger": ledger}.items():
        model = tiny_models.vit()  # takes what the Trainer tells it of all processes' targets
        for key, parameter in model.named_parameters():
            parameter.requires_grad = key.startswith("classifier")
        training = TrainingArguments(
            str(folder), per_device_train_batch_size=16 // processes, learning_rate=0.5, lr_scheduler_type="constant",
            optim="sgd", max_grad_norm=0, weight_decay=0, use_cpu=True, report_to=[], dataloader_pin_memory=False,
            max_steps=4,
        )  # fmt: skip
        request = Request(model, rows[16:], rows[:16], default_data_collator, training, trainable_state(model))
        if name == "ledger":
            method.prepare(request)
        method.unlearn(request)
        found[name] = torch.cat(list(map(torch.flatten, problems.trainable(model).values()))).detach()
    return found


def main(rank: int, folder: Path) -> None:
    from accelerate import Accelerator

    from peft_ext.unlearning.evaluation.metrics import observe

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
    torch.save(forgotten(accelerator.prepare, folder), folder / f"forgotten.{rank}.pt")
    torch.save(trained(folder / f"trained.{rank}", WORLD), folder / f"trained.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
