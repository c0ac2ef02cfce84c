"""Rows: which layers can be adapted, and how they are named."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn

from . import models
from .models import llama, logits
from .rows import Method, adapted_layers, close, dense, different, row

GROUP = "Layers"
NAMING = "Naming layers"
EXPERTS = "Experts"


def one_layer(method: Method, name: str, x: torch.Tensor, **options: Any) -> None:
    base = models.Layers()
    adapted = method.adapt(base, target_modules=[name], **options)
    expected = dense(base, adapted)(x, name)
    different(adapted(x, name), base(x, name))
    close(adapted(x, name), expected)
    close(adapted.merge_and_unload()(x, name), expected)


@row(GROUP, "`nn.Linear`")
def linear(method: Method) -> None:
    one_layer(method, "linear", torch.randn(5, 8))


@row(GROUP, "`nn.Embedding`")
def embedding(method: Method) -> None:
    one_layer(method, "embedding", torch.arange(5))


@row(GROUP, "transformers' `Conv1D`")
def conv1d(method: Method) -> None:
    one_layer(method, "conv1d", torch.randn(5, 8))


@row(GROUP, "`nn.Conv2d`, and with groups")
def conv2d(method: Method) -> None:
    one_layer(method, "conv2d", models.images())
    one_layer(method, "grouped", torch.randn(2, 4, 5, 5))


@row(GROUP, "`nn.TransformerEncoderLayer` in evaluation mode")
def encoder(method: Method) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0), 1).eval()
    x = torch.randn(2, 5, 16)
    adapted = method.adapt(base, target_modules=["linear1", "linear2"])
    with torch.no_grad():
        expected = dense(base, adapted)(x)
        close(adapted.train()(x), expected)
        close(adapted.eval()(x), expected)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


@row(GROUP, "`nn.MultiheadAttention`")
def attention(method: Method) -> None:
    base, x = Attention(), torch.randn(2, 5, 16)
    adapted = method.adapt(base, target_modules=["attention"])
    before = adapted(x)
    different(before, base(x))
    close(adapted.merge_and_unload()(x), before)


@row(GROUP, "`out_proj` inside `nn.MultiheadAttention`, named")
def inner_projection(method: Method) -> None:
    base, x = Attention(), torch.randn(2, 5, 16)
    adapted = method.adapt(base, target_modules=["out_proj"])
    close(adapted(x), dense(base, adapted)(x))


@row(NAMING, '`"all-linear"`, Llama')
def all_linear(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base, target_modules="all-linear")
    names = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert adapted_layers(adapted).keys() == names and len(names) == 14
    close(logits(adapted), logits(dense(base, adapted)))


@row(NAMING, '`"all-linear"`, SigLIP (a model with `nn.MultiheadAttention`)')
def all_linear_siglip(method: Method) -> str | None:
    base = models.siglip()
    adapted = method.adapt(base, target_modules="all-linear")
    names = set(adapted_layers(adapted))
    own = {
        n
        for n, m in base.named_modules()
        if isinstance(m, nn.Linear) and not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)
    }
    with torch.no_grad():
        found, x = adapted(models.images()).pooler_output, models.images()
        different(found, base(x).pooler_output)
        close(found, dense(base, adapted)(x).pooler_output)
    assert own <= names, f"left out: {sorted(own - names)}"
    return "`out_proj` of `nn.MultiheadAttention` is left out" if names == own and not method.is_lora else None


@row(NAMING, '`"all-linear"`, Mamba')
def all_linear_mamba(method: Method) -> None:
    base = models.mamba()
    adapted = method.adapt(base, target_modules="all-linear")
    close(logits(adapted), logits(dense(base, adapted)))
    close(logits(adapted), logits(copy.deepcopy(adapted).merge_and_unload()))


@row(NAMING, "Mamba's `in_proj`, `x_proj`")
def mamba(method: Method) -> None:
    base = models.mamba()
    adapted = method.adapt(base, target_modules=["in_proj", "x_proj"])
    close(logits(adapted), logits(dense(base, adapted)))


@row(NAMING, "Mamba's `dt_proj`, `out_proj`, which are never called")
def mamba_never_called(method: Method) -> None:
    base = models.mamba()
    adapted = method.adapt(base, target_modules=["dt_proj", "out_proj"])
    close(logits(adapted), logits(dense(base, adapted)))


@row(NAMING, "regular expression, `exclude_modules`")
def expression(method: Method) -> None:
    adapted = method.adapt(llama(), target_modules=r".*layers\.1.*(q|k)_proj", exclude_modules=["k_proj"])
    assert list(adapted_layers(adapted)) == ["model.layers.1.self_attn.q_proj"]


@row(NAMING, "`layers_to_transform`, `layers_pattern`")
def some_layers(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base, layers_to_transform=[1], layers_pattern="layers")
    assert list(adapted_layers(adapted)) == [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")]
    close(logits(adapted), logits(dense(base, adapted)))


@row(NAMING, "no `target_modules`: PEFT's defaults")
def defaults(method: Method) -> None:
    for base in (llama(), models.gpt2()):
        adapted = method.adapt(base, target_modules=None)
        lora = adapted_layers(_lora().adapt(base, target_modules=None))
        assert adapted_layers(adapted).keys() == lora.keys()
        close(logits(adapted), logits(dense(base, adapted)))


def _lora() -> Method:
    from .rows import METHODS

    return METHODS["LoRA"]


@row(NAMING, "`rank_pattern`, `alpha_pattern`")
def patterns(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 6.0})
    for name, layer in adapted_layers(adapted).items():
        rank, alpha = (3, 2) if "q_proj" in name else (2, 6)
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == rank
        assert layer.scaling["default"] == alpha / rank
    close(logits(adapted), logits(dense(base, adapted)))


@row(NAMING, "LoRA's variants: `use_dora`")
def dora(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base, use_dora=True)
    close(logits(adapted), logits(copy.deepcopy(adapted).merge_and_unload()))


@row(NAMING, "`use_rslora`")
def rslora(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base, use_rslora=True)
    for layer in adapted_layers(adapted).values():
        assert abs(layer.scaling["default"] - 2 / 2**0.5) < 1e-6


# Experts: the parameters of all experts of a block are one tensor of three dimensions.


def experts(method: Method, base: Any, parameters: list[str], **options: Any) -> None:
    """Adapts expert parameters: an effect, the same merged and unmerged, and no other weight changes."""
    adapted = method.adapt(base, target_parameters=parameters, **options)
    found = logits(adapted)
    different(found, logits(base))
    before = {name: each.clone() for name, each in base.named_parameters()}
    plain = copy.deepcopy(adapted).merge_and_unload()
    close(logits(plain), found)
    changed = {n for n, each in plain.named_parameters() if not torch.equal(each, before[n])}
    named = {n for n in before if any(n.endswith(f".{p}") for p in parameters)}
    assert changed == named, f"changed: {sorted(changed)[:3]}, named: {sorted(named)[:3]}"
    with adapted.disable_adapter():
        close(logits(adapted), logits(base), 1e-6)


@row(EXPERTS, "`target_parameters`, Mixtral")
def mixtral(method: Method) -> None:
    experts(method, models.mixtral(), ["experts.gate_up_proj", "experts.down_proj"], target_modules=[])


@row(EXPERTS, "`target_parameters`, Qwen3-MoE")
def qwen(method: Method) -> None:
    experts(method, models.qwen3_moe(), ["experts.gate_up_proj", "experts.down_proj"], target_modules=[])


@row(EXPERTS, "`target_parameters`, gpt-oss")
def gpt_oss(method: Method) -> None:
    experts(method, models.gpt_oss(), ["experts.gate_up_proj", "experts.down_proj"], target_modules=[])


@row(EXPERTS, '`"all-linear"`, Qwen3-MoE')
def all_linear_experts(method: Method) -> str | None:
    """The experts are adapted too, or a warning says that they are not."""
    base = models.qwen3_moe()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = method.adapt(base, target_modules="all-linear")
    found = logits(adapted)
    plain = copy.deepcopy(adapted).merge_and_unload()
    close(logits(plain), found)
    before = dict(base.named_parameters())
    touched = any("experts" in n and not torch.equal(p, before[n]) for n, p in plain.named_parameters())
    if touched:
        return None
    said = any(re.search("expert", str(each.message)) for each in caught)
    if method.is_lora and not said:
        return "the experts are left out without a word"
    assert said, "the experts are left out without a word"
    return "the experts are left out, which a warning says"
