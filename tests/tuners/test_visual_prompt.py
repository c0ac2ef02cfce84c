"""Visual prompts: against blocks run by hand on concatenated tokens, and through PEFT as a user has it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ext import VisualPromptConfig, randomness
from peft_ext.tuners.visual_prompt import VisualPromptLayer

HIDDEN = 16
REGISTERS = 2


@dataclass(frozen=True)
class Architecture:
    """A classifier of a kind that can have prompts.

    Args:
        special: tokens before the patches: VPT puts the prompts after them.
        head: from the normed tokens to logits, as the paper of the architecture has it.
    """

    config: type
    model: type
    special: int
    head: Callable[[Any, torch.Tensor], torch.Tensor]
    options: dict[str, Any]

    def make(self, layers: int = 3, **options: Any) -> Any:
        torch.manual_seed(0)
        settings = {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 2, "image_size": 16}
        model = self.model(self.config(**{**settings, "patch_size": 8, "num_labels": 3, **self.options, **options}))
        for parameter in model.parameters():  # the patches and the special tokens must matter
            nn.init.normal_(parameter, std=0.3)
        return model.eval()


def _mean(special: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda model, x: model.classifier(torch.cat([x[:, 0], x[:, special:].mean(dim=1)], dim=1))


ARCHITECTURES = {
    "vit": Architecture(
        transformers.ViTConfig,
        transformers.ViTForImageClassification,
        1,
        lambda model, x: model.classifier(x[:, 0]),
        {"intermediate_size": 24},
    ),
    "deit": Architecture(
        transformers.DeiTConfig,
        transformers.DeiTForImageClassificationWithTeacher,
        2,
        lambda model, x: (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2,
        {"intermediate_size": 24},
    ),
    "dinov2": Architecture(
        transformers.Dinov2Config, transformers.Dinov2ForImageClassification, 1, _mean(1), {"mlp_ratio": 2}
    ),
    "dinov2_with_registers": Architecture(
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersForImageClassification,
        1 + REGISTERS,
        _mean(1 + REGISTERS),
        {"mlp_ratio": 2, "num_register_tokens": REGISTERS},
    ),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
shallow_and_deep = pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])


def images(batch: int = 2, height: int = 16, width: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def tokens_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The prompts in the order of the blocks, by name."""
    ending = f".visual_prompt_tokens.{adapter}.values"
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ending)}


def adapt(base: nn.Module, num_prompts: int = 3, **options: Any) -> PeftModel:
    """A copy of a model with prompts that are not the initial ones, in the dtype of the model."""
    model = get_peft_model(copy.deepcopy(base), VisualPromptConfig(num_prompts=num_prompts, **options))
    randomise(model)
    return model.to(next(base.parameters()).dtype).eval()


def randomise(model: nn.Module, adapter: str = "default", seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in tokens_of(model, adapter).values():
        parameter.data.normal_(generator=generator)


def dense(
    name: str, base: Any, prompts: list[torch.Tensor], x: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """VPT as published: prompts after the special tokens; each of `prompts` replaces those of the block before.

    Returns:
        Logits, the normed tokens, and the tokens before and after each block, all without the prompts.
    """
    special = ARCHITECTURES[name].special
    backbone = getattr(base, base.base_model_prefix)
    blocks = next(module for module in backbone.modules() if isinstance(module, nn.ModuleList))
    number = len(prompts[0])
    x = backbone.embeddings(x, **options)

    def without(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :special], x[:, special + number :]], dim=1)

    states = [x]
    for index, block in enumerate(blocks):
        if index < len(prompts):
            rest = x[:, special + number :] if index else x[:, special:]
            x = torch.cat([x[:, :special], prompts[index].expand(len(x), -1, -1), rest], dim=1)
        x = block(x)
        states.append(without(x))
    x = backbone.layernorm(without(x))
    return ARCHITECTURES[name].head(base, x), x, states


