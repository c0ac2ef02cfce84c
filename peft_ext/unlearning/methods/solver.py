"""Unlearning by solving for the weights that training without the forget set would have led to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ...checks import check_choice, check_number, check_positive_integer
from ...targets import IGNORED
from ..derivatives.curvature import Curvature, KernelForm, MatrixFreeForm, ParameterForm
from ..derivatives.data import Loader, gathered, sample_keys, total
from ..derivatives.function import AdapterFunction
from ..derivatives.losses import LOSSES

_REJECTIONS = 6  # in a row, each with four times the damping


@dataclass
class Step:
    """One solution that was tried.

    Attributes:
        objective: after it; where it was undone, perhaps of a part of the retain set alone, which was enough.
        retain_loss: likewise, mean over targets, in nats.
        damping: in units of the mean curvature.
        accepted: whether it was kept.
        predicted: decrease of the objective that the quadratic model promised.
    """

    objective: float
    retain_loss: float
    damping: float
    accepted: bool
    predicted: float


@dataclass
class UnlearningReport:
    """What was done.

    Attributes:
        method, form: as computed.
        parameters: how many could change.
        retain_loss: mean over the targets of the retain set, in nats, before and after.
        forget_loss: likewise of the forget set.
        shift: length of the change of the parameters.
        steps: what was tried.
        curvature: how the curvature was estimated, and its error.
        seconds: wall time.
        notes: what else there is to say.
    """

    method: str
    form: str
    parameters: int
    retain_loss: tuple[float, float] = (float("nan"), float("nan"))
    forget_loss: tuple[float, float] = (float("nan"), float("nan"))
    shift: float = 0.0
    steps: list[Step] = field(default_factory=list)
    curvature: str = "exact"
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class NTKUnlearner:
    """Changes an adapter, or other chosen parameters, to what training on the retain set alone would have given.

    `method="gauss_newton"`, the default, takes damped generalised Gauss-Newton steps from the trained weights: the
    curvature is `J^T H J` with the Jacobian J of the outputs in the parameters and the second derivative H of the loss
    in the outputs. They minimise the retain loss less a linear term, the gradient of the loss on all data at the
    trained weights: what training left unfinished on all data stays unfinished on the retain set. Levenberg and
    Marquardt's damping is steered by the retain loss. A step that takes it more than `retain_tolerance` above where it
    was at the start is undone, and so is one after the first that raises the objective. (The first is an influence
    function, and may cost what the others repair.)

    `method="fast_ntk"` is the published closed form (Golatkar et al. 2020, "Forgetting outside the box", equation 9,
    restricted to the adapter by Li et al. 2023, "Fast-NTK"): outputs are linearised at `reference`, trained by least
    squares on one-hot targets, and the difference between the solutions of ridge regression on the retain set and on
    all data is added to the trained weights. It looks at no loss afterwards.

    Args:
        model: with a trained adapter. It is changed in place by `fit`. May come from `Accelerator.prepare`.
        loss: `"cross_entropy"` or `"squared_error"`; what the adapter was trained with. `fast_ntk` is least squares.
        method: `"gauss_newton"` or `"fast_ntk"`.
        form: `"parameter"` (memory O(p^2) for p parameters, whatever the number of samples), `"kernel"` (memory
            O(n (n + p)) for n rows of the Jacobian), `"matrix_free"` (memory O(p); conjugate gradients to a relative
            residual of 1e-4; Gauss-Newton only), or `"auto"`: the smaller one of the first two that fits `memory`, or
            the third.
        damping: first value of what is added to the diagonal, in units of its mean, 0.3 by default; for `fast_ntk` the
            ridge, 0.01 by default.
        max_steps: keep at most as many Gauss-Newton steps.
        tolerance: stop when a step lowers the objective by less than this, relative to the retain loss.
        retain_tolerance: the retain loss may end at most this far above its start, in nats per target.
        parameters: a regular expression that the names of the parameters to change contain. Default: those that
            require gradients.
        reference: parameters before training, by name. Weight decay pulls towards them, and `fast_ntk` linearises at
            them. Default: the weights that the model has when `fit` is called.
        weight_decay: of training: the objective is the retain loss plus half of this times the squared distance from
            `reference`.
        draws: estimate the curvature from as many random vectors a sample: one backward pass each, instead of one a
            class. They depend on the sample alone. `None` for the exact curvature, which is out of reach for large
            vocabularies. Not for `fast_ntk`.
        estimator: how they are made of the vectors `sqrt(p_y) (e_y - p)` of all labels y, whose outer products add up
            to the curvature in the outputs. `"signs"`: in as many groups, each added up with random signs; the longest
            vectors are groups of their own, so little is left to chance where few labels compete. `"labels"`: `e_y - p`
            of labels drawn from the model, as in the usual estimate of the Fisher matrix, which sees little of a model
            that is sure of its labels. Both are right on average.
        curvature_samples: estimate the curvature from about as many samples of the retain set, chosen by their hash.
            Default: all. Not for `fast_ntk`.
        memory: bytes for matrices; a quarter of them for the derivatives of a chunk of samples, and another one for the
            outputs of frozen layers below the first parameter, which are computed once.

    Raises:
        ValueError: an argument holds what it cannot, the model has no parameters to change, or dropout is on.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str = "cross_entropy",
        method: Literal["gauss_newton", "fast_ntk"] = "gauss_newton",
        form: Literal["auto", "parameter", "kernel", "matrix_free"] = "auto",
        damping: float | None = None,
        max_steps: int = 10,
        tolerance: float = 1e-3,
        retain_tolerance: float = 0.05,
        parameters: str | None = None,
        reference: Mapping[str, torch.Tensor] | None = None,
        weight_decay: float = 0.0,
        draws: int | None = 3,
        estimator: Literal["signs", "labels"] = "signs",
        curvature_samples: int | None = None,
        memory: float = 4e9,
    ) -> None:
        check_choice("loss", loss, tuple(LOSSES))
        check_choice("method", method, ("gauss_newton", "fast_ntk"))
        self._forms = ("parameter", "kernel", "matrix_free")[: 3 if method == "gauss_newton" else 2]
        check_choice("form", form, ("auto", *self._forms))
        if damping is None:
            damping = 0.3 if method == "gauss_newton" else 0.01
        for name, value in (("damping", damping), ("memory", memory)):
            check_number(name, value)
            if value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value!r}.")
        for name, value in (
            ("tolerance", tolerance),
            ("retain_tolerance", retain_tolerance),
            ("weight_decay", weight_decay),
        ):
            check_number(name, value)
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value!r}.")
        for name, count in (("max_steps", max_steps), ("draws", draws), ("curvature_samples", curvature_samples)):
            if count is not None or name == "max_steps":
                check_positive_integer(name, count)
        check_choice("estimator", estimator, ("signs", "labels"))
        self.method, self.form, self.damping, self.memory = method, form, damping, memory
        self.max_steps, self.tolerance, self.retain_tolerance = max_steps, tolerance, retain_tolerance
        self.weight_decay, self.draws, self.curvature_samples = weight_decay, draws, curvature_samples
        if method == "fast_ntk":
            loss, self.draws, self.curvature_samples = "squared_error", None, None
        self.function = AdapterFunction(model, LOSSES[loss](), parameters, memory / 4, estimator)
        self.reference = None if reference is None else self.function.flatten(reference)

    def fit(self, retain: Loader, forget: Loader) -> UnlearningReport:
        """Changes the model.

        Args:
            retain: batches of the retain set: dicts of the model's arguments, `labels` among them. Read once a step
                and more; the order does not matter. May come from `Accelerator.prepare`.
            forget: the same of the forget set.

        Raises:
            ValueError: one of the sets is empty, they overlap, they lead to numbers that are not finite, or the form
                that was asked for does not fit `memory`. The model is then as it was.
        """
        start = time.perf_counter()
        retained, forgotten = sample_keys(retain), sample_keys(forget)
        for name, keys in (("retain", retained), ("forget", forgotten)):
            if not keys:
                raise ValueError(f"The {name} set is empty.")
        both = set(retained) & set(forgotten)
        if both:
            raise ValueError(
                f"The retain and the forget set overlap: {len(both)} samples are in both. Take what is to be forgotten "
                "out of the retain set (two samples of the same content count as one)."
            )
        before = self.function.vector
        report = UnlearningReport(self.method, self.form, self.function.size)
        try:
            with self.function.prefix.remembering():
                if self.method == "fast_ntk":
                    self._fast_ntk(retain, forget, len(retained) + len(forgotten), report)
                else:
                    self._gauss_newton(retain, forget, len(retained), report)
        except BaseException:
            self.function.vector = before
            raise
        report.shift = float((self.function.vector - before).norm())
        report.seconds = time.perf_counter() - start
        return report

    def _form(self, rows: int) -> str:
        """What to compute with, for so many rows of a Jacobian."""
        size = self.function.size
        need = {
            "parameter": ParameterForm.bytes_needed(size),
            "kernel": KernelForm.bytes_needed(rows, size),
            "matrix_free": 0,
        }
        if self.form != "auto":
            if need[self.form] > self.memory:
                fits = [name for name in need if need[name] <= self.memory and name in self._forms]
                raise ValueError(
                    f"form={self.form!r} needs {need[self.form] / 1e9:.3g} GB ({size:,} parameters, {rows:,} rows of "
                    f"the Jacobian), and `memory` allows {self.memory / 1e9:.3g} GB. "
                    + (
                        f"form={' or '.join(map(repr, fits))} needs less, or raise `memory`"
                        if fits
                        else "Raise `memory`"
                    )
                    + ("." if self.method == "fast_ntk" else ", or lower `curvature_samples` or `draws`.")
                )
            return self.form
        smallest = min(self._forms[:2], key=lambda name: need[name])
        if need[smallest] <= self.memory:
            return smallest
        if self.method == "fast_ntk":
            raise ValueError(
                f"method='fast_ntk' needs {need[smallest] / 1e9:.3g} GB in its smallest form, {smallest!r} ({size:,} "
                f"parameters, {rows:,} rows of the Jacobian), and `memory` allows {self.memory / 1e9:.3g} GB. Raise "
                "`memory`, or use method='gauss_newton', which can do without matrices."
            )
        return "matrix_free"

    # The published closed form

    def _fast_ntk(self, retain: Loader, forget: Loader, samples: int, report: UnlearningReport) -> None:
        function = self.function
        trained = function.vector
        before = self._losses(retain, forget)
        if self.reference is not None:
            function.vector = self.reference
        report.form = self._form(samples * function.rows_of_a_sample(forget, None))
        shift = self._shift_by_parameters if report.form == "parameter" else self._shift_by_kernel
        function.vector = trained + shift(retain, forget)
        after = self._losses(retain, forget)
        report.retain_loss, report.forget_loss = zip(before, after)

    def _losses(self, *loaders: Loader) -> list[float]:
        found = [self.function.loss_and_gradient(loader, gradient=False) for loader in loaders]
        return [loss / targets for loss, targets, _ in found]

    def _shift_by_parameters(self, retain: Loader, forget: Loader) -> torch.Tensor:
        """`w*(retain) - w*(all)` with `w*(S) = (J_S^T J_S + ridge I)^-1 J_S^T (y_S - f_S)`."""
        function = self.function
        sums = []
        for loader in (retain, forget):
            gram, right = _zeros(function, function.size, function.size), _zeros(function, function.size)
            for J, residual in self._jacobian(loader):
                gram.addmm_(J.T, J)
                right += J.T @ residual
            sums.append((total(gram), total(right)))
        (gram_r, right_r), (gram_f, right_f) = sums
        whole = ParameterForm(gram_f.add_(gram_r))
        ridge = self.damping * whole.mean
        solution = whole.solve(right_r + right_f, ridge)
        return ParameterForm(gram_r).solve(right_r, ridge) - solution

    def _shift_by_kernel(self, retain: Loader, forget: Loader) -> torch.Tensor:
        """The same by kernel matrices: `-P J_f^T M V` in the paper's letters.

        With `T_ab = J_a J_b^T`, the ridge on the diagonals of `T_rr` and `T_ff`, and residuals `r = y - f`:
        `P = I - J_r^T T_rr^-1 J_r`, `M = (T_ff - T_fr T_rr^-1 T_rf)^-1`, `V = r_f - T_fr T_rr^-1 r_r`, which is block
        elimination in the kernel of all data. (The sign of the second term of V is what the elimination gives.)
        """
        (J_r, r_r), (J_f, r_f) = (self._stacked(loader) for loader in (retain, forget))
        T_rr, T_fr, T_ff = J_r @ J_r.T, J_f @ J_r.T, J_f @ J_f.T
        ridge = self.damping * float(T_rr.trace() + T_ff.trace()) / self.function.size
        solved = ParameterForm(T_rr).solve(torch.cat((T_fr.T, r_r[:, None]), 1), ridge)
        V = r_f - T_fr @ solved[:, -1]
        MV = ParameterForm(T_ff - T_fr @ solved[:, :-1]).solve(V, ridge)
        return J_r.T @ (solved[:, :-1] @ MV) - J_f.T @ MV

    def _stacked(self, loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
        parts = gathered([(J.cpu(), residual.cpu()) for J, residual in self._jacobian(loader)])
        J, residual = (torch.cat(found).to(self.function.device) for found in zip(*parts))
        return J, residual

    def _jacobian(self, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of the Jacobian and, for each, the one-hot target minus the output, chunk by chunk."""
        for found in self.function.linearise(loader, None):
            present = (found.targets != IGNORED)[..., None]
            wanted = torch.nn.functional.one_hot(found.targets.clamp(min=0), found.outputs.shape[-1])
            yield found.rows.flatten(0, 1), ((wanted - found.outputs.double()) * present).flatten()

    # Damped Gauss-Newton steps

    def _gauss_newton(self, retain: Loader, forget: Loader, retained: int, report: UnlearningReport) -> None:
        function = self.function
        weights = function.vector
        centre = weights if self.reference is None else self.reference

        def penalty(weights: torch.Tensor) -> float:
            return 0.5 * self.weight_decay * float((weights - centre).square().sum())

        forget_loss, forget_targets, forget_gradient = function.loss_and_gradient(forget)
        retain_loss, targets, gradient = function.loss_and_gradient(retain)
        first_loss = retain_loss / targets
        if not math.isfinite(retain_loss + forget_loss) or not torch.isfinite(gradient + forget_gradient).all():
            raise ValueError("The loss or its gradient is not finite: the adapter or the data hold NaN or infinity.")
        limit = first_loss + self.retain_tolerance
        # What training on all data left of its gradient, training on the retain set would have left too: the solution
        # is where the gradient of the retain set is this, not zero.
        start, left = weights, (gradient + forget_gradient) / (targets + forget_targets)
        left = left + self.weight_decay * (weights - centre)

        def beside(weights: torch.Tensor) -> float:
            """The objective without the retain loss."""
            return penalty(weights) - float(left @ (weights - start))

        def evaluate(weights: torch.Tensor, most: float, last: bool) -> tuple[float, float, torch.Tensor]:
            """Objective, retain loss, gradient of the objective unless it is the last; no further than to a loss."""
            function.vector = weights
            loss, _, gradient = function.loss_and_gradient(retain, most * targets, gradient=not last)
            gradient = gradient / targets + self.weight_decay * (weights - centre) - left
            return loss / targets + beside(weights), loss / targets, gradient

        objective, retain_loss = first_loss + beside(weights), first_loss
        gradient = gradient / targets + self.weight_decay * (weights - centre) - left
        curvature = self._curvature(retain, retained, gradient, report)
        moved, damping, kept, rejections = False, self.damping, 0, 0
        while kept < self.max_steps and rejections < _REJECTIONS:
            step = -curvature.solve(gradient, damping * curvature.mean + self.weight_decay)
            image = curvature.product(step) + self.weight_decay * step
            predicted = -float(step @ gradient) - 0.5 * float(step @ image)
            # The first step leaves the neighbourhood of the trained weights, where no quadratic model is right; what it
            # costs the retain set within the bound, the others repair.
            most = limit if kept == 0 else min(limit, objective - beside(weights + step))
            found, found_loss, found_gradient = evaluate(weights + step, most, kept + 1 == self.max_steps)
            gain = objective - found
            accepted = found_loss <= most
            report.steps.append(Step(found, found_loss, damping, accepted, predicted))
            ratio = gain / predicted if math.isfinite(gain) and predicted > 0 else -math.inf
            rejections = 0 if accepted else rejections + 1
            if accepted:
                done = kept > 0 and gain <= self.tolerance * retain_loss
                weights, objective, retain_loss, gradient = weights + step, found, found_loss, found_gradient
                moved, kept = True, kept + 1
                if done:
                    break
            if moved and ratio < 0.25 and kept < self.max_steps:
                function.vector = weights
                curvature, moved = self._curvature(retain, retained, gradient, report), False
            damping *= 4 if not accepted else 0.3 if ratio > 0.75 else 1 if ratio > 0.25 else 2
        function.vector = weights
        undone = sum(not step.accepted for step in report.steps)
        if undone:
            report.notes.append(
                f"{undone} of {len(report.steps)} steps were undone: they took the retain loss above {limit:.4g} "
                f"({self.retain_tolerance:g} above its start), or raised the objective."
            )
        if not kept:
            report.notes.append("No step was kept: the model is unchanged.")
        elif kept == self.max_steps:
            report.notes.append(f"Stopped after {self.max_steps} steps, with the objective still falling.")
        report.retain_loss = (first_loss, retain_loss)
        report.forget_loss = (forget_loss / forget_targets, self._losses(forget)[0])

    def _curvature(self, retain: Loader, retained: int, along: torch.Tensor, report: UnlearningReport) -> Curvature:
        """The mean over targets of the retain set, or of a part of it; its error is taken along a direction."""
        function = self.function
        share = min(1.0, (self.curvature_samples or retained) / retained)
        rows = math.ceil(share * retained) * function.rows_of_a_sample(retain, self.draws)
        report.form = self._form(rows)
        if report.form == "matrix_free":
            return self._matrix_free(retain, share, report)
        gram = _zeros(function, *[function.size if report.form == "parameter" else 0] * 2)
        stored, along_each, targets = [], [], 0
        for found in function.linearise(retain, self.draws, share):
            along_each.append((found.rows @ along).square().sum(1).cpu())
            targets += found.num_targets
            flat = found.rows.flatten(0, 1)
            if report.form == "parameter":
                gram.addmm_(flat.T, flat)
            else:
                stored.append(flat.cpu())
        targets = sum(gathered([targets]))
        along_all = torch.cat([torch.zeros(0, dtype=torch.float64), *gathered(along_each)])
        if not len(along_all):
            raise ValueError(f"`curvature_samples` of {self.curvature_samples} chose none of {retained} samples.")
        curvature: Curvature
        if report.form == "parameter":
            curvature = ParameterForm(total(gram).div_(targets))
        else:
            curvature = KernelForm(torch.cat(gathered(stored)).to(function.device) / math.sqrt(targets))
        if not math.isfinite(curvature.mean):
            raise ValueError("The curvature is not finite: the adapter or the retain set leads to NaN or infinity.")
        if share < 1 or self.draws is not None:
            each = "all labels" if self.draws is None else f"{self.draws} x random {self.function.estimator} each"
            error = float(along_all.std() / along_all.mean()) / len(along_all) ** 0.5
            report.curvature = (
                f"{len(along_all):,} of {retained:,} retain samples, {each}: relative standard error of the "
                f"curvature along the gradient {error:.2g}"
            )
        return curvature

    def _matrix_free(self, retain: Loader, share: float, report: UnlearningReport) -> Curvature:
        """Exact products. The mean of the diagonal, which only scales the damping, is estimated from single draws."""
        function = self.function
        sums = torch.zeros(3, dtype=torch.float64)
        for found in function.linearise(retain, 1, share):
            sums += torch.tensor([float(found.rows.square().sum()), found.num_targets, len(found.rows)])
        squared, targets, samples = total(sums.to(function.device)).tolist()
        if not squared > 0 or not math.isfinite(squared):
            raise ValueError(
                "The curvature is zero or not finite: the adapter or the retain set leads to NaN or infinity."
            )
        report.curvature = f"exact products over {int(samples):,} samples"

        weights = function.vector

        def product(vector: torch.Tensor) -> torch.Tensor:
            return function.curvature_product(retain, weights, vector, share) / targets

        return MatrixFreeForm(product, squared / targets / function.size)


def _zeros(function: AdapterFunction, *shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=function.device)
