"""The methods in diffusers' models: weights of adapters, a scale for one call, fusing, saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import close, coefficients_of, updates
from methods import METHODS, ONE_OF_EACH, Config, config_of
from peft import PeftConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

DOUBLE = torch.float64
TARGETS = ["to_q", "to_v", "conv1"]


def unet() -> Any:
    torch.manual_seed(0)
    return (
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        .to(DOUBLE)
        .eval()
    )


def transformer() -> Any:
    torch.manual_seed(0)
    return (
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        )
        .to(DOUBLE)
        .eval()
    )


@torch.no_grad()
def run(model: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    if isinstance(model, diffusers.UNet2DConditionModel):
        options = {"cross_attention_kwargs": {"scale": options["scale"]}} if options else {}
        return model(draw(2, 4, 8, 8), 3, draw(2, 5, 8), **options).sample
    options = {"joint_attention_kwargs": {"scale": options["scale"]}} if options else {}
    positions = {"img_ids": torch.zeros(4, 3, dtype=DOUBLE), "txt_ids": torch.zeros(5, 3, dtype=DOUBLE)}
    time = torch.tensor([0.5, 0.5], dtype=DOUBLE)
    return model(draw(2, 4, 4), draw(2, 5, 8), draw(2, 8), time, **positions, **options).sample


def adapted(base: nn.Module, method: str) -> tuple[Any, dict[str, Config]]:
    """A copy of a model with the adapters "one" and "two" of random coefficients; "two" is active."""
    model = copy.deepcopy(base)
    configs = {
        "one": config_of(method, target_modules=TARGETS[:2]),
        "two": config_of(method, target_modules=TARGETS[1:], seed=5),
    }
    for name, config in configs.items():
        model.add_adapter(config, name)
    return model.to(DOUBLE), configs


def dense(base: nn.Module, model: nn.Module, configs: dict[str, Config], weights: dict[str, Any]) -> nn.Module:
    """The base model with the dense updates of adapters added, each times a weight, or one by the module's name."""
    combined = copy.deepcopy(base)
    for adapter, weight in weights.items():
        for key, delta in updates(configs[adapter], base, coefficients_of(model, adapter)).items():
            times = weight(key) if callable(weight) else weight
            combined.get_parameter(key).data += times * delta.detach()
    return combined


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [unet, transformer])
def test_weights_of_adapters(make: Any, method: str) -> None:
    base = make()
    model, configs = adapted(base, method)
    close(run(model), run(dense(base, model, configs, {"two": 1})))
    model.set_adapters(["one", "two"], [0.5, -2.0])
    expected = run(dense(base, model, configs, {"one": 0.5, "two": -2}))
    close(run(model), expected)
    # For one call, after which the weights are what they were.
    close(run(model, scale=0.25), run(dense(base, model, configs, {"one": 0.125, "two": -0.5})))
    close(run(model), expected)
    model.set_adapters("one", 3.0)
    close(run(model), run(dense(base, model, configs, {"one": 3})))
    model.set_adapters(["one", "two"])
    close(run(model), run(dense(base, model, configs, {"one": 1, "two": 1})))
    close(run(model, scale=0), run(base))
    close(run(model), run(dense(base, model, configs, {"one": 1, "two": 1})))


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_weights_by_block(method: str) -> None:
    base = unet()
    model, configs = adapted(base, method)
    model.set_adapters(["one", "two"], [{"down": 0.5, "mid": 2.0, "up": {"block_0": [0.1, 0.2]}}, 0.3])

    def weight(key: str) -> float:
        if key.startswith("up_blocks.0.attentions"):
            return [0.1, 0.2][int(key.split(".")[3])]
        return 0.5 if key.startswith("down") else 2.0

    close(run(model), run(dense(base, model, configs, {"one": weight, "two": 0.3})))


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_fusing(method: str) -> None:
    base = unet()
    model, configs = adapted(base, method)
    model.set_adapters("one", 0.5)
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    fused = run(dense(base, model, configs, {"one": 0.25}))
    close(run(model), fused)
    # With LoRA these have no effect, without a word.
    for change in (
        lambda: run(model, scale=0.5),
        lambda: model.set_adapters("one", 1.0),
        lambda: model.fuse_lora(lora_scale=0.5),
    ):
        with pytest.raises(ValueError, match="adapter 'one' cannot change while it is merged.*`unfuse_lora"):
            change()
    close(run(model), fused)
    model.unfuse_lora()
    close(run(model), fused)  # fusing scaled the layers, as LoRA's
    model.set_adapters("one", 1.0)
    close(run(model), run(dense(base, model, configs, {"one": 1})))
    model.disable_lora()
    close(run(model), run(base))


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_disabling_and_deleting(method: str) -> None:
    base = unet()
    model, configs = adapted(base, method)
    model.set_adapters(["one", "two"], [0.5, 0.5])
    model.disable_adapters()
    assert torch.equal(run(model), run(base))
    model.enable_adapters()
    model.delete_adapters("two")
    assert list(model.peft_config) == ["one"] and model.active_adapters() == ["one"]
    close(run(model), run(dense(base, model, configs, {"one": 0.5})))
    assert not [name for name, _ in model.named_parameters() if ".two" in name]


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_an_adapter_goes_through_files_to_another_model(method: str, tmp_path: Path) -> None:
    base = unet()
    model, configs = adapted(base, method)
    save_file(get_peft_model_state_dict(model, adapter_name="one"), tmp_path / "adapter_model.safetensors")
    model.peft_config["one"].save_pretrained(str(tmp_path))
    other = copy.deepcopy(base)
    inject_adapter_in_model(PeftConfig.from_pretrained(str(tmp_path)), other, "one")
    set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors"), "one")
    other.set_adapters("one", 0.5)
    close(run(other), run(dense(base, model, configs, {"one": 0.5})))


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_file_of_diffusers_is_not_taken_for_lora(method: str, tmp_path: Path) -> None:
    """`load_lora_adapter` makes a LoRA of whatever it is given, and fails."""
    model, _ = adapted(unet(), method)
    model.save_lora_adapter(str(tmp_path), "one")
    other = unet()
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
        other.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(other), run(unet()))
