"""Saves coefficients in another type, without a model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from safetensors.torch import save

from ..checkpoint import quantization
from ..checkpoint.identity import checksum, write_record
from ..checks import check_choice
from ..files import check_writable, write_whole
from ..tuners.description import NETWORK_CONFIG_NAME, describe
from .saved import Saved

_TENSORS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npy", ".npz", ".pkl"),
    ".index.json",  # says in which file a tensor is
)
_WRITTEN_ANEW = (CONFIG_NAME, NETWORK_CONFIG_NAME)
_NOT_COPIED = (*_WRITTEN_ANEW, "trainer_state.json")  # which is of a run of the Trainer


def quantize(saved: Saved, out: str | os.PathLike[str], dtype: str, overwrite: bool = False) -> dict[str, Any]:
    """Saves an adapter or a network again, with its coefficients in another type.

    The model card goes with it, described anew, and so do the other files of the folder that hold no tensors, such as
    those of a tokenizer. Folders in it, with further adapters perhaps, and what a Trainer left there, do not.

    Args:
        saved: which is not changed.
        out: a folder, made unless it is there.
        dtype: one of `peft_ext.checkpoint.quantization.DTYPES`.
        overwrite: write into a folder that is not empty.

    Returns:
        `folder`, `coefficient_dtype`, `bytes` of the weights file, `bytes_before`, `error`: the norm of the change
        of the coefficients relative to theirs, and `not_copied`: names of the files and folders that stay behind.

    Raises:
        ValueError: another dtype, one in which coefficients become infinite, or coefficients that cannot be unpacked
            without the base model. Nothing is written then.
        FileExistsError: `out` is the folder of the checkpoint, is not empty, or holds one of the other kind.
    """
    check_choice("dtype", dtype, quantization.DTYPES)
    path = check_writable(out, overwrite, saved.folder)
    other = CONFIG_NAME if saved.is_network else NETWORK_CONFIG_NAME
    if (path / other).exists():
        kind = "an adapter" if saved.is_network else "a network"
        raise FileExistsError(f"`out` must not hold {kind} ({other}): nothing would say which of the two is meant.")
    packs, was_packed = quantization.is_integer(dtype), quantization.is_integer(saved.dtype)
    if was_packed and not packs and not saved.shapes_known and len(set(saved.sizes)) > 1:
        raise ValueError(
            f"Coefficients in {saved.dtype} for modules of several shapes cannot be told apart without the base model: "
            f"load the adapter, set `coefficient_dtype` of its configuration to {dtype!r} and save it."
        )
    before = saved.coefficients()
    if packs:
        layout = saved.layout() if was_packed else saved.config.layout([vector.numel() for vector in before])
        packed = layout.pack(before, dtype)
        after, stored = layout.unpack(packed, dtype), {saved.packed: packed}
    else:
        cast = [each.to(getattr(torch, dtype)) for each in before]  # float64 too, which saving a model keeps
        after, stored = cast, dict(zip(saved.vectors, cast))
    _check_range(before, after, dtype)
    record = {**saved.record, "dtype": dtype, "coefficients": checksum(saved.labelled(stored))}
    tensors = {**saved.others, **stored, saved.record_name: write_record(record)}

    path.mkdir(parents=True, exist_ok=True)
    left = []
    for each in saved.folder.iterdir():
        if _goes_with_it(each):
            shutil.copyfile(each, path / each.name)
        elif each.name not in (*_WRITTEN_ANEW, saved.weights_path.name):
            left.append(f"{each.name}/" if each.is_dir() else each.name)
    metadata = {"format": "pt"}
    weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path / saved.weights_path.name, save(weights, metadata=metadata))
    error = quantization.change(before, after)
    told = {"coefficient_dtype": dtype, "coefficient_error": error}
    if saved.is_network:
        described = {**saved.described, "method": {**saved.described["method"], **told}}
        write_whole(path / NETWORK_CONFIG_NAME, json.dumps(described, indent=1) + "\n")
        describe(path)
    else:
        config = dataclasses.replace(saved.config, **told)
        config.save_pretrained(str(path), auto_mapping_dict=config.auto_mapping)
    return {
        "folder": str(path),
        "coefficient_dtype": dtype,
        "bytes": (path / saved.weights_path.name).stat().st_size,
        "bytes_before": saved.weights_path.stat().st_size,
        "error": error or 0.0,
        "not_copied": sorted(left),
    }


def _goes_with_it(path: Path) -> bool:
    """Whether a file of a checkpoint is neither written anew nor about tensors that are."""
    return path.is_file() and path.name not in _NOT_COPIED and not path.name.lower().endswith(_TENSORS)


def _check_range(before: list[torch.Tensor], after: list[torch.Tensor], dtype: str) -> None:
    """Raises a ValueError if a dtype is too small for some coefficients."""
    lost = sum(int((~each.isfinite()).sum()) for each in after)
    if lost:
        largest = max(float(each.abs().max()) for each in before if len(each))
        raise ValueError(
            f"`dtype` must be one that holds all coefficients, got {dtype!r}, in which {lost} of them would be "
            f"infinite: the largest is {largest:.3g}. Take one of a larger range, such as 'bfloat16'."
        )
