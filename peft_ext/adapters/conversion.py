"""Saves coefficients in another type, without a model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import Any

import transformers
from peft.utils import CONFIG_NAME
from safetensors.torch import save

from ..checkpoint import quantization
from ..checkpoint.card import CARD_NAME
from ..checkpoint.identity import checksum, write_record
from ..checks import check_choice
from ..files import check_writable, write_whole
from ..tuners.description import NETWORK_CONFIG_NAME, describe
from .saved import Saved


def quantize(saved: Saved, out: str | os.PathLike[str], dtype: str, overwrite: bool = False) -> dict[str, Any]:
    """Saves an adapter or a network again, with its coefficients in another type.

    The model card and other files of the checkpoint go with it, described anew.

    Args:
        saved: which is not changed.
        out: a folder, made unless it is there.
        dtype: one of `peft_ext.checkpoint.quantization.DTYPES`.
        overwrite: write into a folder that is not empty.

    Returns:
        `folder`, `coefficient_dtype`, `bytes` of the weights file, `bytes_before`, and `error`: the norm of the change
        of the coefficients relative to theirs.

    Raises:
        ValueError: another dtype, or coefficients that cannot be unpacked without the base model.
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
        cast = [quantization.cast(each, dtype) for each in before]
        after, stored = cast, dict(zip(saved.vectors, cast))
    record = {**saved.record, "dtype": dtype, "coefficients": checksum(saved.labelled(stored))}
    tensors = {**saved.others, **stored, saved.record_name: write_record(record)}

    path.mkdir(parents=True, exist_ok=True)
    for each in saved.folder.iterdir():
        if each.is_file() and each.name in (CARD_NAME, transformers.CONFIG_NAME):
            shutil.copyfile(each, path / each.name)
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
    }
