"""Code that reads the weight of an adapted layer and does not call the layer: it sees the adapted weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from dense import coefficients_of
from methods import METHODS, ONE_OF_EACH, adapt, config_of
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_ext.generators import Generator

every_method = pytest.mark.parametrize("method", METHODS)
one_of_each = pytest.mark.parametrize("method", ONE_OF_EACH)


class Padded(nn.Module):
    """An encoder whose inputs are padded: in evaluation it computes with nested tensors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = torch.arange(x.shape[1]) >= torch.tensor([5, 3, 2])[:, None]
        return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class _Product(torch.autograd.Function):
    """As losses that are fused with the last layer are written: the weight goes into a function of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class Reader(nn.Module):
    """Reads the tables and weights of all its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 16)
        self.linear = nn.Linear(16, 16)
        self.conv = nn.Conv2d(4, 2, 2)
        self.head = nn.Linear(16, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x.to(self.linear.weight.dtype), self.linear.weight, self.linear.bias)
        x = x + F.conv2d(x.view(-1, 4, 2, 2), self.conv.weight).view(*x.shape[:2], 2).sum(-1, keepdim=True)
        return _Product.apply(F.linear(x, self.table.weight), self.head.weight)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0, **options)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(layer(), 2)


ENCODER = ["linear1", "linear2", "out_proj"]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "encoder layer": (layer, ENCODER),
    "encoder": (encoder, ENCODER),
    "padded encoder": (lambda: Padded(encoder()), ENCODER),
    "norm first": (lambda: nn.TransformerEncoder(layer(norm_first=True), 2, enable_nested_tensor=False), ENCODER),
    "attention": (Attention, ["out_proj"]),
    "reader": (Reader, ["table", "linear", "conv", "head"]),
}
STATE_SPACE = {
    "mamba": {"time_step_rank": 4},
    "falcon_mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "jamba": {
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "pad_token_id": 0,
    },
}


def inputs() -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return getattr(found, "logits", found)


def check(model: PeftModel, base: nn.Module, x: torch.Tensor, effect: float = 1e-2) -> None:
    """Compares a model with the merged one, in training and evaluation, and its gradients with a difference."""
    merged = copy.deepcopy(model).merge_and_unload()
    for mode in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                found, expected = output(model.train(mode), x), output(merged.train(mode), x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert (found - output(base.train(mode), x)).abs().max() > effect
    coefficients = coefficients_of(model)
    model.train()
    model.zero_grad()
    output(model, x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in coefficients.values())


def check_gradients(model: PeftModel, x: torch.Tensor) -> None:
    """Compares the gradients of a float64 model with differences."""
    parameters = list(coefficients_of(model).values())
    direction = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((parameter.grad * each).sum() for parameter, each in zip(parameters, direction))

    @torch.no_grad()
    def loss(step: float) -> torch.Tensor:
        for parameter, each in zip(parameters, direction):
            parameter.add_(each, alpha=step)
        value = output(model, x).square().sum()
        for parameter, each in zip(parameters, direction):
            parameter.sub_(each, alpha=step)
        return value

    torch.testing.assert_close(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("kind", MODELS)
def test_torch_modules_that_read(kind: str, method: str) -> None:
    make, targets = MODELS[kind]
    torch.manual_seed(0)
    base = make().double()
    model, _ = adapt(base, method, target_modules=targets)
    for parameter in coefficients_of(model).values():
        parameter.data *= 2  # the factor A of some starts small
    x = inputs().double()
    check(model, base, x)
    check_gradients(model, x)


def test_norms_that_are_read() -> None:
    """The fast path of an encoder layer reads the norms too, which PRANC adapts; and biases."""
    torch.manual_seed(0)
    base = encoder().double()
    model, _ = adapt(base, "PRANC, two a weight, biases", target_modules=[*ENCODER, "norm1", "norm2"])
    check(model, base, inputs().double())
    check_gradients(model, inputs().double())


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out")  # the routers of Jamba
@one_of_each
@pytest.mark.parametrize("kind", STATE_SPACE)
def test_state_space_models(kind: str, method: str) -> None:
    """They read `dt_proj` and, fused, `out_proj`; `all-linear` adapts these among the others."""
    torch.manual_seed(0)
    sizes = {"mamba_d_state": 8} if kind == "jamba" else {"state_size": 8}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, **sizes, **STATE_SPACE[kind]
    )
    base = transformers.AutoModelForCausalLM.from_config(config)
    model, _ = adapt(base, method, target_modules="all-linear")
    check(model, base, tiny_models.tokens(2, 9), effect=1e-3)


@one_of_each
def test_all_linear_adapts_the_pooling_head_of_siglip(method: str) -> None:
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    base = transformers.SiglipVisionModel(config).double().eval()
    model, _ = adapt(base, method, target_modules="all-linear")
    assert any("head.attention.out_proj" in name for name in model.base_model.targeted_module_names)
    merged = copy.deepcopy(model).merge_and_unload()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x).pooler_output, merged(x).pooler_output, rtol=1e-4, atol=1e-5)


@one_of_each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(method: str, reentrant: bool) -> None:
    model, _ = adapt(Reader(), method, target_modules=MODELS["reader"][1])
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in coefficients_of(model).items()}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


