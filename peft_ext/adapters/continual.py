"""Learning tasks in turn with one adapter: what it keeps of those that it has learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import TrainerCallback

from ..checks import check_not_negative, check_positive, check_positive_integer, check_share
from ..training.callbacks import DropChanges, Ridge, trainable_parameters
from ..training.projection import Projection, ProjectUpdates
from ..unlearning.derivatives.data import Loader, gathered
from ..unlearning.derivatives.function import AdapterFunction
from ..unlearning.derivatives.losses import CrossEntropy
from ..unlearning.derivatives.quadratic import RowSum


class Softened(CrossEntropy):
    """Cross-entropy whose softmax is taken of outputs over a temperature, as far as derivatives go.

    At 1 its curvature is that of the loss, which says little of samples that the model is sure of. The higher the
    temperature, the more all differences of outputs count alike, those of classes with the lowest possible output
    apart.

    Args:
        temperature: above 0.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def label_weights(self, outputs: torch.Tensor) -> torch.Tensor:
        return super().label_weights(outputs / self.temperature)

    def directions(self, outputs: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        return super().directions(outputs / self.temperature, amounts)

    def squared_lengths(self, outputs: torch.Tensor) -> torch.Tensor:
        return super().squared_lengths(outputs / self.temperature)


@dataclass
class TaskMemory:
    """What an adapter keeps of the tasks that it has learned, one after the other, while it learns the next one.

    The vector that is trained is short, so everything is done in its space: the trained coefficients, and a head that
    is trained beside them, of any PEFT adapter or `SeededNetwork`. Three ways can be joined. With none of them it is
    fine-tuning.

    - Projection (gradient projection memory, Saha et al. 2021). After a task, the leading directions in which its
      outputs depend on the vector are added to those that are protected, and no later step goes along them: outputs of
      earlier tasks stay as they were, to first order. The published method does it layer by layer, with the inputs of
      whole weight matrices.
    - Elastic weight consolidation (Kirkpatrick et al. 2017): every number is pulled to where each earlier task left it,
      as strongly as that task's loss depends on it, by the diagonal of the Fisher matrix.
    - Heterogeneous dropout (Abbasi et al. 2022, there of units): what a task changes in a number is dropped with the
      rate `1 - exp(-dropout * use / largest use)`, so that tasks use different numbers. A number's use is how far
      earlier tasks' changes of it have moved their outputs (root mean square, to first order).

    Args:
        energy: share of the trace of a task's `J^T J` that is protected, above 0 and at most 1; None for no projection.
        components: at most as many directions are added a task. By default the share of the energy alone decides.
        temperature: of the softmax by which differences of outputs are weighted; see `Softened`.
        elastic: strength of the penalty of elastic weight consolidation; 0 for none.
        dropout: how strongly use leads to dropout; 0 for none.
        draws: random vectors a sample that estimate derivatives, exact from the number of classes of a task on; None
            for all classes.
        memory: bytes that derivatives of a chunk of samples may take.

    Attributes:
        projection: what is protected; None as long as nothing is.
        tasks: how many tasks it remembers.
    """

    energy: float | None = None
    components: int | None = None
    temperature: float = 100.0
    elastic: float = 0.0
    dropout: float = 0.0
    draws: int | None = 3
    memory: float = 2e9
    projection: Projection | None = field(default=None, init=False, repr=False)
    tasks: int = field(default=0, init=False)
    _fisher: torch.Tensor | None = field(default=None, init=False, repr=False)
    _centre: torch.Tensor | None = field(default=None, init=False, repr=False)
    _use: torch.Tensor | None = field(default=None, init=False, repr=False)
    _before: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.energy is not None:
            check_share("energy", self.energy)
        if self.components is not None:
            check_positive_integer("components", self.components)
            if self.energy is None:
                raise ValueError("`components` bounds what is protected: give `energy` too, such as 0.99.")
        for name in ("temperature", "memory"):
            check_positive(name, getattr(self, name))
        for name in ("elastic", "dropout"):
            check_not_negative(name, getattr(self, name))
        if self.draws is not None:
            check_positive_integer("draws", self.draws)

    def callbacks(self, model: nn.Module, seed: int = 0) -> list[TrainerCallback]:
        """Returns what a Trainer needs for the next task; see `peft_ext.training.trainer.fit`.

        Args:
            model: as it is before that task.
            seed: draws what is dropped.

        Raises:
            ValueError: the model has another number of trainable numbers than before.
        """
        parameters = trainable_parameters(model)
        self._before = _vector(parameters)
        known = next((each for each in (self._fisher, self._use) if each is not None), None)
        if known is not None and len(known) != len(self._before):
            raise ValueError(
                f"The earlier tasks trained {len(known):,} numbers; this model has {len(self._before):,} to train."
            )
        found: list[TrainerCallback] = []
        if self._fisher is not None and self._centre is not None:
            strength = {name: self.elastic * part for name, part in _split(self._fisher, parameters).items()}
            found.append(Ridge(model, _split(self._centre, parameters), strength))
        if self._use is not None and self._use.any():
            rates = 1 - torch.exp(-self.dropout * self._use / self._use.max())
            found.append(DropChanges(parameters, _split(rates, parameters), seed + self.tasks))
        if self.projection is not None:
            found.append(ProjectUpdates(parameters, self.projection))
        return found

    def remember(self, model: nn.Module, loader: Loader) -> None:
        """Takes in a task that the model has just learned, after a training with `callbacks`.

        Args:
            model: the trained model.
            loader: samples of the task, a few hundred are enough: dicts of the model's arguments and `labels`. It is
                read in evaluation mode, and may be read more than once.

        Raises:
            ValueError: the loader gives no sample, nothing of the vector has an effect on the outputs, or all of it
                would be protected.
        """
        if self.energy is not None or self.dropout:
            function, rows = self._rows(model, loader, self.temperature)
            if self.energy is not None:
                self.projection = Projection(rows, self.energy, components=self.components, beside=self.projection)
            if self.dropout:
                moved = function.vector if self._before is None else function.vector - self._before.to(function.device)
                use = moved.abs() * rows.square().sum(0).sqrt()
                self._use = use if self._use is None else self._use + use
        if self.elastic:
            function, rows = self._rows(model, loader, 1.0)
            fisher, centre = rows.square().sum(0), function.vector
            if self._fisher is not None and self._centre is not None:
                # The sum of two penalties is one around their weighted mean, but for a constant.
                both = self._fisher + fisher
                weighted = self._fisher * self._centre + fisher * centre
                fisher, centre = both, torch.where(both > 0, weighted / both.clamp(min=1e-300), centre)
            self._fisher, self._centre = fisher, centre
        self.tasks += 1

    def _rows(self, model: nn.Module, loader: Loader, temperature: float) -> tuple[AdapterFunction, torch.Tensor]:
        """Returns the rows R `(m, size)` of the mean of a task's curvature `R^T R`."""
        model.eval()
        function = AdapterFunction(model, Softened(temperature), memory=self.memory / 2)
        rows, targets = RowSum("kernel", function), 0
        for found in function.linearise(loader, self.draws):
            rows.add(found.rows)
            targets += found.num_targets
        targets = sum(gathered([targets]))
        if not targets:
            raise ValueError("The task has no samples: its loader gives none with a target.")
        return function, rows.total().flatten(0, 1).to(function.device) / math.sqrt(targets)


def _vector(parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in parameters.values()])


def _split(vector: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    parts = vector.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view(p.shape).to(p) for (name, p), part in zip(parameters.items(), parts)}
