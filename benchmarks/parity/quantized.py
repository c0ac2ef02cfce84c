"""Rows: quantized and offloaded base models, and models in several processes."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .models import X, llama, logits
from .rows import Method, NotRun, adapted_layers, close, different, folder, need, row
from .training import alike, gradients, trainable

GROUP = "Quantized and offloaded"
PROCESSES = "Several processes"


def bits_and_bytes(four: bool) -> Any:
    bnb = need("bitsandbytes")
    base = llama(hidden_size=64, intermediate_size=64)
    for layer in base.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            old = getattr(layer.self_attn, name)
            if four:
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(layer.self_attn, name, new.to("cpu"))
    return base


def check_quantized(method: Method, base: Any) -> None:
    """The adapted model is the quantized one plus the dense updates, before and, roughly, after merging."""
    plain, name = logits(base), "model.layers.0.self_attn.q_proj"
    adapted = method.adapt(base)
    layer = adapted_layers(adapted)[name]
    x = torch.randn(6, layer.get_base_layer().in_features)  # type: ignore[arg-type]
    with torch.no_grad():
        own = base.get_submodule(name)(x)
        delta = x @ layer.get_delta_weight("default").detach().float().T  # type: ignore[operator]
        close(layer(x), own + delta, 0.02)
    different(logits(adapted), plain)
    assert gradients(adapted)
    found = logits(adapted)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        close(merged.get_submodule(name)(x), own + delta, 0.15)
    different(logits(merged), plain)
    close(logits(merged), found, 0.3)


@row(GROUP, "bitsandbytes, 8 bits, on a CPU")
def eight_bits(method: Method) -> None:
    check_quantized(method, bits_and_bytes(False))


@row(GROUP, "bitsandbytes, 4 bits, on a CPU")
def four_bits(method: Method) -> None:
    check_quantized(method, bits_and_bytes(True))


@row(GROUP, "torchao, int8 weights")
def torchao(method: Method) -> None:
    quantization = need("torchao.quantization")
    base = llama()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    check_quantized(method, base)


@row(GROUP, "optimum-quanto, int8 weights")
def quanto(method: Method) -> None:
    library = need("optimum.quanto")
    base = llama()
    library.quantize(base, weights=library.qint8)
    library.freeze(base)
    check_quantized(method, base)


@row(GROUP, "HQQ, 8 bits")
def hqq(method: Method) -> None:
    core = need("hqq.core.quantize")
    base = llama()
    config = core.BaseQuantizeConfig(nbits=8, group_size=16)
    for layer in base.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = core.HQQLinear(old, config, compute_dtype=torch.float32, device="cpu")
            new.in_features, new.out_features = old.in_features, old.out_features
            setattr(layer.self_attn, name, new)
    check_quantized(method, base)


def offloaded(method: Method, **options: Any) -> None:
    accelerate = need("accelerate")
    base = llama()
    expected_of = method.adapt(base)
    with folder() as path:
        if options.get("offload_folder"):
            options["offload_dir"] = str(path)
        options.pop("offload_folder", None)
        dispatched = accelerate.dispatch_model(
            copy.deepcopy(base), {"": "cpu", "model.layers.1": options.pop("place")}, main_device="cpu", **options
        )
        from peft import PeftModel

        expected_of.save_pretrained(str(path / "adapter"))
        loaded = PeftModel.from_pretrained(dispatched, str(path / "adapter"))
        close(logits(loaded.eval()), logits(expected_of))


@row(GROUP, "a layer offloaded to disk by accelerate")
def on_disk(method: Method) -> None:
    offloaded(method, place="disk", offload_folder=True)


@row(PROCESSES, "FSDP2 (`fully_shard`, the whole model one unit)", slow=True)
def sharded(method: Method) -> None:
    with group():
        from torch.distributed.fsdp import fully_shard

        adapted = method.adapt(llama())
        expected, exact = gradients(adapted), logits(adapted)
        fully_shard(adapted)
        close(logits(adapted), exact)
        found = gradients(adapted)
        alike({name: each.full_tensor() for name, each in found.items()}, expected)  # type: ignore[attr-defined]


@row(PROCESSES, "FSDP2, a unit for every block", slow=True)
def sharded_blocks(method: Method) -> None:
    with group():
        from torch.distributed.fsdp import fully_shard

        adapted = method.adapt(llama())
        expected = gradients(adapted)
        for block in adapted.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(adapted)
        found = gradients(adapted)
        alike({name: each.full_tensor() for name, each in found.items()}, expected)  # type: ignore[attr-defined]


@row(PROCESSES, "`DistributedDataParallel`", slow=True)
def parallel(method: Method) -> None:
    with group():
        adapted = method.adapt(llama())
        expected = gradients(adapted)
        wrapped = nn.parallel.DistributedDataParallel(adapted)
        adapted.zero_grad()
        wrapped(input_ids=X, labels=X).loss.backward()
        alike({name: each.grad for name, each in trainable(adapted).items()}, expected)  # type: ignore[misc]


@row(PROCESSES, "DeepSpeed ZeRO-3")
def deepspeed(method: Method) -> None:
    raise NotRun("DeepSpeed needs a GPU or a compiler for its CPU operators")


class group:
    """A process group of this process alone: it shards and reduces, but nothing is sent."""

    def __enter__(self) -> None:
        store = dist.HashStore()
        os.environ.setdefault("MASTER_ADDR", "localhost")
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()
