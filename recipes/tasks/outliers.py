"""Telling images of none of the classes: with which losses methods are trained, and how well scores tell them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import send_to_device
from peft import PeftModel
from rich import box
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from peft_ext.presentation import spread
from peft_ext.training.outliers import (
    OUTLIER,
    SCORES,
    HeadPass,
    OutlierLoss,
    OutlierTrainer,
    detection,
    observe,
    reading,
)
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.methods import Method, Spec, parse_specs
from recipes.support.reporting import RunResult, by_label, markdown
from recipes.tasks.image_classification import Classifier, ImageData, ImageTask, collate, forward_options
from recipes.tasks.outlier_sets import OutlierSet, SetSpec, load_set, parse_set
from recipes.tasks.training import trainings

_SET = (
    "a data set's id, folder or file, 'digits' for scikit-learn's handwritten digits, or a YAML mapping such as "
    "'{name: digits, split: validation, labels: [3, 4], label: some digits}'; its other options are image_column and "
    "label_column, and without a name it is of --dataset_name. Of classes, those that are not known are meant."
)
_TERMS = ("exposure", "separation", "clustering")
_LOSSES: dict[str, tuple[str, ...]] = {"plain": (), "exposure": _TERMS[:1], "separation": _TERMS}
"""The weights of `OutlierLoss` that each loss has as options; those that it lacks are 0."""


@dataclass
class OutlierArguments:
    """Whether the models are to tell images of none of the classes, outliers, from the others."""

    ood_dataset: str | None = field(
        default=None, metadata={"help": f"Auxiliary outliers, which are trained with: {_SET}"}
    )
    ood_test: list[str] = field(
        default_factory=list,
        metadata={"help": "Outliers that are scored, one set or several, as for --ood_dataset."},
    )
    ood_losses: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Losses that every method is trained with, each: 'plain'; 'exposure', which asks for equal "
            "probabilities of outliers; 'separation', which also turns their features away from the rows of the head "
            "and those of images to the row of their class; or YAML mappings with the weights exposure, separation, "
            "clustering and a label. Default: all three, without --ood_dataset 'plain'."
        },
    )
    ood_ratio: int = field(default=1, metadata={"help": "Auxiliary outliers beside every image of a batch."})
    ood_samples: int = field(default=1000, metadata={"help": "Take a random subset of a set that has more images."})


def head_of(classifier: Classifier) -> str:
    """Returns the name of the linear layer that makes the logits; raises a UserError if it is none."""
    modules = {name: classifier.model.get_submodule(name) for name in classifier.head}
    classes = classifier.model.config.num_labels
    found = [name for name, each in modules.items() if isinstance(each, nn.Linear) and each.out_features == classes]
    if len(found) != 1:
        shown = ", ".join(f"{name} ({type(each).__name__})" for name, each in modules.items())
        raise UserError(
            f"ood_test: the model's head is {shown}; it must be one linear layer with a row for every class"
        )
    return found[0]


@dataclass
class OutlierTask(ImageTask):
    """Telling classes apart, and outliers from all of them.

    Attributes:
        last_layer: name of the layer that makes the logits.
        added: what is added to the loss; None for nothing.
        auxiliary: outliers to train with, if the loss needs some.
        tests: outliers to score.
        ratio: auxiliary outliers for every image of a batch.
    """

    last_layer: str
    added: OutlierLoss | None
    auxiliary: OutlierSet | None
    tests: list[OutlierSet]
    ratio: int

    @property
    def trainer(self) -> Callable[..., Trainer]:
        if self.added is None:
            return super().trainer
        outliers = self.encoded(self.auxiliary.rows) if self.auxiliary and self.added.needs_outliers else None
        return partial(
            OutlierTrainer, head=self.last_layer, outlier_loss=self.added, outliers=outliers, ratio=self.ratio
        )

    def encoded(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Returns outliers as pixel values, made when they are read."""
        return dataclasses.replace(self.data, numbers={OUTLIER: OUTLIER}).encoded(rows, self.processor)

    def score(self, model: PeftModel, evaluation: Mapping[str, float], result: RunResult) -> None:
        super().score(model, evaluation, result)
        if not PartialState().is_main_process:
            return
        known = self.observe(model, self.data.encoded(self.data.validation, self.processor))
        for each in self.tests:
            outliers = self.observe(model, self.encoded(each.rows))
            for name, score in SCORES.items():
                found = detection(score(known), score(outliers))
                result.detection.append({"outliers": each.spec.label, "score": name, **found._asdict()})

    def observe(self, model: PeftModel, rows: datasets.Dataset) -> HeadPass:
        """Returns what the last layer reads and gives of images."""
        collator = partial(collate, options=forward_options(model))
        loader = DataLoader(rows, self.training.per_device_eval_batch_size, collate_fn=collator)  # type: ignore[arg-type]
        batches = ({name: value for name, value in batch.items() if name != "labels"} for batch in loader)
        return observe(model, self.last_layer, (send_to_device(batch, model.device) for batch in batches))


