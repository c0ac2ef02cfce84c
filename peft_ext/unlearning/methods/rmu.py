"""Representation misdirection for unlearning (Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With
Unlearning", 2024, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import nn
from torch.func import functional_call

from ...checks import check_positive
from ...targets import IGNORED, Alignment
from ...training.callbacks import trainable_parameters, trainable_state
from .base import Request
from .paired import Paired, PairedTrainer


def find_layer(model: nn.Module, layer: str | None) -> str:
    """Returns the full name of the module whose outputs are steered.

    Args:
        model: with trainable parameters.
        layer: how the name ends, at a dot; by default the middle one of the blocks that hold trainable parameters, or
            of all blocks if none does.

    Raises:
        ValueError: there is no such module, or several, or by default no list of blocks.
    """
    names = [name for name, _ in model.named_modules()]
    if layer is not None:
        found = [name for name in names if name == layer or name.endswith(f".{layer}")]
        if len(found) != 1:
            said = f"{len(found)} modules end so: {', '.join(found[:3])}" if found else "no module's name ends so"
            raise ValueError(f"`layer` must name one module of the model, got {layer!r}; {said}.")
        return found[0]
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    if not len(blocks):
        raise ValueError(
            f"rmu steers the outputs of a layer, and {type(model).__name__} has no list of blocks that would suggest "
            "one: name it by `layer`."
        )
    changing = [i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
    changing = changing or list(range(len(blocks)))  # with soft prompts, which stand in front of all blocks
    return f"{name}.{changing[len(changing) // 2]}"


def activations(
    model: nn.Module, layer: str, batch: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Returns what a module gives at the places of all targets of a batch, `(places, width)`.

    For texts they are the places whose outputs belong to targets; for a classifier of samples they are the sample, or
    all its tokens that `attention_mask` does not leave out.

    Args:
        model: any model that `Alignment` knows.
        layer: full name of the module.
        batch: with `labels`.
        weights: parameters in place of the model's own, by name.

    Raises:
        ValueError: the module was not called, or gives nothing that belongs to targets.
    """
    found: list[Any] = []
    inner = extract_model_from_parallel(model)
    hook = inner.get_submodule(layer).register_forward_hook(lambda module, inputs, output: found.append(output))
    alignment = Alignment.of(inner)
    arguments, labels = alignment.split(batch)
    try:
        model(**arguments) if weights is None else functional_call(inner, dict(weights), (), arguments)
    finally:
        hook.remove()
    hidden = found[-1] if found else None
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    if labels.dim() == 2 and isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
        if hidden.shape[1] >= labels.shape[1] and not (alignment.encoder_decoder and "decoder" not in layer):
            places, targets = alignment.pair(hidden, labels)
            return places[targets != IGNORED]
    elif (
        labels.dim() == 1 and isinstance(hidden, torch.Tensor) and hidden.dim() in (2, 3) and len(hidden) == len(labels)
    ):
        mask = arguments.get("attention_mask")
        if hidden.dim() == 3 and isinstance(mask, torch.Tensor) and mask.shape == hidden.shape[:2]:
            return hidden[mask.bool()]
        return hidden.reshape(-1, hidden.shape[-1])
    shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
    raise ValueError(
        f"rmu steers what a layer says at the targets, and {layer!r} gives {shape} for labels of shape "
        f"{tuple(labels.shape)}: name by `layer` a module with outputs of shape (n, width) or (n, length, width), one "
        "for every label."
    )


class SteeringTrainer(PairedTrainer):
    """Keeps the activations of retain samples where they were."""

    def retain_loss(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        layer, _, trained = self.before
        with torch.no_grad():
            wanted = activations(model, layer, batch, trained)
        return (activations(model, layer, batch) - wanted).square().mean()


@dataclass
class RMU(Paired):
    """Steers the activations of forget samples at a layer to one random vector, and keeps those of retain samples.

    Both losses are mean squares over places and width. Parameters behind the layer have no part in it and stay. The
    activations of the trained model come from the trained values of the few trainable parameters; no second model is
    kept.

    Attributes:
        retain_weight: as in `Paired`. The published weights are high, 1,200 for a model of 7 billion parameters: what
            moves at retain samples is small beside the length of the vector.
        layer: how the name of the module ends, at a dot, such as `"layers.7"`; by default the middle one of the blocks
            that hold trainable parameters, or of all if none does. It must lie behind some of these parameters.
        steering: length of the vector, in units of the mean length of the forget set's activations: a length as it was
            published means another thing in every model.
    """

    name: ClassVar[str] = "rmu"
    universal: ClassVar[bool] = False
    trainer: ClassVar[type[PairedTrainer]] = SteeringTrainer
    retain_weight: float = 100.0
    layer: str | None = None
    steering: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("steering", self.steering)

    def check(self, request: Request) -> None:
        layer, model = find_layer(request.model, self.layer), request.model.eval()
        parameters = list(trainable_parameters(model).values())
        batch = send_to_device(request.collator([request.forget[0]]), parameters[0].device)
        said = activations(model, layer, batch).sum()
        # Not `requires_grad` alone: hooks of gradient checkpointing ask for gradients of what nothing changes.
        gradients = torch.autograd.grad(said, parameters, allow_unused=True) if said.requires_grad else []
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"No trainable parameter has an effect on the outputs of {layer!r}, which rmu is to steer: name by "
                "`layer` a module that lies behind an adapter, and see that this adapter is active "
                "(`model.set_adapter(name)` makes it so)."
            )

    def before(self, request: Request, parts: Mapping[str, Any]) -> tuple[str, torch.Tensor, dict[str, torch.Tensor]]:
        self.check(request)
        layer, device = find_layer(request.model, self.layer), request.training.device
        model = request.model.to(device).eval()  # type: ignore[arg-type]
        batches = (send_to_device(batch, device) for batch in request.loader(parts["forget"]))
        with torch.no_grad():
            found = torch.cat([activations(model, layer, batch) for batch in batches])
        generator = torch.Generator().manual_seed(request.training.seed)
        vector = torch.rand(found.shape[-1], generator=generator).to(found)
        length = self.steering * found.norm(dim=-1).mean()
        return layer, length * vector / vector.norm(), trainable_state(model)

    def forget_loss(self, model: nn.Module, batch: Mapping[str, Any], before: Any) -> torch.Tensor:
        layer, vector, _ = before
        return (activations(model, layer, batch["forget"]) - vector).square().mean()
