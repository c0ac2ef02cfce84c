"""A model as a function of the few parameters that are to change, and its derivatives sample by sample."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.func import functional_call, jacfwd, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...targets import IGNORED, Alignment
from ...training.batch import Batch
from ...training.modes import check_adapters, check_dependence, no_input_gradients
from ...training.prefix import FrozenPrefix
from .data import Loader, batches, gathered, total, unit_uniform
from .losses import Loss, widened


@dataclass
class Linearised:
    """What `AdapterFunction.linearise` finds for n samples of at most t targets, with c outputs for each.

    Places without a target are left out, so that nothing depends on how a sample is padded.

    Attributes:
        rows: probes of the loss times the Jacobian, `(n, probes, size)` in float64.
        outputs: of the model at the targets, `(n, t, c)`.
        targets: `(n, t)`, in their order; -100 behind those of a sample that has fewer than t.
        keys: hashes of the samples.
    """

    rows: torch.Tensor
    outputs: torch.Tensor
    targets: torch.Tensor
    keys: list[str]

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORED).sum())


class AdapterFunction:
    """A model as a function of one vector: the parameters that are to change, one after the other.

    Everything is computed in eval mode: batch-norm uses its running statistics, so that samples do not see each other.
    Sums are in float64.

    Args:
        model: any model that `Alignment` knows, also one that Accelerate has prepared.
        loss: loss of its outputs.
        parameters: a regular expression that the names of the parameters contain; by default those that require
            gradients.
        memory: bytes that the derivatives of a chunk of samples may take, and as many again for what `prefix` keeps.
        estimator: how random probes are made, `"signs"` or `"labels"`; see `Loss`.

    Attributes:
        prefix: the part of the model below the first of the parameters. Whoever passes over the same samples more than
            once does so within `prefix.remembering()`, which keeps the outputs of that part.

    Raises:
        ValueError: there is no such parameter, the adapter is merged or disabled, or dropout is on.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        parameters: str | None = None,
        memory: float = 2e9,
        estimator: str = "signs",
    ) -> None:
        self.model: nn.Module = extract_model_from_parallel(model)
        check_adapters(self.model)
        self.alignment = Alignment.of(self.model)
        self.loss = loss
        self.memory = memory
        self.estimator = estimator
        found = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if (parameter.requires_grad if parameters is None else re.search(parameters, name))
        }
        if not found:
            raise ValueError(
                "The model has no parameter that could change: "
                + (
                    "none requires gradients. Give a model with a trainable adapter (a loaded adapter needs "
                    "`is_trainable=True`), or name parameters with `parameters`."
                    if parameters is None
                    else f"no name contains {parameters!r}."
                )
            )
        dropout = [
            name
            for name, module in self.model.named_modules()
            if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        ]
        if dropout:
            raise ValueError(
                f"Dropout is on ({len(dropout)} modules, first: {dropout[0]!r}): derivatives would be random. Call "
                "`model.eval()` first."
            )
        self.parameters: dict[str, nn.Parameter] = found
        self.device = next(iter(found.values())).device
        self.size = sum(parameter.numel() for parameter in found.values())
        self.prefix = FrozenPrefix(self.model, lambda batch: self._call(batch)[:1], memory)
        self._measured: dict[Any, tuple[int, int, int]] = {}

    @property
    def vector(self) -> torch.Tensor:
        """The parameters, `(size,)` in float64 on the device of the first of them."""
        return self.flatten(self.parameters)

    @vector.setter
    @torch.no_grad()
    def vector(self, value: torch.Tensor) -> None:
        for name, part in self.split(value).items():
            self.parameters[name].copy_(part)

    def flatten(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns tensors by the names of the parameters as one vector, `(size,)` in float64.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        for name, parameter in self.parameters.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                got = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
                raise ValueError(f"There must be a tensor {name!r} of shape {tuple(parameter.shape)}, got {got}.")
        return torch.cat([tensors[name].detach().double().flatten().to(self.device) for name in self.parameters])

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns a vector as tensors by the names of the parameters, with their shapes, dtypes and devices."""
        parts = vector.split([parameter.numel() for parameter in self.parameters.values()])
        return {
            name: part.view(parameter.shape).to(parameter)
            for (name, parameter), part in zip(self.parameters.items(), parts)
        }

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Puts the model in eval mode, with gradients for the parameters alone, and back afterwards.

        Gradient checkpointing rests in eval mode.
        """
        training = [module for module in self.model.modules() if module.training]
        required = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        chosen = set(self.parameters.values())
        self.model.eval()
        for parameter in required:
            parameter.requires_grad_(parameter in chosen)
        try:
            with no_input_gradients(self.model):
                yield
        finally:
            for module in training:
                module.training = True
            for parameter, value in required.items():
                parameter.requires_grad_(value)

    def _call(
        self, batch: Batch, parameters: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns outputs `(n, places, c)` and targets `(n, places)`, with other values of the parameters if given.

        The outputs are in single precision at least: probes of the loss are made of them.
        """

        def forward(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            arguments, labels = self.alignment.split({**batch.tensors, **batch.options})
            if parameters is None:
                found = self.model(**arguments)
            else:
                found = functional_call(self.model, parameters, (), arguments)
            outputs, targets = self.alignment.pair(found, labels)
            return widened(outputs), targets

        return self.prefix.call(batch, forward)

    def loss_and_gradient(
        self, loader: Loader, limit: float = math.inf, gradient: bool = True
    ) -> tuple[float, int, torch.Tensor]:
        """Returns the sum of the losses of all samples, the number of targets, and the gradient of the sum `(size,)`.

        Args:
            loader: what `batches` takes.
            limit: once the losses, which are never negative, add up to more, the rest is not computed. The sum is then
                above the limit and the gradient is of no use.
            gradient: whether the gradient is wanted; otherwise it is zero and backward passes are saved.

        Raises:
            ValueError: there is no target, or the gradient is wanted and the parameters have no effect.
        """
        sums = torch.zeros(self.size + 2, dtype=torch.float64, device=self.device)
        with self.evaluation(), torch.set_grad_enabled(gradient):
            for batch in batches(loader, self.device):
                if not sums[0] <= limit:
                    continue  # to the end of the loader: Accelerate's would be left in the middle of an epoch
                outputs, targets = self.prefix.call(batch, self._call, remember=True)
                loss = self.loss.values(outputs, targets).double().sum()
                sums[0] += loss.detach()
                sums[1] += (targets != IGNORED).sum()
                if gradient:
                    check_dependence(outputs, self.size)
                    sums[2:] += self._flat_gradient(loss)
        sums = total(sums)
        if not sums[1] and sums[0] <= limit:
            raise ValueError("The loader gives no sample with a target.")
        return float(sums[0]), int(sums[1]), sums[2:]

    def _flat_gradient(self, loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        pairs = zip(found, self.parameters.values())
        return torch.cat([(torch.zeros_like(p) if part is None else part).double().flatten() for part, p in pairs])

    def linearise(self, loader: Loader, draws: int | None, share: float = 1.0) -> Iterator[Linearised]:
        """Yields probes of the loss times the Jacobian of the outputs, for this process's samples, chunk by chunk.

        The outer products of all rows add up to the generalised Gauss-Newton matrix `sum_i J_i^T H_i J_i`, exactly or
        in expectation. By forward-mode differentiation where there are fewer parameters than probes, otherwise by
        reverse mode.

        Args:
            loader: what `batches` takes.
            draws: random probes for every sample, which depend on its content alone; all probes if None, c for every
                target, of which those for targets that a sample does not have are zero.
            share: share of the samples that is used, chosen by their content.
        """
        with self.evaluation():
            for batch, keys in self._chosen(loader, share):
                # What a forward pass keeps, as much again for every vector on the way back, and rows in two precisions.
                probes, outputs, kept = self.prefix.call(batch, partial(self._sizes, draws=draws))
                need = kept * (1 + min(probes, self.size)) + probes * (12 * self.size + 16 * outputs)
                chunk = max(1, int(self.memory / need))
                for start in range(0, len(batch), chunk):
                    part, part_keys = batch.select(slice(start, start + chunk)), keys[start : start + chunk]
                    yield self.prefix.call(part, partial(self._rows, keys=part_keys, draws=draws))

    def _chosen(self, loader: Loader, share: float) -> Iterator[tuple[Batch, list[str]]]:
        """Yields the samples of a share of a loader, and their hashes."""
        for batch in batches(loader, self.device):
            keys = batch.keys()
            if share < 1:
                chosen = [i for i, key in enumerate(keys) if float(unit_uniform(key, "subset")) < share]
                batch, keys = batch.select(chosen), [keys[i] for i in chosen]
            if keys:
                yield batch, keys

    def _rows(self, batch: Batch, keys: list[str], draws: int | None) -> Linearised:
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        labels = self._labels(batch)
        places, classes, _ = self._measure(batch)
        targets, where = self._at_targets(labels, places)
        draws = self._at_most(draws, labels, classes)
        forward_mode = self.size < (draws or where.shape[1] * classes)
        own = draws if draws and labels.dim() == 1 else 1

        def one(
            sample: dict[str, torch.Tensor], where: torch.Tensor, present: torch.Tensor, u: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            def function(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
                single = Batch({name: tensor[None] for name, tensor in sample.items()}, batch.options)
                return self._call(single, parameters)[0][0][where]

            def probe(outputs: torch.Tensor) -> torch.Tensor:
                if draws is None:
                    return self.loss.exact_probes(outputs, present)
                if self.estimator == "signs":
                    return self.loss.sign_probes(outputs, present, u, draws, own)
                return self.loss.label_probes(outputs, present, u)

            if forward_mode:
                jacobian, outputs = jacfwd(lambda p: (function(p),) * 2, has_aux=True)(parameters)
                flat = torch.cat([part.flatten(2) for part in jacobian.values()], -1)
                return torch.einsum("mtc,tcp->mp", probe(outputs).double(), flat.double()), outputs
            outputs, pull_back = vjp(function, parameters)  # type: ignore[misc]
            (found,) = vmap(pull_back)(probe(outputs))
            return torch.cat([part.flatten(1) for part in found.values()], 1).double(), outputs

        present = (targets != IGNORED).to(torch.float32)
        each = (where, present, self._numbers(keys, present, draws, classes))
        tensors = dict(batch.tensors)
        mask = tensors.get("attention_mask")
        if self.alignment.kind == "next token" and mask is not None and (mask[:, 1:] <= mask[:, :-1]).all():
            del tensors["attention_mask"]  # no token of a causal model sees the padding behind it
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know neither vmap nor forward mode
            if any(name.endswith("attention_mask") for name in tensors):
                # transformers looks at the values of a mask, which vmap does not allow.
                singles = [
                    one({name: tensor[i] for name, tensor in tensors.items()}, *(part[i] for part in each))
                    for i in range(len(batch))
                ]
                rows, outputs = (torch.stack(found) for found in zip(*singles))
            else:
                rows, outputs = vmap(one)(tensors, *each)
        return Linearised(rows, outputs, targets, keys)

    def _labels(self, batch: Batch) -> torch.Tensor:
        return self.alignment.split({**batch.tensors, **batch.options})[1]

    def _at_targets(self, labels: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the targets of samples and the places where they are, `(n, t)` both, for the most targets t."""
        targets = self.alignment.targets(labels, places)
        present = targets != IGNORED
        first = present.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        where = first[:, : max(1, int(present.sum(1).max()))]
        return targets.gather(1, where), where

    def _numbers(self, keys: list[str], present: torch.Tensor, draws: int | None, classes: int) -> torch.Tensor:
        """Returns the random numbers of the targets of every sample, `(n, t, c)` or `(n, draws, t, 1)`.

        A sample has the same ones whatever it is padded to, since those that it has no targets for are not drawn.
        """
        found = []
        for key, number in zip(keys, present.sum(1).int().tolist()):
            shape = (number, classes) if self.estimator == "signs" else (draws or 0, number, 1)
            numbers = unit_uniform(key, self.estimator, shape=shape)
            found.append(nn.functional.pad(numbers, (0, 0, 0, present.shape[1] - number)))
        return torch.stack(found).to(self.device)

    def _sizes(self, batch: Batch, draws: int | None) -> tuple[int, int, int]:
        """Returns the most rows and outputs at targets that a sample has, and the bytes that a forward pass keeps."""
        labels = self._labels(batch)
        places, classes, kept = self._measure(batch)
        outputs = self._at_targets(labels, places)[1].shape[1] * classes
        return self._at_most(draws, labels, classes) or outputs, outputs, kept

    def rows_of_a_sample(self, loader: Loader, draws: int | None) -> int:
        """Returns how many rows `linearise` gives for a sample at most, over all processes.

        All samples are looked at where that depends on them: for all probes of several targets a sample.
        """
        most = 0
        with self.evaluation():
            for batch in batches(loader, self.device):
                most = max(most, self.prefix.call(batch, partial(self._sizes, draws=draws))[0])
                if draws is not None or batch.tensors["labels"].dim() == 1:
                    break
        return max(gathered([most]))

    def _at_most(self, draws: int | None, labels: torch.Tensor, classes: int) -> int | None:
        """Returns None, for all probes, where a sample's target has as many groups as it has vectors.

        Where samples have several targets their numbers differ, and one rule must hold for all.
        """
        alone = self.estimator == "signs" and labels.dim() == 1
        return None if draws is not None and alone and draws >= classes else draws

    def _measure(self, batch: Batch) -> tuple[int, int, int]:
        """Returns a sample's number of places, of outputs at each, and the bytes that a forward pass keeps."""
        shapes = tuple(tensor.shape[1:] for tensor in batch.tensors.values())
        if shapes not in self._measured:
            kept = 0

            def count(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal kept
                kept += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                outputs, _ = self._call(batch.select(slice(0, 1)))
            if torch.is_grad_enabled():
                check_dependence(outputs, self.size)
            self._measured[shapes] = (outputs.shape[1], outputs.shape[2], kept)
        return self._measured[shapes]

    def along(self, loader: Loader, step: torch.Tensor) -> list[torch.Tensor]:
        """Returns what the outputs at the targets of every sample become with a step, to first order: `f + J step`.

        One forward-mode pass a batch gives it.

        Args:
            loader: what `batches` takes.
            step: change of the parameters, `(size,)`.

        Returns:
            A tensor `(targets, c)` for every sample of this process, in main memory.
        """
        parameters, tangents = {n: p.detach() for n, p in self.parameters.items()}, self.split(step)

        def moved(batch: Batch) -> list[torch.Tensor]:
            def call(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
                return self._call(batch, parameters)[0]

            outputs, tangent = jvp(call, (parameters,), (tangents,))  # type: ignore[misc]
            present = self.alignment.targets(self._labels(batch), outputs.shape[1]) != IGNORED
            return [each[at].detach().cpu() for each, at in zip(outputs + tangent, present)]

        with self.evaluation(), sdpa_kernel(SDPBackend.MATH):
            return [each for batch in batches(loader, self.device) for each in self.prefix.call(batch, moved)]

    def curvature_product(
        self, loader: Loader, weights: torch.Tensor, vector: torch.Tensor, share: float = 1.0
    ) -> torch.Tensor:
        """Returns `sum_i J_i^T H_i J_i v`, exactly, over the samples of all processes.

        One forward-mode and one reverse pass a batch give it.

        Args:
            loader: what `batches` takes.
            weights: parameters at which the outputs are linearised, `(size,)`.
            vector: v, `(size,)`.
            share: share of the samples that is used, chosen by their content.
        """
        parameters, tangents = self.split(weights), self.split(vector)

        def product(batch: Batch) -> torch.Tensor:
            def call(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
                return self._call(batch, parameters)[0]

            _, tangent = jvp(call, (parameters,), (tangents,))  # type: ignore[misc]
            outputs, pull_back = vjp(call, parameters)  # type: ignore[misc]
            present = (self.alignment.targets(self._labels(batch), outputs.shape[1]) != IGNORED)[..., None]
            (found,) = pull_back(self.loss.hessian_product(outputs, tangent) * present)
            return torch.cat([found[name].double().flatten() for name in self.parameters])

        result = torch.zeros_like(vector)
        with self.evaluation(), sdpa_kernel(SDPBackend.MATH):
            for batch, _ in self._chosen(loader, share):
                result += self.prefix.call(batch, product)
        return total(result)