@dataclass
class Outliers:
    """The outliers of a comparison.

    Attributes:
        args: what was asked for.
        methods: what is trained.
        losses: what each is trained with, by label; None for the plain loss.
        refused: why methods are not trained with losses, by the labels of both.

    Args:
        args, methods: see above.

    Raises:
        UserError: an argument has no use, or does not fit the others.
    """

    args: OutlierArguments
    methods: Sequence[Method]
    losses: dict[str, OutlierLoss | None] = field(init=False)
    refused: dict[tuple[str, str], str] = field(init=False, default_factory=dict)
    auxiliary: OutlierSet | None = field(init=False, default=None)
    tests: list[OutlierSet] = field(init=False, default_factory=list)
    _auxiliary: SetSpec | None = field(init=False, default=None)
    _tests: list[SetSpec] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        inputs.check_counts(self.args, "ood_ratio", "ood_samples")
        if not self.args.ood_test:
            for each in dataclasses.fields(OutlierArguments):
                if getattr(self.args, each.name) != getattr(OutlierArguments(), each.name):
                    raise UserError(f"{each.name} has no use without --ood_test, outliers to score")
        names = self.args.ood_losses or (list(_LOSSES) if self.args.ood_dataset else ["plain"])
        self.losses = {spec.label: _loss(spec) for spec in parse_specs(names, _LOSSES, "ood_losses")}
        needing = [label for label, loss in self.losses.items() if loss and loss.needs_outliers]
        if needing and self.args.ood_dataset is None:
            raise UserError(f"ood_losses: {needing[0]!r} trains with outliers; name some with --ood_dataset")
        if self.args.ood_dataset is not None and not needing:
            raise UserError(f"ood_dataset: no loss of --ood_losses, {', '.join(self.losses)}, trains with outliers")
        if self.args.ood_dataset is not None:
            self._auxiliary = parse_set("ood_dataset", self.args.ood_dataset)
        self._tests = [parse_set("ood_test", text) for text in self.args.ood_test]
        labels = [spec.label for spec in self._tests]
        for label in {label for label in labels if labels.count(label) > 1}:
            raise UserError(f"ood_test: two are called {label!r}; give each a 'label' of its own")

    def load(self, data: ImageData) -> None:
        """Loads the outliers.

        Args:
            data: the known classes.

        Raises:
            UserError: there are none, they are of known classes, or auxiliary ones are scored.
        """
        limit, column = self.args.ood_samples, data.args.image_column
        if self._auxiliary is not None:
            self.auxiliary = load_set("ood_dataset", self._auxiliary, data.args.train_split, limit, data)
        for spec in self._tests:
            found = load_set("ood_test", spec, data.args.eval_split, limit, data)
            if self.auxiliary and (same := self.auxiliary.digests(column) & found.digests(column)):
                raise UserError(
                    f"ood_test: {len(same)} of the images of {found.spec.label} are auxiliary outliers too; take other "
                    "classes, another split, or slices such as 'train[:50%]'"
                )
            self.tests.append(found)

    def task(self, task: ImageTask, loss: OutlierLoss | None) -> OutlierTask:
        """Returns a task with outliers."""
        values = {each.name: getattr(task, each.name) for each in dataclasses.fields(task)}
        last_layer = head_of(task.classifier)
        return OutlierTask(
            **values,
            last_layer=last_layer,
            added=loss,
            auxiliary=self.auxiliary,
            tests=self.tests,
            ratio=self.args.ood_ratio,
        )

    def try_out(self, task: ImageTask, seed: int) -> None:
        """Finds the methods in which a loss changes nothing, because all that is trained is the head.

        Raises:
            UserError: the model has no linear head, or nothing is left to train.
        """
        if not self.tests:
            return
        pixels = self.task(task, None).data.encoded(task.data.validation, task.processor)[:1]["pixel_values"]
        losses = {label: loss for label, loss in self.losses.items() if loss and loss.needs_features}
        for method in self.methods if losses else ():
            model: Any = task.adapt(method, seed)
            with reading(model, head_of(task.classifier)) as passes:
                model(pixel_values=pixels, **forward_options(model))
            if not passes[-1].features.requires_grad:
                for label in losses:
                    self.refused[method.label, label] = "nothing before the head is trained, so that features stay"
        if len(self.refused) == len(self.methods) * len(self.losses):
            raise UserError(
                f"ood_losses: {', '.join(losses)}: nothing before the head is trained; add an adapter, or 'plain'"
            )

    def runs(
        self, tasks: Mapping[str, ImageTask], seeds: Sequence[int], verify: bool, flat_sigma: float | None
    ) -> dict[str, Callable[[Path], RunResult]]:
        """Returns a training of every method with every loss; the arguments are those of `trainings`."""
        runs: dict[str, Callable[[Path], RunResult]] = {}
        for method in self.methods:
            first = verify
            for label, loss in self.losses.items():
                if (method.label, label) in self.refused:
                    continue
                trained = dataclasses.replace(method, label=f"{method.label}, {label}")
                with_outliers = {mark: self.task(task, loss) for mark, task in tasks.items()}
                runs |= trainings(with_outliers, [trained], seeds, first, flat_sigma)
                first = False
        return runs

    def summary(self, results: Sequence[RunResult]) -> str:
        """Returns Markdown that says what outliers there are, with a table of how well scores tell them."""
        if not self.tests:
            return ""
        text = f"\nOutliers that are scored: {'; '.join(each.description for each in self.tests)}."
        if self.auxiliary:
            text += f" Trained with: {self.auxiliary.description}, {self.args.ood_ratio} for every image."
        text += "".join(f"\n\nNo {loss} of {method}: {reason}." for (method, loss), reason in self.refused.items())
        return f"{text}\n\n{_table(results)}\n{_MEANING}\n"