@settings(max_examples=6, deadline=None)
@given(
    layers=st.integers(1, 3),
    num_prompts=st.integers(1, 6),
    batch=st.integers(1, 3),
    size=st.tuples(st.sampled_from([8, 16, 24]), st.sampled_from([16, 32])),
)
@shallow_and_deep
@every_architecture
def test_outputs_and_gradients_are_those_of_the_dense_computation(
    name: str, deep: bool, layers: int, num_prompts: int, batch: int, size: tuple[int, int]
) -> None:
    base = ARCHITECTURES[name].make(layers).double()
    model = adapt(base, num_prompts, deep=deep)
    x = images(batch, *size, dtype=torch.float64)
    options = {"interpolate_pos_encoding": True} if "dinov2" not in name and size != (16, 16) else {}

    prompts = [parameter.detach().clone().requires_grad_() for parameter in tokens_of(model).values()]
    assert len(prompts) == (layers if deep else 1)
    expected, normed, _ = dense(name, base, prompts, x, **options)
    gradients = torch.autograd.grad(expected.square().sum(), prompts)

    logits = model(x, **options).logits
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected)
    for parameter, gradient in zip(tokens_of(model).values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    backbone = getattr(model.get_base_model(), base.base_model_prefix)
    torch.testing.assert_close(backbone(x, **options).last_hidden_state, normed)
    # The prompts do something: 7e-4 at least in all draws, where float64 that leaves them out differs by 1e-15.
    assert (logits - base(x, **options).logits).abs().max() > 1e-6


@shallow_and_deep
@every_architecture
def test_hidden_states_and_attentions(name: str, deep: bool) -> None:
    base = ARCHITECTURES[name].make(attn_implementation="eager").double()
    model = adapt(base, deep=deep)
    x = images(dtype=torch.float64)
    *_, states = dense(name, base, list(tokens_of(model).values()), x)
    length = states[0].shape[1]
    out = model(x, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(states) == 4
    for found, expected in zip(out.hidden_states, states, strict=True):
        # This attention computes its softmax in single precision.
        torch.testing.assert_close(found[:, :length], expected, rtol=1e-4, atol=1e-5)
    assert [each.shape for each in out.attentions] == [(2, 2, length + 3, length + 3)] * 3


@shallow_and_deep
@every_architecture
def test_without_the_adapter_it_is_the_base_model(name: str, deep: bool) -> None:
    base = ARCHITECTURES[name].make()
    x = images()
    expected = base(x).logits
    model = adapt(base, deep=deep)
    adapted = model(x).logits
    with model.disable_adapter():
        assert torch.equal(model(x).logits, expected)
    assert torch.equal(model(x).logits, adapted)
    unloaded = model.unload()
    assert torch.equal(unloaded(x).logits, expected)
    assert [(key, type(module)) for key, module in unloaded.named_modules()] == [
        (key, type(module)) for key, module in base.named_modules()
    ]


@shallow_and_deep
def test_merging_is_refused(deep: bool) -> None:
    model = adapt(ARCHITECTURES["vit"].make(), deep=deep, modules_to_save=["embeddings"])
    with torch.no_grad():  # its own embeddings would be merged first
        model.base_model.model.vit.embeddings.modules_to_save["default"].cls_token.add_(1)
    x = images()
    expected = model(x).logits
    layer = next(module for module in model.modules() if isinstance(module, VisualPromptLayer))
    for refused in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter, layer.merge):
        with pytest.raises(ValueError, match="cannot be merged into the weights.*`unload"):
            refused()
    assert torch.equal(model(x).logits, expected)
    assert isinstance(model.base_model.model.vit.embeddings, ModulesToSaveWrapper)


# Saving and loading


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@shallow_and_deep
@every_architecture
def test_saved_and_loaded_it_computes_the_same(name: str, deep: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    base = ARCHITECTURES[name].make()
    head = "cls_classifier" if name == "deit" else "classifier"
    model = adapt(base, deep=deep, modules_to_save=[head])
    nn.init.normal_(model.get_submodule(f"base_model.model.{head}.modules_to_save.default").weight)
    x = images()
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.pop(next(key for key in saved if key.endswith("visual_prompt_identity"))).dtype == torch.uint8
    prompts = {key: value for key, value in saved.items() if "visual_prompt" in key}
    assert len(prompts) == (3 if deep else 1) and len(saved) == len(prompts) + 2
    assert all(value.shape == (3, HIDDEN) and value.dtype == torch.float32 for value in prompts.values())

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded.eval()(x).logits, model(x).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@shallow_and_deep
def test_backbones_and_auto_classes(deep: bool, tmp_path: Path) -> None:
    ARCHITECTURES["dinov2"].make().save_pretrained(tmp_path / "base")
    x = images()
    for auto, options in (
        (transformers.AutoModel, {}),
        (transformers.AutoModelForImageClassification, {"modules_to_save": ["classifier"]}),
    ):
        model = adapt(auto.from_pretrained(tmp_path / "base").eval(), deep=deep, **options)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        heads = {f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
        expected = {*tokens_of(model), *(heads if options else ())}
        assert trainable == expected
        model.save_pretrained(str(tmp_path / "adapter"))
        base = auto.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        assert torch.equal(loaded(x)[0], model(x)[0])


@shallow_and_deep
def test_adapters_of_transformers(deep: bool, tmp_path: Path) -> None:
    base = ARCHITECTURES["vit"].make()
    x = images()
    expected = base(x).logits
    model = adapt(base, deep=deep)
    model.save_pretrained(str(tmp_path))
    base.load_adapter(str(tmp_path))
    assert torch.equal(base(x).logits, model(x).logits)
    base.disable_adapters()
    assert torch.equal(base(x).logits, expected)


@shallow_and_deep
def test_injected_by_a_state_dict_all_blocks_are_adapted(deep: bool) -> None:
    """The state dict names the blocks with tokens; the last one must cut them off."""
    base = ARCHITECTURES["vit"].make()
    model = adapt(base, deep=deep)
    prompts = get_peft_model_state_dict(model)
    injected = inject_adapter_in_model(VisualPromptConfig(num_prompts=3, deep=deep), base, state_dict=prompts)
    tokens = [value for key, value in prompts.items() if key.endswith("tokens.values")]
    for found, expected in zip(tokens_of(injected).values(), tokens, strict=True):
        found.data.copy_(expected)
    assert torch.equal(injected(images()).logits, model(images()).logits)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[max(tensors)]


def _other_size(tensors: dict[str, torch.Tensor]) -> None:
    tensors[max(tensors)] = torch.zeros(4, HIDDEN)


def _unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors[max(tensors).replace(".2.", ".3.")] = torch.zeros(3, HIDDEN)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[max(tensors)][0, 0] = math.nan


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"1 adapted layers find no coefficients \(first: '.*\.2\.visual_prompt_tokens"),
        (_other_size, r"'.*\.2\..*' must have shape \(3, 16\), got \(4, 16\). `num_prompts` and `deep`"),
        (_unknown, r"1 saved coefficients find no layer \(first: '.*\.3\.visual_prompt_tokens"),
        (_nan, r"must be finite, got NaN or infinity in '.*\.2\.visual_prompt_tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, second: bool, tmp_path: Path
) -> None:
    base = ARCHITECTURES["vit"].make()
    adapt(base, deep=True).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    x = images()
    if second:
        model = adapt(base, deep=True)
        expected = model(x).logits
        with pytest.raises(ValueError, match=message):
            model.load_adapter(str(tmp_path), "other")
        assert list(model.peft_config) == ["default"]
        assert torch.equal(model(x).logits, expected)
    else:
        expected = base(x).logits
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, str(tmp_path))
        assert torch.equal(base(x).logits, expected)
        assert not any(isinstance(module, VisualPromptLayer) for module in base.modules())


# What cannot have prompts


def _swin() -> nn.Module:
    settings = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    return transformers.SwinModel(transformers.SwinConfig(window_size=2, **settings))


def _dinov2_backbone() -> nn.Module:
    return transformers.Dinov2Backbone(ARCHITECTURES["dinov2"].make().config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_swin, "need a model of type vit, deit, dinov2, dinov2_with_registers, .* got SwinModel of type 'swin'"),
        (tiny_models.llama, "got LlamaForCausalLM of type 'llama'"),
        (tiny_models.Layers, "got Layers of type None"),
        (_dinov2_backbone, "cannot be used in a backbone for feature maps, got Dinov2Backbone"),
    ],
)
def test_other_models_are_refused_and_left_alone(
    make: Callable[[], nn.Module], message: str, snapshot: Callable[[nn.Module], dict[str, object]]
) -> None:
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, VisualPromptConfig())
    after = snapshot(base)
    assert after["modules"] == before["modules"]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_mask(attention: str, deep: bool) -> None:
    """Prompts are seen and see like tokens: a hidden patch changes nothing, and one that is seen does."""
    base = ARCHITECTURES["vit"].make()
    base.set_attn_implementation(attention)
    model = adapt(base, deep=deep)
    x, mask = images(), torch.ones(2, 5, dtype=torch.bool)
    everything = model(x).logits
    torch.testing.assert_close(model(x, attention_mask=mask).logits, everything)
    mask[:, 4] = False
    hidden = model(x, attention_mask=mask).logits
    assert not torch.allclose(hidden, everything, atol=1e-4)
    changed = x.clone()
    changed[..., 8:, 8:] += 1  # the last patch
    torch.testing.assert_close(model(changed, attention_mask=mask).logits, hidden)
    changed[..., :8, :8] += 1
    assert not torch.allclose(model(changed, attention_mask=mask).logits, hidden, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x, attention_mask=mask).logits, base(x, attention_mask=mask).logits)


