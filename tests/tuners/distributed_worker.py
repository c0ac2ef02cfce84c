"""One of the two processes of test_distributed.py: trains a tiny model in many distributed ways.

Every scenario trains for a few steps and returns losses and gradients. The expected ones come from the same training in
one process on the whole batch, without wrapper or checkpointing: see `reference`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import torch
import torch.distributed as dist
from methods import config_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

WORLD = 2
STEPS = 3

Record = dict[str, Any]


@dataclass
class Scenario:
    """How a model is wrapped and trained.

    Args:
        wrap: makes the distributed model.
        targets: modules that are adapted.
        checkpointing: use of activation checkpointing: `None`, `"reentrant"` or `"nonreentrant"`.
        micro_steps: backward passes per optimizer step.
        no_sync: context of the backward passes before the last one of a step.
        method: a row of `methods.METHODS`.
        options: further fields of the configuration.
        dtype: of the whole model; double precision tells a wrong gradient from a rounded one.
        tolerance: on losses and gradients, relative to the largest gradient of the parameter.
    """

    wrap: Callable[[nn.Module], nn.Module]
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    checkpointing: str | None = None
    micro_steps: int = 1
    no_sync: Callable[[nn.Module], contextlib.AbstractContextManager[None]] | None = None
    method: str = "NOLA"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-5  # the model computes its norms and its loss in single precision


def build(scenario: Scenario, lora: bool = False) -> PeftModel:
    model = tiny_models.llama()
    torch.manual_seed(1)
    targets = list(scenario.targets)
    if lora:
        alpha = scenario.options.get("alpha", 1.0)
        config: Any = LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=targets)
    else:
        # With SGD the factor of PRANC's coefficients would count twice: training would fall apart.
        kind = "plain" if scenario.method.startswith("PRANC") else "scaled"
        config = config_of(scenario.method, target_modules=targets, parametrization=kind, **scenario.options)
    model = get_peft_model(model, config)
    if scenario.checkpointing is not None:
        reentrant = scenario.checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()  # as the Trainer does: re-entrant checkpointing needs it
    return model.to(scenario.dtype)


def batch(step: int, micro: int) -> torch.Tensor:
    return tiny_models.tokens(batch=4, seed=100 + 10 * step + micro)


def train(model: nn.Module, scenario: Scenario, rows: slice, gather: Callable[[nn.Module], Record]) -> Record:
    """Trains; an evaluation after every step shows whether the weights in use follow the parameters."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    record: Record = {"loss": [], "gradients": [], "evaluation": []}
    for step in range(STEPS):
        model.train()
        total = torch.zeros(())
        for micro in range(scenario.micro_steps):
            x = batch(step, micro)[rows]
            last = micro == scenario.micro_steps - 1
            quiet = contextlib.nullcontext() if last or not scenario.no_sync else scenario.no_sync(model)
            with quiet:
                loss = model(input_ids=x, labels=x).loss / scenario.micro_steps
                loss.backward()
            total += loss.detach()
        record["gradients"].append(gather(model))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            x = batch(step, 5)[rows]
            evaluation = model(input_ids=x, labels=x).loss
        record["loss"].append(total)
        record["evaluation"].append(evaluation)
    return record


def plain_gradients(model: nn.Module) -> Record:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def reference(scenario: Scenario, lora: bool = False) -> Record:
    plain = Scenario(scenario.wrap, scenario.targets, method=scenario.method, options=scenario.options)
    plain.micro_steps = scenario.micro_steps
    return train(build(plain, lora), plain, slice(None), plain_gradients)


