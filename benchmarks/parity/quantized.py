"""Rows: quantized and offloaded base models, and models in several processes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

from .models import X, llama, logits
from .rows import Method, NotRun, adapted_layers, close, different, first_words, folder, need, row
from .training import alike, gradients, trainable

GROUP = "Quantized and offloaded"
PROCESSES = "Several processes"


def loaded(library: str, configuration: str, **options: Any) -> Any:
    """A model that transformers quantizes while loading it."""
    need(library)
    with folder() as path:
        llama(hidden_size=64, intermediate_size=64).save_pretrained(path)
        config = getattr(transformers, configuration)(**options)
        try:
            return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": "cpu"}).eval()
        except (ImportError, RuntimeError, ValueError) as error:
            raise NotRun(f"{library} cannot quantize here: {first_words(str(error), 100)}") from error


def check(method: Method, base: Any, coarse: float = 0.05) -> None:
    """An adapted layer is the quantized one plus the dense update; so is the merged one, up to quantizing again."""
    plain, name = logits(base), "model.layers.0.self_attn.q_proj"
    x = torch.randn(6, 64, dtype=base.dtype)
    with torch.no_grad():
        own = base.get_submodule(name)(x).float()
    adapted = get_peft_model(base, method.config()).eval()
    layer = adapted_layers(adapted)[name]
    with torch.no_grad():
        expected = own + x.float() @ layer.get_delta_weight("default").detach().float().T
        different(expected, own)
        close(layer(x), expected, 0.03)
    found = logits(adapted)
    different(found, plain)
    assert gradients(adapted.train())
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        error = float((merged.get_submodule(name)(x).float() - expected).norm() / expected.norm())
        assert error < coarse, f"merging changes the output by {error:.0%}"
    different(logits(merged), plain)


@row(GROUP, "bitsandbytes, 8 bits, on a CPU")
def eight_bits(method: Method) -> None:
    check(method, loaded("bitsandbytes", "BitsAndBytesConfig", load_in_8bit=True))


@row(GROUP, "bitsandbytes, 4 bits, on a CPU")
def four_bits(method: Method) -> None:
    check(method, loaded("bitsandbytes", "BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.2)


@row(GROUP, "torchao, int8 weights")
def torchao(method: Method) -> None:
    kind = need("torchao.quantization").Int8WeightOnlyConfig()
    check(method, loaded("torchao", "TorchAoConfig", quant_type=kind))


@row(GROUP, "optimum-quanto, int8 weights")
def quanto(method: Method) -> None:
    check(method, loaded("optimum.quanto", "QuantoConfig", weights="int8"))


@row(GROUP, "HQQ, 8 bits")
def hqq(method: Method) -> None:
    check(method, loaded("hqq", "HqqConfig", nbits=8, group_size=16))


@row(GROUP, "a base model offloaded to disk by accelerate")
def on_disk(method: Method) -> None:
    accelerate = need("accelerate")
    expected = method.adapt(llama())
    with folder() as path:
        expected.save_pretrained(str(path / "adapter"))
        base = accelerate.disk_offload(llama(), str(path / "base"), execution_device=torch.device("cpu"))
        adapted = get_peft_model(base, method.config(zero=True))
        set_peft_model_state_dict(adapted, get_peft_model_state_dict(expected))
        close(logits(adapted.eval()), logits(expected))


@row(PROCESSES, "FSDP2 (`fully_shard`, the whole model one unit)", slow=True)
def sharded(method: Method) -> None:
    with group():
        from torch.distributed.fsdp import fully_shard

        adapted = method.adapt(llama())
        expected, exact = gradients(adapted), logits(adapted)
        fully_shard(adapted)
        close(logits(adapted), exact)
        found = gradients(adapted)
        alike({name: each.full_tensor() for name, each in found.items()}, expected)


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
        alike({name: each.full_tensor() for name, each in found.items()}, expected)


@row(PROCESSES, "`DistributedDataParallel`", slow=True)
def parallel(method: Method) -> None:
    with group():
        adapted = method.adapt(llama())
        expected = gradients(adapted)
        wrapped = nn.parallel.DistributedDataParallel(adapted)
        adapted.zero_grad()
        wrapped(input_ids=X, labels=X).loss.backward()
        alike({name: each.grad for name, each in trainable(adapted).items()}, expected)


@row(PROCESSES, "DeepSpeed ZeRO-3")
def deepspeed(method: Method) -> None:
    raise NotRun("DeepSpeed was not tried")


class group:
    """A process group of this process alone: it shards and reduces, but nothing is sent."""

    def __enter__(self) -> None:
        store = dist.HashStore()
        os.environ.setdefault("MASTER_ADDR", "localhost")
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()
