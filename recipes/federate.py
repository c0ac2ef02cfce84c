"""Trains image classifiers with agents that each have a part of the data, and exchange coefficients or outputs.

``python -m recipes.federate`` runs the quickstart, which needs no hub: ten agents and the ten digits, unequally
divided. Flags such as ``--output_dir`` change it; with ``--model_name_or_path`` or ``--dataset_name`` it is a task of
your own. ``--help`` lists the arguments. It needs Flower, the extra ``federated``, and runs all agents in this process;
the same program runs on machines that Flower connects, see docs/federated.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from transformers import TrainingArguments

from recipes.federation.agents import AGREE, ALONE, AVERAGE, LABELS, POOLED, ComparisonArguments, Federation, apart
from recipes.federation.results import FederatedResult, write_report
from recipes.federation.split import FederationArguments, check_split
from recipes.support.arguments import UserError, run_main
from recipes.support.methods import HEAD, Method, parse_methods
from recipes.support.runs import Recipe, RunArguments, run_recipe
from recipes.support.usage import Usage
from recipes.tasks import digits, image_classification
from recipes.tasks.image_classification import DataArguments, ModelArguments
from recipes.tasks.seeded import FULL
from recipes.tasks.toys import refuse_other_inputs


def check_flower() -> None:
    """Raises a UserError if Flower is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise UserError("federate needs Flower, of Python 3.11 or later: pip install -e '.[federated]'")


@dataclass
class Federate(Recipe[FederatedResult]):
    """Learning from the data of several agents, which stay where they are."""

    model: ModelArguments
    data: DataArguments
    federation: FederationArguments
    comparison: ComparisonArguments
    run: RunArguments
    quickstart: digits.QuickstartArguments
    training: TrainingArguments
    methods: list[Method] = field(init=False)
    problem: Federation = field(init=False)

    name = "federate"
    result = FederatedResult
    grid: ClassVar[Any] = None
    """Flower's way to the agents; in this process if there is none."""

    def check(self) -> None:
        check_flower()
        self.methods = parse_methods(self.comparison.methods, extra=[HEAD, FULL])
        for method in self.methods:
            method.refuse_dropout()
        for way in self.comparison.compare:
            if way not in (AGREE, ALONE, POOLED):
                raise UserError(f"compare: {way!r} is none of {AGREE}, {ALONE}, {POOLED}")
        check_split(self.federation)
        if self.training.max_steps > 0:
            raise UserError("max_steps: a round is counted in passes over an agent's samples; give --num_train_epochs")
        if self.training.dataloader_drop_last:
            raise UserError("dataloader_drop_last: an agent's samples may be less than a batch; leave it out")
        if self.quickstart.digits:
            refuse_other_inputs("digits", self.model, self.data)
            if self.grid is not None:
                raise UserError(
                    "digits makes model and data in one place: name --model_name_or_path and --dataset_name"
                )
        if self.data.shots is not None or len(self.data.data_seeds) > 1:
            raise UserError("--shots and --data_seeds are for other recipes: the seed of a run draws who has what")
        if PartialState().num_processes > 1:
            raise UserError("federate runs in one process: start it without accelerate launch")

    def make(self, folder: Path) -> None:
        if self.quickstart.digits:
            digits.prepare(folder, self.model, self.data, self.training.use_cpu)

    def load(self) -> None:
        data = image_classification.load_image_data(self.data)
        classifier = image_classification.load_classifier(self.model, data.labels)
        rows = [
            image_classification.ImageRows(data.encoded(each, classifier.processor))
            for each in (data.train, data.validation)
        ]
        image_classification.check_model(classifier, rows[0].pixel_values[:1])
        sharing = AGREE in self.comparison.compare
        self.problem = Federation(classifier, rows[0], rows[1], self.federation, self.training, sharing)

    def try_out(self) -> None:
        for seed in self.seeds:
            self.problem.split(seed)
        for method in self.methods:
            self.problem.exchange(method, self.seeds[0])

    def runs(self) -> dict[str, Callable[[Path], FederatedResult]]:
        wanted = [(method, AVERAGE) for method in self.methods]
        wanted += [(self.methods[0], way) for way in self.comparison.compare]
        return {
            f"{method.folder}-{way}-seed{seed}": partial(self.learn, method, way, seed)
            for seed in self.seeds
            for method, way in wanted
        }

    def learn(self, method: Method, way: str, seed: int, folder: Path) -> FederatedResult:
        """Trains all agents in one way, and prints a line."""
        with Usage(self.training.device) as usage:
            if way in (AVERAGE, AGREE):
                result = self._exchange(method, way, seed)
            else:
                result = apart(self.problem, method, way, seed)
        result.label, result.seed, result.seconds = method.label + LABELS[way], seed, usage.seconds
        print(result.line(), flush=True)
        return result

    def _exchange(self, method: Method, way: str, seed: int) -> FederatedResult:
        from recipes.federation.flower import InProcess, exchange, make_client

        client = make_client(lambda context: (self.problem, self.methods))
        grid = self.grid or InProcess(client, self.federation.agents)
        return exchange(grid, self.problem, method, way, seed)

    def report(self, results: list[FederatedResult], folder: Path) -> list[str]:
        parts = [part for seed in self.seeds for part in self.problem.split(seed).parts]
        notes = (
            f"{self.federation.agents} agents with {min(map(len, parts))} to {max(map(len, parts))} training images "
            f"each (Dirichlet {self.federation.dirichlet:g}), {self.federation.rounds} rounds; "
            f"{len(self.problem.test):,} test images; seeds {', '.join(map(str, self.seeds))}. Bytes: of the "
            "numbers or outputs, of one agent. Accuracy: in percent, of the common model or the mean over those of all "
            "agents.\n"
        )
        return write_report(results, folder, notes)


def main(argv: Sequence[str], grid: Any = None) -> None:
    """Runs the recipe, with agents that a grid of Flower leads to if one is given."""
    run_recipe(type(Federate.__name__, (Federate,), {"grid": grid}), argv)


if __name__ == "__main__":
    run_main(main)
