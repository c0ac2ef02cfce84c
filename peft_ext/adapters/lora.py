"""Exports adapters as stock LoRA adapters, which load where this package is not installed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.card import CardFacts, write_card
from ..checkpoint.markdown import code, escape, python_string
from ..checks import check_positive_integer, check_probability
from ..files import check_writable, write_whole
from ..tuners.config import SeededConfig
from ..tuners.description import AUTO_CLASSES
from ..tuners.layers import SeededLayer, layer_kind
from ..tuners.surroundings import PREFIX, check_biases, clean, saved_modules, whole
from .low_rank import LowRank
from .saved import read, unexplained, verify
from .stand_in import ADAPTER, on_stand_in, vector_refused

_MOST_VLLM = 512  # vllm/config/lora.py: the largest `max_lora_rank`; 16 by default
_MERGE = "Merge the adapter into the model (`merge_and_unload`) and save that."


def to_lora(
    model_or_folder: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    error: float | None = None,
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes an adapter as a LoRA adapter of PEFT, which loads without this package.

    NOLA, and PRANC and MCNC on factors, are exported exactly, to rounding: their factors are LoRA's. The dense updates
    of PRANC and MCNC on whole weights are cut off behind their largest singular values, or kept whole with `error=0`.

    Every linear layer and embedding has the same rank, the largest that one of them needs, filled up with zeros, and
    `lora_alpha / r` is the scaling of all: vLLM and llama.cpp read no `rank_pattern` and no `alpha_pattern`. Only
    convolutions, which neither takes, have ranks of their own. Trained biases, PRANC's biases (as `lora_bias`) and
    `modules_to_save` are exported too; dropout is not.

    Args:
        model_or_folder: a model of PEFT or of transformers with an adapter, or a saved adapter: its folder, or its id
            on the hub.
        out: a folder, made unless it is there.
        rank: of dense updates; that of a grouped convolution is the next multiple of its groups.
        error: in place of `rank`: the norm of what is cut off of a module's update, relative to that of the update,
            from 0 to below 1. All modules get the smallest rank with which each of them stays below it.
        adapter_name: which adapter of a model.
        base: for a saved adapter, the base model, or its folder or id on the hub, of which the configuration alone is
            read: what kinds of layers are adapted. It is not needed where the names of the modules tell that they are
            linear layers.
        revision: branch, tag or commit of a saved adapter on the hub.
        overwrite: write into a folder that is not empty.

    Returns:
        Values that JSON can hold: `folder`, `method`, `r`, `lora_alpha`, `modules` (by name, each with `rank`, that
        was needed, and `error`, relative), `worst_module` and `worst_error`, `error` (of all modules together),
        `bytes` of the weights file, and `notes`, sentences on what the file holds, lacks or asks of its readers.

    Raises:
        ValueError: an argument that does not fit, a damaged checkpoint, a base model that is needed or does not fit, or
            a module that a LoRA adapter cannot represent, by its name.
        FileExistsError: `out` is not empty.
        OSError: no such folder, repository or base model.
    """
    if isinstance(model_or_folder, nn.Module):
        if base is not None or revision is not None:
            raise ValueError("`base` and `revision` must be None for a model: they belong to saved adapters.")
        source = None
        config = _config(model_or_folder, adapter_name)
        _check_size(config, rank, error)
        parts, others = _parts(model_or_folder, adapter_name), _others(model_or_folder, adapter_name, config)
        everything: list[str] | None = [name for name, _ in _base_model(model_or_folder).named_modules()]
    else:
        if adapter_name != "default":
            raise ValueError(f"`adapter_name` must be 'default' for a saved adapter, got {adapter_name!r}.")
        saved = read(model_or_folder, revision)
        source, config = saved.folder, _seeded(None if saved.is_network else saved.config)
        _check_size(config, rank, error)
        verify(saved)
        model, everything = on_stand_in(saved, base)
        parts = _parts(model, ADAPTER)
        strangers = unexplained(saved)
        others = {name: tensor for name, tensor in saved.others.items() if name not in strangers}
    folder = check_writable(out, overwrite, source)
    plan = _Plan.of(parts, rank, error)
    tensors = plan.tensors(parts)
    lora = _lora_config(config, parts, plan, everything)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({**tensors, **others}, metadata={"format": "pt"})
    write_whole(folder / SAFETENSORS_WEIGHTS_NAME, data)
    described = {**lora.to_dict(), "target_modules": [part.name for part in parts]}
    if config.auto_mapping is not None:
        described["auto_mapping"] = config.auto_mapping
    write_whole(folder / CONFIG_NAME, json.dumps(described, indent=2, sort_keys=True) + "\n")
    found = {
        "folder": str(folder),
        "method": config.method_name,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "modules": plan.modules,
        **plan.errors(),
        "bytes": len(data),
        "notes": _notes(config, lora, parts, others),
    }
    write_card(folder, _card_facts(lora, found))
    return found


