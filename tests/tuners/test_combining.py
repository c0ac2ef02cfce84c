"""Adapters that are made from others: `add_weighted_adapter`, beside LoRA's, and what is refused."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from dense import close, coefficients_of, layer_update, updates
from methods import METHODS, Config, config_of, lower
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_ext import AdapterPool, VisualPromptConfig
from peft_ext.tuners.layers import SeededLayer

DOUBLE = torch.float64
PATH = ("embedding", "first", "second", "wide", "conv1d")
TARGETS = ["first", "wide", "conv1d", "embedding"]
X = torch.arange(20).view(2, 10) % 11

PRANC = [method for method in METHODS if lower(method) == "pranc" and method != "PRANC, factors"]
NOLA = [method for method in METHODS if lower(method) == "nola"]
MCNC = [method for method in METHODS if lower(method) == "mcnc"]


def model_of(method: str, *names: str, **options: Any) -> tuple[PeftModel, nn.Module, Config]:
    """A model in double precision with adapters of random coefficients, its base, and the configuration."""
    base = tiny_models.Layers().to(DOUBLE)
    config = config_of(method, **{"target_modules": TARGETS, **options})
    model = get_peft_model(copy.deepcopy(base), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config_of(method, **{"target_modules": TARGETS, **options}))
    return model.to(DOUBLE), base, config


def dense(model: nn.Module, base: nn.Module, config: Config, weights: dict[str, float]) -> nn.Module:
    """The base model with the dense updates of adapters added to its weights, each times its weight."""
    combined = copy.deepcopy(base)
    for name, weight in weights.items():
        for key, delta in updates(config, base, coefficients_of(model, name)).items():
            combined.get_parameter(key).data += weight * delta.detach()
    return combined


def scale(model: nn.Module, adapter: str, scale: Callable[[int], float] | float) -> None:
    for index, layer in enumerate(layer for layer in model.modules() if isinstance(layer, SeededLayer)):
        layer.set_scale(adapter, scale(index) if callable(scale) else scale)


WEIGHTS = [(0.5, 0.5, 0.0), (1.0, 1.0, 1.0), (0.7, -0.2, 2.0), (-1.0, -0.5, -0.25)]


@pytest.mark.parametrize("method", PRANC)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_pranc_adds_updates(method: str, weights: tuple[float, ...]) -> None:
    model, base, config = model_of(method, "a", "b", "c", target_modules=[*TARGETS, "norm"])
    scale(model, "b", 0.5)
    model.add_weighted_adapter(["a", "b", "c"], list(weights), "sum", combination_type="linear")
    model.set_adapter("sum")
    factors = {"a": weights[0], "b": 0.5 * weights[1], "c": weights[2]}
    expected = dense(model, base, config, factors)
    path = (*PATH[:3], "norm", *PATH[3:])
    close(model(X, path), expected(X, path))
    close(dense(model, base, config, {"sum": 1})(X, path), expected(X, path))


def lora_of(model: PeftModel, base: nn.Module, config: Config, names: tuple[str, ...]) -> PeftModel:
    """PEFT's LoRA with the dense factors of NOLA adapters."""
    lora: Any = None
    for name in names:
        fields = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            target_modules=TARGETS,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        )
        lora = get_peft_model(copy.deepcopy(base), fields, name) if lora is None else lora
        if name not in lora.peft_config:
            lora.add_adapter(name, fields)
        lora.to(DOUBLE)
        coefficients = coefficients_of(model, name)
        for key in coefficients:
            factors = layer_update(config, base, key, coefficients).factors
            layer = lora.base_model.model.get_submodule(key)
            embeds = isinstance(base.get_submodule(key), nn.Embedding)
            for part, factor in zip("AB", factors):
                at = getattr(layer, f"lora_embedding_{part}" if embeds else f"lora_{part}")[name]
                (at if embeds else at.weight).data = factor.detach().clone()
    return lora


