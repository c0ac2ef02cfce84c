"""What agents learn and do: train on their part, exchange numbers or agree on outputs, and are measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import TrainingArguments, set_seed

from peft_ext.adapters.federated import Exchange
from peft_ext.training.trainer import fit
from peft_ext.unlearning.evaluation.metrics import observe
from peft_ext.unlearning.methods.soft_targets import SoftCollator, SoftTargets, SoftTrainer
from recipes.federation.results import FederatedResult
from recipes.federation.split import FederationArguments, Split, split
from recipes.support.arguments import UserError
from recipes.support.methods import Method
from recipes.tasks import image_classification
from recipes.tasks.base import adapt
from recipes.tasks.seeded import FULL

AVERAGE, AGREE, ALONE, POOLED = "average", "agree", "alone", "pooled"
LABELS = {
    AVERAGE: "",
    AGREE: ", agreeing on outputs",
    ALONE: ", every agent alone",
    POOLED: ", all data in one place",
}
"""The ways to learn, and what they add to a method's label."""

_APART = 1000  # seeds of agents that have their own, and of the rounds of a training


@dataclass
class ComparisonArguments:
    """What the agents train."""

    methods: list[str] = field(
        default_factory=lambda: ["pranc"],
        metadata={
            "help": "Methods whose numbers are averaged, one after the other: PEFT methods as for finetune_vit, such "
            "as '{name: lora, r: 8, learning_rate: 2e-3, label: LoRA r=8}'; 'head', the head alone; 'full', all "
            "weights."
        },
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What the first method is compared with: 'agree', agents of different seeds, which learn each "
            "other's mean outputs on shared samples; 'alone', agents that exchange nothing; 'pooled', all data in one "
            "place."
        },
    )


class Unlabelled(Dataset):
    """Some rows of a data set with 0 in place of their labels.

    Args:
        rows: all of them.
        places: those that are meant.
    """

    def __init__(self, rows: Any, places: Sequence[int]) -> None:
        self.rows, self.places = rows, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[self.places[index]], "labels": 0}


@dataclass
class Federation:
    """The data of all agents, and the model that every one of them trains.

    Attributes:
        classifier: the base model.
        train, test: rows of images.
        args: how the training rows are divided, and how often they are exchanged.
        training: the Trainer's arguments, for the training of an agent in a round.
        sharing: whether samples are put aside that all agents have.
    """

    classifier: image_classification.Classifier
    train: image_classification.ImageRows
    test: image_classification.ImageRows
    args: FederationArguments
    training: TrainingArguments
    sharing: bool
    _splits: dict[int, Split] = field(init=False, default_factory=dict)
    _models: dict[tuple[str, int], tuple[nn.Module, torch.Tensor]] = field(init=False, default_factory=dict)

    def split(self, seed: int) -> Split:
        """Returns who has which samples in the run with a seed."""
        if seed not in self._splits:
            self._splits[seed] = split(self.train.labels, self.args, self.sharing, seed)
        return self._splits[seed]

    def fresh(self, method: Method, seed: int) -> nn.Module:
        """Returns the base model with a fresh adapter and head, on the device."""
        if method.name == FULL:
            set_seed(seed)
            model: nn.Module = self.classifier.fresh_model()
        else:
            model = adapt(self.classifier.fresh_model, method, seed, self.classifier.head)
        return model.to(self.training.device)

    def exchange(self, method: Method, seed: int) -> Exchange:
        """Returns what is exchanged of a fresh model.

        Raises:
            UserError: it cannot be averaged.
        """
        try:
            return Exchange(self.fresh(method, seed))
        except ValueError as error:
            raise UserError(f"method {method.label!r}: {error}") from error

    def agent(self, method: Method, way: str, seed: int, number: int) -> Agent:
        """Returns an agent whose model has the numbers that training begins with."""
        # Agents that average have one seed, and one model serves them all: each puts its numbers into it.
        own_seed = seed if way in (AVERAGE, POOLED) else seed + _APART * (number + 1)
        key = (method.folder, own_seed)
        if key not in self._models:
            if len(self._models) >= self.args.agents:
                self._models.clear()
            model = self.fresh(method, own_seed)
            self._models[key] = model, Exchange(model).vector
        model, start = self._models[key]
        found = Agent(self, model, self.split(seed), seed, number, method.learning_rate)
        found.exchange.vector = start
        return found


