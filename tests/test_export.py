"""Exported LoRA adapters: what they give in a process without this package, and what their readers ask of them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from methods import adapts_norms, config_of
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ext import AdapterPool, NolaConfig, PrancConfig, SeededNetwork, VisualPromptConfig, to_lora
from peft_ext.adapters.low_rank import LowRank

WEIGHTS = "adapter_model.safetensors"
X = tiny_models.tokens()
PREFIX = "base_model.model."
BASES = {
    "llama": (tiny_models.llama, ["q_proj", "down_proj"]),
    "gpt2": (tiny_models.gpt2, ["c_attn", "c_proj"]),
}
EXACT: dict[str, dict[str, Any]] = {name: {} for name in ("NOLA", "NOLA, own bases", "MCNC", "PRANC, factors")} | {
    name: {"error": 0.0} for name in ("PRANC", "PRANC, dense", "MCNC, weight", "PRANC, two a weight, biases")
}
"""How each method is exported without a loss."""


def randomised(model: Any) -> Any:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model.eval()


def adapted(base: nn.Module, config: Any) -> PeftModel:
    """The update is about as large as the weights, so that what it gives differs from what the base gives."""
    return randomised(get_peft_model(base, config))


@torch.no_grad()
def outputs(model: Any, *inputs: Any) -> torch.Tensor:
    found = model(*inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def loaded(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, str(folder)).eval()


def adapted_names(model: PeftModel) -> set[str]:
    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


# In a process without this package

WITHOUT = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_ext":
            raise ImportError("peft_ext is not installed here")
sys.meta_path.insert(0, Blocker())
try:
    import peft_ext
except ImportError:
    pass
else:
    sys.exit("peft_ext can be imported")
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
out, tokens, *folders = sys.argv[1:]
tokens, found = torch.tensor(json.loads(tokens)), {}
for folder in folders:
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found[f"{folder} logits"] = model(tokens).logits
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found[f"{folder} text"] = model.generate(input_ids=tokens[:, :4], **settings)
save_file(found, out)
"""