def test_an_attention_mask_is_refused_where_rows_differ() -> None:
    model = adapt(ARCHITECTURES["vit"].make())
    mask = torch.tensor([[True, True, True, True, False]] * 2)
    with pytest.raises(ValueError, match="`attention_mask` must be None in a batch with `adapter_names`"):
        model(images(), attention_mask=mask, adapter_names=["default", "__base__"])


# Several adapters


def test_several_adapters() -> None:
    base = ARCHITECTURES["deit"].make()
    x = images()
    configs = {"first": (2, False), "second": (3, False), "third": (4, True)}
    expected = {}
    model = None
    for name, (number, deep) in configs.items():
        config = VisualPromptConfig(num_prompts=number, deep=deep)
        if model is None:
            model = get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        randomise(model, name, seed=number)
        alone = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        randomise(alone, seed=number)
        expected[name] = alone.eval()(x).logits
    assert model is not None
    model.eval()
    assert [status.available_adapters for status in model.get_layer_status()] == [sorted(configs)] * 3
    assert model.get_model_status().active_adapters == ["first"]
    for name in ("second", "third", "first"):
        model.set_adapter(name)
        assert torch.equal(model(x).logits, expected[name])
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == set(tokens_of(model, name))
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    assert torch.equal(model(x).logits, expected["second"])
    assert not tokens_of(model, "first")
    model.set_adapter("third")
    assert torch.equal(model(x).logits, expected["third"])


