"""What Gauss-Newton and Fast-NTK share: both solve for the weights that training without the forget set had led to."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...checks import check_choice, check_not_negative, check_positive, check_positive_integer
from ..derivatives.data import Loader, check_sets
from ..derivatives.function import AdapterFunction
from ..derivatives.quadratic import MEMORY, bytes_needed, smaller_form
from .base import Request, UnlearningMethod, UnlearningReport


@dataclass
class Problem:
    """What a solver is to solve.

    Attributes:
        function: the model as a function of the parameters that are to change.
        retain, forget: batches of the sets.
        retained, forgotten: numbers of their samples, over all processes.
        reference: parameters before training, `(size,)`; None if nobody gave them.
        ridge: strength of the pull to them in training.
    """

    function: AdapterFunction
    retain: Loader
    forget: Loader
    retained: int
    forgotten: int
    reference: torch.Tensor | None
    ridge: float


@dataclass
class Solver(UnlearningMethod):
    """A method that solves for weights with derivatives of the model's outputs.

    Attributes:
        form: `"parameter"` (memory O(p^2) for p parameters, whatever the number of samples), `"kernel"` (memory
            O(n (n + p)) for n rows of the Jacobian), another one that the method names, or `"auto"`: the smaller of
            these two if it fits `memory`.
        memory: bytes for matrices; a quarter of them for the derivatives of a chunk of samples, and another one for the
            outputs of frozen layers below the first parameter, which are computed once.
        batch_size: rows per device in a batch of a request; that of the model's training if None.
    """

    forms: ClassVar[tuple[str, ...]] = ("parameter", "kernel")
    saving: ClassVar[str] = ""
    """What else lowers the memory that a form needs, as the end of a sentence."""

    form: str = "auto"
    memory: float = MEMORY
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("auto", *self.forms))
        check_positive("memory", self.memory)
        if self.batch_size is not None:
            check_positive_integer("batch_size", self.batch_size)

    @abstractmethod
    def function(self, model: nn.Module, parameters: str | None = None) -> AdapterFunction:
        """Returns a model as a function of what is to change, with the loss whose derivatives the method takes."""

    @abstractmethod
    def solve(self, problem: Problem, report: UnlearningReport) -> None:
        """Changes the model's parameters, and adds to the report what was found."""

    def fit(
        self,
        model: nn.Module,
        retain: Loader,
        forget: Loader,
        *,
        reference: Mapping[str, torch.Tensor] | None = None,
        ridge: float = 0.0,
        parameters: str | None = None,
    ) -> UnlearningReport:
        """Changes the parameters of a model; see `UnlearningMethod.fit`.

        Args:
            model: may come from `Accelerator.prepare`.
            retain, forget: may come from `Accelerator.prepare`.
            reference, ridge: see `UnlearningMethod.fit`.
            parameters: a regular expression that the names of the parameters to change contain; by default those that
                require gradients.

        Raises:
            ValueError: the model has no parameters to change, dropout is on, one of the sets is empty, they overlap,
                they lead to numbers that are not finite, or the form that was asked for does not fit `memory`. The
                model is then as it was.
        """
        start = time.perf_counter()
        check_not_negative("ridge", ridge)
        function = self.function(model, parameters)
        centre = None if reference is None else function.flatten(reference)
        problem = Problem(function, retain, forget, *check_sets(retain, forget), centre, ridge)
        before = function.vector
        report = UnlearningReport(self.name, function.size)
        try:
            with function.prefix.remembering():
                self.solve(problem, report)
        except BaseException:
            function.vector = before
            raise
        report.shift = float((function.vector - before).norm())
        report.seconds = time.perf_counter() - start
        return report

    def unlearn(self, request: Request) -> UnlearningReport:
        request.model.to(request.training.device)  # type: ignore[arg-type]
        request.model.eval()
        retain, forget = (request.shared_loader(part, self.batch_size) for part in (request.retain, request.forget))
        return self.fit(request.model, retain, forget, reference=request.initial, ridge=request.ridge)

    def fitting_form(self, size: int, rows: int) -> str:
        """Returns the form to compute with.

        Args:
            size: number of parameters.
            rows: number of rows of the Jacobian.

        Raises:
            ValueError: the form that was asked for, or every one, needs more than `memory`.
        """
        what = f"({size:,} parameters, {rows:,} rows of the Jacobian), and `memory` allows {self.memory / 1e9:.3g} GB"
        if self.form != "auto":
            need = {form: bytes_needed(form, size, rows) for form in self.forms}
            if need[self.form] <= self.memory:
                return self.form
            fits = [form for form in self.forms if need[form] <= self.memory]
            less = f"form={' or '.join(map(repr, fits))} needs less, or raise `memory`" if fits else "Raise `memory`"
            raise ValueError(f"form={self.form!r} needs {need[self.form] / 1e9:.3g} GB {what}. {less}{self.saving}.")
        form, need_of_it = smaller_form(size, rows)
        if need_of_it <= self.memory:
            return form
        if "matrix_free" in self.forms:
            return "matrix_free"
        raise ValueError(
            f"{type(self).__name__} needs {need_of_it / 1e9:.3g} GB in its smallest form, {form!r} {what}. Raise "
            "`memory`, or use GaussNewton, which can do without matrices."
        )


def mean_losses(function: AdapterFunction, *loaders: Loader) -> list[float]:
    """Returns the mean loss over the targets of each of some sets."""
    found = [function.loss_and_gradient(loader, gradient=False) for loader in loaders]
    return [loss / targets for loss, targets, _ in found]
