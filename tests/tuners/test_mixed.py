"""Batches in which every row has an adapter of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from methods import FURTHER, METHODS, adapts_norms, config_of, lower
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_ext import set_expansion_budget
from peft_ext.tuners import mixed

NAMES = ["default", "second", "__base__", "other", "default", "third"]

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(params=[None, 0], ids=["kept", "not kept"])
def budget(request: pytest.FixtureRequest) -> Any:
    """With room for expanded weights, and without."""
    before = set_expansion_budget(1 << 30 if request.param is None else request.param)
    yield
    set_expansion_budget(before)


def adapted(base: nn.Module, method: str, **options: Any) -> PeftModel:
    """With two equal adapters, which differ in their coefficients, and two of other kinds."""
    config = config_of(method, **options)
    model = get_peft_model(copy.deepcopy(base), config)
    second = copy.deepcopy(config)
    model.add_adapter("second", second)
    for name, fields in zip(("other", "third"), FURTHER[lower(method)]):
        model.add_adapter(name, type(config)(**{"init_weights": False, **options, **fields}))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model.eval()


def one_by_one(model: PeftModel, names: list[str], **inputs: torch.Tensor) -> torch.Tensor:
    """The right outputs: every row alone, with its adapter active."""
    rows = []
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(**own))
        else:
            model.set_adapter(name)
            rows.append(model(**own))
    return torch.cat([row.logits for row in rows])


@pytest.mark.usefixtures("budget")
@every_method
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_row_has_its_adapter(kind: str, method: str) -> None:
    targets = ["q_proj", "v_proj", "embed_tokens"] if kind == "llama" else ["c_attn", "c_proj", "wte"]
    if adapts_norms(method):
        targets.append("norm" if kind == "llama" else "ln_f")
    model = adapted(getattr(tiny_models, kind)(), method, target_modules=targets)
    x = tiny_models.tokens(len(NAMES))
    with torch.no_grad():
        expected = one_by_one(model, NAMES, input_ids=x)
        for _ in range(2):  # what the first pass has expanded serves the second
            torch.testing.assert_close(model(input_ids=x, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


class Convolutions(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, **options)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.second(self.norm(self.first(x)))
        return transformers.modeling_outputs.ImageClassifierOutput(logits=x)  # type: ignore[attr-defined]


@every_method
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"stride": 2, "padding": 1, "padding_mode": "reflect"}, {"padding": "same", "dilation": 2}],
    ids=["plain", "groups", "reflecting", "dilated"],
)
def test_convolutions(options: dict[str, Any], method: str) -> None:
    targets = ["first", "second", *(["norm"] if adapts_norms(method) else [])]
    torch.manual_seed(0)
    model = adapted(Convolutions(**options), method, target_modules=targets)
    x = torch.randn(len(NAMES), 4, 9, 9)
    with torch.no_grad():
        expected = one_by_one(model, NAMES, x=x)
        torch.testing.assert_close(model(x, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_generation(method: str) -> None:
    """Greedy, with beams and with several samples: what generate makes of a row follows the row's adapter."""
    model = adapted(tiny_models.llama(), method)
    x = tiny_models.tokens(len(NAMES), 5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        rows = []
        for row, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(model.generate(input_ids=x[row : row + 1], **options, **more))
            else:
                model.set_adapter(name)
                rows.append(model.generate(input_ids=x[row : row + 1], **options, **more))
        found = model.generate(input_ids=x, adapter_names=NAMES, **options, **more)
        assert torch.equal(found, torch.cat(rows))


def test_an_encoder_sees_its_rows_before_they_become_beams() -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = adapted(transformers.T5ForConditionalGeneration(config), "NOLA", target_modules=["q", "v"])
    x, names = tiny_models.tokens(3, 5) % 50, ["second", "__base__", "other"]
    found = model.generate(input_ids=x, adapter_names=names, num_beams=2, max_new_tokens=5)
    model.set_adapter("second")
    assert torch.equal(found[0], model.generate(input_ids=x[:1], num_beams=2, max_new_tokens=5)[0])


def test_modules_that_were_trained_whole() -> None:
    model = adapted(tiny_models.vit(), "NOLA", modules_to_save=["classifier"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    x = torch.randn(len(NAMES), 3, 16, 16)
    with torch.no_grad():
        expected = one_by_one(model, NAMES, pixel_values=x)
        torch.testing.assert_close(model(pixel_values=x, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_changes_are_seen(method: str) -> None:
    """Between two passes with the same names, in whatever way coefficients and scales change."""
    model = adapted(tiny_models.llama(), method)
    x = tiny_models.tokens(3)
    names = ["second", "default", "__base__"]

    def check() -> torch.Tensor:
        with torch.no_grad():
            found = model(input_ids=x, adapter_names=names).logits
            torch.testing.assert_close(found, one_by_one(model, names, input_ids=x), rtol=1e-4, atol=1e-5)
        return found

    before = check()
    parameters = [parameter for name, parameter in model.named_parameters() if ".second." in name]
    parameters[-1].data.add_(1.0)
    changed = check()
    assert not torch.equal(before[0], changed[0]) and torch.equal(before[1:], changed[1:])
    with torch.no_grad():
        parameters[0].mul_(2)
    check()
    model.delete_adapter("second")
    config = config_of(method, seed=3)
    model.add_adapter("second", config)
    model.eval()
    assert not torch.equal(check()[0], changed[0])


@every_method
def test_gradients_reach_the_coefficients_of_their_rows(method: str) -> None:
    model = adapted(tiny_models.llama(), method)
    names = ["second", "default", "__base__"]
    model.base_model.set_requires_grad(["default", "second"])
    x = tiny_models.tokens(3)
    model(input_ids=x, adapter_names=names).logits.sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(".second." in name for name in found)
    for row, name in ((0, "second"), (1, "default")):
        model.zero_grad()
        model.set_adapter(name)
        model(input_ids=x[row : row + 1]).logits.sum().backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-4)


def test_gradients_where_other_layers_are_frozen() -> None:
    """The layers that are expanded together need not all be trained: those that are have their gradients."""
    model = adapted(tiny_models.llama(), "NOLA", target_modules=["q_proj"])
    parameters = [parameter for name, parameter in model.named_parameters() if ".default." in name]
    for parameter in parameters:
        parameter.requires_grad_(parameter is parameters[-1])
    names = ["default", "default", "__base__"]
    x = tiny_models.tokens(3)
    with torch.no_grad():
        model(input_ids=x, adapter_names=["__base__"] * 3)
    model(input_ids=x, adapter_names=names).logits.sum().backward()
    found = parameters[-1].grad
    assert parameters[0].grad is None and found is not None
    parameters[-1].grad = None
    model(input_ids=x[:2]).logits.sum().backward()
    torch.testing.assert_close(found, parameters[-1].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC"])
def test_wrong_requests_have_the_errors_of_lora(method: str) -> None:
    x = tiny_models.tokens(2)
    lora = get_peft_model(tiny_models.llama(), LoraConfig(init_lora_weights=False)).eval()
    ours = adapted(tiny_models.llama(), method)

    def both(error: type[Exception], **inputs: Any) -> None:
        messages = []
        for model in (lora, ours):
            with pytest.raises(error) as refused:
                model(input_ids=x, **inputs)
            messages.append(str(refused.value))
        assert messages[0] == messages[1]

    both(ValueError, adapter_names=["default"])
    both(ValueError, adapter_names=["default", "unknown"])
    with pytest.raises(TypeError, match="`adapter_names` must be a list of names, one for each row, got str"):
        ours(input_ids=x, adapter_names="default")
    for model in (lora, ours):
        model.train()
    both(ValueError, adapter_names=["default", "__base__"])
    for model in (lora, ours):
        model.eval().merge_adapter()
    both(ValueError, adapter_names=["default", "__base__"])
    for model in (lora, ours):
        model.unmerge_adapter()
    with ours.disable_adapter(), torch.no_grad():
        expected = ours(input_ids=x).logits
        assert torch.equal(ours(input_ids=x, adapter_names=["default", "__base__"]).logits, expected)
    ours.set_adapter("default")  # a refused request leaves nothing behind
    assert torch.equal(ours(input_ids=x).logits, ours(input_ids=x).logits)
    assert all(getattr(module, "mixed", None) is None for module in ours.modules())


@pytest.mark.parametrize("method", ["NOLA", "MCNC"])
def test_equal_adapters_are_expanded_in_one_product_a_shape(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_models.llama(), method, target_modules=["q_proj", "o_proj"])
    generators = {
        type(expansion.generator)
        for layer in model.modules()
        if isinstance(layer, model.base_model.tuner_layer_cls)
        for expansion in layer.expansions["default"]
    }
    shapes: list[torch.Size] = []
    for generator in generators:
        expand = generator.expand

        def counted(self: Any, coefficients: torch.Tensor, expand: Any = expand) -> torch.Tensor:
            shapes.append(coefficients.shape)
            return expand(self, coefficients)

        monkeypatch.setattr(generator, "expand", counted)
    x = tiny_models.tokens(4)
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=x, adapter_names=["default", "second", "default", "__base__"])
    parts = 2  # q_proj and o_proj have one shape, and so one generator of A and one of B
    assert len(shapes) == parts and all(shape[:2] == (4, 2) for shape in shapes)  # two layers of two projections


def test_what_is_kept_stays_within_the_budget() -> None:
    model = adapted(tiny_models.llama(), "PRANC")
    x = tiny_models.tokens(2)
    one_layer = 2 * 4 * 16 * 16
    before = set_expansion_budget(one_layer + 100)
    try:
        with torch.no_grad():
            model(input_ids=x, adapter_names=["default", "second"])
        batch = model.base_model._mixed
        assert isinstance(batch, mixed.MixedBatch)
        held = {id(w): w.numel() * 4 for parts in batch._parts.values() for part in parts for w in part.weights}
        assert 0 <= sum(held.values()) <= one_layer + 100
    finally:
        set_expansion_budget(before)


@every_method
@pytest.mark.parametrize("how", ["bfloat16 base", "bfloat16", "autocast"])
def test_half_precision(how: str, method: str) -> None:
    """Rows differ from rows alone by no more than rounding to bfloat16 does."""
    model = adapted(tiny_models.llama(), method)
    x = tiny_models.tokens(len(NAMES))
    with torch.no_grad():
        exact = one_by_one(model, NAMES, input_ids=x)
    if how == "bfloat16":
        model.bfloat16()
    elif how == "bfloat16 base":
        for name, parameter in model.named_parameters():
            if "_coefficients" not in name:
                parameter.data = parameter.data.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        alone = one_by_one(model, NAMES, input_ids=x).float()
        found = model(input_ids=x, adapter_names=NAMES).logits.float()
    rounding = (alone - exact).abs().max()
    assert (found - exact).abs().max() <= 2 * rounding and (found - alone).abs().max() <= 2 * rounding


@every_method
def test_gradients_after_a_pass_without(method: str) -> None:
    model = adapted(tiny_models.llama(), method).eval()
    model.set_requires_grad(["default", "second"])
    tokens, names = tiny_models.tokens(3), ["default", "second", "__base__"]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, adapter_names=names).logits.square().sum().backward()
        found = [p.grad for name, p in model.named_parameters() if ".default." in name or ".second." in name]
        assert found and all(grad is not None for grad in found)
        return [grad.clone() for grad in found if grad is not None]

    first = gradients()
    with torch.no_grad():
        expected = model(tokens, adapter_names=names).logits
    for before, now in zip(first, gradients()):
        torch.testing.assert_close(now, before)
    torch.testing.assert_close(model(tokens, adapter_names=names).logits, expected)