@pytest.mark.parametrize("order", [["shallow", "deep"], ["deep", "shallow"]])
def test_active_together_blocks_get_the_prompts_of_all(order: list[str]) -> None:
    base = ARCHITECTURES["dinov2"].make().double()
    model = get_peft_model(copy.deepcopy(base), VisualPromptConfig(num_prompts=2), adapter_name="shallow")
    model.add_adapter("deep", VisualPromptConfig(num_prompts=3, deep=True))
    model.double().eval()
    for name in order:
        randomise(model, name, seed=len(name))
    model.base_model.set_adapter(order)
    (kept,) = tokens_of(model, "shallow").values()
    local = list(tokens_of(model, "deep").values())
    x = images(dtype=torch.float64)

    backbone = base.dinov2
    tokens = backbone.embeddings(x)
    length = tokens.shape[1]
    tokens = torch.cat([tokens, kept.expand(2, -1, -1)], dim=1)
    for block, prompts in zip(backbone.encoder.layer, local, strict=True):
        tokens = block(torch.cat([tokens, prompts.expand(2, -1, -1)], dim=1))[:, : length + 2]
    expected = ARCHITECTURES["dinov2"].head(base, backbone.layernorm(tokens[:, :length]))
    torch.testing.assert_close(model(x).logits, expected)


