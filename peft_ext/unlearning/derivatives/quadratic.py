"""The quadratic model of a loss around some weights: its curvature, in the form that fits, and its damped minimum."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from .curvature import Curvature, KernelForm, MatrixFreeForm, ParameterForm
from .data import Loader, gathered, total
from .function import AdapterFunction

MEMORY = 4e9
"""Bytes that matrices may take unless the user says otherwise."""

DRAWS = 3
"""Random vectors a sample that estimate a curvature unless the user says otherwise."""


def bytes_needed(form: str, size: int, rows: int) -> float:
    """Returns the bytes that a form of the curvature takes.

    Args:
        form: `"parameter"`, `"kernel"` or `"matrix_free"`.
        size: number of parameters.
        rows: number of rows of the Jacobian.
    """
    if form == "matrix_free":
        return 0
    return ParameterForm.bytes_needed(size) if form == "parameter" else KernelForm.bytes_needed(rows, size)


def smaller_form(size: int, rows: int) -> tuple[str, float]:
    """Returns which of `"parameter"` and `"kernel"` takes less, and the bytes that it takes; see `bytes_needed`."""
    form = min(("parameter", "kernel"), key=lambda name: bytes_needed(name, size, rows))
    return form, bytes_needed(form, size, rows)


class RowSum:
    """The sum of the outer products of rows, which come chunk by chunk in every process.

    Args:
        form: `"parameter"` for the sum itself, `"kernel"` for the rows, from which it follows.
        function: whose rows they are.
        dtype: of rows that are kept.
    """

    def __init__(self, form: str, function: AdapterFunction, dtype: torch.dtype = torch.float64) -> None:
        self.form, self.dtype = form, dtype
        size = function.size if form == "parameter" else 0
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=function.device)
        self._rows: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Adds rows `(n, probes, size)`."""
        if self.form == "parameter":
            flat = rows.flatten(0, 1)
            self._gram.addmm_(flat.T, flat)
        else:
            self._rows.append(rows.to(self.dtype).cpu())

    def total(self) -> torch.Tensor:
        """Returns what all processes added: the sum `(size, size)`, or the rows `(n, probes, size)` in main memory.

        Samples with fewer rows than others have zeros behind them.
        """
        if self.form == "parameter":
            return total(self._gram)
        rows = gathered(self._rows)
        most = max(part.shape[1] for part in rows)
        return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1])) for part in rows])


def mean_curvature(form: str, terms: torch.Tensor, targets: int) -> Curvature:
    """Returns the mean over targets of what a `RowSum` of a form added up."""
    if form == "parameter":
        return ParameterForm(terms / targets)
    return KernelForm(terms.flatten(0, 1).double() / math.sqrt(targets))


@dataclass
class CurvatureEstimate:
    """From what a curvature was estimated, and how well.

    Attributes:
        samples: number of samples that were used.
        of: number of samples that there are.
        draws: random vectors a sample; None for all labels.
        estimator: how the random vectors are made, `"signs"` or `"labels"`; None for all labels.
        relative_error: standard error of the curvature along the gradient, relative to it; None where nothing was left
            to chance, or where the curvature is known by its products alone.
    """

    samples: int
    of: int
    draws: int | None = None
    estimator: str | None = None
    relative_error: float | None = None