def _check_size(config: SeededConfig, rank: int | None, error: float | None) -> None:
    """Verifies that a size is asked for where one is needed, and nowhere else."""
    if config.ensure_weight_tying:
        raise ValueError(
            "`ensure_weight_tying` must be False for an adapter that becomes one of LoRA: its readers take two updates "
            "for what is one. Merge the adapter into the model instead."
        )
    if getattr(config, "r", None) and getattr(config, "apply_to", "factors") == "factors":
        if rank is not None or error is not None:
            raise ValueError(
                f"`rank` and `error` must be None for {config.method_name} on factors, which is exported exactly, got "
                f"rank={rank!r} and error={error!r}."
            )
        return
    if (rank is None) == (error is None):
        raise ValueError(
            f"`rank` or `error` must be given for {config.method_name}, whose updates are dense (and not both), got "
            f"rank={rank!r} and error={error!r}. error=0 exports them exactly, with full rank."
        )
    if rank is not None:
        check_positive_integer("rank", rank)
    else:
        check_probability("error", error)


def _config(model: nn.Module, adapter_name: str) -> SeededConfig:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or adapter_name not in configs:
        names = sorted(configs) if isinstance(configs, Mapping) else "a model without adapters"
        raise ValueError(f"`adapter_name` must be an adapter of the model, got {adapter_name!r} and {names}.")
    return _seeded(configs[adapter_name])


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _seeded(config: Any) -> SeededConfig:
    if not isinstance(config, SeededConfig):
        what = "a network from a seed" if config is None else f"an adapter of {type(config).__name__}"
        raise ValueError(f"`model_or_folder` must hold an adapter of NOLA, PRANC or MCNC, got {what}.")
    return config


# What is exported


@dataclass
class _Part:
    """An adapted module.

    Attributes:
        kind: `"linear"`, `"conv2d"` or `"embedding"`.
        base: the module before it was adapted.
        update: without the scaling.
        bias: what is added to its bias, of shape `(fan_out,)`, if anything is.
    """

    name: str
    kind: str
    base: Any
    update: LowRank
    scaling: float
    bias: torch.Tensor | None


def _parts(model: nn.Module, adapter: str) -> list[_Part]:
    """The modules that an adapter adapts, by their names in the base model.

    Raises:
        ValueError: LoRA cannot represent one of them.
    """
    pool = getattr(getattr(model, "base_model", None), "pool", None)
    parts = []
    with pool.holding(adapter) if pool is not None and adapter in pool else nullcontext():
        for name, layer in _base_model(model).named_modules():
            if isinstance(layer, SeededLayer) and layer.container(adapter) is not None:
                parts.append(_part(clean(name), layer, adapter))
    if not parts:
        raise ValueError(f"`adapter_name` must be an adapter with adapted layers, got {adapter!r}, which has none.")
    if any(part.bias is not None for part in parts):
        embeddings = [part.name for part in parts if part.kind == "embedding"]
        if embeddings:
            raise ValueError(
                f"{embeddings[0]!r} is an embedding, which cannot be in a LoRA adapter with biases (`lora_bias`), and "
                f"the adapter updates biases of other modules. {_MERGE}"
            )
    return parts