# Training


@pytest.mark.parametrize("reentrant", [False, True])
@shallow_and_deep
def test_gradient_checkpointing(deep: bool, reentrant: bool) -> None:
    base = ARCHITECTURES["vit"].make()
    plain, checkpointed = adapt(base, deep=deep).train(), adapt(base, deep=deep).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    backbone = checkpointed.get_base_model().vit
    blocks = next(module for module in backbone.modules() if isinstance(module, nn.ModuleList))
    blocks[1].get_base_layer().layernorm_before.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(images()).logits.square().sum().backward()
    assert len(calls) == 2  # once more in the backward pass
    for expected, found in zip(tokens_of(plain).values(), tokens_of(checkpointed).values(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@shallow_and_deep
@every_architecture
def test_a_bfloat16_base_keeps_float32_prompts(name: str, deep: bool) -> None:
    base = ARCHITECTURES[name].make().bfloat16()
    model = get_peft_model(copy.deepcopy(base), VisualPromptConfig(num_prompts=3, deep=deep)).eval()
    randomise(model)
    prompts = tokens_of(model)
    assert {parameter.dtype for parameter in prompts.values()} == {torch.float32}
    logits = model(images().bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    expected = dense(name, base.float(), [parameter.bfloat16().float() for parameter in prompts.values()], images())[0]
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.2)
    logits.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prompts.values())


@shallow_and_deep
def test_autocast(deep: bool) -> None:
    base = ARCHITECTURES["vit"].make()
    model = adapt(base, deep=deep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images()).logits
    torch.testing.assert_close(logits.float(), model(images()).logits, rtol=0.05, atol=0.2)
    logits.float().sum().backward()
    for parameter in tokens_of(model).values():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@shallow_and_deep
@every_architecture
def test_gradients_of_single_images(name: str, deep: bool, attention: str) -> None:
    """`vmap` of `grad` over a functional call: what per-sample Jacobians are made of."""
    model = adapt(ARCHITECTURES[name].make(attn_implementation=attention), deep=deep)
    prompts = tokens_of(model)
    x = images(3)

    def loss(prompts: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, prompts, (image[None],)).logits.square().sum()

    detached = {key: parameter.detach() for key, parameter in prompts.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, x)
    for index in range(3):
        expected = torch.autograd.grad(model(x[index : index + 1]).logits.square().sum(), list(prompts.values()))
        for key, gradient in zip(prompts, expected, strict=True):
            torch.testing.assert_close(found[key][index], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_dropout_is_drawn_for_every_image_and_only_in_training(deep: bool) -> None:
    model = get_peft_model(
        ARCHITECTURES["vit"].make(), VisualPromptConfig(num_prompts=50, deep=deep, prompt_dropout=0.25)
    )
    seen = []
    for parameter in tokens_of(model).values():
        nn.init.ones_(parameter)
    for module in model.modules():
        if isinstance(module, VisualPromptLayer):
            module.get_base_layer().register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 5:]))
    model.train()(images())
    for prompts in seen if deep else seen[:1]:
        assert prompts.shape == (2, 50, HIDDEN)
        assert sorted(prompts.unique().tolist()) == pytest.approx([0, 1 / 0.75])
        assert not torch.equal(prompts[0], prompts[1])
        assert 0.68 < prompts.bool().float().mean() < 0.82
    seen.clear()
    model.eval()(images())
    assert torch.equal(seen[0], torch.ones(2, 50, HIDDEN))


# Initialisation


