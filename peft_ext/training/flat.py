"""Flat training: the gradient is taken at weights with noise, whose size grows over the training.

What is flat in the coefficients of an adapter can be sharp in the weights that they make. Flat-LoRA (Li et al. 2025,
arXiv 2409.14396) minimises the mean loss over random perturbations of the merged weight W, whose noise in row i is
normal with the standard deviation `sigma * |W_i| / sqrt(n)`, n being the length of the row: the variance of an output
grows by about `1 + sigma^2` whatever the size of the layer. There is one draw a step and one pass, so that a step costs
little more.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..checks import check_not_negative, check_positive
from ..randomness import check_seed, uniform
from .modes import check_adapters

_KINDS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_ADDITIVE = (
    "adalora c3a delora fourierft gralora loha lokr lora randlora shira tinylora unilora vblora vera waveft".split()
)
"""PEFT's methods whose layers compute with `W + get_delta_weight(adapter)`, an update that does not depend on W."""


class FlatTraining(TrainerCallback):
    """Adds noise to the merged weights for the forward and backward passes of every step, and takes it off again.

    The noise of step t of T has the size `sigma * (1 - cos(pi * t / T)) / 2`; all batches of a step that accumulates
    gradients have the same. It is drawn from the seed, the step and the layer's name: a training that is repeated,
    resumed or run in several processes has the same noise, and torch's own random numbers are left alone. The optimizer
    changes the adapter alone, as without noise, and evaluations are without noise.

    A Trainer tells its callbacks nothing of an exception or a Ctrl-C, so this one has to be entered, and puts the
    weights back when it is left:

        with FlatTraining(sigma=0.05, seed=0) as flat:
            Trainer(model, arguments, train_dataset=rows, callbacks=[flat]).train()

    Args:
        sigma: size of the noise at the end of the training, as a share of a row's norm.
        seed: of the noise, 0 to 2**64 - 1.

    Raises:
        ValueError: `sigma` or `seed` is something else; and at the begin of a training for an adapter that is merged
            or disabled, or that `check_perturbable` refuses.
        RuntimeError: at the begin of a training that is not inside `with`.
    """

    def __init__(self, sigma: float = 0.05, seed: int = 0) -> None:
        check_positive("sigma", sigma)
        self.sigma, self.seed = sigma, check_seed(seed)
        self._perturbed: ExitStack | None = None  # what undoes the noise of the present step; None outside `with`

    def __enter__(self) -> FlatTraining:
        self._perturbed = ExitStack()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()
        self._perturbed = None

    def _restore(self) -> ExitStack:
        if self._perturbed is None:
            raise RuntimeError(
                "Flat training must be entered, so that an exception in the middle of a step leaves no noise in the "
                "weights: `with FlatTraining(...) as flat:` around `Trainer(..., callbacks=[flat]).train()`."
            )
        self._perturbed.close()
        return self._perturbed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()  # after a step that ran out of memory, the Trainer may begin again with smaller batches
        check_adapters(kwargs["model"])
        check_perturbable(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grown = (1 - math.cos(math.pi * state.global_step / state.max_steps)) / 2
        noise = perturbed(kwargs["model"], self.sigma * grown, self.seed, state.global_step)
        self._restore().enter_context(noise)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()  # a training that is stopped while it accumulates gradients makes no optimizer step


@contextmanager
def perturbed(model: nn.Module, sigma: float, seed: int, step: int = 0) -> Iterator[None]:
    """Adds noise to the merged weights of a model's adapted layers until the end of the context.

    Under it the model's loss is that under a fresh draw of noise, and gradients are those at the noisy weights, for a
    training loop of one's own. Backward passes belong into the context as well: after it torch refuses them. The
    weights are then put back from copies, to the bit and after exceptions too; that takes memory for one copy of the
    adapted weights.

    Rows are those of the outputs, for embeddings the vectors of the tokens; biases have no noise. In 16 bits the noisy
    weights are rounded as all others.

    Args:
        model: with adapters that `check_perturbable` accepts; merged or disabled ones too.
        sigma: standard deviation of a row's noise, times the square root of its length, as a share of its norm.
        seed: of the noise, 0 to 2**64 - 1.
        step: which of the seed's draws.

    Raises:
        ValueError: `sigma` or `seed` is something else, or there are layers without a weight that can have noise.
        RuntimeError: adapters were merged or unmerged within the context. The weights are those from before it, which
            the layers no longer know.
    """
    check_not_negative("sigma", sigma)
    seed, step = check_seed(seed), operator.index(step)
    weights = _weights(model)
    before = [list(layer.merged_adapters) for weight in weights for layer in weight.layers]
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for weight in weights if sigma else []:
                kept.append((weight.parameter, weight.parameter.clone()))
                weight.parameter.copy_(weight.with_noise(sigma, seed, step))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        if kept and before != [layer.merged_adapters for weight in weights for layer in weight.layers]:
            raise RuntimeError(
                "Adapters were merged or unmerged while their weights had noise. The weights are those from before, "
                "which the layers do not know: load the model again, and merge outside of flat training."
            )


def check_perturbable(model: nn.Module) -> None:
    """Raises a ValueError unless every weight that active adapters of a model adapt can have noise.

    It has to be a weight in floating-point numbers of a linear layer, a convolution or an embedding, whole in this
    process, to which the method adds an update: NOLA, PRANC, MCNC, LoRA without variants such as DoRA, and others of
    PEFT that add one. Quantized weights are refused.
    """
    _weights(model)


class _Weight(NamedTuple):
    """The weight of an adapted layer.

    Attributes:
        name: of the layer, without what wrappers add to it.
        parameter: the weight.
        layers: what adapts it, from the outermost layer in.
        turned: whether it is stored as `(inputs, outputs)`.
    """

    name: str
    parameter: torch.Tensor
    layers: list[Any]
    turned: bool

    def with_noise(self, sigma: float, seed: int, step: int) -> torch.Tensor:
        """Returns the weight with noise for the norms of the merged weight's rows, in float32 at least."""
        merged = self.parameter.to(torch.promote_types(self.parameter.dtype, torch.float32))
        for layer in self.layers:
            for adapter in [] if layer.merged or layer.disable_adapters else _adapters(layer):
                merged = merged + layer.get_delta_weight(adapter).to(merged)
        rows = merged.T if self.turned else merged.flatten(1)
        count, length = rows.shape
        scales = torch.linalg.vector_norm(rows, dim=1, keepdim=True) * (sigma / math.sqrt(length))
        noise = _normal(seed, ("flat training", self.name, count, length, step), rows.numel()).view(count, length)
        noise = noise.to(merged) * scales
        return (noise.T if self.turned else noise.view(merged.shape)).add_(self.parameter)


def _normal(seed: int, stream: tuple[str | int, ...], count: int) -> torch.Tensor:
    """Returns standard normal numbers of a stream, float32 of shape `(count,)`: the quantiles of its uniform ones."""
    # Moved by half their distance, which is exact, the uniform numbers lie within (-1, 1) and symmetrically around 0.
    return uniform(seed, stream, count).add_(2.0**-24).erfinv_().mul_(math.sqrt(2))


def _adapters(layer: Any) -> list[str]:
    available = layer._get_available_adapters()
    return [adapter for adapter in layer.active_adapters if adapter in available]


def _weights(model: nn.Module) -> list[_Weight]:
    """Returns the weights that active or merged adapters of a model adapt; one that modules share is there once."""
    found: dict[int, _Weight] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not (layer.merged or _adapters(layer)):
            continue
        base_layer: Any = layer.get_base_layer()
        problem = _problem(layer, base_layer)
        if problem:
            raise ValueError(f"Noise on the merged weight of {name!r} is not possible: {problem}.")
        if id(base_layer.weight) in found:
            continue
        layers: list[Any] = [layer]
        while isinstance(layers[-1].base_layer, BaseTunerLayer):
            layers.append(layers[-1].base_layer)
        short = name.replace("_orig_mod.", "").removeprefix("module.")
        found[id(base_layer.weight)] = _Weight(short, base_layer.weight, layers, isinstance(base_layer, Conv1D))
    if not found:
        raise ValueError(
            "There is no merged weight to add noise to: no active adapter changes weights. Flat training is for LoRA, "
            "NOLA, PRANC, MCNC and others that add an update to weights; `model.set_adapter(name)` makes one active."
        )
    return list(found.values())


def _problem(layer: Any, base_layer: nn.Module) -> str | None:
    """Returns why the weight of a layer cannot have noise, and what to do; None if it can."""
    places = type(layer).__module__.split(".")
    method = places[2] if places[:2] == ["peft", "tuners"] else type(layer).__name__
    variants = sorted(getattr(layer, "lora_variant", {}).keys() & layer._get_available_adapters())
    if variants or not getattr(layer, "adds_to_weight", method in _ADDITIVE):
        return (
            f"{f'the LoRA variant of {variants[0]!r}' if variants else method} does more than add an update to it. Use "
            "NOLA, PRANC, MCNC, plain LoRA or another method that adds one, or train without noise"
        )
    kind = type(base_layer).__name__
    if not isinstance(base_layer, _KINDS):
        return (
            f"noise is for rows of linear layers, convolutions and embeddings, and this is a {kind}. Leave it out of "
            "`target_modules`, use a base model that is not quantized, or train without noise"
        )
    weight = base_layer.weight
    if weight.is_meta or not weight.numel():
        return "it is sharded or offloaded. Keep the whole model in every process, or train without noise"
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
    if getattr(layer, "quantization_backend", None) is not None or not plain:
        return (
            f"the weight of the {kind} is quantized, or sharded, and packed numbers cannot hold the noise. Load the "
            "base model in float32 or bfloat16, whole in every process, or train without noise"
        )
    return None
