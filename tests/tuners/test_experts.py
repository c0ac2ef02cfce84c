"""Experts of mixtures, and other parameters that are no layer's weight."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny_models
import torch
from methods import METHODS, ONE_OF_EACH, adapt, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_ext import NolaConfig, PrancConfig, to_lora
from peft_ext.adapters.saved import read, verify
from peft_ext.randomness import uniform
from peft_ext.tuners.expert_layers import SeededExperts

KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ALONE: dict[str, Any] = {"target_modules": [], "target_parameters": EXPERTS}
X = tiny_models.tokens()


def layers_of(model: nn.Module) -> dict[str, SeededExperts]:
    """The layers of adapted parameters by the name of the parameter in the base model."""
    return {
        layer.adapted_name(name.removeprefix("base_model.model.")): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SeededExperts)
    }


def logits(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits


def coefficients_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: layer.container("default")["default"] for name, layer in layers_of(model).items()}


def nola_update(
    coefficients: torch.Tensor, shape: torch.Size, is_transposed: bool, r: int, alpha: float, num_A: int, num_B: int
) -> torch.Tensor:
    """What NOLA adds to a stack of experts, from random numbers, as docs/checkpoint-format.md has it."""
    experts, fan_out, fan_in = (shape[0], shape[2], shape[1]) if is_transposed else shape
    a, b = coefficients.split((num_A, num_B))
    stream_A, stream_B = ("nola", "A", r, fan_in), ("nola", "B", fan_out, r)
    a = a * math.sqrt(3) * (experts * fan_in * r / num_A) ** 0.25
    b = b * math.sqrt(3 * experts * fan_out * r / num_B)
    basis_A = uniform(0, (*stream_A, "basis"), num_A * r * fan_in).view(num_A, r, fan_in) / math.sqrt(num_A)
    basis_B = uniform(0, (*stream_B, "basis"), num_B * fan_out * r).view(num_B, fan_out, r) / math.sqrt(num_B)
    signs_A = uniform(0, (*stream_A, "sign"), experts * num_A).view(experts, num_A).lt(0)
    signs_B = uniform(0, (*stream_B, "sign"), experts * num_B).view(experts, num_B).lt(0)
    start = uniform(0, (*stream_A, "offset"), experts * r * fan_in).view(experts, r, fan_in) / math.sqrt(fan_in)
    stack = []
    for e in range(experts):
        A = start[e] + sum((-1) ** int(signs_A[e, i]) * a[i] * basis_A[i] for i in range(num_A))
        B = sum((-1) ** int(signs_B[e, j]) * b[j] * basis_B[j] for j in range(num_B))
        M = alpha / r * B @ A
        stack.append(M.T if is_transposed else M)
    return torch.stack(stack)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_nola_is_what_the_formula_says_and_so_are_its_gradients(kind: str, implementation: str) -> None:
    base = tiny_models.mixture(kind)
    base.set_experts_implementation(implementation)
    model, _ = adapt(base, "NOLA", **ALONE)
    own = coefficients_of(model)
    assert len(own) == 4 and all(parameter.shape == (12,) for parameter in own.values())
    fields = {"r": 2, "alpha": 1.0, "num_A": 5, "num_B": 7}
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in own.items()}
    weights = {
        name: base.get_parameter(name)
        + nola_update(copies[name], base.get_parameter(name).shape, kind == "gpt_oss", **fields)
        for name in own
    }
    expected = torch.func.functional_call(base, weights, (X,), {"labels": X})
    found = model(X, labels=X)
    assert (found.logits - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    for name, parameter in own.items():
        assert parameter.grad.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, copies[name].grad, rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "coefficients" not in name)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unmerged(method: str, kind: str) -> None:
    base = tiny_models.mixture(kind)
    model, _ = adapt(base, method, **ALONE)
    dense = copy.deepcopy(base)
    for name, layer in layers_of(model).items():
        update = layer.get_delta_weight("default")
        assert update.shape == dense.get_parameter(name).shape and update.flatten(1).abs().max(1).values.min() > 0
        dense.get_parameter(name).data += update
    expected = logits(dense)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    assert torch.equal(logits(model), expected)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base))
    plain = model.merge_and_unload()
    assert [(name, type(module)) for name, module in plain.named_modules()] == [
        (name, type(module)) for name, module in base.named_modules()
    ]
    torch.testing.assert_close(logits(plain), expected)


def test_unload_gives_the_base_model_back() -> None:
    base = tiny_models.mixture("mixtral")
    model, _ = adapt(base, "NOLA", **ALONE)
    plain = model.unload()
    assert plain.state_dict().keys() == base.state_dict().keys() and torch.equal(logits(plain), logits(base))


def test_a_merge_that_is_not_finite_is_refused() -> None:
    model, _ = adapt(tiny_models.mixture("mixtral"), "NOLA", **ALONE)
    name, layer = next(iter(layers_of(model).items()))
    before = layer.get_base_weight().clone()
    layer.scaling["default"] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_weight(), before)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_several_adapters(method: str) -> None:
    base = tiny_models.mixture("qwen3_moe")
    model, _ = adapt(base, method, **ALONE)
    first = logits(model)
    model.add_adapter("other", config_of(method, **{**ALONE, "seed": 5}))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    other = logits(model)
    assert not torch.allclose(other, first, atol=1e-3)
    model.base_model.set_adapter(["default", "other"])
    dense = copy.deepcopy(base)
    for name, layer in layers_of(model).items():
        dense.get_parameter(name).data += layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "targets", [ALONE, {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "experts"]}]
)
@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out")
def test_saved_and_loaded(method: str, targets: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_models.mixture("mixtral")
    model, _ = adapt(base, method, **targets)
    assert len(layers_of(model)) == 4
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(model))
    theirs = copy.deepcopy(base)
    theirs.load_adapter(str(tmp_path))
    assert torch.equal(logits(theirs.eval()), logits(model))


@pytest.mark.parametrize("method", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_saved_small(method: str, dtype: str, tmp_path: Path) -> None:
    base = tiny_models.mixture("gpt_oss")
    model, _ = adapt(base, method, coefficient_dtype=dtype, **ALONE)
    for parameter in coefficients_of(model).values():
        parameter.data.uniform_(-0.03, 0.03)  # about as large as inputs of MCNC's chunks are
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    for old, new in zip(layers_of(model).values(), layers_of(again).values()):
        expected = old.get_delta_weight("default")
        error = (new.get_delta_weight("default") - expected).norm() / expected.norm()
        assert 0 < error < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_is_verified_without_a_model(method: str, tmp_path: Path) -> None:
    options = {"target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "router.weight"]}
    model, _ = adapt(tiny_models.mixture("gpt_oss"), method, **options)
    model.save_pretrained(str(tmp_path))
    saved = read(tmp_path)
    assert saved.shapes_known and len(saved.targets) == 8 and len(verify(saved)) > 3
    assert "48 x 32 x 4" in saved.config.target_shapes
    assert "2 layers of 48 x 32 x 4 experts" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_export_as_lora_is_refused_by_name(tmp_path: Path) -> None:
    model, _ = adapt(tiny_models.mixture("gpt_oss"), "NOLA", **ALONE)
    assert not model.supports_lora_conversion()
    with pytest.raises(ValueError, match="experts', a GptOssExperts, cannot be exported as LoRA"):
        to_lora(model, tmp_path / "lora")
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="`target_parameters`.*cannot be exported as LoRA"):
        to_lora(tmp_path / "adapter", tmp_path / "lora")


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    model, _ = adapt(tiny_models.mixture("mixtral"), "NOLA", **ALONE)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="48 x 32 x 4.*does not fit the model.*48 x 32 x 5"):
        PeftModel.from_pretrained(tiny_models.mixture("mixtral", experts=5), str(tmp_path))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_gradient_checkpointing(method: str, reentrant: bool) -> None:
    model, _ = adapt(tiny_models.mixture("qwen3_moe"), method, **ALONE)
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(X, labels=X).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_model_in_bfloat16(method: str) -> None:
    base = tiny_models.mixture("qwen3_moe").bfloat16()
    model = get_peft_model(copy.deepcopy(base), config_of(method, **ALONE)).eval()
    assert {parameter.dtype for parameter in coefficients_of(model).values()} == {torch.float32}
    out = logits(model)
    assert out.dtype == torch.bfloat16 and not torch.equal(out, logits(base))
    model.merge_adapter()
    assert torch.equal(logits(model), out)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(logits(model)).all()


def test_autocast_does_not_round_the_update() -> None:
    model, _ = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", **ALONE)
    layer = next(iter(layers_of(model).values()))
    expected = layer.get_delta_weight("default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), expected)


def test_the_size_of_nola_does_not_grow_with_the_number_of_experts() -> None:
    sizes, loras = [], []
    for experts in (4, 16):
        base = tiny_models.mixture("qwen3_moe", experts=experts)
        options = {"target_modules": [], "target_parameters": EXPERTS}
        model = get_peft_model(copy.deepcopy(base), NolaConfig(r=2, num_basis=6, **options))
        sizes.append(model.get_nb_trainable_parameters()[0])
        loras.append(get_peft_model(base, LoraConfig(r=2, **options)).get_nb_trainable_parameters()[0])
    assert sizes == [4 * 12, 4 * 12]
    assert loras[1] == 4 * loras[0] > 100 * sizes[0] / 10


def test_experts_share_the_memory_of_one_basis() -> None:
    model, _ = adapt(tiny_models.mixture("qwen3_moe", experts=16), "NOLA", **ALONE)
    logits(model)
    generators = {e.generator for layer in layers_of(model).values() for e in layer.expansions["default"]}
    stored = sum(size for generator in generators for size in generator.frozen_sizes)
    bases = 5 * 2 * (32 + 24) + 7 * 2 * (48 + 32)
    signs, starts = 16 * 2 * (5 + 7), 16 * 2 * (32 + 24)
    assert stored * 4 == sum(generator.nbytes for generator in generators) and stored == bases + signs + starts


def test_all_linear_adapts_experts_and_says_what_it_leaves_out() -> None:
    base = tiny_models.mixture("qwen3_moe")
    with pytest.warns(UserWarning, match=r"leaves out 2 parameters \(gate.weight\).*`target_parameters`"):
        model, _ = adapt(base, "NOLA", target_modules="all-linear")
    config = model.peft_config["default"]
    assert config.target_parameters == ["experts.gate_up_proj", "experts.down_proj"]
    assert len(layers_of(model)) == 4 and "v_proj" in str(config.target_modules)


def test_excluded_modules() -> None:
    base = tiny_models.mixture("qwen3_moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = adapt(base, "NOLA", target_modules="all-linear", exclude_modules=["gate", "experts"])
        assert layers_of(model) == {}
        model, _ = adapt(base, "NOLA", target_modules="all-linear", exclude_modules=["gate", "experts.down_proj"])
    assert {name.rpartition(".")[2] for name in layers_of(model)} == {"gate_up_proj"}
    model, _ = adapt(base, "NOLA", exclude_modules=["layers.0.mlp.experts"], **ALONE)
    assert set(layers_of(model)) == {f"model.layers.1.{name}" for name in EXPERTS}


def test_layers_to_transform() -> None:
    model, _ = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", layers_to_transform=[1], **ALONE)
    assert set(layers_of(model)) == {f"model.layers.1.{name}" for name in EXPERTS}


def test_a_model_without_experts_is_left_in_peace() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for base in (tiny_models.llama(), tiny_models.vit(), tiny_models.gpt2()):
            model, config = adapt(base, "NOLA", target_modules="all-linear")
            assert layers_of(model) == {} and config.target_parameters is None


def test_names_that_older_releases_gave_experts_are_not_left_out_silently() -> None:
    with pytest.warns(UserWarning, match=r"names 'gate_proj', and no module is called that.*experts.gate_up_proj"):
        model, _ = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", target_modules=["q_proj", "gate_proj"])
    assert layers_of(model) == {}


def test_the_name_of_the_module_stands_for_its_experts() -> None:
    model, _ = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", target_modules=["q_proj", "experts"])
    assert set(layers_of(model)) == {f"model.layers.{i}.{name}" for i in range(2) for name in EXPERTS}
    assert model.peft_config["default"].target_parameters == ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_router(kind: str) -> None:
    base = tiny_models.mixture(kind)
    name = next(name for name, _ in base.named_parameters() if name.endswith(("gate.weight", "router.weight")))
    model, _ = adapt(base, "NOLA", target_modules=[], target_parameters=[name])
    (layer,) = layers_of(model).values()
    dense = copy.deepcopy(base)
    dense.get_parameter(name).data += layer.get_delta_weight("default")
    assert torch.equal(logits(model), logits(dense)) and not torch.equal(logits(dense), logits(base))


def test_a_module_that_is_no_layer_says_how_to_name_its_parameters() -> None:
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.gate'.*`target_parameters`: gate.weight"):
        adapt(tiny_models.mixture("qwen3_moe"), "NOLA", target_modules=["gate"])


def test_names_that_are_not_there() -> None:
    base = tiny_models.mixture("qwen3_moe")
    message = "got 'experts.w1'. Those that can be adapted here: experts.gate_up_proj, experts.down_proj, gate.weight"
    with pytest.raises(NoMatchingPeftModuleError, match=message):
        adapt(base, "NOLA", target_modules=[], target_parameters=["experts.w1"])
    with pytest.raises(ValueError, match="of a Linear: put 'q_proj' into `target_modules`"):
        adapt(base, "NOLA", target_parameters=["q_proj.weight"])
    gpt_oss = tiny_models.mixture("gpt_oss")
    with pytest.raises(ValueError, match="must name matrices, or stacks of matrices.*router.bias"):
        adapt(gpt_oss, "NOLA", target_parameters=["router.bias"])
    with pytest.raises(ValueError, match="target_parameters"):
        NolaConfig(target_parameters="experts.down_proj")


def test_patterns_reach_parameters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"experts.gate_up_proj": 4.0}}
        model, _ = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", **patterns, **ALONE)
    found = [(layer.r["default"], layer.alpha["default"]) for layer in layers_of(model).values()]
    assert found == [(3, 1.0), (2, 4.0)] * 2
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys.*\['nothing'\]"):
        adapt(tiny_models.mixture("qwen3_moe"), "NOLA", rank_pattern={"nothing": 3, "down_proj": 1}, **ALONE)


def test_offloaded_experts_are_refused() -> None:
    base = tiny_models.mixture("mixtral")
    accelerate.cpu_offload(base, execution_device="cpu")
    model = get_peft_model(base, config_of("NOLA", **ALONE))
    with pytest.raises(RuntimeError, match="'down_proj' of a MixtralExperts is offloaded.*without offloading"):
        model(X)


def test_biases_of_experts() -> None:
    """Those that PEFT trains are saved and loaded; those of the experts are called otherwise and stay."""
    base = tiny_models.mixture("gpt_oss")
    model, _ = adapt(base, "NOLA", bias="all", **ALONE)
    trained = [name for name, each in model.named_parameters() if each.requires_grad and "coefficients" not in name]
    assert len(trained) == 10 and all(name.endswith(".bias") for name in trained)


def test_default_modules_beside_parameters() -> None:
    model, config = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", target_parameters=EXPERTS)
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"} and len(layers_of(model)) == 4


def test_dropout() -> None:
    base = tiny_models.mixture("qwen3_moe")
    with pytest.raises(ValueError, match="`nola_dropout` must be 0 for parameters.*experts.gate_up_proj"):
        adapt(base, "NOLA", nola_dropout=0.1, **ALONE)
    with pytest.warns(UserWarning, match=r"leaves out 6 parameters \(experts.gate_up_proj.*set `nola_dropout=0`"):
        model, _ = adapt(base, "NOLA", target_modules="all-linear", nola_dropout=0.1)
    assert layers_of(model) == {}


def test_adapters_of_one_module_adapt_the_same_parameters() -> None:
    model, _ = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", **ALONE)
    with pytest.raises(ValueError, match="must name the same parameters of 'model.layers.0.mlp.experts'"):
        model.add_adapter("other", config_of("NOLA", target_modules=[], target_parameters=["experts.down_proj"]))


def test_mixed_batches_are_refused() -> None:
    model, _ = adapt(tiny_models.mixture("qwen3_moe"), "NOLA", **ALONE)
    model.eval()
    with pytest.raises(ValueError, match="NolaExperts does not support mixed adapter batches"):
        model(X, adapter_names=["default", "__base__", "default", "default"])
    with torch.no_grad():
        out = model(X, adapter_names=["__base__"] * 4).logits
    torch.testing.assert_close(out, logits(model.unload()))


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_deep_copies_and_generation(method: str) -> None:
    model, _ = adapt(tiny_models.mixture("mixtral"), method, **ALONE)
    again = copy.deepcopy(model)
    text = model.generate(X, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(X, max_new_tokens=4, do_sample=False), text)


class Stack(nn.Module):
    """A stack of matrices in an unknown module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.Parameter(torch.randn(1, 8, 13))
        self.square = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eij->bej", x @ self.matrices[0].T, self.square)


def test_a_model_that_transformers_does_not_know() -> None:
    base = tiny_models.One(Stack())
    x = torch.randn(5, 13)
    for transposed in (False, True):
        options = {"target_parameters": ["layer.matrices", "layer.square"], "fan_in_fan_out": transposed}
        model, _ = adapt(base, "NOLA", **options)
        layers = layers_of(model)
        assert [(layer.fan_out, layer.fan_in, layer.experts) for layer in layers.values()] == [
            (8, 8, 3),
            (13, 8, 1) if transposed else (8, 13, 1),
        ]
        dense = copy.deepcopy(base)
        for name, layer in layers.items():
            dense.get_parameter(name).data += layer.get_delta_weight("default")
        assert torch.equal(model(x), dense(x)) and not torch.allclose(dense(x), base(x))


def test_too_many_coefficients_for_the_experts() -> None:
    with pytest.raises(ValueError, match="`num_coefficients` must be at most the number of weights.*18432"):
        adapt(tiny_models.mixture("mixtral"), "PRANC", num_coefficients=18433, **ALONE)
    model = get_peft_model(tiny_models.mixture("mixtral"), PrancConfig(num_coefficients=18432, **ALONE))
    assert model.get_nb_trainable_parameters()[0] == 18432
