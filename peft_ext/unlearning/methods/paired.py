"""A training whose every step takes a forget batch and a retain batch: what the customary baselines share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ...checks import check_not_negative
from ...targets import IGNORED, Alignment
from ...training.modes import check_dependence
from ...training.trainer import EvaluationTrainer
from ..derivatives.losses import CrossEntropy
from .base import Request
from .tuning import Tuning


class Pairs(Dataset):
    """Samples to forget, each with a random sample to retain.

    Args:
        parts: sets with a row for every sample to forget, by name; the samples themselves are `"forget"`.
        retain: the samples that stay; None leaves them out.
        draw: returns, for a size, a partner for every sample: places in `retain`.
    """

    def __init__(self, parts: Mapping[str, Any], retain: Any, draw: Callable[[int], Any]) -> None:
        self.parts, self.retain, self.draw = parts, retain, draw
        self.new_partners()

    def new_partners(self) -> None:
        """Draws another retain sample for every sample to forget."""
        self.partners = self.draw(len(self))

    def __len__(self) -> int:
        return len(self.parts["forget"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = {name: part[index] for name, part in self.parts.items()}
        if self.retain is not None:
            rows["retain"] = self.retain[int(self.partners[index])]
        return {**rows, "place": index}


def collate_pairs(collator: Callable[[list[Any]], Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a batch of each part of some pairs, by its name, and their places among the samples to forget, `(n,)`."""
    batch = {name: collator([row[name] for row in rows]) for name in rows[0] if name != "place"}
    return {**batch, "place": torch.tensor([row["place"] for row in rows])}


class NewPartners(TrainerCallback):
    """Pairs the samples to forget anew in every pass but the first, for which they are paired already."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.passes = pairs, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.passes:
            self.pairs.new_partners()
        self.passes += 1


def log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probability of every sample's targets, `(n,)` in nats, and how many targets it has, `(n,)`.

    A classifier of samples has one target, its class; for texts the log-probabilities of the targets add up.

    Raises:
        ValueError: the labels are no classes or tokens; see `Alignment`.
    """
    alignment = Alignment.of(extract_model_from_parallel(model))
    arguments, labels = alignment.split(batch)
    outputs, targets = alignment.pair(model(**arguments), labels)
    return -CrossEntropy().values(outputs, targets), (targets != IGNORED).sum(1)


@torch.no_grad()
def reference_log_probabilities(request: Request, rows: Dataset) -> torch.Tensor:
    """Returns the log-probabilities of the targets of some rows under a request's model as it is now, `(rows,)`.

    Every process goes through all rows.
    """
    device = request.training.device
    model = request.model.to(device).eval()  # type: ignore[arg-type]
    batches = (send_to_device(batch, device) for batch in request.loader(rows))
    return torch.cat([log_probabilities(model, batch)[0] for batch in batches])


class PairedTrainer(EvaluationTrainer):
    """Descends the loss of a method on forget batches and the training's own loss on retain batches, added up.

    Args:
        method: what is done.
        before: what `Paired.before` found.
        *args, **kwargs: what a Trainer takes.
    """

    def __init__(self, method: Paired, before: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.before = method, before

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        model.eval()
        loss = self.method.forget_loss(model, inputs, self.before)
        check_dependence(loss, sum(p.numel() for p in model.parameters() if p.requires_grad))
        if self.method.retain_weight:
            loss = loss + self.method.retain_weight * super().compute_loss(model, inputs["retain"])
        return (loss, {}) if return_outputs else loss


@dataclass
class Paired(Tuning):
    """A method that pairs every forget sample with a random retain sample and descends a loss of both.

    Subclasses give the loss on forget batches. A pass is one over the forget set; every pass pairs anew, by the
    training's seed.

    Attributes:
        epochs: passes over the forget set.
        learning_rate: three tenths of that of the model's training if None.
        batch_size: forget samples per device in a batch, and as many retain samples beside them.
        retain_weight: how much the loss of the retain samples counts beside that of the forget samples; with 0 the
            retain set is not read.
    """

    epochs: float = 10.0
    retain_weight: float = 1.0

    rate: ClassVar[float] = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("retain_weight", self.retain_weight)

    @abstractmethod
    def forget_loss(self, model: nn.Module, batch: Mapping[str, Any], before: Any) -> torch.Tensor:
        """Returns what is descended on a forget batch, a scalar.

        Args:
            model: in evaluation mode.
            batch: what `collate_pairs` makes: a batch under every name of `parts`, and `place`.
            before: what `before` returned.
        """

    def parts(self, request: Request) -> dict[str, Any]:
        """Returns sets with a row for every sample to forget, by name."""
        return {"forget": request.forget}

    def before(self, request: Request, parts: Mapping[str, Any]) -> Any:
        """Returns what the loss needs to know of the model before its first step; by default nothing."""
        return None

    def data(self, request: Request) -> Pairs:
        total = len(request.retain)  # type: ignore[arg-type]
        retain = request.retain if self.retain_weight else None
        return Pairs(self.parts(request), retain, partial(request.rng().integers, 0, total))

    def arguments(self, request: Request) -> TrainingArguments:
        training = super().arguments(request)
        training.learning_rate *= 1.0 if self.learning_rate is not None else self.rate
        # In evaluation mode buffers stay as they are, and a step calls the model more than once before it goes back.
        training.ddp_broadcast_buffers = False
        return training

    def train(self, request: Request) -> Trainer:
        pairs = self.data(request)
        trainer_class = partial(PairedTrainer, self, self.before(request, pairs.parts))
        paired = replace(request, collator=partial(collate_pairs, request.collator))
        return paired.fit(pairs, self.arguments(request), trainer_class, callbacks=[NewPartners(pairs)])
