"""Trains an image classifier that is a seed and a few coefficients, without base weights, by PRANC, MCNC or NOLA.

``python -m recipes.train_from_seed --preset resnet20_cifar10 --dataset_name <folder>``; ``--help`` lists the arguments.
Without any, a small ViT learns scikit-learn's digits, and flags such as ``--output_dir`` change that. It runs under
``accelerate launch -m`` unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import TrainingArguments, ViTImageProcessorPil

from recipes.support import inputs
from recipes.support.arguments import UserError, run_main
from recipes.support.methods import Method, MethodArguments, parse_methods
from recipes.support.reporting import RunResult, plot_losses, plot_metric, write_report
from recipes.support.runs import Recipe, RunArguments, run_recipe
from recipes.tasks import digits
from recipes.tasks.image_classification import DataArguments, load_image_data
from recipes.tasks.seeded import FULL, NetworkArguments, SeedTask, check_network
from recipes.tasks.training import trainings


@dataclass
class TrainFromSeed(Recipe[RunResult]):
    """Telling images apart with networks that are made from a seed, with one method after the other."""

    network: NetworkArguments
    data: DataArguments
    comparison: MethodArguments
    run: RunArguments
    training: TrainingArguments
    methods: list[Method] = field(init=False)
    task: SeedTask = field(init=False)

    name = "train_from_seed"
    result = RunResult

    def check(self) -> None:
        self.methods = parse_methods(self.comparison.methods, extra=[FULL])
        self.training.remove_unused_columns = False  # images become pixel values when they are read
        check_network(self.network)
        if self.network.digits and self.data.dataset_name:
            raise UserError("digits makes its own data: leave out --dataset_name")
        if self.data.shots is not None or self.comparison.verify_adapters or self.comparison.flat_sigma is not None:
            raise UserError("--shots, --verify_adapters and --flat_sigma are for adapters")

    def make(self, folder: Path) -> None:
        if self.network.digits:
            self.data.dataset_name = digits.prepare_data(folder)

    def load(self) -> None:
        processor = ViTImageProcessorPil(size={"height": self.network.image_size, "width": self.network.image_size})
        data = load_image_data(self.data)
        self.task = SeedTask(inputs.ModelArguments(), processor, self.training, data, self.network)

    def try_out(self) -> None:
        for method in self.methods:
            self.task.adapt(method, self.seeds[0])

    def runs(self) -> dict[str, Callable[[Path], RunResult]]:
        return trainings({"": self.task}, self.methods, self.seeds)

    def report(self, results: list[RunResult], folder: Path) -> list[str]:
        plots = {
            "loss.png": partial(plot_losses, results, unit="image"),
            "accuracy.png": partial(plot_metric, results, name="accuracy"),
        }
        data = self.task.data
        sizes = f"{len(data.train):,} training, {len(data.validation):,} validation images"
        return write_report(results, folder, f"{len(self.seeds)} seed(s) a method; {sizes}.\n", plots)


def main(argv: Sequence[str]) -> None:
    """Runs the recipe."""
    run_recipe(TrainFromSeed, argv)


if __name__ == "__main__":
    run_main(main)
