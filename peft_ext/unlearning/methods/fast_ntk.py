"""The closed form of Fast-NTK, as published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...checks import check_positive
from ...targets import IGNORED
from ..derivatives.curvature import ParameterForm
from ..derivatives.data import Chain, Loader, gathered, total
from ..derivatives.function import AdapterFunction
from ..derivatives.losses import SquaredError
from ..derivatives.quadratic import CurvatureEstimate, RowSum
from .base import Solution, UnlearningReport
from .solver import Problem, Solver, mean_losses


@dataclass
class FastNTK(Solver):
    """Adds the difference between two ridge regressions to the trained weights (Li et al. 2023, "Fast-NTK").

    It is equation 9 of Golatkar et al. 2020, "Forgetting outside the box", restricted to the parameters of the adapter:
    the outputs are linearised at the reference weights and trained by least squares on one-hot targets; what is added
    is the solution on the retain set less that on all data. No loss is looked at afterwards. The ridge of the training
    (`ridge` of `fit`) does not enter: the published form has one of its own, `damping`. The losses in the report are
    half squared distances to one-hot targets, not nats.

    Attributes:
        damping: ridge, in units of the mean of the diagonal of `J^T J` over all data.
    """

    name: ClassVar[str] = "fast_ntk"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("damping", self.damping)

    def function(self, model: nn.Module, parameters: str | None = None) -> AdapterFunction:
        return AdapterFunction(model, SquaredError(), parameters, self.memory / 4)

    def solve(self, problem: Problem, report: UnlearningReport) -> None:
        function, retain, forget = problem.function, problem.retain, problem.forget
        trained = function.vector
        before = mean_losses(function, retain, forget)
        if problem.reference is not None:
            function.vector = problem.reference
        samples = problem.retained + problem.forgotten
        form = self.fitting_form(function.size, samples * function.rows_of_a_sample(Chain([retain, forget]), None))
        shift = self._shift_by_parameters if form == "parameter" else self._shift_by_kernel
        function.vector = trained + shift(function, retain, forget)
        after = mean_losses(function, retain, forget)
        report.retain_loss, report.forget_loss = zip(before, after)
        report.solution = Solution(form, CurvatureEstimate(samples, samples))

    def _shift_by_parameters(self, function: AdapterFunction, retain: Loader, forget: Loader) -> torch.Tensor:
        """Returns `w*(retain) - w*(all)` with `w*(S) = (J_S^T J_S + ridge I)^-1 J_S^T (y_S - f_S)`."""
        sums = []
        for loader in (retain, forget):
            gram = RowSum("parameter", function)
            right = torch.zeros(function.size, dtype=torch.float64, device=function.device)
            for rows, residual in _jacobian(function, loader):
                gram.add(rows)
                right += rows.flatten(0, 1).T @ residual
            sums.append((gram.total(), total(right)))
        (gram_r, right_r), (gram_f, right_f) = sums
        whole = ParameterForm(gram_f.add_(gram_r))
        ridge = self.damping * whole.mean
        solution = whole.solve(right_r + right_f, ridge)
        return ParameterForm(gram_r).solve(right_r, ridge) - solution

    def _shift_by_kernel(self, function: AdapterFunction, retain: Loader, forget: Loader) -> torch.Tensor:
        """Returns the same by kernel matrices: `-P J_f^T M V` in the paper's letters.

        With `T_ab = J_a J_b^T`, the ridge on the diagonals of `T_rr` and `T_ff`, and residuals `r = y - f`:
        `P = I - J_r^T T_rr^-1 J_r`, `M = (T_ff - T_fr T_rr^-1 T_rf)^-1`, `V = r_f - T_fr T_rr^-1 r_r`, which is block
        elimination in the kernel of all data. (The sign of the second term of V is what the elimination gives.)
        """
        (J_r, r_r), (J_f, r_f) = (_stacked(function, loader) for loader in (retain, forget))
        T_rr, T_fr, T_ff = J_r @ J_r.T, J_f @ J_r.T, J_f @ J_f.T
        ridge = self.damping * float(T_rr.trace() + T_ff.trace()) / function.size
        solved = ParameterForm(T_rr).solve(torch.cat((T_fr.T, r_r[:, None]), 1), ridge)
        V = r_f - T_fr @ solved[:, -1]
        MV = ParameterForm(T_ff - T_fr @ solved[:, :-1]).solve(V, ridge)
        return J_r.T @ (solved[:, :-1] @ MV) - J_f.T @ MV


def _stacked(function: AdapterFunction, loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all rows of the Jacobian and all residuals, of all processes."""
    parts = [(rows.flatten(0, 1).cpu(), residual.cpu()) for rows, residual in _jacobian(function, loader)]
    rows, residuals = zip(*gathered(parts))
    return torch.cat(rows).to(function.device), torch.cat(residuals).to(function.device)


def _jacobian(function: AdapterFunction, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields rows of the Jacobian `(n, probes, size)` and, for each, the one-hot target minus the output."""
    for found in function.linearise(loader, None):
        present = (found.targets != IGNORED)[..., None]
        wanted = torch.nn.functional.one_hot(found.targets.clamp(min=0), found.outputs.shape[-1])
        yield found.rows, ((wanted - found.outputs.double()) * present).flatten()