def estimated_curvature(
    function: AdapterFunction,
    loader: Loader,
    form: str,
    samples: int,
    draws: int | None,
    curvature_samples: int | None,
    along: torch.Tensor,
) -> tuple[Curvature, CurvatureEstimate]:
    """Returns the curvature of the mean loss over the targets of a set, at the weights that the model has.

    Args:
        function: the model as a function of its parameters.
        loader: the set.
        form: `"parameter"`, `"kernel"`, or `"matrix_free"` for exact products, where `draws` counts for nothing.
        samples: number of samples of the set, over all processes.
        draws: random vectors a sample; None for all labels.
        curvature_samples: about how many samples are used, chosen by their hash; None for all.
        along: direction in which the error of the estimate is taken, `(size,)`.

    Raises:
        ValueError: no sample was chosen, or the curvature is not finite.
    """
    share = min(1.0, (curvature_samples or samples) / samples)
    if form == "matrix_free":
        return _products(function, loader, samples, share)
    terms = RowSum(form, function)
    along_each, targets = [], 0
    for found in function.linearise(loader, draws, share):
        along_each.append((found.rows @ along).square().sum(1).cpu())
        targets += found.num_targets
        terms.add(found.rows)
    targets = sum(gathered([targets]))
    along_all = torch.cat([torch.zeros(0, dtype=torch.float64), *gathered(along_each)])
    if not len(along_all):
        raise ValueError(f"`curvature_samples` of {curvature_samples} chose none of {samples} samples.")
    curvature = mean_curvature(form, terms.total().to(function.device), targets)
    if not math.isfinite(curvature.mean):
        raise ValueError("The curvature is not finite: the adapter or the retain set leads to NaN or infinity.")
    estimate = CurvatureEstimate(len(along_all), samples)
    if share < 1 or draws is not None:
        estimate.relative_error = float(along_all.std() / along_all.mean()) / len(along_all) ** 0.5
    if draws is not None:
        estimate.draws, estimate.estimator = draws, function.estimator
    return curvature, estimate


def _products(
    function: AdapterFunction, loader: Loader, samples: int, share: float
) -> tuple[Curvature, CurvatureEstimate]:
    """Returns exact products; the mean of the diagonal, which only scales the damping, comes from single draws."""
    sums = torch.zeros(3, dtype=torch.float64)
    for found in function.linearise(loader, 1, share):
        sums += torch.tensor([float(found.rows.square().sum()), found.num_targets, len(found.rows)])
    squared, targets, used = total(sums.to(function.device)).tolist()
    if not squared > 0 or not math.isfinite(squared):
        raise ValueError("The curvature is zero or not finite: the adapter or the retain set leads to NaN or infinity.")
    weights = function.vector

    def product(vector: torch.Tensor) -> torch.Tensor:
        return function.curvature_product(loader, weights, vector, share) / targets

    return MatrixFreeForm(product, squared / targets / function.size), CurvatureEstimate(int(used), samples)