def test_initial_prompts_come_from_the_seed_alone() -> None:
    base = ARCHITECTURES["vit"].make()
    torch.manual_seed(5)
    first = tokens_of(get_peft_model(copy.deepcopy(base), VisualPromptConfig(num_prompts=50, deep=True, seed=7)))
    torch.manual_seed(6)
    with torch.inference_mode():
        again = tokens_of(get_peft_model(copy.deepcopy(base), VisualPromptConfig(num_prompts=50, deep=True, seed=7)))
    other = tokens_of(get_peft_model(copy.deepcopy(base), VisualPromptConfig(num_prompts=50, deep=True, seed=8)))
    values = [parameter.detach() for parameter in first.values()]
    bound = math.sqrt(6 / (3 * 8 * 8 + HIDDEN))
    for index, name in enumerate(first):
        expected = bound * randomness.uniform(7, ("visual_prompt", index), 50 * HIDDEN).view(50, HIDDEN)
        torch.testing.assert_close(values[index], expected)
        assert torch.equal(again[name], first[name]) and not again[name].is_inference()
        assert not torch.equal(other[name], first[name])
        assert 0.95 * bound < values[index].abs().max() <= bound
    assert not torch.equal(values[0], values[1])
    assert values[0][0, :3].tolist() == pytest.approx([0.1495503, -0.1610860, -0.1696300], abs=1e-6)


# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prompts": 0}, "`num_prompts` must be a positive integer, got 0"),
        ({"num_prompts": 2.0}, "`num_prompts` must be a positive integer, got 2.0"),
        ({"num_prompts": True}, "`num_prompts` must be a positive integer, got True"),
        ({"deep": "yes"}, "`deep` must be True or False, got 'yes'"),
        ({"deep": 1}, "`deep` must be True or False, got 1"),
        ({"prompt_dropout": 1.0}, "`prompt_dropout` must be a number from 0 to below 1, got 1.0"),
        ({"prompt_dropout": -0.1}, "`prompt_dropout` must be a number from 0 to below 1, got -0.1"),
        ({"prompt_dropout": "0.1"}, "`prompt_dropout` must be a number from 0 to below 1, got '0.1'"),
        ({"seed": -1}, r"`seed` must be an integer between 0 and 2\*\*64 - 1, got -1"),
    ],
)
def test_a_bad_field_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualPromptConfig(**fields)


def test_the_configuration_is_saved_and_loaded(tmp_path: Path) -> None:
    made = VisualPromptConfig(num_prompts=3, deep=True, prompt_dropout=0.5, seed=2**64 - 1, modules_to_save=["head"])
    made.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is VisualPromptConfig and loaded == made


def test_every_field_is_described() -> None:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(VisualPromptConfig):
        assert field.metadata.get("help"), field.name
        assert field.name in inherited or f"{field.name} (`" in (VisualPromptConfig.__doc__ or "")


# A real model


@shallow_and_deep
def test_training_steps_of_dinov2(shared: Path, deep: bool, tmp_path: Path) -> None:
    folder = shared / "models" / "dinov2-small"
    base = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    config = VisualPromptConfig(num_prompts=8, deep=deep, modules_to_save=["classifier"])
    model = get_peft_model(copy.deepcopy(base), config)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert model.get_nb_trainable_parameters()[0] == 8 * 384 * (12 if deep else 1) + 3 * 2 * 384 + 3
    x, labels = images(3, 28, 28), torch.arange(3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(pixel_values=x, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    } == trainable

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model.eval()(x).logits)


@every_architecture
def test_rows_with_prompts_of_their_own(name: str) -> None:
    """Shallow and deep adapters, of several lengths, and none: each row as if it were alone."""
    base = ARCHITECTURES[name].make()
    model = adapt(base, deep=False)
    model.add_adapter("deep", VisualPromptConfig(num_prompts=2, deep=True, seed=1))
    model.add_adapter("longer", VisualPromptConfig(num_prompts=5, seed=2))
    model.eval()
    names = ["longer", "__base__", "default", "deep", "longer"]
    x = images(len(names))
    with torch.no_grad():
        found = model(x, adapter_names=names).logits
        for row, adapter in enumerate(names):
            model.set_adapter("default" if adapter == "__base__" else adapter)
            expected = (base if adapter == "__base__" else model)(x[row : row + 1]).logits[0]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="non-existing adapter.*: unknown"):
        model(x, adapter_names=["unknown"] * len(names))
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        model(x, adapter_names=["deep"])
