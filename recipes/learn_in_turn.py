"""Learns tasks one after the other with one adapter, in several ways, and says what becomes of the earlier ones.

``python -m recipes.learn_in_turn`` runs the quickstart, which needs no hub: the ten digits, two at a time. Flags such
as ``--output_dir`` change it; with ``--model_name_or_path`` or ``--dataset_name`` it is a task of your own, and
``--preset swiss_roll`` takes seconds. ``--help`` lists the arguments. It runs under ``accelerate launch -m`` unchanged.
A task is known when it is asked for: a classifier chooses among its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import TrainingArguments

from recipes.continual.learners import Learner, LearnerArguments, Turns, parse_learners
from recipes.continual.problems import Problem, TaskArguments, check_tasks, split_images, swiss_roll
from recipes.continual.results import TurnResult, write_report
from recipes.support import inputs
from recipes.support.arguments import UserError, run_main
from recipes.support.methods import HEAD, Method, parse_methods
from recipes.support.runs import Recipe, RunArguments, run_recipe
from recipes.tasks import digits
from recipes.tasks.image_classification import DataArguments, ModelArguments
from recipes.tasks.toys import refuse_all, refuse_other_inputs


@dataclass
class LearnInTurn(Recipe[TurnResult]):
    """Learning tasks in turn, with one learner after the other."""

    model: ModelArguments
    data: DataArguments
    tasks: TaskArguments
    comparison: LearnerArguments
    run: RunArguments
    quickstart: digits.QuickstartArguments
    training: TrainingArguments
    adapter: Method = field(init=False)
    learners: dict[str, Learner] = field(init=False)
    problem: Problem = field(init=False)
    turns: Turns = field(init=False)

    name = "learn_in_turn"
    result = TurnResult

    def check(self) -> None:
        (self.adapter,) = parse_methods([self.comparison.adapter], extra=[HEAD], flag="adapter")
        self.adapter.config(None, self.seeds[0])
        self.adapter.refuse_dropout()
        self.training.learning_rate = self.adapter.learning_rate or self.training.learning_rate
        self.learners = parse_learners(self.comparison.learners)
        inputs.check_counts(self.comparison, "memory_samples")
        for name in ("label_smoothing_factor", "gradient_checkpointing", "dataloader_drop_last"):
            if getattr(self.training, name):
                raise UserError(
                    f"{name} is for other recipes: here a task is trained on whole, without it; leave it out"
                )
        check_tasks(self.tasks, self.adapter)
        if self.tasks.swiss_roll is not None:
            if self.quickstart.digits:
                raise UserError("swiss_roll and digits are two problems: give one of them")
            refuse_all("swiss_roll has no images", self.model, self.data)
        if self.quickstart.digits:
            refuse_other_inputs("digits", self.model, self.data)
        if len(self.data.data_seeds) > 1:
            raise UserError(f"data_seeds: one subset is learned, not those of {self.data.data_seeds}; give one seed")

    def make(self, folder: Path) -> None:
        if self.quickstart.digits:
            digits.prepare(folder, self.model, self.data, self.training.use_cpu)

    def load(self) -> None:
        if self.tasks.swiss_roll is not None:
            self.problem = swiss_roll(self.tasks, self.adapter)
        else:
            self.problem = split_images(self.model, self.data, self.tasks, self.adapter)
        self.turns = Turns(self.problem, self.training, self.comparison.memory_samples)

    def try_out(self) -> None:
        for learner in self.learners.values():
            self.turns.try_out(learner, self.seeds[0])

    def runs(self) -> dict[str, Callable[[Path], TurnResult]]:
        return {
            f"{folder}-seed{seed}": partial(self.turns.run, learner, seed)
            for seed in self.seeds
            for folder, learner in self.learners.items()
        }

    def report(self, results: list[TurnResult], folder: Path) -> list[str]:
        sizes = [sum(map(len, rows)) for rows in (self.problem.train, self.problem.test)]  # type: ignore[arg-type]
        left_out = "".join(f" (no task has the class {name})" for name in self.problem.left_out)
        notes = (
            f"{len(self.problem.names)} tasks{left_out}, {sizes[0]:,} samples to train and {sizes[1]:,} to test; seeds "
            f"{', '.join(map(str, self.seeds))}. Accuracy: mean over the tasks learned so far, in percent. Backward "
            "transfer: what earlier tasks have gained or lost since each was learned, in points. Protected: directions "
            "that no step takes any more. One adapter a task has as many numbers again for every task.\n"
        )
        return write_report(results, folder, notes)


def main(argv: Sequence[str]) -> None:
    """Runs the recipe."""
    run_recipe(LearnInTurn, argv)


if __name__ == "__main__":
    run_main(main)
