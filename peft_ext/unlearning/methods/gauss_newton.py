"""Damped Gauss-Newton steps on the retain set from the trained weights: the default method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...checks import check_choice, check_not_negative, check_positive, check_positive_integer
from ..derivatives.data import Loader
from ..derivatives.function import AdapterFunction
from ..derivatives.losses import LOSSES
from ..derivatives.quadratic import DRAWS, CurvatureEstimate, Quadratic, estimated_curvature, furthest, ridge_gradient
from .base import Solution, Step, UnlearningReport
from .solver import Problem, Solver, mean_losses

_REJECTIONS = 6  # in a row, each with four times the damping
_SHORTENED = 24  # likewise: steps in a row that led too far


@dataclass
class GaussNewton(Solver):
    """Takes damped generalised Gauss-Newton steps towards what training on the retain set alone would have given.

    The curvature is `J^T H J` with the Jacobian J of the outputs in the parameters and the second derivative H of the
    loss in the outputs (Martens 2020, "New insights and perspectives on the natural gradient method"). The steps
    minimise the retain loss less a linear term, the gradient of the loss on all data at the trained weights: what
    training left unfinished on all data stays unfinished on the retain set. Levenberg and Marquardt's damping is
    steered by the retain loss. A step that takes it more than `retain_tolerance` above where it was at the start is
    undone, and so is one after the first that raises the objective. (The first is an influence function, and may cost
    what the others repair.) No step leads further from the trained weights than training had led from the initial ones
    (or than the trained weights are long, where nobody gave the initial ones): a part of the data has not moved the
    weights further than all of it, and an adapter that was hardly trained has flat directions in which the loss bounds
    nothing.

    With `form="matrix_free"` (memory O(p)) the steps are solved for by conjugate gradients to a relative residual of
    1e-4; `form="auto"` falls back on it where no matrix fits `memory`.

    Attributes:
        loss: `"cross_entropy"` or `"squared_error"`: what the model was trained with.
        damping: first value of what is added to the diagonal of the curvature, in units of its mean.
        max_steps: as many steps are kept at most.
        tolerance: the steps end with one that lowers the objective by less than this, relative to the retain loss.
        retain_tolerance: the retain loss may end at most this far above its start, per target: nats of the
            cross-entropy, or half squared distances.
        draws: the curvature is estimated from as many random vectors a sample: one backward pass each, instead of one a
            class. They depend on the sample alone. None for the exact curvature, which is out of reach for large
            vocabularies.
        estimator: how they are made of the vectors `sqrt(p_y) (e_y - p)` of all labels y, whose outer products add up
            to the curvature in the outputs. `"signs"`: in as many groups, each added up with random signs; the longest
            vectors are groups of their own, so little is left to chance where few labels compete. `"labels"`: `e_y - p`
            of labels drawn from the model, as in the usual estimate of the Fisher matrix, which sees little of a model
            that is sure of its labels. Both are right on average.
        curvature_samples: the curvature is estimated from about as many samples of the retain set, chosen by their
            hash; None for all.
    """

    name: ClassVar[str] = "gauss_newton"
    forms: ClassVar[tuple[str, ...]] = ("parameter", "kernel", "matrix_free")
    saving: ClassVar[str] = ", or lower `curvature_samples` or `draws`"

    loss: str = "cross_entropy"
    damping: float = 0.3
    max_steps: int = 10
    tolerance: float = 1e-3
    retain_tolerance: float = 0.05
    draws: int | None = DRAWS
    estimator: str = "signs"
    curvature_samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, tuple(LOSSES))
        check_positive("damping", self.damping)
        check_positive_integer("max_steps", self.max_steps)
        check_not_negative("tolerance", self.tolerance)
        check_not_negative("retain_tolerance", self.retain_tolerance)
        for name in ("draws", "curvature_samples"):
            if getattr(self, name) is not None:
                check_positive_integer(name, getattr(self, name))
        check_choice("estimator", self.estimator, ("signs", "labels"))

    def function(self, model: nn.Module, parameters: str | None = None) -> AdapterFunction:
        return AdapterFunction(model, LOSSES[self.loss](), parameters, self.memory / 4, self.estimator)

    def solve(self, problem: Problem, report: UnlearningReport) -> None:
        function = problem.function
        forget_loss, forget_targets, forget_gradient = function.loss_and_gradient(problem.forget)
        retain_loss, targets, gradient = function.loss_and_gradient(problem.retain)
        if not math.isfinite(retain_loss + forget_loss) or not torch.isfinite(gradient + forget_gradient).all():
            raise ValueError("The loss or its gradient is not finite: the adapter or the data hold NaN or infinity.")
        weights = function.vector
        centre = weights if problem.reference is None else problem.reference
        everything = (gradient + forget_gradient, targets + forget_targets)
        objective = Objective(
            function,
            problem.retain,
            targets,
            start=weights,
            left=ridge_gradient(*everything, weights, centre, problem.ridge),
            reference=centre,
            ridge=problem.ridge,
        )
        first = objective.found(weights, retain_loss, gradient)
        report.solution = Solution("", CurvatureEstimate(0, 0), retain_tolerance=self.retain_tolerance)
        last = self._descend(problem, objective, first, report.solution)
        report.retain_loss = (first.retain_loss, last.retain_loss)
        report.forget_loss = (forget_loss / forget_targets, mean_losses(function, problem.forget)[0])

    def _descend(self, problem: Problem, objective: Objective, at: Point, solution: Solution) -> Point:
        """Takes steps from a point, and returns the last one that was kept; the model has its weights."""
        limit = at.retain_loss + self.retain_tolerance
        start, most_shift = at.weights, furthest(at.weights, problem.reference)
        model = self._quadratic(problem, at, solution)
        moved, damping, kept, rejections, shortened = False, self.damping, 0, 0, 0
        solution.ended = "steps"
        while kept < self.max_steps:
            if rejections == _REJECTIONS:
                solution.ended = "rejections"
                break
            step = model.newton_step(damping * model.curvature.mean)
            if float((at.weights + step - start).norm()) > most_shift:
                shortened += 1
                if shortened > _SHORTENED or not most_shift:
                    solution.ended = "distance"
                    break
                damping *= 4
                continue
            shortened = 0
            predicted = model.decrease(step)
            # The first step leaves the neighbourhood of the trained weights, where no quadratic model is right; what it
            # costs the retain set within the bound, the others repair.
            weights = at.weights + step
            most = limit if kept == 0 else min(limit, at.value - objective.beside(weights))
            found = objective.evaluate(weights, most, gradient=kept + 1 < self.max_steps)
            gain = at.value - found.value
            accepted = found.retain_loss <= most
            solution.steps.append(Step(found.value, found.retain_loss, damping, accepted, predicted, gain))
            ratio = gain / predicted if math.isfinite(gain) and predicted > 0 else -math.inf
            rejections = 0 if accepted else rejections + 1
            if accepted:
                done = kept > 0 and gain <= self.tolerance * at.retain_loss
                at, moved, kept = found, True, kept + 1
                model = Quadratic(model.curvature, at.gradient, problem.ridge)
                if done and kept < self.max_steps:
                    solution.ended = "gain"
                    break
            if moved and ratio < 0.25 and kept < self.max_steps:
                problem.function.vector = at.weights
                model, moved = self._quadratic(problem, at, solution), False
            damping *= 4 if not accepted else 0.3 if ratio > 0.75 else 1 if ratio > 0.25 else 2
        problem.function.vector = at.weights
        return at

    def _quadratic(self, problem: Problem, at: Point, solution: Solution) -> Quadratic:
        """Returns the quadratic model of the objective at a point, whose weights the model has."""
        function, samples = problem.function, problem.retained
        share = min(1.0, (self.curvature_samples or samples) / samples)
        rows = math.ceil(share * samples) * function.rows_of_a_sample(problem.retain, self.draws)
        solution.form = self.fitting_form(function.size, rows)
        options = (solution.form, samples, self.draws, self.curvature_samples)
        curvature, solution.curvature = estimated_curvature(function, problem.retain, *options, along=at.gradient)
        return Quadratic(curvature, at.gradient, problem.ridge)


@dataclass
class Point:
    """Weights, and what was found at them.

    Attributes:
        weights: `(size,)`.
        value: of the objective.
        retain_loss: mean over targets.
        gradient: of the objective, `(size,)`.
    """

    weights: torch.Tensor
    value: float
    retain_loss: float
    gradient: torch.Tensor


@dataclass
class Objective:
    """The mean retain loss with the ridge of training, less a linear term.

    What training on all data left of its gradient, training on the retain set would have left too: the solution is
    where the gradient of the retain set is that, not zero.

    Attributes:
        function: the model.
        retain: batches of the retain set.
        targets: number of targets of the retain set.
        start: weights at which the linear term is zero, `(size,)`.
        left: gradient of the linear term, `(size,)`.
        reference: weights that the ridge pulls to, `(size,)`.
        ridge: its strength.
    """

    function: AdapterFunction
    retain: Loader
    targets: int
    start: torch.Tensor
    left: torch.Tensor
    reference: torch.Tensor
    ridge: float

    def beside(self, weights: torch.Tensor) -> float:
        """Returns the objective without the retain loss."""
        penalty = 0.5 * self.ridge * float((weights - self.reference).square().sum())
        return penalty - float(self.left @ (weights - self.start))

    def found(self, weights: torch.Tensor, loss: float, gradient: torch.Tensor) -> Point:
        """Returns what a sum of losses over the retain set and its gradient make of some weights."""
        mean = loss / self.targets
        gradient = ridge_gradient(gradient, self.targets, weights, self.reference, self.ridge) - self.left
        return Point(weights, mean + self.beside(weights), mean, gradient)

    def evaluate(self, weights: torch.Tensor, most: float, gradient: bool) -> Point:
        """Gives the model some weights and returns what is found at them.

        Args:
            weights: `(size,)`.
            most: the retain loss is added up no further than to this. The point's loss and value are lower bounds then,
                and its gradient is of no use.
            gradient: whether the gradient is wanted.
        """
        self.function.vector = weights
        loss, _, found = self.function.loss_and_gradient(self.retain, most * self.targets, gradient=gradient)
        return self.found(weights, loss, found)