def without_the_package(folders: list[Path]) -> dict[str, torch.Tensor]:
    """Logits and greedy text that adapters give where `peft_ext` cannot be imported."""
    place = folders[0].parent
    arguments = [sys.executable, "-c", WITHOUT, str(place / "found"), json.dumps(X.tolist()), *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(arguments, env=environment, cwd=place, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return load_file(place / "found")


@pytest.mark.parametrize("base", BASES)
def test_same_logits_and_text_without_the_package(base: str, tmp_path: Path) -> None:
    make, targets = BASES[base]
    make().save_pretrained(tmp_path / "base")
    expected = {}
    sizes: dict[str, dict[str, Any]] = {**EXACT, "PRANC": {"error": 1e-5}, "MCNC, weight": {"rank": 99}}
    for method, size in sizes.items():
        model = type(make()).from_pretrained(tmp_path / "base")
        model = adapted(model, config_of(method, target_modules=targets, task_type="CAUSAL_LM"))
        logits = outputs(model, X)
        with model.disable_adapter():
            assert not torch.allclose(outputs(model, X), logits, atol=1e-2)
        text = model.generate(input_ids=X[:, :4], max_new_tokens=12, do_sample=False, pad_token_id=0)
        model.save_pretrained(str(tmp_path / method))
        for source, place in (("model", model), ("folder", tmp_path / method)):
            expected[tmp_path / f"{method} from a {source}"] = logits, text
            to_lora(place, tmp_path / f"{method} from a {source}", **size)
    found = without_the_package(list(expected))
    for folder, (logits, text) in expected.items():
        torch.testing.assert_close(found[f"{folder} logits"], logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[f"{folder} text"], text)


# Layers of every kind, against the adapted model and the update itself


class Padded(nn.Module):
    """Embeddings and convolutions that a test of plain layers leaves out."""

    def __init__(self, **conv: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8, padding_idx=2)
        self.grouped = nn.Conv2d(4, 8, 3, **{"padding": 1, "stride": 2, "groups": 2, **conv})
        self.depthwise = nn.Conv2d(8, 8, (3, 1), groups=8)
        self.pointwise = nn.Conv2d(8, 6, 1, bias=False)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.depthwise(self.grouped(image))).flatten(1) @ torch.ones(216, 8) + self.table(tokens)


PLACES = ["embedding", "first", "second", "wide", "conv1d", "conv2d"]


def through(name: str) -> torch.Tensor:
    """An input for one of the layers of `tiny_models.Layers`."""
    torch.manual_seed(5)
    return {"embedding": torch.arange(11), "conv1d": torch.randn(3, 24), "conv2d": torch.randn(2, 3, 5, 5)}.get(
        name, torch.randn(3, 8)
    )


@pytest.mark.parametrize("method", EXACT)
def test_every_kind_of_layer(method: str, tmp_path: Path) -> None:
    places = PLACES[1:] if method.endswith("biases") else PLACES
    model = adapted(tiny_models.Layers(), config_of(method, target_modules=places))
    model.save_pretrained(str(tmp_path / "adapter"))
    found = [to_lora(model, tmp_path / "one", **EXACT[method])]
    found.append(to_lora(tmp_path / "adapter", tmp_path / "two", base=tiny_models.Layers(), **EXACT[method]))
    assert found[0]["error"] == found[1]["error"] == 0 and found[0]["r"] == found[1]["r"]
    for folder in ("one", "two"):
        lora = loaded(tiny_models.Layers(), tmp_path / folder)
        assert adapted_names(lora) == set(places)
        for name in places:
            expected = outputs(model, through(name), (name,))
            assert not torch.allclose(outputs(tiny_models.Layers(), through(name), (name,)), expected, atol=1e-2)
            torch.testing.assert_close(outputs(lora, through(name), (name,)), expected, rtol=1e-4, atol=1e-5)
        if not method.endswith("biases"):  # one of the layers has none
            merged = lora.merge_and_unload()
            for name in places:
                expected = outputs(model, through(name), (name,))
                torch.testing.assert_close(outputs(merged, through(name), (name,)), expected, rtol=1e-4, atol=1e-5)


DENSE = [(method, size) for method in ("PRANC", "MCNC, weight") for size in ({}, {"rank": 3}, {"error": 0.3})]


@pytest.mark.parametrize(("method", "size"), [("NOLA", {}), ("MCNC", {}), *DENSE])
def test_grouped_convolutions_and_padded_embeddings(method: str, size: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(Padded(), config_of(method, target_modules=["table", "grouped", "depthwise", "pointwise"]))
    found = to_lora(model, tmp_path / "lora", **(size or EXACT[method]))
    lora = loaded(Padded(), tmp_path / "lora")
    assert adapted_names(lora) == {"table", "grouped", "depthwise", "pointwise"}
    layers = dict(lora.get_base_model().named_modules())
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        expected = layer.get_delta_weight("default")
        delta = response(layers[name], expected.shape)
        error = float((delta - expected).norm() / expected.norm())
        assert error == pytest.approx(found["modules"][name]["error"], abs=2e-6)
        assert error < 0.3 or "error" not in size
        rank = found["modules"][name]["rank"]
        if "rank" in size:
            assert rank == {"grouped": 4, "depthwise": 8}.get(name, 3)
    tokens, image = torch.tensor([1, 2]), torch.randn(2, 4, 15, 11)
    if not size:
        torch.testing.assert_close(outputs(lora, tokens, image), outputs(model, tokens, image), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def response(layer: Any, shape: torch.Size) -> torch.Tensor:
    """What PEFT's LoRA adds to a weight, read off its outputs: it cannot tell of grouped convolutions."""
    if layer.base_layer.weight.dim() == 2:
        return layer.get_delta_weight("default")
    out, inputs, *kernel = shape
    conv, groups = layer.base_layer, layer.base_layer.groups
    image = torch.eye(groups * inputs * kernel[0] * kernel[1]).view(-1, groups * inputs, *kernel)
    padding = conv.padding
    for part in (conv, layer.lora_A["default"]):
        part.padding = (0, 0)
    added = (layer(image) - conv(image))[:, :, 0, 0].T.view(groups, out // groups, groups, inputs, *kernel)
    for part in (conv, layer.lora_A["default"]):
        part.padding = padding
    other = [added[i, :, j] for i in range(groups) for j in range(groups) if i != j]
    assert all(part.abs().max() < 1e-6 for part in other)  # a group reads its own channels
    return torch.cat([added[i, :, i] for i in range(groups)])


def test_scaled_embeddings(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3TextConfig

    def make() -> nn.Module:
        torch.manual_seed(0)
        text = Gemma3TextConfig(
            **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0},
        )
        return Gemma3ForCausalLM(text).eval()

    assert Gemma3Config
    model = adapted(make(), config_of("NOLA", target_modules=["embed_tokens", "q_proj"]))
    to_lora(model, tmp_path / "lora")
    lora = loaded(make(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, X), outputs(model, X), rtol=1e-4, atol=1e-4)


# Ranks and errors


def test_ranks_and_alphas_by_module(tmp_path: Path) -> None:
    """Neither vLLM nor llama.cpp reads patterns: the file has one rank and one scaling."""
    config = NolaConfig(
        **{"r": 2, "num_basis": 5, "alpha": 3.0, "init_weights": False, "target_modules": ["q_proj", "v_proj"]},
        **{"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 7.0}},
    )
    model = adapted(tiny_models.llama(), config)
    found = to_lora(model, tmp_path / "lora")
    assert found["r"] == 5 and found["lora_alpha"] == 5
    assert sorted(row["rank"] for row in found["modules"].values()) == [2, 2, 2, 5]
    lora = loaded(tiny_models.llama(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, X), outputs(model, X), rtol=1e-4, atol=1e-4)
    assert lora.peft_config["default"].rank_pattern == lora.peft_config["default"].alpha_pattern == {}


@pytest.mark.parametrize(("alpha", "expected"), [(4.0, 4), (0.5, 0.5), (0.0, 2)])
def test_alpha_is_that_of_the_adapter(alpha: float, expected: float, tmp_path: Path) -> None:
    """An alpha of 0 means none to llama.cpp, and with it a scaling of 1."""
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"], alpha=alpha))
    assert to_lora(model, tmp_path / "lora")["lora_alpha"] == expected
    lora = loaded(tiny_models.llama(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, X), outputs(model, X), rtol=1e-4, atol=1e-4)


def test_factors_are_the_adapters(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"]))
    to_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    name = "model.layers.1.self_attn.q_proj"
    (A, B), _ = model.get_base_model().get_submodule(name).update("default")
    assert torch.equal(tensors[f"{PREFIX}{name}.lora_A.weight"], A)
    assert torch.equal(tensors[f"{PREFIX}{name}.lora_B.weight"], B)


@pytest.mark.parametrize("method", ["PRANC", "MCNC, weight"])
def test_a_wanted_error_gives_the_smallest_rank(method: str, tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of(method, target_modules=["q_proj", "v_proj"]))
    found = to_lora(model, tmp_path / "lora", error=0.2)
    ranks = set()
    lost = all = 0.0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        delta = layer.get_delta_weight("default").detach().double()
        values = torch.linalg.svdvals(delta).square()
        errors = [float((values[rank:].sum() / values.sum()).sqrt()) for rank in range(len(values) + 1)]
        needed = next(rank for rank, error in enumerate(errors) if error <= 0.2)
        assert found["modules"][name]["rank"] == needed
        assert found["modules"][name]["error"] == pytest.approx(errors[min(found["r"], len(values))], abs=1e-6)
        ranks.add(needed)
        lost, all = lost + float(values[found["r"] :].sum()), all + float(values.sum())
    assert found["r"] == max(ranks) < 32
    assert found["error"] == pytest.approx((lost / all) ** 0.5, rel=1e-4) and 0 < found["worst_error"] <= 0.2
    lora = loaded(tiny_models.llama(), tmp_path / "lora")
    assert (outputs(lora, X) - outputs(model, X)).norm() < 0.5 * outputs(model, X).norm()


def test_a_rank_is_cut_to_what_there_is(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("PRANC", target_modules=["q_proj", "v_proj"]))
    assert to_lora(model, tmp_path / "some", rank=3)["r"] == 3
    found = to_lora(model, tmp_path / "all", rank=1000)
    assert found["r"] == 32 and found["error"] < 1e-6
    assert found["modules"]["model.layers.0.self_attn.v_proj"]["rank"] == 16


def test_an_adapter_that_was_not_trained(tmp_path: Path) -> None:
    config = config_of("PRANC", target_modules=["q_proj"], init_weights=True)
    found = to_lora(get_peft_model(tiny_models.llama(), config), tmp_path / "lora", error=0.1)
    assert found["r"] == 1 and found["error"] == found["worst_error"] == 0
    lora = loaded(tiny_models.llama(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, X), outputs(tiny_models.llama(), X))


# What is adapted, and what else is in the file


class Nested(nn.Module):
    """Names of modules are ends of others' names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"layer": nn.Linear(8, 8), "block": nn.ModuleDict({"layer": nn.Linear(8, 8)})})
        self.one = nn.ModuleDict({"block": nn.ModuleDict({"layer": nn.Linear(8, 8)}), "two": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.modules():
            x = torch.tanh(module(x)) if type(module).__name__ == "Linear" or isinstance(module, LoraLayer) else x
        return x


@pytest.mark.parametrize(
    "targets",
    [
        r"layer",
        r"block\.layer",
        r"block\.layer|one\.block\.layer",
        r"layer|block\.block\.layer",
        r"block\.block\.layer|one\.two",
    ],
)
def test_nothing_else_is_adapted(targets: str, tmp_path: Path) -> None:
    model = adapted(Nested(), config_of("NOLA", target_modules=targets))
    found = to_lora(model, tmp_path / "one")
    model.save_pretrained(str(tmp_path / "adapter"))
    to_lora(tmp_path / "adapter", tmp_path / "two", base=Nested())
    expected = set(found["modules"])
    assert expected == {name for name, layer in model.get_base_model().named_modules() if hasattr(layer, "scaling")}
    for folder in ("one", "two"):
        lora = loaded(Nested(), tmp_path / folder)
        assert adapted_names(lora) == expected
        for name in expected:
            layer, other = (each.get_base_model().get_submodule(name) for each in (lora, model))
            torch.testing.assert_close(layer.get_delta_weight("default"), other.get_delta_weight("default"))


def test_some_layers_alone(tmp_path: Path) -> None:
    options = {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["v_proj"]}
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj", "v_proj", "o_proj"], **options))
    model.save_pretrained(str(tmp_path / "adapter"))
    to_lora(tmp_path / "adapter", tmp_path / "lora")
    lora = loaded(tiny_models.llama(), tmp_path / "lora")
    assert adapted_names(lora) == {f"model.layers.1.self_attn.{name}_proj" for name in "qo"}
    torch.testing.assert_close(outputs(lora, X), outputs(model, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["all", "nola_only"])
def test_trained_biases_and_modules(bias: str, tmp_path: Path) -> None:
    config = config_of("NOLA", target_modules=["q_proj", "fc1"], bias=bias, modules_to_save=["classifier"])
    model = adapted(tiny_models.vit(), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    images = torch.randn(2, 3, 16, 16)
    found = to_lora(model, tmp_path / "one")
    to_lora(tmp_path / "adapter", tmp_path / "two", base=tiny_models.vit())
    assert any("classifier" in note for note in found["notes"]) and any("bias=" in note for note in found["notes"])
    assert any("vLLM and llama.cpp do not take it" in note for note in found["notes"])
    for folder in ("one", "two"):
        lora = loaded(tiny_models.vit(), tmp_path / folder)
        torch.testing.assert_close(outputs(lora, images), outputs(model, images), rtol=1e-4, atol=1e-4)
        assert lora.peft_config["default"].bias == bias.replace("nola", "lora")


def test_trained_modules_of_a_model_of_transformers(tmp_path: Path) -> None:
    model = tiny_models.vit()
    model.add_adapter(config_of("NOLA", target_modules=["q_proj"], modules_to_save=["classifier"]))
    randomised(model)
    images = torch.randn(2, 3, 16, 16)
    to_lora(model, tmp_path / "lora")
    lora = loaded(tiny_models.vit(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, images), outputs(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scalings", [(0.5, 0.5), (0.5, 2.0)])
def test_updates_of_biases_that_are_scaled(scalings: tuple[float, float], tmp_path: Path) -> None:
    model = adapted(tiny_models.Layers(), config_of("PRANC, two a weight, biases", target_modules=["first", "wide"]))
    for name, scaling in zip(("first", "wide"), scalings):
        model.get_base_model().get_submodule(name).scaling["default"] = scaling
    found = to_lora(model, tmp_path / "lora", error=0)
    assert found["lora_alpha"] == (4 if scalings[1] == 0.5 else 8)
    lora = loaded(tiny_models.Layers(), tmp_path / "lora")
    for name in ("first", "wide"):
        expected = outputs(model, through(name), (name,))
        torch.testing.assert_close(outputs(lora, through(name), (name,)), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_noted(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"], nola_dropout=0.1))
    assert any("Dropout (0.1) is not exported" in note for note in to_lora(model, tmp_path / "lora")["notes"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_packed_coefficients(dtype: str, tmp_path: Path) -> None:
    model = adapted(tiny_models.gpt2(), config_of("NOLA", target_modules=["c_attn", "c_fc", "c_proj"]))
    model.peft_config["default"].coefficient_dtype = dtype
    model.save_pretrained(str(tmp_path / "adapter"))
    to_lora(tmp_path / "adapter", tmp_path / "lora", base=tiny_models.gpt2())
    expected = PeftModel.from_pretrained(tiny_models.gpt2(), str(tmp_path / "adapter")).eval()
    lora = loaded(tiny_models.gpt2(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, X), outputs(expected, X), rtol=1e-4, atol=1e-4)


def test_one_of_several_adapters_in_a_model_of_transformers(tmp_path: Path) -> None:
    model = tiny_models.llama()
    for name, seed in (("one", 1), ("two", 2)):
        model.add_adapter(config_of("NOLA", target_modules=["q_proj"], seed=seed), adapter_name=name)
    for adapter in ("one", "two"):
        to_lora(model, tmp_path / adapter, adapter_name=adapter)
        model.set_adapter(adapter)
        lora = loaded(tiny_models.llama(), tmp_path / adapter)
        torch.testing.assert_close(outputs(lora, X), outputs(model.eval(), X), rtol=1e-4, atol=1e-4)
        again = tiny_models.llama()
        again.load_adapter(str(tmp_path / adapter))
        torch.testing.assert_close(outputs(again.eval(), X), outputs(model, X), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_pool(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "one"))
    expected = outputs(model, X)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.neg_()
    model.save_pretrained(str(tmp_path / "two"))
    AdapterPool(model).load({"a": tmp_path / "one", "b": tmp_path / "two"})
    model.set_adapter("b")
    to_lora(model, tmp_path / "lora", adapter_name="a")
    assert model.active_adapters == ["b"]
    torch.testing.assert_close(outputs(loaded(tiny_models.llama(), tmp_path / "lora"), X), expected)


def test_the_base_is_read_and_not_changed(tmp_path: Path) -> None:
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "base" / "model.safetensors").unlink()  # the configuration is enough
    to_lora(tmp_path / "adapter", tmp_path / "one", base=str(tmp_path / "base"))
    to_lora(tmp_path / "adapter", tmp_path / "two", base=base)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(hasattr(module, "base_layer") for module in base.modules())
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert (tmp_path / "one" / "adapter_config.json").read_text() == (
        tmp_path / "two" / "adapter_config.json"
    ).read_text()
    lora = loaded(base, tmp_path / "one")
    torch.testing.assert_close(outputs(lora, X), outputs(model, X), rtol=1e-4, atol=1e-4)


# What is refused


def refused(match: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        to_lora(*arguments, **options)


def test_sizes_are_asked_for_where_they_are_needed(tmp_path: Path) -> None:
    exact = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"]))
    dense = adapted(tiny_models.llama(), config_of("MCNC, weight", target_modules=["q_proj"]))
    refused("`rank` and `error` must be None for NOLA on factors", exact, tmp_path / "out", rank=4)
    refused("`rank` and `error` must be None for NOLA on factors", exact, tmp_path / "out", error=0.1)
    refused("`rank` or `error` must be given for MCNC, .* error=0 exports them exactly", dense, tmp_path / "out")
    refused("`rank` or `error` must be given", dense, tmp_path / "out", rank=3, error=0.1)
    refused("`rank` must be a positive integer, got 0", dense, tmp_path / "out", rank=0)
    refused("`error` must be a number from 0 to below 1, got 1.0", dense, tmp_path / "out", error=1.0)
    refused("`base` and `revision` must be None for a model", exact, tmp_path / "out", base=tiny_models.llama())
    refused("`adapter_name` must be an adapter of the model, got 'x'", exact, tmp_path / "out", adapter_name="x")
    refused("got 'default' and a model without adapters", tiny_models.llama(), tmp_path / "out")
    exact.save_pretrained(str(tmp_path / "adapter"))
    refused("`adapter_name` must be 'default' for a", tmp_path / "adapter", tmp_path / "out", adapter_name="x")
    assert not (tmp_path / "out").exists()


def test_other_methods_are_refused(tmp_path: Path) -> None:
    lora = get_peft_model(tiny_models.llama(), LoraConfig(target_modules=["q_proj"]))
    refused("must hold an adapter of NOLA, PRANC or MCNC, got an adapter of LoraConfig", lora, tmp_path / "out")
    prompts = get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=2))
    prompts.save_pretrained(str(tmp_path / "prompts"))
    for place in (prompts, tmp_path / "prompts"):
        refused("got an adapter of VisualPromptConfig", place, tmp_path / "out")
    SeededNetwork(tiny_models.vit(), PrancConfig(num_coefficients=20)).save_pretrained(tmp_path / "network")
    refused("got a network from a seed", tmp_path / "network", tmp_path / "out")


def test_norms_are_refused_by_name(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("PRANC", target_modules=["q_proj", "norm"]))
    refused("'model.norm' holds vectors only .*merge_and_unload", model, tmp_path / "out", rank=2)
    model.save_pretrained(str(tmp_path / "adapter"))
    refused("`base` must be given: whether 'model.norm' is a", tmp_path / "adapter", tmp_path / "out", rank=2)
    refused("'model.norm' holds", tmp_path / "adapter", tmp_path / "out", rank=2, base=tiny_models.llama())


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Conv2d(4, 4, 3, dilation=2), r"'layer' has `dilation=\(2, 2\)`"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "'layer' has `padding_mode='reflect'`"),
        (nn.Embedding(11, 8, max_norm=1.0), "'layer' has `max_norm`"),
    ],
)
def test_layers_that_lora_does_not_have_are_refused_by_name(layer: nn.Module, match: str, tmp_path: Path) -> None:
    model = adapted(tiny_models.One(layer), config_of("NOLA", target_modules=["layer"]))
    refused(f"{match}.* LoRA", model, tmp_path / "out")
    model.save_pretrained(str(tmp_path / "adapter"))
    refused(f"{match}.* LoRA", tmp_path / "adapter", tmp_path / "out", base=tiny_models.One(layer))


@pytest.mark.parametrize("conv", [{"kernel_size": 1, "dilation": 2}, {"kernel_size": 3, "padding_mode": "circular"}])
def test_layers_whose_options_do_nothing_are_not_refused(conv: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, **conv)
    model = adapted(tiny_models.One(copy.deepcopy(layer)), config_of("NOLA", target_modules=["layer"]))
    to_lora(model, tmp_path / "lora")
    image = torch.randn(2, 4, 5, 5)
    found = outputs(loaded(tiny_models.One(layer), tmp_path / "lora"), image)
    torch.testing.assert_close(found, outputs(model, image), rtol=1e-4, atol=1e-5)


def test_biases_beside_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    config = config_of("PRANC, two a weight, biases", target_modules=["embedding", "first"])
    refused(
        "'embedding' is an embedding, which cannot .*`lora_bias`",
        adapted(tiny_models.Layers(), config),
        tmp_path / "out",
        error=0,
    )


def test_a_base_model_that_is_needed_or_does_not_fit(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    refused("`base` must be given: whether 'model.embed_tokens' is", tmp_path / "adapter", tmp_path / "out")
    options: dict[str, Any] = {"base": tiny_models.gpt2()}
    refused("`base` must be the model that was adapted, got one", tmp_path / "adapter", tmp_path / "out", **options)
    options = {"base": tiny_models.llama(hidden_size=64)}
    refused("belongs to other modules", tmp_path / "adapter", tmp_path / "out", **options)
    with pytest.raises(OSError):
        to_lora(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "nowhere"))


def test_shapes_that_the_checkpoint_does_not_tell(tmp_path: Path) -> None:
    """The layers of the two halves of a model have other shapes."""
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {
            half: nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, size)}) for _ in range(2))
            for half, size in (("a", 4), ("b", 6))
        }
    )
    model = adapted(base, config_of("NOLA", target_modules=["q_proj"], coefficient_dtype="int8"))
    model.save_pretrained(str(tmp_path / "adapter"))
    refused("`base` must be given: which of the adapted modules has which", tmp_path / "adapter", tmp_path / "out")
    base = model.unload()
    to_lora(tmp_path / "adapter", tmp_path / "lora", base=base)
    expected = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).get_base_model()
    lora = loaded(base, tmp_path / "lora").get_base_model()
    for name in ("a.0.q_proj", "b.1.q_proj"):
        found = lora.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(found, expected.get_submodule(name).get_delta_weight("default"))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(FileExistsError, match="`out` must be another folder than the checkpoint's"):
        to_lora(tmp_path / "adapter", tmp_path / "adapter", overwrite=True)
    with pytest.raises(FileExistsError, match="`out` must be a new or empty folder"):
        to_lora(model, tmp_path / "adapter")
    to_lora(model, tmp_path / "lora")
    to_lora(model, tmp_path / "lora", overwrite=True)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point())[1] += 1
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    refused("the coefficients", tmp_path / "adapter", tmp_path / "out")


def test_a_model_card_says_what_it_is(tmp_path: Path) -> None:
    model = adapted(tiny_models.llama(), config_of("PRANC", target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = to_lora(model, tmp_path / "lora", rank=4)
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "exported from an adapter of PRANC" in card.text and f"{found['error']:.2g} of all updates" in card.text
    assert "import peft_ext" not in card.text and "pip install peft-ext" not in card.text


# What the loaders of others ask


def vllm_refuses(config: dict[str, Any], tensors: dict[str, torch.Tensor], vocabulary: int) -> str | None:
    """The rules of vLLM 0.1x to 0.2x (vllm/lora/peft_helper.py, utils.py, lora_model.py, lora_weights.py)."""
    if not {"r", "lora_alpha", "target_modules"} <= config.keys() or config["r"] < 1:
        return "a required field"
    if config["modules_to_save"] or config["use_dora"] or config["bias"] != "none":
        return "a feature of the configuration"
    if config.get("trainable_token_indices"):
        return "tokens"
    if config["r"] > 512:
        return "the rank"
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[:2] != ["base_model", "model"] or tensor.dim() != 2:
            return name
        first = parts[-1] == "lora_embedding_A" or parts[-2:] == ["lora_A", "weight"]
        if not first and parts[-1] != "lora_embedding_B" and parts[-2:] != ["lora_B", "weight"]:
            return name
        if parts[-1] == "lora_embedding_A" and tensor.shape[1] != vocabulary:
            return name
        if tensor.shape[0 if first else 1] > config["r"]:  # copied into room for so many rows or columns
            return name
    return None


def vllm_scaling(config: dict[str, Any], A: torch.Tensor) -> float:
    return config["lora_alpha"] / config["r"]


def llama_cpp_refuses(tensors: dict[str, torch.Tensor]) -> str | None:
    """The rules of llama.cpp (convert_lora_to_gguf.py and src/llama-adapter.cpp)."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for end, letter in ((".lora_A.weight", "A"), (".lora_B.weight", "B")):
            if name.endswith(end):
                pairs.setdefault(name.removesuffix(end), {})[letter] = tensor
        for letter in "AB":
            if name.endswith(f".lora_embedding_{letter}"):
                pairs.setdefault(name.rpartition(".")[0], {})[letter] = tensor
        if not name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")):
            return name
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].dim() != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            return name
    return None


def llama_cpp_scaling(config: dict[str, Any], A: torch.Tensor) -> float:
    return config["lora_alpha"] / len(A) if config["lora_alpha"] else 1.0


OF_LOADERS = {
    "linear": ("llama", ["q_proj", "down_proj"], {}),
    "ranks": (
        "llama",
        ["q_proj", "v_proj"],
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5.0}},
    ),
    "embedding and head": ("llama", ["embed_tokens", "q_proj", "lm_head"], {}),
    "no scaling": ("llama", ["q_proj"], {"alpha": 0.0}),
}


@pytest.mark.parametrize("scaling", [vllm_scaling, llama_cpp_scaling])
@pytest.mark.parametrize(("case", "method"), [*((case, "NOLA") for case in OF_LOADERS), ("linear", "PRANC")])
def test_what_vllm_and_llama_cpp_read(case: str, method: str, scaling: Any, tmp_path: Path) -> None:
    """What they compute with one `lora_alpha / r`, from two matrices a module, is the update of the adapter."""
    _, targets, options = OF_LOADERS[case]
    model = adapted(tiny_models.llama(), config_of(method, target_modules=targets, **options))
    to_lora(model, tmp_path / "lora", **({"error": 0.0} if method == "PRANC" else {}))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    assert vllm_refuses(config, tensors, tiny_models.VOCABULARY) is None
    assert llama_cpp_refuses(tensors) is None
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert config["peft_type"] == "LORA" and isinstance(config["r"], int)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "fan_in")}
    assert config["target_modules"] == list(layers)
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        embedded = isinstance(layer.get_base_layer(), nn.Embedding)
        ends = ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A.weight", "lora_B.weight")
        A, B = (tensors[f"{PREFIX}{name}.{end}"] for end in ends)
        delta = layer.get_delta_weight("default")
        found = scaling(config, A) * (B @ A)
        torch.testing.assert_close(found.T if embedded else found, delta, rtol=1e-4, atol=1e-6)


def test_what_vllm_and_llama_cpp_do_not_take_is_noted(tmp_path: Path) -> None:
    cases: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
        "conv": (tiny_models.Layers(), config_of("NOLA", target_modules=["conv2d"]), {}),
        "bias": (tiny_models.Layers(), config_of("PRANC, two a weight, biases", target_modules=["first"]), {"rank": 2}),
        "trained": (tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"], modules_to_save=["lm_head"]), {}),
    }
    for name, (base, config, size) in cases.items():
        found = to_lora(adapted(base, config), tmp_path / name, **size)
        written = json.loads((tmp_path / name / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / name / WEIGHTS)
        assert vllm_refuses(written, tensors, tiny_models.VOCABULARY) and llama_cpp_refuses(tensors)
        assert any("vLLM and llama.cpp do not take it" in note for note in found["notes"])
    wide = adapted(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"], r=17))
    assert any("`--max-lora-rank` of at least 17" in note for note in to_lora(wide, tmp_path / "wide")["notes"])


# PEFT's own conversion


CONVERTED = {  # what PEFT gets right; the others it must refuse
    "first": True,
    "second": True,
    "wide": True,
    "conv1d": True,
    "embedding": False,
    "conv2d": False,
    "norm": False,
}


@pytest.mark.parametrize("rank", [8, 1.0])
@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("method", EXACT)
def test_peft_converts_what_it_gets_right(method: str, name: str, rank: float, tmp_path: Path) -> None:
    config = config_of(method, target_modules=[name])
    if name == "norm" and not adapts_norms(method):
        with pytest.raises(ValueError, match="cannot adapt"):
            get_peft_model(tiny_models.Layers(), config)
        return
    model = adapted(tiny_models.Layers(), config)
    with_bias = method.endswith("biases") and name != "second"
    if not CONVERTED[name] or with_bias:
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=rank)
        return
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path / "lora", model, rank=rank)
    lora = loaded(tiny_models.Layers(), tmp_path / "lora")
    expected = outputs(model, through(name), (name,))
    torch.testing.assert_close(outputs(lora, through(name), (name,)), expected, rtol=1e-3, atol=1e-4)


def test_peft_refuses_an_adapter_that_adapts_other_layers() -> None:
    model = adapted(tiny_models.Layers(), config_of("NOLA", target_modules=["first"]))
    model.add_adapter("other", config_of("NOLA", target_modules=["second"]))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2, adapter_name="other")


def test_peft_refuses_weights_that_are_stored_as_inputs_by_outputs() -> None:
    """It knows of Conv1D alone that they are; the configuration can say it of quantized layers."""
    model = adapted(tiny_models.Layers(), config_of("NOLA", target_modules=["first"]))
    assert model.supports_lora_conversion()
    model.get_base_model().first.fan_in_fan_out = True
    assert not model.supports_lora_conversion()


def test_low_rank_of_one_row_of_zeros_and_of_a_rank_beyond() -> None:
    torch.manual_seed(0)
    for update in (torch.zeros(3, 5), torch.randn(3, 5), torch.randn(1, 5), torch.randn(5, 2)):
        low = LowRank(update)
        for rank in (1, 2, 3, 6):
            A, B = low.factors(rank)
            assert A.shape == (1, rank, update.shape[1]) and B.shape == (1, len(update), rank)
            lost, all = low.norms(A, B)
            kept = torch.linalg.svdvals(update.double()).square()[rank:].sum()
            assert lost == pytest.approx(float(kept), abs=1e-9) and all == pytest.approx(float(update.square().sum()))