def gradients(model: nn.Module) -> Record:
    """Whole gradients, by the names that they have in the model that is not distributed."""
    if isinstance(model, FullyShardedDataParallel):
        # A process whose shard has no gradient contributes zeros of the default dtype.
        torch.set_default_dtype(next(model.parameters()).dtype)
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = plain_gradients(model)
        torch.set_default_dtype(torch.float32)
    else:
        found = plain_gradients(model)
    clean: Record = {}
    for name, gradient in found.items():
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        clean[name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")] = whole
    return clean


def run(scenario: Scenario, rank: int, lora: bool) -> Record:
    model = scenario.wrap(build(scenario, lora))
    rows = slice(rank * 2, rank * 2 + 2)
    record = train(model, scenario, rows, gradients)
    for key in ("loss", "evaluation"):
        values = torch.stack(record[key])
        dist.all_reduce(values)
        record[key] = list(values / WORLD)
    return record


# Ways of wrapping


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    return model.no_sync()  # type: ignore[operator]


def fsdp1(model: nn.Module, policy: str = "block", patience: int = 120) -> nn.Module:
    """`patience`: seconds that a process waits for one that has failed."""
    if policy == "block":
        chosen: Any = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    elif policy == "peft":
        chosen = fsdp_auto_wrap_policy(model)
    else:
        chosen = None
    return FullyShardedDataParallel(
        model,
        process_group=dist.new_group(timeout=datetime.timedelta(seconds=patience)),
        auto_wrap_policy=chosen,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sync_module_states=False,
    )


def fsdp2(model: nn.Module, blocks: bool = True, **options: Any) -> nn.Module:
    if blocks:
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module, **options)
    return fully_shard(model, **options)