@pytest.mark.parametrize("method", NOLA)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_nola_is_lora_with_its_factors(method: str, weights: tuple[float, ...]) -> None:
    """The products of LoRA's `linear`, which are not the sum of the updates, on factors that have an offset."""
    options = {"rank_pattern": {"wide": 3}, "alpha_pattern": {"first": 5.0}} if method == "NOLA" else {}
    model, base, config = model_of(method, "a", "b", "c", **options)
    lora = lora_of(model, base, config, ("a", "b", "c"))
    close(model(X, PATH), lora(X, PATH))
    scale(model, "b", lambda index: 0.5 + index)
    for index, key in enumerate(coefficients_of(model, "a")):
        lora.base_model.model.get_submodule(key).set_scale("b", 0.5 + index)
    for each in (model, lora):
        each.add_weighted_adapter(["a", "b", "c"], list(weights), "sum", combination_type="linear")
        each.set_adapter("sum")
    if options:  # LoRA gives all modules of the new adapter its alpha as their rank: a scaling that factors do not have
        for key in coefficients_of(model, "a"):
            lora.base_model.model.get_submodule(key).scaling["sum"] = 1.0
    close(model(X, PATH), lora(X, PATH))


@pytest.mark.parametrize("method", [*PRANC, *NOLA])
@pytest.mark.parametrize("weight", [0.3, -2.0, 0.0, 1.0])
def test_a_single_adapter_is_scaled(method: str, weight: float) -> None:
    model, base, config = model_of(method, "a")
    model.add_weighted_adapter(["a"], [weight], "scaled", combination_type="svd")  # as in LoRA, all types are the same
    model.set_adapter("scaled")
    close(model(X, PATH), dense(model, base, config, {"a": weight})(X, PATH))


@pytest.mark.parametrize("method", ["NOLA", "NOLA, own bases", "PRANC", "PRANC, two a weight, biases"])
def test_the_result_is_an_ordinary_adapter(method: str, tmp_path: Path) -> None:
    """From adapters that were loaded, trained further, saved, loaded alone, deleted."""
    options = {"target_modules": TARGETS}
    for name in ("a", "b"):
        made = get_peft_model(tiny_models.Layers(), config_of(method, **options))
        made.save_pretrained(str(tmp_path / name))
    model = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path / "a"), "a")
    model.load_adapter(str(tmp_path / "b"), "b")
    base = tiny_models.Layers()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    outputs = model(X, PATH)
    model.add_weighted_adapter(["a", "b"], [0.75, 0.5], "sum")
    assert torch.equal(model(X, PATH), outputs) and model.active_adapters == ["a"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        **before,
        **{n: False for n, _ in model.named_parameters() if n not in before},
    }
    found = coefficients_of(model, "sum")
    assert [p.shape for p in found.values()] == [p.shape for p in coefficients_of(model, "a").values()]

    model.set_adapter("sum")
    config = config_of(method, **options)
    close(model(X, PATH), dense(model, base, config, {"sum": 1})(X, PATH))
    assert all(parameter.requires_grad for parameter in coefficients_of(model, "sum").values())
    model(X, PATH).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    trained = model(X, PATH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(str(tmp_path / "out"), selected_adapters=["sum"])
    alone = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path / "out" / "sum"))
    assert torch.equal(alone(X, PATH), trained)
    size = (tmp_path / "out" / "sum" / "adapter_model.safetensors").stat().st_size
    assert size == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size

    for name in ("a", "b"):
        model.delete_adapter(name)
    assert torch.equal(model(X, PATH), trained)
    model.add_adapter("a", config_of(method, **options))
    model.add_weighted_adapter(["a", "sum"], [1.0, 1.0], "again")
    model.delete_adapter("sum")
    model.set_adapter("again")
    assert not torch.equal(model(X, PATH), trained)
    assert not [name for name, _ in model.named_parameters() if ".sum" in name]


