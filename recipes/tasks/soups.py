"""Soups of what a recipe has trained: which runs are mixed, what mixtures are learned from, and how they are scored."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import DataLoader

from peft_ext.adapters.soup import Soup, best_adapter, check_method, greedy_soup, learn_soup, uniform_soup
from peft_ext.files import write_whole
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.methods import Method, folder_name
from recipes.support.reporting import RunResult
from recipes.tasks.image_classification import ImageTask
from recipes.tasks.training import make_trainer

KINDS: dict[str, Callable[..., Soup]] = {
    "best single": best_adapter,
    "uniform soup": lambda model, adapters, loader: uniform_soup(model, adapters),
    "greedy soup": greedy_soup,
    "learned soup": partial(learn_soup, per_layer=False),
    "learned soup by layer": learn_soup,
}
"""What is made of the adapters of a method."""


@dataclass
class SoupArguments:
    """Whether the adapters of a method are mixed."""

    soup: bool = field(
        default=False,
        metadata={
            "help": "Mix the adapters of every method over all seeds and rates: the best one, the mean, the greedy "
            "soup and learned mixtures. The frozen numbers of all runs are then of the first seed, unless the method "
            "has a seed of its own."
        },
    )
    soup_rates: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates that every method is trained with, each, in place of its own."},
    )
    soup_shots: int = field(
        default=10,
        metadata={"help": "Samples of every class that are not trained on, which mixtures are learned and chosen on."},
    )


@dataclass
class Soups:
    """The soups of a comparison.

    Attributes:
        args: what was asked for.
        seeds: of the runs.
        methods: what is mixed, by label: the methods that are trained in its place, one a rate.
        refused: why others are not mixed, by label.

    Args:
        args, seeds: see above.
        chosen: the methods that were asked for.

    Raises:
        UserError: there is nothing to mix, or an argument has no use.
    """

    args: SoupArguments
    seeds: Sequence[int]
    chosen: dataclasses.InitVar[Sequence[Method]]
    methods: dict[str, list[Method]] = field(init=False, default_factory=dict)
    refused: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self, chosen: Sequence[Method]) -> None:
        rates = self.args.soup_rates
        for name in ("soup_rates", "soup_shots"):
            if not self.args.soup and getattr(self.args, name) != getattr(SoupArguments(), name):
                raise UserError(f"{name} has no use without --soup")
        inputs.check_counts(self.args, "soup_shots")
        inputs.check_distinct(self.args, "soup_rates")
        if any(not rate > 0 for rate in rates):
            raise UserError(f"soup_rates: they must be positive numbers, got {rates}")
        if self.args.soup and len(self.seeds) * max(1, len(rates)) < 2:
            raise UserError("soup: it mixes the runs of several --seeds or --soup_rates, and there is one run")
        for method in chosen:
            self.methods[method.label] = [self._at(method, rate) for rate in rates] or [self._at(method, None)]
            try:
                check_method(method.config(None, self.seeds[0]), method.label)
            except ValueError as error:
                self.refused[method.label] = str(error)
        if self.args.soup and len(self.refused) == len(self.methods):
            raise UserError(f"soup: there is no method to mix: {' '.join(self.refused.values())}")

    def _at(self, method: Method, rate: float | None) -> Method:
        options = method.options
        if self.args.soup and hasattr(method.config(None, self.seeds[0]), "seed"):
            options = {"seed": self.seeds[0], **options}
        if rate is None:
            return dataclasses.replace(method, options=options)
        return dataclasses.replace(method, options=options, label=f"{method.label} rate={rate:g}", learning_rate=rate)

    @property
    def trained(self) -> list[Method]:
        """The methods that are trained."""
        return [method for each in self.methods.values() for method in each]

    def runs(self, tasks: Mapping[str, ImageTask]) -> dict[str, Callable[[Path], RunResult]]:
        """Returns what is made of the adapters of every method and task, by the names of their folders.

        Args:
            tasks: the tasks, by what tells them apart in the names of the folders of the trainings.
        """
        runs: dict[str, Callable[[Path], RunResult]] = {}
        for label, methods in self.methods.items() if self.args.soup else ():
            for mark, task in tasks.items() if label not in self.refused else ():
                names = [f"{method.folder}{mark}-seed{seed}" for method in methods for seed in self.seeds]
                for kind in KINDS:
                    runs[folder_name(f"{label} {kind}") + mark] = partial(
                        mix, task, label, kind, names, self.args.soup_shots, self.seeds[0]
                    )
        return runs

    def check(self, task: ImageTask) -> None:
        """Raises a UserError if the task has too few samples to hold out."""
        if self.args.soup:
            task.data.held_out_set(task.data_seed, self.args.soup_shots)

    def summary(self) -> str:
        """Returns Markdown that says what the table's soups are of."""
        if not self.args.soup:
            return ""
        count = len(self.seeds) * max(1, len(self.args.soup_rates))
        text = (
            f"\nSoups are of {count} adapters. The best single one is chosen, and mixtures are learned, on "
            f"{self.args.soup_shots} images a class of the training split that no adapter is trained on.\n"
        )
        return text + "".join(f"\nNo soup of {label}: {reason}\n" for label, reason in self.refused.items())


def held_out(task: ImageTask, shots: int) -> list[dict[str, Any]]:
    """Returns batches of samples that are not trained on, as large as those of the training.

    They are read once: images are decoded when they are read.
    """
    rows = task.data.encoded(task.data.held_out_set(task.data_seed, shots), task.processor)
    collator = task.trainer_arguments(task.classifier.model)["data_collator"]
    return list(DataLoader(rows, task.training.per_device_train_batch_size, collate_fn=collator))  # type: ignore[arg-type]


def mix(
    task: ImageTask, label: str, kind: str, adapters: Sequence[str], shots: int, seed: int, folder: Path
) -> RunResult:
    """Makes one adapter of several, saves it with what it was made of, and scores it.

    Args:
        task: what the adapters were trained on.
        label: of their method.
        kind: one of `KINDS`.
        adapters: names of the folders beside `folder` that they were trained in.
        shots: samples of every class to learn and choose on.
        seed: that of the frozen numbers.
        folder: where the adapter goes.
    """
    training = copy.copy(task.training)
    training.output_dir = str(folder)
    places = [folder.parent / name / "adapter" for name in adapters]
    base = task.fresh_model().to(training.device)  # type: ignore[arg-type]
    loader = held_out(task, shots)
    start = time.perf_counter()
    soup = KINDS[kind](base, places, loader)
    seconds = time.perf_counter() - start
    trainable = {name: each.numel() for name, each in soup.model.named_parameters() if each.requires_grad}
    result = RunResult(
        f"{label}, {kind}",
        seed,
        trainable_parameters=sum(trainable.values()),
        head_parameters=sum(size for name, size in trainable.items() if ".modules_to_save." in name),
        seconds=seconds,
    )
    evaluation = make_trainer(task, soup.model, training).evaluate()
    result.validation_loss = evaluation[task.loss]
    task.score(soup.model, evaluation, result)
    if PartialState().is_main_process:
        task.save(soup.model, folder / "adapter")
        made = {"adapters": list(adapters), "losses": soup.losses, "loss": soup.loss}
        coefficients = {name: each.tolist() for name, each in soup.coefficients.items()}
        write_whole(folder / "soup.json", json.dumps({**made, "coefficients": coefficients}, indent=1))
        task.describe(folder / "adapter", result)
        result.adapter_bytes = (folder / "adapter" / task.weights_file).stat().st_size
    return result