@contextlib.contextmanager
def fsdp2_no_sync(model: nn.Module) -> Iterator[None]:
    """Gradients are neither reduced nor are the parameters sharded again between the backward passes."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)
    yield
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)


part = functools.partial
static = part(ddp, static_graph=True)
unused = part(ddp, find_unused_parameters=True)
whole1 = part(fsdp1, policy="whole")
whole2 = part(fsdp2, blocks=False)
kept2 = part(fsdp2, reshard_after_forward=False)
half2 = part(fsdp2, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
HALF: dict[str, Any] = {"dtype": torch.float32, "tolerance": 0.05}

HEAD = ("q_proj", "v_proj", "lm_head")  # the head has as many inputs as q_proj: NOLA's A is expanded together
ALL = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "lm_head")
NORMS = (*ALL, "input_layernorm", "norm")

SCENARIOS: dict[str, Scenario] = {
    "ddp": Scenario(ddp),
    "ddp, own bases": Scenario(ddp, method="NOLA, own bases"),
    "ddp, every layer": Scenario(ddp, ALL),
    "ddp, static graph": Scenario(static),
    "ddp, find unused": Scenario(unused),
    "ddp, no_sync": Scenario(ddp, micro_steps=2, no_sync=no_sync),
    "ddp, nonreentrant": Scenario(ddp, checkpointing="nonreentrant"),
    "ddp, nonreentrant, every layer": Scenario(ddp, ALL, "nonreentrant"),
    "ddp, nonreentrant, no_sync": Scenario(ddp, HEAD, "nonreentrant", 2, no_sync),
    "ddp, reentrant": Scenario(ddp, checkpointing="reentrant"),
    "ddp, reentrant, no_sync": Scenario(ddp, micro_steps=2, checkpointing="reentrant", no_sync=no_sync),
    "ddp, reentrant, head": Scenario(ddp, HEAD, "reentrant"),
    "ddp, reentrant, head, static graph": Scenario(static, HEAD, "reentrant"),
    "ddp, reentrant, head, find unused": Scenario(unused, HEAD, "reentrant"),
    "ddp, reentrant, every layer": Scenario(ddp, ALL, "reentrant"),
    "ddp, reentrant, head, no_sync": Scenario(ddp, HEAD, "reentrant", 2, no_sync),
    "fsdp1, blocks": Scenario(fsdp1),
    "fsdp1, blocks, every layer": Scenario(fsdp1, ALL),
    "fsdp1, whole": Scenario(whole1),
    "fsdp1, peft policy": Scenario(part(fsdp1, policy="peft")),
    "fsdp1, blocks, nonreentrant": Scenario(fsdp1, HEAD, "nonreentrant"),
    "fsdp1, blocks, reentrant": Scenario(fsdp1, HEAD, "reentrant"),
    "fsdp1, blocks, no_sync": Scenario(fsdp1, HEAD, None, 2, no_sync),
    "fsdp2, blocks": Scenario(fsdp2),
    "fsdp2, blocks, own bases": Scenario(fsdp2, method="NOLA, own bases"),
    "fsdp2, blocks, every layer": Scenario(fsdp2, ALL),
    "fsdp2, blocks, not resharded": Scenario(kept2, ALL),
    "fsdp2, blocks, nonreentrant": Scenario(fsdp2, ALL, "nonreentrant"),
    "fsdp2, blocks, reentrant": Scenario(fsdp2, ALL, "reentrant"),
    "fsdp2, blocks, no_sync": Scenario(fsdp2, ALL, None, 3, fsdp2_no_sync),
    "fsdp2, blocks, not resharded, no_sync": Scenario(kept2, ALL, None, 3, fsdp2_no_sync),
    "fsdp2, blocks, no_sync, nonreentrant": Scenario(fsdp2, ALL, "nonreentrant", 3, fsdp2_no_sync),
    "fsdp2, whole": Scenario(whole2, ALL),
    "fsdp2, whole, nonreentrant": Scenario(whole2, ALL, "nonreentrant"),
    "fsdp2, whole, reentrant": Scenario(whole2, ALL, "reentrant"),
    "fsdp2, whole, no_sync": Scenario(whole2, ALL, None, 3, fsdp2_no_sync),
    "fsdp2, blocks, bf16": Scenario(half2, options={"alpha": 0.1}, **HALF),
    # PRANC: one vector that layers of all units read.
    "pranc, ddp": Scenario(ddp, NORMS, method="PRANC"),
    "pranc, ddp, dense": Scenario(ddp, HEAD, method="PRANC, dense"),
    "pranc, ddp, static graph": Scenario(static, NORMS, method="PRANC"),
    "pranc, ddp, find unused": Scenario(unused, NORMS, method="PRANC"),
    "pranc, ddp, no_sync": Scenario(ddp, NORMS, None, 2, no_sync, "PRANC"),
    "pranc, ddp, nonreentrant": Scenario(ddp, NORMS, "nonreentrant", method="PRANC"),
    "pranc, ddp, nonreentrant, dense": Scenario(ddp, HEAD, "nonreentrant", method="PRANC, dense"),
    "pranc, ddp, nonreentrant, factors": Scenario(ddp, HEAD, "nonreentrant", method="PRANC, factors"),
    "pranc, ddp, nonreentrant, no_sync": Scenario(ddp, NORMS, "nonreentrant", 2, no_sync, "PRANC"),
    "pranc, ddp, reentrant": Scenario(ddp, checkpointing="reentrant", method="PRANC"),
    "pranc, ddp, reentrant, head": Scenario(ddp, HEAD, "reentrant", method="PRANC"),
    "pranc, ddp, reentrant, static graph": Scenario(static, HEAD, "reentrant", method="PRANC"),
    "pranc, fsdp1, whole": Scenario(whole1, ALL, method="PRANC"),
    "pranc, fsdp1, whole, nonreentrant": Scenario(whole1, ALL, "nonreentrant", method="PRANC"),
    "pranc, fsdp1, whole, no_sync": Scenario(whole1, ALL, None, 2, no_sync, "PRANC"),
    "pranc, fsdp1, blocks": Scenario(part(fsdp1, patience=10), HEAD, method="PRANC"),
    "pranc, fsdp1, blocks, embedding": Scenario(fsdp1, ALL, method="PRANC"),
    "pranc, fsdp1, peft policy": Scenario(part(fsdp1, policy="peft", patience=10), method="PRANC"),
    "pranc, fsdp2, whole": Scenario(whole2, ALL, method="PRANC"),
    "pranc, fsdp2, whole, nonreentrant": Scenario(whole2, ALL, "nonreentrant", method="PRANC"),
    "pranc, fsdp2, whole, factors": Scenario(whole2, ALL, method="PRANC, factors"),
    "pranc, fsdp2, whole, reentrant": Scenario(whole2, ALL, "reentrant", method="PRANC"),
    "pranc, fsdp2, whole, no_sync": Scenario(whole2, ALL, None, 3, fsdp2_no_sync, "PRANC"),
    "pranc, fsdp2, blocks": Scenario(fsdp2, method="PRANC"),
    "pranc, fsdp2, blocks, head": Scenario(fsdp2, HEAD, method="PRANC"),
    "pranc, fsdp2, blocks, embedding": Scenario(fsdp2, ALL, method="PRANC"),
    "pranc, fsdp2, blocks, not resharded": Scenario(kept2, ALL, method="PRANC"),
    # MCNC
    "mcnc, ddp": Scenario(ddp, ALL, method="MCNC"),
    "mcnc, ddp, weights": Scenario(ddp, ALL, method="MCNC, weight"),
    "mcnc, ddp, no_sync": Scenario(ddp, ALL, None, 2, no_sync, "MCNC"),
    "mcnc, ddp, nonreentrant": Scenario(ddp, ALL, "nonreentrant", method="MCNC"),
    "mcnc, ddp, nonreentrant, weights": Scenario(ddp, ALL, "nonreentrant", method="MCNC, weight"),
    "mcnc, ddp, reentrant": Scenario(ddp, HEAD, "reentrant", method="MCNC"),
    "mcnc, ddp, reentrant, weights": Scenario(ddp, HEAD, "reentrant", method="MCNC, weight"),
    "mcnc, fsdp1, blocks": Scenario(fsdp1, ALL, method="MCNC"),
    "mcnc, fsdp1, blocks, nonreentrant": Scenario(fsdp1, HEAD, "nonreentrant", method="MCNC"),
    "mcnc, fsdp1, blocks, reentrant": Scenario(fsdp1, HEAD, "reentrant", method="MCNC"),
    "mcnc, fsdp1, blocks, no_sync": Scenario(fsdp1, HEAD, None, 2, no_sync, "MCNC"),
    "mcnc, fsdp1, whole, weights": Scenario(whole1, ALL, method="MCNC, weight"),
    "mcnc, fsdp2, blocks": Scenario(fsdp2, ALL, method="MCNC"),
    "mcnc, fsdp2, blocks, weights": Scenario(fsdp2, ALL, method="MCNC, weight"),
    "mcnc, fsdp2, blocks, not resharded": Scenario(kept2, ALL, method="MCNC"),
    "mcnc, fsdp2, blocks, nonreentrant": Scenario(fsdp2, ALL, "nonreentrant", method="MCNC"),
    "mcnc, fsdp2, blocks, reentrant": Scenario(fsdp2, ALL, "reentrant", method="MCNC"),
    "mcnc, fsdp2, blocks, no_sync": Scenario(fsdp2, ALL, None, 3, fsdp2_no_sync, "MCNC"),
    "mcnc, fsdp2, whole": Scenario(whole2, ALL, method="MCNC"),
    "mcnc, fsdp2, blocks, bf16": Scenario(half2, method="MCNC", **HALF),
}


def main(rank: int, folder: Path, names: list[str], lora: bool) -> None:
    torch.set_num_threads(1)
    for number, name in enumerate(names):
        # A process group of its own for each: a failure in one must not leave the next waiting.
        store = dist.FileStore(str(folder / f"store-{number}"), WORLD)
        patience = datetime.timedelta(seconds=120)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=patience)
        try:
            result: Any = run(SCENARIOS[name], rank, lora)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(";"), lora="lora" in sys.argv[4:])