@torch.no_grad()
def _part(name: str, layer: SeededLayer, adapter: str) -> _Part:
    base: Any = layer.get_base_layer()
    kind = layer_kind(base)
    if kind == "vector":
        raise ValueError(vector_refused(name))
    if kind not in ("linear", "conv2d", "embedding"):
        raise ValueError(f"{name!r}, a {type(base).__name__}, cannot be exported as LoRA. {_MERGE}")
    if kind == "embedding" and base.max_norm is not None:
        raise ValueError(
            f"{name!r} has `max_norm`, which PEFT's LoRA would apply to its factor, and the adapter does not. Adapt "
            "the model without it."
        )
    if kind == "conv2d":
        pads = base.padding_mode != "zeros" and base.padding not in ("valid", (0, 0))
        dilates = any(step > 1 and size > 1 for step, size in zip(base.dilation, base.kernel_size))
        if pads or dilates:
            what = f"`padding_mode={base.padding_mode!r}`" if pads else f"`dilation={base.dilation}`"
            raise ValueError(f"{name!r} has {what}, which the convolutions of PEFT's LoRA do not have. {_MERGE}")
    (update, bias), scaling = layer.linear_update(adapter), float(layer.scaling[adapter])
    groups = base.groups if kind == "conv2d" else 1
    return _Part(name, kind, base, LowRank(update, groups), scaling, None if bias is None else bias * scaling)


def _others(model: nn.Module, adapter_name: str, config: SeededConfig) -> dict[str, torch.Tensor]:
    """The biases and modules that are trained and saved whole, by the names that PEFT gives them in a file."""
    if config.bias == "none" and not config.modules_to_save:
        return {}
    check_biases(model, config)
    state = {clean(name): tensor for name, tensor in model.state_dict().items()}
    found = BaseTuner._get_learnable_bias_state_dict(model, state, config)
    found |= saved_modules(model, adapter_name, state)
    return {
        f"{PREFIX}{name.removeprefix(PREFIX)}": whole(tensor).detach().cpu().contiguous().clone()
        for name, tensor in found.items()
    }


# How it is exported


