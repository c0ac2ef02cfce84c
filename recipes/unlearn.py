"""Makes a fine-tuned model forget some training samples, with several methods, and compares them with retraining.

``python -m recipes.unlearn`` runs the quickstart, which needs no hub, and flags such as ``--output_dir`` change it;
with ``--model_name_or_path``, ``--dataset_name`` or ``--network_weights`` it is a task of your own. ``--help`` lists
the arguments. It runs under ``accelerate launch -m`` unchanged. Every seed trains the original on all samples and, for
every case of what is to be forgotten, the gold: from the same start, without the forget set. Every method starts from
the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from peft_ext.unlearning.evaluation.report import write_report
from peft_ext.unlearning.evaluation.results import GOLD, ORIGINAL, UnlearningResult
from peft_ext.unlearning.methods import Retrain, UnlearningMethod
from recipes.support.arguments import UserError, run_main
from recipes.support.methods import Method
from recipes.support.runs import Recipe, RunArguments, run_recipe
from recipes.tasks import digits
from recipes.unlearning import same_time
from recipes.unlearning.cases import Case, CaseArguments, CaseSpec, choose, parse_cases
from recipes.unlearning.experiment import FILES, Experiment, notes
from recipes.unlearning.same_time import SameTime, like_before, parse_same_time
from recipes.unlearning.settings import (
    DataArguments,
    ModelArguments,
    Setting,
    UnlearnArguments,
    check_arguments,
    check_quickstart,
    load_images,
    load_labelled_texts,
    load_texts,
    load_tofu,
    parse_adapter,
    parse_unlearning_methods,
)


@dataclass
class Unlearn(Recipe[UnlearningResult]):
    """Forgetting some training samples, with one method after the other."""

    model: ModelArguments
    data: DataArguments
    case: CaseArguments
    comparison: UnlearnArguments
    run: RunArguments
    quickstart: digits.QuickstartArguments
    training: TrainingArguments
    methods: dict[str, UnlearningMethod] = field(init=False)
    before: dict[str, UnlearningMethod] = field(init=False)
    asked: str | None = field(init=False)
    baselines: dict[str, SameTime] = field(init=False)
    specs: list[CaseSpec] = field(init=False)
    adapter: Method | None = field(init=False)
    setting: Setting = field(init=False)
    cases: list[Case] = field(init=False)

    name = "unlearn"
    result = UnlearningResult
    marks = ("*/*/unlearning.json", *FILES)

    def check(self) -> None:
        check_arguments(self.model, self.data, self.comparison)
        if self.quickstart.digits:
            check_quickstart(self.model, self.data, self.comparison)
        self.methods = parse_unlearning_methods(self.comparison.methods)
        self.before, self.asked = self.methods, self.comparison.same_time_as
        self.baselines = parse_same_time(self.comparison.same_time, self.asked, self.methods)
        self.comparison.same_time_as = next((each.like for each in self.baselines.values()), None)
        self.specs = parse_cases(self.case, self.comparison.task)
        self.adapter = parse_adapter(self.comparison, self.training, self.seeds[0])

    def continued(self, name: str, before: Any, now: Any) -> Any:
        if name in ("cases", "seeds", "further_golds"):
            return now
        if name == "same_time_as":  # after the methods
            like = like_before(before, self.asked, self.before, self.methods)
            if like in self.methods:
                self.baselines = parse_same_time(self.comparison.same_time, like, self.methods)
            return like
        if name != "methods":
            return None
        self.before = known = parse_unlearning_methods(before)
        if any(known[label] != self.methods[label] for label in known.keys() & self.methods.keys()):
            return None  # what is there under a label is something else
        return [*now, *(text for text, label in zip(before, known) if label not in self.methods)]

    def make(self, folder: Path) -> None:
        if self.quickstart.digits:
            digits.prepare(folder, self.model, self.data, self.training.use_cpu)

    def load(self) -> None:
        task = self.comparison.task
        if task == "image":
            self.setting = load_images(self.model, self.data, self.comparison, self.adapter)
            return
        assert self.adapter is not None
        if task == "tofu":
            splits, batch_size = [spec.kind for spec in self.specs], self.training.per_device_eval_batch_size
            self.setting = load_tofu(self.model, self.data, self.adapter, splits, batch_size)
        else:
            load = load_texts if task == "text" else load_labelled_texts
            self.setting = load(self.model, self.data, self.adapter)

    def try_out(self) -> None:
        unknown = partial(np.zeros, len(self.setting.train))  # memorisation is not measured yet
        cases = [choose(spec, self.case, self.setting.train, self.setting.test, unknown) for spec in self.specs]
        experiment = Experiment(self.setting, self.training, self.comparison, None)
        for case in cases:
            request = experiment.request(self.seeds[0], case.forget)
            for label, method in self.methods.items():
                try:
                    method.check(request)
                except ValueError as error:
                    raise UserError(f"method {label!r}: {error}") from error

    def runs(self) -> dict[str, Callable[[Path], UnlearningResult]]:
        limit = self.data.max_retain_eval_samples
        experiment = Experiment(self.setting, self.training, self.comparison, limit)
        memorisation = partial(experiment.memorisation, self.case.memorised_pairs, self.case.forget_seed)
        train, test = self.setting.train, self.setting.test
        self.cases = [choose(spec, self.case, train, test, memorisation) for spec in self.specs]
        everything: dict[str, Any] = {ORIGINAL: None, GOLD: Retrain(), **self.methods, **self.baselines}
        return experiment.runs(self.cases, everything, self.seeds)

    def report(self, results: list[UnlearningResult], folder: Path) -> list[str]:
        said = notes(self.setting, self.cases, self.comparison, self.seeds, same_time.notes(self.baselines))
        write_report(results, folder, "Unlearning", said)
        return ["report.md", "report.json", "accuracy.png", "losses.png", "tradeoff.png"]


def main(argv: Sequence[str]) -> None:
    """Runs the recipe."""
    run_recipe(Unlearn, argv)


if __name__ == "__main__":
    run_main(main)