@dataclass
class Agent:
    """One agent.

    Attributes:
        federation: what all agents have.
        model: what it trains.
        split: who has which samples.
        seed: of the run.
        number: of the agent, from 0.
        learning_rate: that of its method, if it has one.
    """

    federation: Federation
    model: nn.Module
    split: Split
    seed: int
    number: int
    learning_rate: float | None

    @property
    def samples(self) -> int:
        """How many samples it trains on."""
        return len(self.split.parts[self.number])

    @property
    def exchange(self) -> Exchange:
        """What it exchanges with agents of the same seed."""
        return Exchange(self.model)

    def learn(self, number: int, places: Sequence[int] | None = None, epochs: float | None = None) -> None:
        """Trains the model on the agent's part.

        Args:
            number: of the round, which draws the order of the samples, with the agent's.
            places: samples to train on in place of the agent's.
            epochs: how often, in place of what the training's arguments say.
        """
        part = Subset(self.federation.train, self.split.parts[self.number] if places is None else list(places))
        training = self._training(number)
        training.num_train_epochs = training.num_train_epochs if epochs is None else epochs
        fit(self.model, part, self._collator, training)

    def outputs(self) -> torch.Tensor:
        """Returns the probabilities of all classes on the shared samples, `(samples, classes)` in float32."""
        found = observe(self.model, self._loader(Unlabelled(self.federation.train, self.split.shared))).log_probs
        assert found is not None
        return torch.from_numpy(found).exp()

    def agree(self, number: int, wanted: torch.Tensor) -> None:
        """Trains the model towards given probabilities on the shared samples, `(samples, classes)`."""
        rows = SoftTargets(Unlabelled(self.federation.train, self.split.shared), list(wanted[:, None]))
        training = self._training(number)
        training.num_train_epochs = self.federation.args.agree_epochs
        fit(self.model, rows, SoftCollator(self._collator), training, partial(SoftTrainer, "cross_entropy"))

    def accuracy(self) -> float:
        """Returns the accuracy in percent on all test samples."""
        return 100 * float(observe(self.model, self._loader(self.federation.test)).correct.mean())

    def _training(self, number: int) -> TrainingArguments:
        training = copy.copy(self.federation.training)
        training.seed = ((self.seed * _APART + number) * _APART + self.number) % 2**32  # as large as NumPy takes them
        training.learning_rate = self.learning_rate or training.learning_rate
        return training

    def _loader(self, rows: Any) -> Any:
        size = self.federation.training.per_device_eval_batch_size
        return DataLoader(rows, size, collate_fn=self._collator)

    @property
    def _collator(self) -> Any:
        options = image_classification.forward_options(self.federation.classifier.model)
        return partial(image_classification.collate, options=options)


def apart(federation: Federation, method: Method, way: str, seed: int) -> FederatedResult:
    """Trains without any exchange, as often as all rounds together do.

    Args:
        federation: data and base model.
        method: what is trained.
        way: `"alone"`, every agent on its own part, or `"pooled"`, one model on all of them.
        seed: of the run.
    """
    parts, accuracy = federation.split(seed).parts, []
    epochs = federation.args.rounds * federation.training.num_train_epochs
    for number in range(1 if way == POOLED else federation.args.agents):
        agent = federation.agent(method, way, seed, number)
        agent.learn(1, sum(parts, []) if way == POOLED else None, epochs)
        accuracy.append(agent.accuracy())
    return FederatedResult(parameters=agent.exchange.size, accuracy=[mean(accuracy)])