@dataclass
class _Plan:
    """Ranks, scalings and errors.

    Attributes:
        r: the rank of linear layers and embeddings.
        scaling: of every module; `None` where modules differ and each B is multiplied by its own.
        ranks: of every module in the file, by name.
        modules: what is reported of every module.
    """

    r: int
    scaling: float | None
    ranks: dict[str, int]
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    squares: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, parts: list[_Part], rank: int | None, error: float | None) -> _Plan:
        needed = {}
        for part in parts:
            most = part.update.full_rank
            groups = part.update.groups
            own = most if rank is None and error is None else 0
            if rank is not None:
                own = min(-(-rank // groups), most)
            elif error is not None:
                own = part.update.rank_for(error)
            needed[part.name] = own * groups
        flat = [needed[part.name] for part in parts if part.kind != "conv2d"]
        r = max(flat or needed.values())
        ranks = {part.name: needed[part.name] if part.kind == "conv2d" else r for part in parts}
        scalings = {part.scaling for part in parts}
        # llama.cpp takes an alpha of 0 for no alpha at all, which is a scaling of 1.
        scaling = scalings.pop() if len(scalings) == 1 and 0 not in scalings else None
        return cls(r, scaling, ranks, {name: {"rank": own, "error": 0.0} for name, own in needed.items()})

    def alpha(self, rank: int) -> float:
        """The alpha that gives a rank its scaling: a whole number where it is one."""
        alpha = rank * (1.0 if self.scaling is None else self.scaling)
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    def tensors(self, parts: list[_Part]) -> dict[str, torch.Tensor]:
        """The tensors of the file by name; notes the errors."""
        found: dict[str, torch.Tensor] = {}
        with_biases = any(part.bias is not None for part in parts)
        for part in parts:
            A, B = part.update.factors(self.ranks[part.name] // part.update.groups)
            if not part.update.is_exact:
                lost, all = part.update.norms(A, B)
                self.modules[part.name]["error"] = math.sqrt(lost / all) if all else 0.0
                self.squares.append((lost * part.scaling**2, all * part.scaling**2))
            inverse = 1 / part.scaling if self.scaling is not None else 1.0
            if self.scaling is None:
                B = B * part.scaling
            start = f"{PREFIX}{part.name}"
            if part.kind == "embedding":
                found[f"{start}.lora_embedding_A"], found[f"{start}.lora_embedding_B"] = A[0], B[0]
                continue
            A, B = _convolved(part.base, A, B) if part.kind == "conv2d" else (A[0], B[0])
            found[f"{start}.lora_A.weight"], found[f"{start}.lora_B.weight"] = A, B
            if with_biases:
                bias = torch.zeros(len(B)) if part.bias is None else part.bias.detach().float().cpu() * inverse
                found[f"{start}.lora_B.bias"] = bias
        return {name: tensor.contiguous().clone() for name, tensor in found.items()}

    def errors(self) -> dict[str, Any]:
        worst = max(self.modules, key=lambda name: self.modules[name]["error"])
        lost, all = (sum(squares) for squares in zip(*self.squares)) if self.squares else (0.0, 0.0)
        return {
            "worst_module": worst,
            "worst_error": self.modules[worst]["error"],
            "error": math.sqrt(lost / all) if all else 0.0,
        }


def _convolved(conv: nn.Conv2d, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of every group as PEFT's two convolutions, of which the second alone has groups.

    The first reads all channels, so what a group does not read is zero in its part.

    Args:
        A: `(groups, rank, inputs of a group * kernel)`.
        B: `(groups, outputs of a group, rank)`.

    Returns:
        A `(groups * rank, inputs, *kernel)` and B `(outputs, rank, 1, 1)`.
    """
    groups, rank, _ = A.shape
    inputs = conv.in_channels // groups
    wide = A.new_zeros(groups, rank, conv.in_channels, *conv.kernel_size)
    for group in range(groups):
        part = A[group].view(rank, inputs, *conv.kernel_size)
        wide[group, :, group * inputs : (group + 1) * inputs] = part
    return wide.flatten(0, 1), B.flatten(0, 1)[:, :, None, None]


def _lora_config(config: SeededConfig, parts: list[_Part], plan: _Plan, everything: list[str] | None) -> LoraConfig:
    names = [part.name for part in parts]
    other = {name: rank for name, rank in plan.ranks.items() if rank != plan.r}
    keys = {name: f"^{re.escape(name)}" for name in other}  # PEFT would also match the ends of longer names
    return LoraConfig(
        r=plan.r,
        lora_alpha=plan.alpha(plan.r),  # type: ignore[arg-type]
        target_modules=names,
        exclude_modules=_excluded(config, names, everything),
        rank_pattern={keys[name]: rank for name, rank in other.items()},
        alpha_pattern={keys[name]: plan.alpha(rank) for name, rank in other.items()},  # type: ignore[misc]
        fan_in_fan_out=all(isinstance(part.base, Conv1D) for part in parts),
        bias="lora_only" if config.bias.endswith("_only") else config.bias,  # type: ignore[arg-type]
        lora_bias=any(part.bias is not None for part in parts),
        modules_to_save=sorted(config.modules_to_save) if config.modules_to_save else None,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _excluded(config: SeededConfig, names: list[str], everything: list[str] | None) -> str | None:
    """A regular expression of modules that are not adapted although their names end in that of an adapted one.

    A name in `target_modules` stands for all that end in it. PEFT warns if nothing is excluded, so `None` where there
    are no such modules.

    Args:
        everything: the names of all modules of the base model, if they are known.
    """
    if everything is None:
        # Where names alone chose the modules, the same names have chosen whatever ends in an adapted module's.
        chosen = isinstance(config.target_modules, str) or config.layers_to_transform is not None
        if not chosen and not config.exclude_modules:
            return None
    else:
        known = set(names)
        ends = tuple(f".{name}" for name in names)
        if not any(clean(name).endswith(ends) and clean(name) not in known for name in everything):
            return None
    starts = "|".join(sorted({re.escape(name.partition(".")[0]) for name in names}))
    short = rf".+\.(?:{starts})(?:\..*)?"
    if not any(re.fullmatch(short, name) for name in names):
        return short
    return rf"(?!(?:{'|'.join(map(re.escape, names))})$).*"


def _notes(config: SeededConfig, lora: LoraConfig, parts: list[_Part], others: Mapping[str, torch.Tensor]) -> list[str]:
    """Sentences on what the file holds, lacks and asks of its readers."""
    notes = []
    if config.dropout:
        notes.append(f"Dropout ({config.dropout:g}) is not exported: it acts in training alone.")
    if lora.modules_to_save:
        notes.append(f"Modules that were trained whole are in the file: {', '.join(lora.modules_to_save)}.")
    if lora.bias != "none":
        notes.append(f"Trained biases are in the file: they replace those of the base model (`bias={lora.bias!r}`).")
    if lora.lora_bias:
        without = [part.name for part in parts if getattr(part.base, "bias", None) is None]
        limit = f" It cannot be merged: {without[0]!r} has no bias in the base model." if without else ""
        notes.append(f"Updates of biases are in the file (`lora_bias`).{limit}")
    convolutions = [part for part in parts if part.kind == "conv2d"]
    if any(part.base.groups > 1 for part in convolutions):
        notes.append("PEFT does not merge LoRA into grouped convolutions.")
    if others or lora.lora_bias or convolutions:
        what = "other tensors than pairs of matrices" if others or lora.lora_bias else "convolutions"
        notes.append(f"vLLM and llama.cpp do not take it: it holds {what}.")
    elif lora.r > _MOST_VLLM:
        notes.append(f"vLLM does not take it: the rank is above {_MOST_VLLM}.")
    elif lora.r > 16:
        notes.append(f"vLLM takes it with `--max-lora-rank` of at least {lora.r} (its default is 16).")
    return notes


def _card_facts(lora: LoraConfig, found: Mapping[str, Any]) -> CardFacts:
    base = lora.base_model_name_or_path
    if found["error"]:
        lost = f"{found['error']:.2g} of all updates together, {found['worst_error']:.2g} of "
        lost += f"{code(found['worst_module'])}, the worst (norms, relative)"
    else:
        lost = "none, to rounding"
    rows = {
        **({"base model": code(base)} if base else {}),
        "adapted": f"{len(found['modules'])} modules",
        "exported from": escape(f"an adapter of {found['method']}"),
        "error of the export": lost,
        "saved": f"{found['bytes']:,} bytes, float32",
        **({"notes": " ".join(map(escape, found["notes"]))} if found["notes"] else {}),
    }
    auto_class = AUTO_CLASSES.get(str(lora.task_type or ""), "AutoModel")
    model = f"{auto_class}.from_pretrained({python_string(base)})" if base else "...  # the base model"
    return CardFacts(
        title="LoRA adapter",
        method="LoRA",
        library="peft",
        summary=f"A LoRA adapter of PEFT, exported from an adapter of {found['method']} by peft&#95;ext.",
        rows=rows,
        options=[(code("r"), code(lora.r), code(8)), (code("lora_alpha"), code(lora.lora_alpha), code(8))],
        install="pip install peft",
        hint="`peft_ext` is not needed.",
        example=f"from peft import PeftModel\nfrom transformers import {auto_class}\n\nmodel = {model}\n"
        'model = PeftModel.from_pretrained(model, "<this folder or repository>")',
        base_model=base,
    )