@one_of_each
def test_transforms_and_compilation(method: str) -> None:
    model, _ = adapt(Attention(), method, target_modules=["out_proj"])
    x, values = inputs(), {name: value.detach() for name, value in model.named_parameters()}

    def loss(coefficients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, {**values, **coefficients}, (x,)).square().mean()

    model(x).square().mean().backward()
    adapted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tangent = {name: torch.randn_like(value) for name, value in adapted.items()}
    expected = sum((parameter.grad * tangent[name]).sum() for name, parameter in adapted.items())
    point = {name: values[name] for name in adapted}
    torch.testing.assert_close(torch.func.jvp(loss, (point,), (tangent,))[1], expected, rtol=1e-3, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(x).square().mean().backward()
    found = sum((parameter.grad * tangent[name]).sum() for name, parameter in adapted.items())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


def test_a_dtype_costs_no_expansion() -> None:
    """T5 asks the weight of `wo` for its dtype three times in every forward pass."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0
    )
    base = transformers.T5ForConditionalGeneration(config).eval()
    model, _ = adapt(base, "NOLA", target_modules=["wo"])
    calls = []
    expand = Generator.expand

    def counted(self: Generator, coefficients: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return expand(self, coefficients)

    x = tiny_models.tokens()
    with mock.patch.object(Generator, "expand", counted):
        model(input_ids=x, labels=x).loss.backward()
    assert len(calls) == 2  # of A and of B, for all layers


WRITES: dict[str, Callable[[Any], Any]] = {
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(6, 8)),
    "copy": lambda layer: layer.weight.data.copy_(torch.zeros(6, 8)),
    "row": lambda layer: layer.weight.data.__setitem__(2, 1.0),
    "row of the weight": lambda layer: layer.weight[0].detach().add_(1.0),
    "initialisation": lambda layer: nn.init.zeros_(layer.weight),
    "out": lambda layer: torch.add(torch.zeros(6, 8), 1, out=layer.weight.data),
    "gradient": lambda layer: setattr(layer.weight, "requires_grad", True),
}


@one_of_each
@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused(write: str, method: str) -> None:
    """It would be lost; with disabled adapters it goes to the base weight."""
    model = get_peft_model(tiny_models.One(nn.Linear(8, 6)), config_of(method, target_modules=["layer"]))
    adapted = model.base_model.model.layer
    with pytest.raises(RuntimeError, match=r"cannot be changed: change those of its `get_base_layer\(\)`"):
        WRITES[write](adapted)
    with model.disable_adapter():
        assert adapted.weight is adapted.base_layer.weight


@one_of_each
def test_reading(method: str) -> None:
    base = tiny_models.One(nn.Linear(8, 6))
    model, _ = adapt(base, method, target_modules=["layer"])
    adapted = model.base_model.model.layer
    weight = adapted.weight
    assert (weight.shape, weight.dtype, weight.is_meta, weight.is_floating_point()) == (
        (6, 8),
        torch.float32,
        False,
        True,
    )
    expected = copy.deepcopy(model).merge_and_unload().layer.weight
    torch.testing.assert_close(torch.tensor(weight.tolist()), expected.detach())
    torch.testing.assert_close(torch.from_numpy(weight.detach().numpy()), expected.detach())
    torch.testing.assert_close(copy.deepcopy(weight.detach()), expected.detach())
    assert weight.data_ptr() != adapted.base_layer.weight.data_ptr()
    assert "-" in repr(weight)
    model.merge_adapter()
    assert adapted.weight is adapted.base_layer.weight


@one_of_each
def test_half_precision(method: str) -> None:
    base = Reader().bfloat16()
    model = get_peft_model(copy.deepcopy(base), config_of(method, target_modules=MODELS["reader"][1]))
    assert model.base_model.model.linear.weight.dtype == torch.bfloat16
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(model(inputs().bfloat16()), merged(inputs().bfloat16()), rtol=2e-2, atol=1e-1)


@one_of_each
def test_dropout_that_cannot_be_applied_is_said(method: str) -> None:
    config = config_of(method, target_modules=["linear"], **{f"{method.lower()}_dropout": 0.5})
    model = get_peft_model(Reader(), config)
    with pytest.warns(UserWarning, match=f"`{method.lower()}_dropout` has no effect there"):
        model(inputs())


@one_of_each
def test_rows_with_adapters_of_their_own_are_refused(method: str) -> None:
    """There is no one weight for them; a dtype there is."""
    model = get_peft_model(Attention(), config_of(method, target_modules=["out_proj"])).eval()
    with pytest.raises(ValueError, match="reads the (weight|bias) of an adapted layer.*`adapter_names`"):
        model(inputs(), adapter_names=["default", "__base__", "default"])


@one_of_each
def test_a_merged_layer_that_is_read_is_unmerged_while_adapters_are_disabled(method: str) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = get_peft_model(
        nn.ModuleDict({"attention": attention}).eval(), config_of(method, target_modules=["out_proj"])
    )
    expected = attention(x, x, x)[0]
    with model.disable_adapter():
        base = attention(x, x, x)[0]
    assert (base - expected).abs().max() > 1e-3
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(attention(x, x, x)[0], base)
    torch.testing.assert_close(attention(x, x, x)[0], expected)


def test_a_bias_that_is_read_is_scaled() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    config = config_of("PRANC, two a weight, biases", target_modules=["out_proj"])
    model = get_peft_model(nn.ModuleDict({"attention": attention}).eval(), config)
    attention.out_proj.set_scale("default", 3)
    expected = attention(x, x, x)[0]
    model.merge_adapter()
    torch.testing.assert_close(attention(x, x, x)[0], expected)


@one_of_each
def test_other_libraries_get_the_adapted_numbers(method: str) -> None:
    model, _ = adapt(tiny_models.llama(), method, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        expected = layer.get_base_layer().weight + layer.get_delta_weight("default")
        torch.testing.assert_close(torch.from_dlpack(layer.weight.detach()), expected)