class Stack(nn.Module):
    """Blocks whose linear layers are in a module of some name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})}) for _ in range(2)
        )
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block[self.name]["down"](torch.tanh(block[self.name]["up"](x)))  # type: ignore[index]
        return x


@pytest.mark.parametrize("method", [*PRANC, *NOLA])
def test_renamed_modules_keep_their_random_numbers(method: str, tmp_path: Path) -> None:
    """Bases are drawn by the names that the modules had when the adapter was saved."""
    made = get_peft_model(Stack("mlp"), config_of(method, target_modules=["up", "down"]))
    made.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(Stack("ffn"), str(tmp_path), key_mapping={r"\.mlp\.": ".ffn."})
    model.add_weighted_adapter(["default"], [1.0], "same")
    x = torch.randn(3, 8)
    for name in ("default", "same"):
        model.set_adapter(name)
        close(model(x), made(x))


# What is refused


def refused(model: PeftModel, message: str, *args: Any, **kwargs: Any) -> None:
    before = [name for name, _ in model.named_modules()], dict(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*args, **kwargs)
    assert ([name for name, _ in model.named_modules()], dict(model.peft_config)) == before


def test_arguments() -> None:
    model, _, _ = model_of("NOLA", "a", "b")
    both = ["a", "b"]
    refused(model, "^Adapter z does not exist$", ["a", "z"], [1, 1], "sum")
    refused(model, r"^Found no adapter matching the names in \[\]$", [], [], "sum")
    refused(model, "^Invalid combination_type: mean$", both, [1, 1], "sum", combination_type="mean")
    refused(model, "^Invalid combination_type: mean$", ["a"], [1], "sum", combination_type="mean")
    refused(model, r"`weights` must have a number for each of the 2 adapters, got \[1\]", both, [1], "sum")
    refused(model, r"`weights\[1\]` must be a finite number, got nan", both, [1, float("nan")], "sum")
    refused(model, "`adapter_name` must be a new name, got 'b'", both, [1, 1], "b")
    refused(model, "`svd_rank` has no effect on combination_type='linear'", both, [1, 1], "sum", svd_rank=4)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties", "dare_linear", "magnitude_prune_svd"])
@pytest.mark.parametrize("method", ["NOLA", "PRANC"])
def test_other_combinations_point_to_lora(method: str, kind: str) -> None:
    model, _, _ = model_of(method, "a", "b")
    message = f"must be 'linear' for {method}.*, got '{kind}'.*`peft_ext.to_lora` and .*LoRA's `add_weighted_adapter`"
    refused(model, message, ["a", "b"], [1, 1], "sum", combination_type=kind)


@pytest.mark.parametrize("method", [*MCNC, "PRANC, factors"])
def test_what_is_not_linear(method: str) -> None:
    model, _, _ = model_of(method, "a", "b")
    why = "phi is not linear in alpha" if method in MCNC else "whose product is not linear in it"
    for adapters in (["a", "b"], ["a"]):
        refused(model, f"{why}. Export .*`set_scale", adapters, [1.0] * len(adapters), "sum")


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.5, -0.5), (1.0, -0.9999999)])
def test_weights_that_cancel(weights: tuple[float, float]) -> None:
    model, _, _ = model_of("NOLA", "a", "b")
    refused(model, "`weights` must not cancel for NOLA, whose A is a frozen offset", ["a", "b"], list(weights), "sum")
    model, base, config = model_of("PRANC", "a", "b")  # has no offset
    model.add_weighted_adapter(["a", "b"], list(weights), "sum")
    model.set_adapter("sum")
    close(model(X, PATH), dense(model, base, config, dict(zip("ab", weights)))(X, PATH))


@pytest.mark.parametrize(
    ("field", "options"), [("seed", {"seed": 5}), ("num_basis", {"num_basis": 9}), ("alpha", {"alpha": 2.0})]
)
def test_adapters_that_differ(field: str, options: dict[str, Any]) -> None:
    model, _, _ = model_of("NOLA", "a")
    model.add_adapter("b", config_of("NOLA", target_modules=TARGETS, **options))
    message = f"`adapters` must be alike in all .* `{field}` is .* in 'a' and .* in 'b'. Export"
    refused(model, message, ["a", "b"], [1, 1], "sum")


@pytest.mark.parametrize(
    ("method", "field", "options"),
    [
        ("PRANC", "apply_to", {"apply_to": "factors"}),
        ("NOLA", "parametrization", {"parametrization": "plain"}),
    ],
)
def test_fields_that_one_of_them_lacks(method: str, field: str, options: dict[str, Any]) -> None:
    """Names what differs, whichever of the two has the field."""
    model, _, _ = model_of(method, "a")
    kept = config_of(method, target_modules=TARGETS)
    assert getattr(kept, field) != options[field]
    model.add_adapter("b", config_of(method, target_modules=TARGETS, **options))
    for adapters in (["a", "b"], ["b", "a"]):
        refused(model, f"`adapters` must be alike in all .* `{field}` is ", adapters, [1, 1], "sum")


def test_adapters_of_other_modules() -> None:
    model, _, _ = model_of("PRANC", "a")
    model.add_adapter("b", config_of("PRANC", target_modules=TARGETS[:2]))
    refused(model, "must adapt the same modules, which 'a' and 'b' do not", ["a", "b"], [1, 1], "sum")


def test_one_vector_with_two_scales() -> None:
    model, _, _ = model_of("PRANC", "a", "b")
    scale(model, "b", lambda index: 0.5 + index)
    message = re.escape("'b' must have one scale in all layers that read one vector of coefficients, got 0.5, 1.5, ")
    refused(model, message, ["a", "b"], [1, 1], "sum")


def test_modules_that_are_trained_whole() -> None:
    config = config_of("NOLA", modules_to_save=["classifier"])
    model = get_peft_model(tiny_models.vit(), config, "a")
    refused(model, r"no modules that are trained whole.*'a' has '.*classifier' \(`modules_to_save`\)", ["a"], [1], "x")


def test_trained_biases_stay_with_one_adapter() -> None:
    model, _, _ = model_of("NOLA", "a", bias="all")
    refused(model, "supports only 1 adapter with bias", ["a"], [1], "sum")


def test_prompts() -> None:
    model = get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=2), "a")
    refused(model, "Visual prompts cannot be combined with weights", ["a"], [1.0], "sum")


def test_adapters_of_a_pool(tmp_path: Path) -> None:
    model = get_peft_model(tiny_models.Layers(), config_of("NOLA", target_modules=TARGETS), "a")
    model.save_pretrained(str(tmp_path))
    expected = PeftModel.from_pretrained(tiny_models.Layers(), str(tmp_path / "a"))(X, PATH)
    pool = AdapterPool(model)
    pool.load({"b": tmp_path / "a", "c": tmp_path / "a"})
    refused(model, "must not be in the model's pool, got 'b'", ["a", "b"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["a"], [2.0], "sum")
    model.eval()
    # Those of a pool take turns in the layers, and a scale would stay there.
    model.set_adapter("b")
    scale(model, "b", 0.5)
    for use in (lambda: model.set_adapter("c"), lambda: model(X, PATH, adapter_names=["c", "b"])):
        with pytest.raises(ValueError, match="Adapters in a pool have no scales of their own, and 'b' is scaled"):
            use()
    scale(model, "b", 1)
    model.set_adapter("c")
    torch.testing.assert_close(model(X, PATH), expected)


def test_an_edited_configuration_is_not_believed() -> None:
    model, *_ = model_of("NOLA", "a", "b")
    model.peft_config["a"].alpha = 200
    with pytest.raises(ValueError, match="`alpha` of the configuration of adapter 'a' was changed after it was made"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