def ridge_gradient(
    gradient: torch.Tensor, targets: int, weights: torch.Tensor, reference: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Returns the gradient of the mean loss plus `ridge / 2 * |weights - reference|^2`.

    Args:
        gradient: of the sum of the losses at the weights, `(size,)`.
        targets: their number.
        weights, reference: `(size,)`.
        ridge: strength of the pull to the reference.
    """
    return gradient / targets + ridge * (weights - reference)


def furthest(weights: torch.Tensor, reference: torch.Tensor | None) -> float:
    """Returns how far from trained weights those may be that forgetting some samples leads to.

    It is as far as the whole training had moved them: no part of the data is taken to have done more. In the flat
    directions of an adapter that was hardly trained, the curvature bounds nothing.

    Args:
        weights: `(size,)`.
        reference: weights before the training, `(size,)`; None where they are not known: then the length of the trained
            weights is the bound.
    """
    return float((weights if reference is None else weights - reference).norm())


@dataclass
class Quadratic:
    """The quadratic model of an objective, a mean loss with a ridge, around some weights.

    Attributes:
        curvature: of the mean loss, without the ridge.
        gradient: of the objective at the weights, `(size,)`.
        ridge: strength of the pull to reference weights.
    """

    curvature: Curvature
    gradient: torch.Tensor
    ridge: float

    def newton_step(self, shift: float) -> torch.Tensor:
        """Returns the step to the minimum of the model with `shift / 2 * |step|^2` added to it: `(size,)`."""
        return -self.curvature.solve(self.gradient, shift + self.ridge)

    def decrease(self, step: torch.Tensor) -> float:
        """Returns by how much a step lowers the model."""
        image = self.curvature.product(step) + self.ridge * step
        return -float(step @ self.gradient) - 0.5 * float(step @ image)


@dataclass(frozen=True)
class SampledQuadratic:
    """The quadratic model of a training loss around the trained weights, from which samples can be taken off.

    Attributes:
        form: `"parameter"` or `"kernel"`.
        terms: the curvature as a sum over samples: `(size, size)` in float64, or the rows `(n, probes, size)` in
            float32, in the order of `keys`.
        gradient: of the sum of the losses, `(size,)`.
        trained: weights around which the model is, `(size,)`.
        reference: weights that the ridge pulls to, `(size,)`.
        ridge: its strength.
        keys: hashes of the samples, in alphabetical order.
        targets: number of targets of all samples.
        draws: random vectors a sample; None for all labels.
    """

    form: str
    terms: torch.Tensor
    gradient: torch.Tensor
    trained: torch.Tensor
    reference: torch.Tensor
    ridge: float
    keys: list[str]
    targets: int
    draws: int | None

    @classmethod
    def of(
        cls,
        function: AdapterFunction,
        loader: Loader,
        form: str,
        reference: torch.Tensor | None,
        ridge: float,
        draws: int | None,
    ) -> tuple[SampledQuadratic, float]:
        """Returns the model of the loss over the samples of a loader, and the sum of their losses.

        Args:
            function: with the trained weights.
            loader: the training samples.
            form, ridge, draws: as the attributes.
            reference: as the attribute; by default the trained weights.

        Raises:
            ValueError: a loss, the gradient or the curvature is not finite.
        """
        loss, targets, gradient = function.loss_and_gradient(loader)
        terms, keys = RowSum(form, function, torch.float32), []
        for found in function.linearise(loader, draws):
            keys += found.keys
            terms.add(found.rows)
        keys, curvature = gathered(keys), terms.total().cpu()
        if form == "kernel":
            order = sorted(range(len(keys)), key=keys.__getitem__)
            curvature = curvature[order]
        if not math.isfinite(loss) or not all(torch.isfinite(part).all() for part in (curvature, gradient)):
            raise ValueError(
                f"The loss ({loss:g} over {targets:,} targets), its gradient or its curvature is not finite: the "
                "adapter or the data lead to NaN or infinity. Look for samples whose loss is not finite, or compute "
                "the model in a wider dtype."
            )
        trained = function.vector.cpu()
        centre = trained if reference is None else reference.cpu()
        return cls(form, curvature, gradient.cpu(), trained, centre, ridge, sorted(keys), targets, draws), loss

    @property
    def mean_curvature(self) -> float:
        """The mean of the diagonal of the curvature of the mean loss."""
        trace = self.terms.square().sum() if self.form == "kernel" else self.terms.trace()
        return float(trace) / len(self.gradient) / self.targets

    def newton_step(self, shift: float) -> torch.Tensor:
        """Returns the damped Newton step from the trained weights; see `Quadratic.newton_step`."""
        gradient = ridge_gradient(self.gradient, self.targets, self.trained, self.reference, self.ridge)
        return Quadratic(mean_curvature(self.form, self.terms, self.targets), gradient, self.ridge).newton_step(shift)

    def without(self, function: AdapterFunction, loader: Loader, keys: Counter[str]) -> tuple[SampledQuadratic, float]:
        """Returns the model less the terms of some of its samples, and the sum of the losses of those samples.

        Args:
            function: with the trained weights.
            loader: the samples.
            keys: their hashes.
        """
        loss, targets, gradient = function.loss_and_gradient(loader)
        gone, stays = Counter(keys), []
        for place, key in enumerate(self.keys):
            gone[key] -= 1
            if gone[key] < 0:
                stays.append(place)
        if self.form == "kernel":
            terms = self.terms[stays]
        else:
            taken = RowSum(self.form, function)
            for found in function.linearise(loader, self.draws):
                taken.add(found.rows)
            terms = self.terms - taken.total().cpu()
        remaining = replace(
            self,
            terms=terms,
            gradient=self.gradient - gradient.cpu(),
            keys=[self.keys[place] for place in stays],
            targets=self.targets - targets,
        )
        return remaining, loss