_MEANING = (
    "AUROC is the area under the ROC curve, 50 for chance; FPR95 are the outliers taken for known where 95 % of the "
    "known images are, both in percent. Scores: the maximum softmax probability (MSP), the negative energy, and the "
    "cosine score."
)


def _loss(spec: Spec) -> OutlierLoss | None:
    if spec.name == "plain":
        return None
    absent = {name: 0.0 for name in _TERMS if name not in _LOSSES[spec.name]}
    try:
        return OutlierLoss(**{**absent, **spec.options})
    except ValueError as error:
        raise UserError(f"ood_losses: {spec.label!r}: {error}") from error


def _table(results: Sequence[RunResult]) -> str:
    """Returns Markdown with a row for every method and score: mean and, over several runs, standard deviation."""
    sets = list(dict.fromkeys(row["outliers"] for result in results for row in result.detection))
    table = Table(box=box.MARKDOWN)
    for heading in ("method", "score"):
        table.add_column(heading)
    for heading in [f"{name}, {each}" for each in sets for name in ("AUROC", "FPR95")]:
        table.add_column(heading, justify="right")
    for label, runs in by_label(results).items():
        for score in SCORES:
            rows = [row for run in runs for row in run.detection if row["score"] == score]
            cells = [
                spread([row[key] for row in rows if row["outliers"] == each], 1)
                for each in sets
                for key in ("auroc", "fpr95")
            ]
            table.add_row(label, score, *cells)
    return markdown(table)
