"""Adapts an image classifier to a few images of every class with NOLA, PRANC or MCNC, beside any other PEFT method.

``python -m recipes.finetune_vit`` runs the quickstart, which needs no hub, and flags such as ``--output_dir`` change
it; with ``--model_name_or_path`` or ``--dataset_name`` it is a task of your own. ``--help`` lists the arguments. It
runs under ``accelerate launch -m`` unchanged. The head is trained with every method; the method ``head`` trains nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import TrainingArguments

from recipes.support.arguments import UserError, run_main
from recipes.support.methods import HEAD, Method, MethodArguments, parse_methods
from recipes.support.reporting import RunResult, plot_losses, plot_metric, write_report
from recipes.support.runs import Recipe, RunArguments, run_recipe
from recipes.tasks import digits, image_classification, selection
from recipes.tasks.image_classification import ImageData, ImageTask
from recipes.tasks.outliers import OutlierArguments, Outliers
from recipes.tasks.soups import SoupArguments, Soups
from recipes.tasks.toys import refuse_other_inputs
from recipes.tasks.training import trainings, try_out


@dataclass
class FinetuneViT(Recipe[RunResult]):
    """Telling images apart after a few of every class, with one method after the other."""

    model: image_classification.ModelArguments
    data: image_classification.DataArguments
    labelling: selection.SelectionArguments
    comparison: MethodArguments
    soup: SoupArguments
    ood: OutlierArguments
    run: RunArguments
    quickstart: digits.QuickstartArguments
    training: TrainingArguments
    methods: list[Method] = field(init=False)
    images: ImageData = field(init=False)
    classifier: image_classification.Classifier = field(init=False)
    tasks: list[ImageTask] = field(init=False)
    trained_on: str = field(init=False)
    soups: Soups = field(init=False)
    outliers: Outliers = field(init=False)

    name = "finetune_vit"
    result = RunResult

    def check(self) -> None:
        self.methods = parse_methods(self.comparison.methods, extra=[HEAD])
        for method in self.methods:
            method.config(None, self.seeds[0])
        selection.check_arguments(self.labelling, self.data.shots)
        self.soups = Soups(self.soup, self.seeds, self.methods)
        self.outliers = Outliers(self.ood, self.methods)
        if self.soup.soup and self.ood.ood_test:
            raise UserError("soup and ood_test: a run has either soups or outliers; leave out one")
        self.training.remove_unused_columns = False  # images become pixel values when they are read
        if self.quickstart.digits:
            refuse_other_inputs("digits", self.model, self.data)

    def make(self, folder: Path) -> None:
        if self.quickstart.digits:
            digits.prepare(folder, self.model, self.data, self.training.use_cpu)

    def load(self) -> None:
        self.images = image_classification.load_image_data(self.data, drawn=self.labelling.budget is not None)
        self.classifier = image_classification.load_classifier(self.model, self.images.labels)
        self.outliers.load(self.images)

    def try_out(self) -> None:
        processor = self.classifier.processor
        pixels = self.images.encoded(self.images.validation, processor)[:1]["pixel_values"]
        image_classification.check_model(self.classifier, pixels)
        chosen = selection.select(self.labelling, self.images, self.classifier, self.training)
        self.tasks = [
            ImageTask(self.model, processor, self.training, self.classifier, images, data_seed)
            for data_seed, images in chosen.items()
        ]
        if self.labelling.budget is None:
            self.trained_on = trained_on(self.images)
        else:
            self.trained_on = selection.described(self.labelling, self.images, chosen)
        task = self.tasks[0]
        for method in self.methods:
            try_out(task, method, self.seeds[0], self.comparison.flat_sigma)
        self.soups.check(task)
        self.outliers.try_out(task, self.seeds[0])

    def runs(self) -> dict[str, Callable[[Path], RunResult]]:
        tasks = {f"-data{task.data_seed}": task for task in self.tasks}
        options = self.comparison
        if self.ood.ood_test:
            return self.outliers.runs(tasks, self.seeds, options.verify_adapters, options.flat_sigma)
        runs = trainings(tasks, self.soups.trained, self.seeds, options.verify_adapters, options.flat_sigma)
        return {**runs, **self.soups.runs(tasks)}

    def report(self, results: list[RunResult], folder: Path) -> list[str]:
        trained = [result for result in results if result.validation_curve]
        plots = {
            "loss.png": partial(plot_losses, trained, unit="image"),
            "accuracy.png": partial(plot_metric, results, name="accuracy"),
        }
        notes = self.summary() + self.soups.summary() + self.outliers.summary(results)
        return write_report(results, folder, notes, plots)

    def summary(self) -> str:
        """Returns Markdown that says what the table's numbers are over."""
        data, runs = self.tasks[0].data, len(self.tasks) * len(self.seeds)
        return (
            f"Every method is trained on {self.trained_on}, with seeds {', '.join(map(str, self.seeds))}: "
            f"{runs} run{'s' * (runs > 1)}. {len(data.labels)} classes, {len(data.validation):,} validation images.\n"
        )


def trained_on(data: ImageData) -> str:
    """Returns what every method is trained on, in words."""
    if data.args.shots is None:
        return f"all {len(data.train):,} training images"
    return f"{data.args.shots} images a class, drawn with data seeds {', '.join(map(str, data.args.data_seeds))}"


def main(argv: Sequence[str]) -> None:
    """Runs the recipe."""
    run_recipe(FinetuneViT, argv)


if __name__ == "__main__":
    run_main(main)
