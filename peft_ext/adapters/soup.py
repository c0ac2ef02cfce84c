"""Soups: one adapter whose trained numbers are a mixture of those of several."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from ..checks import check_positive, check_positive_integer
from ..tuners.checkpointed import provenance_of
from ..tuners.combining import check_alike
from ..tuners.config import SeededConfig
from ..tuners.mcnc.config import McncConfig
from ..tuners.mcnc.model import NOT_COMBINED
from ..tuners.surroundings import PREFIX
from ..unlearning.derivatives.data import Loader, batches, gathered
from ..unlearning.derivatives.function import AdapterFunction
from ..unlearning.derivatives.losses import CrossEntropy

Place = str | os.PathLike[str]

_SOUP, _INGREDIENT = "default", "ingredient"
_WARM_UP = 0.2  # share of the steps
# Fields of a LoraConfig that change neither what the trained numbers mean nor what is trained.
_FREE = set(
    "auto_mapping base_model_name_or_path inference_mode init_lora_weights loftq_config lora_dropout peft_version "
    "revision runtime_config task_type".split()
)
_STARTS = (True, False, "gaussian", "orthogonal")  # of LoRA, which leave the base weights as they are


@dataclass
class Soup:
    """An adapter that was mixed from N others.

    Attributes:
        model: the base model with the adapter `"default"`, which is trainable, in evaluation mode.
        adapters: the names of the N adapters.
        coefficients: how much of each adapter is in the soup, `(N,)` in float64 with the sum 1, by the name of the
            module that is adapted or trained whole. Adapters that keep one vector for all modules, as PRANC's, have
            one entry for it, under the name of the first.
        losses: mean loss over the loader of each adapter alone; empty if there was no loader.
        loss: that of the soup.
    """

    model: PeftModel
    adapters: list[str]
    coefficients: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    loss: float | None = None


def best_adapter(model: nn.Module, adapters: Sequence[Place], loader: Loader) -> Soup:
    """Loads that one of several adapters which has the lowest loss on the loader; what soups are compared with.

    See [`learn_soup`] for the arguments and what is refused.
    """
    _count(loader)
    with _Ingredients(model, adapters) as found:
        losses = found.losses(loader)
        best = min(range(len(losses)), key=losses.__getitem__)
        return found.soup(found.share([best]), losses, losses[best])


def uniform_soup(model: nn.Module, adapters: Sequence[Place]) -> Soup:
    """Makes one adapter of several, which is their mean.

    The uniform soup of Wortsman et al. 2022 (https://arxiv.org/abs/2203.05482), section 2. See [`learn_soup`] for the
    arguments, what a mean of adapters is, and what is refused.
    """
    with _Ingredients(model, adapters) as found:
        return found.soup(found.share(range(len(found.names))))


def greedy_soup(model: nn.Module, adapters: Sequence[Place], loader: Loader) -> Soup:
    """Makes one adapter of several, which is the mean of those that improve it.

    The greedy soup of Wortsman et al. 2022 (https://arxiv.org/abs/2203.05482), recipe 1, by the loss: adapters are
    tried from the best to the worst, and each stays if the mean with it is no worse on the loader. See [`learn_soup`]
    for the arguments and what is refused.
    """
    _count(loader)
    with _Ingredients(model, adapters) as found:
        losses = found.losses(loader)
        order = sorted(range(len(losses)), key=losses.__getitem__)
        chosen, loss = order[:1], losses[order[0]]
        for index in order[1:]:
            tried = found.loss(found.share([*chosen, index]), loader)
            if tried <= loss:
                chosen, loss = [*chosen, index], tried
        return found.soup(found.share(chosen), losses, loss)


def learn_soup(
    model: nn.Module,
    adapters: Sequence[Place],
    loader: Loader,
    per_layer: bool = True,
    lr: float = 1e-2,
    epochs: int = 5,
) -> Soup:
    """Makes one adapter of several, with coefficients that are learned.

    MEHL-Soup (Li et al., ECCV 2024, https://arxiv.org/abs/2407.03641), for adapters: their coefficients sum to one and
    may be negative. A step takes the gradient of one combined model, whose inner products with the adapters are the
    gradient of the coefficients. AdamW has a cosine schedule with a warm-up of 20 %, as published. It differs from the
    publication in three ways: all adapters take part in every step, for they are small; a step of `lr` moves a
    coefficient by about `lr`, whatever the size of the adapters' numbers; and the start is the mean of all adapters or
    the best of them, and the result what was best after an epoch, by the loss on the loader: so it is never above that
    of the best adapter.

    What is mixed are the numbers that are trained: of PRANC on weights so exactly the updates, of NOLA, LoRA and PRANC
    on factors the factors A and B, and modules that are trained whole (`modules_to_save`).

    The adapters wait in a temporary file. One of them is in memory at a time, beside the soup and its gradient.

    Args:
        model: the base model, without an adapter; it is adapted in place, as by `PeftModel.from_pretrained`.
        adapters: N folders or repositories of the hub with an adapter each, of one method and seed, for the same
            modules. Each is verified as when it is loaded.
        loader: gives dicts of the model's arguments, with `labels`, and can be read several times. Its samples should
            be none that the adapters were trained on.
        per_layer: learn coefficients for every module; otherwise for the whole adapter.
        lr: the learning rate.
        epochs: how often the loader is read to learn from. It is read N + 1 times more before, and once after each.

    Raises:
        ValueError: `model` has adapters; `adapters` is empty, or they have other seeds, shapes or fields; the method
            has numbers that cannot be mixed, such as MCNC; the loader is empty or cannot be read again; the loss of an
            adapter is no finite number. The base model is then as it was.
    """
    check_positive("lr", lr)
    check_positive_integer("epochs", epochs)
    steps = epochs * _count(loader)
    with _Ingredients(model, adapters, per_layer) as found:
        losses = found.losses(loader)
        count, single = len(losses), min(range(len(losses)), key=losses.__getitem__)
        best = found.share(range(count))
        loss = found.loss(best, loader)
        if losses[single] < loss:
            best, loss = found.share([single]), losses[single]
        line = Hyperplane(best, found.distances())
        optimizer = torch.optim.AdamW([line.position], lr=lr, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(_WARM_UP * steps), steps)
        for _ in range(epochs):
            # A process whose last batch is all padding takes part in the sums of the others' step.
            read = itertools.chain(batches(loader, found.function.device), itertools.repeat(None))
            for batch in itertools.islice(read, steps // epochs):
                coefficients = line.coefficients()
                optimizer.zero_grad()
                own = [] if batch is None else [batch]
                coefficients.backward(found.gradient(coefficients.detach(), own))
                optimizer.step()
                schedule.step()
            coefficients = line.coefficients().detach()
            reached = found.loss(coefficients, loader)
            if reached < loss:
                best, loss = coefficients, reached
        return found.soup(best, losses, loss)


class Hyperplane:
    """Coefficients with the sum 1, as a function of numbers that are free.

    Every adapter has a direction, from the mean of all to the adapter, of one length for all: the mean of their
    distances. So no adapter has a greater part in a step than another because it is farther away.

    Args:
        start: the coefficients at first, `(N, groups)`, each column with the sum 1.
        distances: of the adapters from their mean, `(N, groups)`. An adapter at the mean has no direction.

    Attributes:
        position: how far to go along each direction, `(N, groups)`, 0 at first.
    """

    def __init__(self, start: torch.Tensor, distances: torch.Tensor) -> None:
        self.start = start
        self.scale = torch.where(distances > 0, distances.mean(0) / distances, 0.0)
        self.position = torch.zeros_like(start, requires_grad=True)

    def coefficients(self) -> torch.Tensor:
        """Returns the coefficients `(N, groups)`."""
        moved = self.scale * self.position
        return self.start + moved - moved.mean(0)


@contextlib.contextmanager
def _fitting(name: str) -> Iterator[None]:
    """Names the adapter where PyTorch says that its tensors do not fit."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"`adapters`: {name!r} does not fit the model: {' '.join(str(error).split())}") from error


def _take_off(model: nn.Module) -> None:
    """Makes a model what it was without adapters, wherever putting one on has broken off."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config


class _Ingredients:
    """Saved adapters in a temporary file, and the base model with one adapter that is mixed from them.

    Args:
        model, adapters, per_layer: see `learn_soup`.

    Attributes:
        model: the base model with the mixed adapter.
        names: of the adapters.
        function: the model as a function of all P numbers of the adapter.
        groups: which group of coefficients every trained tensor belongs to.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Place], per_layer: bool = True) -> None:
        if isinstance(adapters, (str, os.PathLike)) or not adapters:
            raise ValueError(f"`adapters` must be a list of at least one saved adapter, got {adapters!r}.")
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("`model` must be a base model without adapters, got one that has some; `unload()` it.")
        self.names = [str(place) for place in adapters]
        check_method(PeftConfig.from_pretrained(self.names[0]), self.names[0])
        self._base = model
        self._required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._training = [module for module in model.modules() if module.training]
        self._file = tempfile.TemporaryFile()
        try:
            with _fitting(self.names[0]):
                self.model = PeftModel.from_pretrained(model, self.names[0], _SOUP, is_trainable=True)  # type: ignore[arg-type]
            self._check_buffers()
            self.model.eval()
            self.function = AdapterFunction(self.model, CrossEntropy())
            parameters = self.function.parameters
            self._names = {_bare(name, _SOUP): name for name in parameters}
            self._sizes = torch.tensor([parameter.numel() for parameter in parameters.values()])
            double = any(parameter.dtype == torch.float64 for parameter in parameters.values())
            self._dtype = torch.float64 if double else torch.float32
            modules = [_module_of(self.model, name) for name in parameters]
            self.modules = list(dict.fromkeys(modules))
            self.groups = torch.tensor([self.modules.index(name) if per_layer else 0 for name in modules])
            self._write(self.function.vector)
            for name in self.names[1:]:
                self._write(self._read(name))
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def __enter__(self) -> _Ingredients:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._file.close()
        if kind is None:
            return
        _take_off(self._base)
        for parameter, value in self._required.items():
            parameter.requires_grad_(value)
        for module in self._training:
            module.training = True

    def _check_buffers(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and any(True for _ in module.buffers()):
                raise ValueError(
                    f"Modules in `modules_to_save` must have no buffers, such as running statistics, of which there is "
                    f"no mixture, got {name.removeprefix(PREFIX)!r}."
                )

    def _read(self, name: str) -> torch.Tensor:
        """The numbers of a saved adapter, `(P,)`."""
        config, first = PeftConfig.from_pretrained(name), self.model.peft_config[_SOUP]
        check_method(config, name)
        self._check_fields(first, config, name)
        try:
            with _fitting(name):
                self.model.load_adapter(name, _INGREDIENT, is_trainable=True)
            mine, theirs = (provenance_of(self.model, adapter) for adapter in (_SOUP, _INGREDIENT))
            if mine is not None and theirs is not None:
                check_alike(mine, theirs, (self.names[0], name))
            self.model.set_adapter(_INGREDIENT)
            trained = {_bare(each, _INGREDIENT): p for each, p in self.model.named_parameters() if p.requires_grad}
            shapes = {each: p.shape for each, p in trained.items()}
            expected = {each: self.function.parameters[full].shape for each, full in self._names.items()}
            if shapes != expected:
                other = min(each for each in {**shapes, **expected} if shapes.get(each) != expected.get(each))
                raise ValueError(
                    f"`adapters` must train tensors of the same names and shapes: {other.removeprefix(PREFIX)!r} is "
                    f"{_told(expected.get(other))} in {self.names[0]!r} and {_told(shapes.get(other))} in {name!r}."
                )
            return self.function.flatten({full: trained[each] for each, full in self._names.items()})
        finally:
            self.model.set_adapter(_SOUP)
            if _INGREDIENT in self.model.peft_config:
                self.model.delete_adapter(_INGREDIENT)

    def _check_fields(self, first: Any, config: Any, name: str) -> None:
        """Raises a ValueError for a LoRA with other fields than the first adapter's, or another method."""
        mine = defining_fields(first)
        for each, theirs in defining_fields(config).items():
            if mine.get(each) != theirs:
                raise ValueError(
                    f"`adapters` must be alike in all but their trained numbers: `{each}` is {mine.get(each)!r} in "
                    f"{self.names[0]!r} and {theirs!r} in {name!r}."
                )

    def _write(self, vector: torch.Tensor) -> None:
        self._file.write(vector.to("cpu", self._dtype).numpy().tobytes())

    def _rows(self) -> Iterator[torch.Tensor]:
        """The numbers of one adapter after the other, `(P,)` in float64."""
        size = self.function.size * self._dtype.itemsize
        self._file.seek(0)
        for _ in self.names:
            row = torch.frombuffer(bytearray(self._file.read(size)), dtype=self._dtype)
            yield row.to(self.function.device, torch.float64)

    def _by_group(self, vector: torch.Tensor) -> torch.Tensor:
        """Sums of numbers of all trained tensors `(P,)`, for every group."""
        sums = torch.stack([part.sum() for part in vector.split(self._sizes.tolist())]).cpu()
        return sums.new_zeros(int(self.groups.max()) + 1).index_add_(0, self.groups, sums)

    def share(self, chosen: Sequence[int]) -> torch.Tensor:
        """The coefficients of a mean, `(N, groups)`."""
        found = torch.zeros(len(self.names), int(self.groups.max()) + 1, dtype=torch.float64)
        found[list(chosen)] = 1 / len(chosen)
        return found

    def mixed(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The sum of the adapters times their coefficients `(N, groups)`, `(P,)`."""
        found = torch.zeros(self.function.size, dtype=torch.float64, device=self.function.device)
        for row, of_row in zip(self._rows(), coefficients):
            if of_row.any():
                found += row * of_row[self.groups].repeat_interleave(self._sizes).to(found)
        return found

    def distances(self) -> torch.Tensor:
        """How far the adapters are from their mean, `(N, groups)`."""
        centre = self.mixed(self.share(range(len(self.names))))
        return torch.stack([self._by_group((row - centre).square()) for row in self._rows()]).sqrt()

    def loss(self, coefficients: torch.Tensor, loader: Loader) -> float:
        """The mean loss of a mixture, which is then in the model."""
        self.function.vector = self.mixed(coefficients)
        loss, targets, _ = self.function.loss_and_gradient(loader, gradient=False)
        return loss / targets

    def losses(self, loader: Loader) -> list[float]:
        """The mean loss of every adapter alone.

        Raises:
            ValueError: one is no finite number.
        """
        found = [self.loss(self.share([index]), loader) for index in range(len(self.names))]
        for name, loss in zip(self.names, found):
            if not math.isfinite(loss):
                raise ValueError(
                    f"`adapters` must have finite losses on the loader, got {loss} of {name!r}: leave it out."
                )
        return found

    def gradient(self, coefficients: torch.Tensor, loader: Loader) -> torch.Tensor:
        """The gradient of the mean loss in the coefficients, `(N, groups)`: one pass through one combined model."""
        self.function.vector = self.mixed(coefficients)
        _, targets, gradient = self.function.loss_and_gradient(loader)
        return torch.stack([self._by_group(row * gradient) for row in self._rows()]) / targets

    def soup(self, coefficients: torch.Tensor, losses: Sequence[float] = (), loss: float | None = None) -> Soup:
        """Puts a mixture into the model."""
        self.function.vector = self.mixed(coefficients)
        group_of = {_module_of(self.model, name): int(group) for name, group in zip(self._names.values(), self.groups)}
        by_module = {name: coefficients[:, group].clone() for name, group in group_of.items()}
        return Soup(self.model, self.names, by_module, list(losses), loss)


def _count(loader: Loader) -> int:
    """The number of batches, in the process that has most.

    Raises:
        ValueError: there is none, or the loader cannot be read.
    """
    count = max(gathered([sum(1 for _ in batches(loader, torch.device("cpu")))]))
    if not count:
        raise ValueError("`loader` must give at least one batch, got an empty one.")
    return count


def check_method(config: Any, name: str) -> None:
    """Raises a ValueError if the trained numbers of an adapter cannot be mixed.

    Args:
        config: the adapter's.
        name: what the message calls the adapter.
    """
    if isinstance(config, McncConfig):
        raise ValueError(NOT_COMBINED)
    linear = isinstance(config, SeededConfig) and type(config).combined is not SeededConfig.combined
    if not linear and type(config) is not LoraConfig:
        raise ValueError(f"`adapters` must be of LoRA, NOLA or PRANC, got {_plain(config.peft_type)} in {name!r}.")
    if config.bias != "none":
        raise ValueError(f"`adapters` must have bias='none', got {config.bias!r} in {name!r}.")
    if getattr(config, "trainable_token_indices", None):
        raise ValueError(f"`adapters` must have no `trainable_token_indices`, got some in {name!r}.")
    start = getattr(config, "init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"`adapters` must leave the base weights as they are, got {name!r} with init_lora_weights={start!r}. "
            "Convert it with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )


def defining_fields(config: Any) -> dict[str, Any]:
    """The method, and the fields of a LoRA without which its trained numbers do not mean the same.

    Those of seeded methods are part of their identity, which says more.
    """
    fields = set() if isinstance(config, SeededConfig) else {each.name for each in dataclasses.fields(config)}
    return {each: _plain(getattr(config, each)) for each in ("peft_type", *sorted(fields - _FREE))}


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _told(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def _bare(name: str, adapter: str) -> str:
    """The name of a parameter without its adapter's."""
    before, _, after = f".{name}.".rpartition(f".{adapter}.")
    return f"{before}.{after}".strip(".")


def _module_of(model: nn.Module, name: str) -> str:
    """The module of the base model that a trained parameter belongs to."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found = ".".join(parts[:end])
        if isinstance(model.get_submodule(found), (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return found.removeprefix(PREFIX)
    return ".".join(parts[:-1]).removeprefix(PREFIX)
