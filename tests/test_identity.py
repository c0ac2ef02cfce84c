"""Coefficients mean the weights that they were saved for, however they are loaded, or are refused."""

from __future__ import annotations

import contextlib
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from dense import coefficients_of
from methods import METHODS, config_of, lower
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_ext import (
    McncConfig,
    NolaConfig,
    PrancConfig,
    SeededNetwork,
    VisualPromptConfig,
    load_from_seed,
    seeded_network,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = tiny_models.tokens()
every_method = pytest.mark.parametrize("method", METHODS)


def randomised(model: nn.Module) -> Any:
    torch.manual_seed(3)
    for parameter in coefficients_of(model).values():
        parameter.data.normal_()
    return model.eval()


def trained(method: str, base: nn.Module | None = None, **options: Any) -> PeftModel:
    options = {"target_modules": ["q_proj", "v_proj"], "init_weights": True, "seed": 7, **options}
    return randomised(get_peft_model(base or tiny_models.llama(), config_of(method, **options)))


def saved(folder: Path, method: str, **options: Any) -> torch.Tensor:
    """The logits of an adapter that is saved to a folder."""
    model = trained(method, **options)
    model.save_pretrained(str(folder))
    return logits(model)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(X).logits


def edit(folder: Path, **changes: Any) -> None:
    """Changes fields of the configuration; those that become `...` are removed."""
    path = folder / CONFIG
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = WEIGHTS) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A ValueError whose message holds some text."""
    with pytest.raises(ValueError) as error:
        yield
    for part in parts:
        assert part in str(error.value)


# Loaded into an adapter that was made with other numbers

OTHERS: dict[str, list[dict[str, Any]]] = {
    "NOLA": [
        {"seed": 8},
        {"r": 3},
        {"alpha": 2.0},
        {"num_basis": (7, 5)},
        {"share_basis": False},
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"layers.1": 3.0}},
    ],
    "PRANC": [{"seed": 8}, {"nnz": 2}, {"basis": "dense"}, {"adapt_bias": True}],
    "MCNC, weight": [
        {"seed": 8},
        {"widths": (6, 4)},
        {"activation": "relu"},
        {"frequency": 4.0},
        {"normalize": False},
    ],
    "MCNC": [{"alpha": 2.0}, {"d": 14, "k": 3}],
}
CASES = [(method, options) for method, rows in OTHERS.items() for options in rows]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_into_another_adapter(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, method)
    model = trained(method, **options)
    before = logits(model)
    with refused(f"`{next(iter(options))}`", "was", "here"):
        model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_with_a_configuration_of_ones_own(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, method)
    config = config_of(method, **{"target_modules": ["q_proj", "v_proj"], "seed": 7, **options})
    with refused(f"`{next(iter(options))}`", "was"):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path), config=config)


@every_method
def test_with_the_same_configuration(method: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, method)
    config = config_of(method, target_modules=["q_proj", "v_proj"], seed=7)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path), config=config)), expected)
    model = trained(method)
    for parameter in coefficients_of(model).values():
        parameter.data.zero_()
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model), expected)


def trainer(seed: int, folder: Path, steps: int) -> transformers.Trainer:
    config = NolaConfig(r=2, num_basis=4, seed=seed, target_modules=["q_proj"], task_type="CAUSAL_LM")
    rows = [{"input_ids": row, "labels": row} for row in X]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=0.1
    )
    model = get_peft_model(tiny_models.llama(), config)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]


def test_trainer_does_not_resume_with_another_seed(tmp_path: Path) -> None:
    trainer(7, tmp_path, 1).train()
    with refused("`seed`", "was 7", "is 8 here"):
        trainer(8, tmp_path, 2).train(resume_from_checkpoint=True)
    resumed = trainer(7, tmp_path, 2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


# Fields

GENERATING = {
    "NOLA": [
        "seed",
        "fan_in_fan_out",
        "r",
        "num_basis",
        "alpha",
        "share_basis",
        "rank_pattern",
        "alpha_pattern",
        "parametrization",
    ],
    "PRANC": ["seed", "fan_in_fan_out", "num_coefficients", "basis", "nnz", "adapt_bias", "parametrization"],
    "MCNC": [
        "seed",
        "k",
        "d",
        "widths",
        "activation",
        "frequency",
        "normalize",
        "apply_to",
        "r",
        "alpha",
        "parametrization",
    ],
}
UNUSUAL: dict[str, dict[str, Any]] = {  # so that a removed field, which means its default, is another one
    "NOLA": {
        "r": 3,
        "alpha": 2.0,
        "share_basis": False,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3.0},
        "fan_in_fan_out": True,
    },
    "PRANC": {"nnz": 2, "basis": "dense", "adapt_bias": True, "fan_in_fan_out": True},
    "MCNC": {
        "apply_to": "weight",
        "activation": "tanh",
        "frequency": 2.0,
        "normalize": False,
        "r": 3,
        "alpha": 2.0,
        "fan_in_fan_out": True,
    },
}
EDITS: dict[str, Any] = {
    "seed": 8,
    "fan_in_fan_out": False,
    "r": 4,
    "num_basis": [7, 5],
    "alpha": 4.0,
    "share_basis": True,
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {},
    "num_coefficients": 12,
    "basis": "sparse",
    "nnz": 3,
    "adapt_bias": False,
    "k": 2,
    "d": 12,
    "widths": [6],
    "activation": "sine",
    "frequency": 3.0,
    "normalize": True,
    "apply_to": "factors",
    "parametrization": "plain",
}


@pytest.mark.parametrize("change", ["edited", "removed"])
@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method in GENERATING for field in GENERATING[method]]
)
def test_every_field_that_generates(method: str, field: str, change: str, tmp_path: Path) -> None:
    saved(tmp_path, method, **UNUSUAL[method])
    edit(tmp_path, fingerprint=None, **{field: EDITS[field] if change == "edited" else ...})
    for load in (
        lambda: PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path)),
        lambda: tiny_models.llama().load_adapter(str(tmp_path)),
    ):
        with refused(f"`{field}`", "was"):
            load()


def test_the_cases_above_are_all_fields() -> None:
    configs = {"NOLA": NolaConfig(), "PRANC": PrancConfig(), "MCNC": McncConfig()}
    for method, config in configs.items():
        named = {*GENERATING[method], "fan_in_fan_out"}
        assert config.generating().keys() - {"method", "generator_version", "factors_version"} == named, method


@every_method
@pytest.mark.parametrize("change", [None, ...], ids=["null", "removed"])
def test_the_identity_itself(method: str, change: Any, tmp_path: Path) -> None:
    saved(tmp_path, method)
    edit(tmp_path, identity=change)
    with refused("`identity` must be there", "taken out"):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    with refused("`identity` must be there", "taken out"):
        tiny_models.llama().load_adapter(str(tmp_path))


def test_a_new_adapter_from_a_saved_configuration(tmp_path: Path) -> None:
    saved(tmp_path, "NOLA")
    config = PeftConfig.from_pretrained(str(tmp_path))
    config.identity = None
    config.inference_mode = False
    config.r = 3
    model = get_peft_model(tiny_models.llama(), config)
    model.save_pretrained(str(tmp_path / "new"))
    again = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "new"))
    assert again.peft_config["default"].r == 3 and torch.equal(logits(again), logits(model.eval()))


NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "PRANC": (
        lambda: PrancConfig(num_coefficients=20, nnz=2, seed=3),
        {"seed": 4, "num_coefficients": 19, "nnz": 1, "basis": "dense", "adapt_bias": True},
    ),
    "MCNC": (
        lambda: McncConfig(apply_to="weight", k=2, d=30, widths=(8,), seed=3),
        {"k": 3, "d": 31, "widths": [9], "activation": "tanh", "frequency": 4.0, "normalize": False, "alpha": 2.0},
    ),
    "MCNC, factors": (
        lambda: McncConfig(r=3, k=2, d=30, widths=(9,), seed=3),
        {"r": 4, "alpha": 2.0, "apply_to": "weight", "parametrization": "plain"},
    ),
    "NOLA": (
        lambda: NolaConfig(r=3, num_basis=(5, 7), seed=3),
        {"r": 4, "num_basis": [7, 5], "share_basis": False, "alpha": 2.0, "rank_pattern": {"a": 2}},
    ),
}


def saved_network(folder: Path, method: str = "PRANC") -> SeededNetwork:
    network = randomised(SeededNetwork(tiny_models.vit(), NETWORKS[method][0]()))
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method, (_, fields) in NETWORKS.items() for field in fields]
)
@pytest.mark.parametrize("change", ["edited", "removed"])
def test_every_field_of_a_network(method: str, field: str, change: str, tmp_path: Path) -> None:
    saved_network(tmp_path, method)
    path = tmp_path / "seed_config.json"
    described = json.loads(path.read_text())
    described["method"].pop("fingerprint")
    if change == "edited":
        described["method"][field] = NETWORKS[method][1][field]
    else:
        del described["method"][field]
    path.write_text(json.dumps(described))
    if change == "removed" and getattr(NETWORKS[method][0](), field) == getattr(type(NETWORKS[method][0]())(), field):
        means = {"parametrization": "plain"}.get(field)  # what is not there means the default, or what it once was
        if means is None:
            load_from_seed(tmp_path)
            return
    with refused(f"`{field}`"):
        load_from_seed(tmp_path)


@pytest.mark.parametrize("method", ["MCNC, factors", "NOLA"])
@pytest.mark.parametrize("change", ["turned", "vector", "missing"])
def test_edited_matrices_of_a_network(method: str, change: str, tmp_path: Path) -> None:
    saved_network(tmp_path, method)
    path = tmp_path / "seed_config.json"
    described = json.loads(path.read_text())
    name = next(name for name, (fan_out, fan_in) in described["matrices"].items() if fan_out != fan_in)
    if change == "turned":
        described["matrices"][name].reverse()
    elif change == "vector":
        del described["matrices"][name]
    else:
        del described["matrices"]
    path.write_text(json.dumps(described))
    with refused("`r` must be at most 0" if change == "missing" else "`matrices` in seed_config.json"):
        load_from_seed(tmp_path)


@pytest.mark.parametrize("field", ["hidden_act", "layer_norm_eps", "num_attention_heads"])
def test_what_a_network_is_beside_its_shapes(field: str, tmp_path: Path) -> None:
    saved_network(tmp_path)
    path = tmp_path / "config.json"
    changed = {"hidden_act": "relu", "layer_norm_eps": 0.1, "num_attention_heads": 2}[field]
    path.write_text(json.dumps({**json.loads(path.read_text()), field: changed}))
    with refused("config.json is not the one that was saved"):
        load_from_seed(tmp_path)


# Layers


@every_method
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_other_layers_of_equal_shape(method: str, dtype: str, tmp_path: Path) -> None:
    saved(tmp_path, method, coefficient_dtype=dtype)
    edit(tmp_path, target_modules=["q_proj", "k_proj"])
    with refused("The saved adapter"):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    with refused():
        tiny_models.llama().load_adapter(str(tmp_path))
    four = tiny_models.llama(4)
    saved(tmp_path / "layers", method, base=four, layers_to_transform=[0, 1], coefficient_dtype=dtype)
    edit(tmp_path / "layers", layers_to_transform=[0, 3])
    with refused("The saved adapter"):
        PeftModel.from_pretrained(tiny_models.llama(4), str(tmp_path / "layers"))
    model = trained(method, base=tiny_models.llama(4), layers_to_transform=[0, 3])
    with refused():
        model.load_adapter(str(tmp_path / "layers"), "default")


class Stack(nn.Module):
    """Blocks whose linear layers are in a module of some name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block[self.name]["down"](torch.tanh(block[self.name]["up"](x)))  # type: ignore[index]
        return x


@every_method
@pytest.mark.parametrize("dtype", ["float32", "int4"])
@torch.no_grad()
def test_renamed_modules(method: str, dtype: str, tmp_path: Path) -> None:
    options = {"target_modules": ["up", "down"], "coefficient_dtype": dtype}
    trained(method, Stack("mlp"), **options).save_pretrained(str(tmp_path))
    x = torch.randn(3, 8)
    expected = PeftModel.from_pretrained(Stack("mlp"), str(tmp_path))(x)
    assert not torch.equal(expected, Stack("mlp")(x))
    mapped = PeftModel.from_pretrained(Stack("ffn"), str(tmp_path), key_mapping={r"\.mlp\.": ".ffn."})
    assert torch.equal(mapped(x), expected)
    mapped.save_pretrained(str(tmp_path / "again"))  # under the new names, drawn by the old ones
    with refused("does not fit the model", "key_mapping"):
        PeftModel.from_pretrained(Stack("ffn"), str(tmp_path))


# Damage


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_flipped_bits_of_coefficients(dtype: str, tmp_path: Path) -> None:
    saved(tmp_path, "NOLA", coefficient_dtype=dtype)
    data = (tmp_path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    base, chance = tiny_models.llama(), random.Random(0)
    for _ in range(30):
        place = chance.randrange(8 * start, 8 * len(data))
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / WEIGHTS).write_bytes(flipped)
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(base, str(tmp_path))


@pytest.mark.parametrize("load", ["peft", "transformers", "transformers, to train"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])
def test_tensors_of_the_base_model(name: str, load: str, tmp_path: Path) -> None:
    saved(tmp_path, "PRANC")
    base = tiny_models.llama()
    extra = torch.zeros_like(base.get_parameter(name))
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"base_model.model.{name}": extra}))
    if load == "peft":
        with refused("no part of it", name):
            PeftModel.from_pretrained(base, str(tmp_path))
        assert base.get_parameter(name).any()
    elif load == "transformers":
        with refused("no part of it", name):
            base.load_adapter(str(tmp_path))
    else:
        base.load_adapter(str(tmp_path), is_trainable=True)
        with refused("no part of it", name):
            logits(base)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_biases_and_heads_through_transformers(dtype: str, trainable: bool, tmp_path: Path) -> None:
    config = NolaConfig(
        r=2,
        num_basis=4,
        bias="all",
        modules_to_save=["classifier"],
        target_modules=["q_proj", "v_proj", "query", "value"],
        coefficient_dtype=dtype,
    )
    randomised(get_peft_model(tiny_models.vit(), config)).save_pretrained(str(tmp_path))
    images = torch.randn(2, 3, 16, 16)
    expected = PeftModel.from_pretrained(tiny_models.vit(), str(tmp_path))(images).logits
    model = tiny_models.vit()
    model.load_adapter(str(tmp_path), is_trainable=trainable)
    assert torch.equal(model.eval()(images).logits, expected)
    edit_tensors(tmp_path, lambda tensors: tensors["base_model.model.classifier.weight"].view(-1)[3].neg_())
    model = tiny_models.vit()
    with refused("what is saved beside the coefficients"):
        model.load_adapter(str(tmp_path), is_trainable=trainable)
        model(images)


def test_swapped_names_beside_the_coefficients(tmp_path: Path) -> None:
    """Labels without names would not show it."""
    model = trained("NOLA", tiny_models.gpt2(), bias="all", target_modules=["c_attn"])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(str(tmp_path))
    one, two = (f"base_model.model.transformer.h.{i}.ln_1.bias" for i in (0, 1))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[two] = tensors[two], tensors[one]

    assert torch.equal(logits(PeftModel.from_pretrained(tiny_models.gpt2(), str(tmp_path))), logits(model))
    edit_tensors(tmp_path, swap)
    with refused("beside the coefficients and its names"):
        PeftModel.from_pretrained(tiny_models.gpt2(), str(tmp_path))


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process alone, as a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_method
def test_biases_of_a_wrapped_model(method: str, process_group: None) -> None:
    """They load into an adapter that has biases, and into no other: they would change the base model alone."""

    def adapted(bias: str) -> PeftModel:
        return trained(method, tiny_models.gpt2(), bias=bias, target_modules=["c_attn"])

    model = adapted("all")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.3)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    expected, state = logits(wrapped), get_peft_model_state_dict(wrapped)
    other = adapted("all")
    assert not torch.equal(logits(other), expected)
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), expected)
    with refused("would overwrite the base model", "need the `bias`"):
        set_peft_model_state_dict(adapted("none"), state)


def test_pickles(tmp_path: Path) -> None:
    saved(tmp_path, "NOLA")
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with refused("adapter_model.bin", "a pickle, which is not read"):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    with pytest.raises(FileNotFoundError):
        tiny_models.llama().load_adapter(str(tmp_path))


def test_a_pickle_that_transformers_is_told_to_read_is_verified(tmp_path: Path) -> None:
    saved(tmp_path, "NOLA")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[next(name for name in tensors if "coefficients" in name)] += 1
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with refused("checksum of the coefficients"):
        tiny_models.llama().load_adapter(str(tmp_path), use_safetensors=False)


# Default dtype and device


def test_the_default_dtype_does_not_matter(tmp_path: Path) -> None:
    network = saved_network(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    expected = network(images).logits
    torch.set_default_dtype(torch.bfloat16)
    live = SeededNetwork(tiny_models.vit(), NETWORKS["PRANC"][0]())  # of the same seed, and so the same start
    loaded = load_from_seed(tmp_path)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(loaded(images).logits, expected)
    assert torch.equal(load_from_seed(tmp_path)(images).logits, expected)
    del live


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_adapters_under_another_default_dtype(dtype: str, tmp_path: Path) -> None:
    model = trained("NOLA", coefficient_dtype=dtype)
    model.save_pretrained(str(tmp_path))
    expected = logits(PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path)))
    base = tiny_models.llama()
    torch.set_default_dtype(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(loaded), expected)


@every_method
def test_on_the_meta_device(method: str, tmp_path: Path) -> None:
    """A model without numbers takes an adapter; there is nothing to compute with until both are loaded for real."""
    saved(tmp_path, method)
    with torch.device("meta"):
        base = tiny_models.llama()
        model = PeftModel.from_pretrained(base, str(tmp_path))
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "coefficients" not in name)


# Bombs


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (lambda: NolaConfig(r=10**6), "`r`"),
        (lambda: NolaConfig(rank_pattern={"q_proj": 10**6}), "`rank_pattern`"),
        (lambda: NolaConfig(num_basis=10**6), "`num_basis`"),
        (lambda: NolaConfig(num_basis=10**9), "`num_basis`"),
        (lambda: NolaConfig(num_basis=(4, 10**9)), "`num_basis`"),
        (lambda: McncConfig(d=20, widths=(10**9,)), "`widths`"),
        (lambda: McncConfig(d=20, widths=(10**5, 10**5)), "`widths`"),
        (lambda: McncConfig(d=20, widths=(10**4,) * 20), "`widths`"),
        (lambda: McncConfig(d=20, widths=(1,) * 10_000), "`widths`"),
        (lambda: McncConfig(d=20, r=10**6), "`r`"),
        (lambda: McncConfig(k=10**8, d=10**9), "`d`"),
        (lambda: PrancConfig(num_coefficients=10**9), "`num_coefficients`"),
        (lambda: PrancConfig(num_coefficients=3000, nnz=10**30), "`nnz`"),
    ],
)
def test_configurations_out_of_proportion(config: Callable[[], Any], field: str) -> None:
    base = tiny_models.llama()
    with refused(field):
        get_peft_model(base, config())
    assert not any("coefficients" in name for name, _ in base.named_parameters())


def test_too_many_prompts() -> None:
    with refused("`num_prompts`"):
        get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=10**9))


@pytest.mark.parametrize("widths", [(10**9,), (10**5, 10**5), (10**4,) * 20])
def test_networks_out_of_proportion(widths: tuple[int, ...]) -> None:
    with refused("`widths`"):
        SeededNetwork(tiny_models.vit(), McncConfig(apply_to="weight", k=2, d=30, widths=widths))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (lambda: NolaConfig(r=10**9), "`r`"),
        (lambda: NolaConfig(r=8, num_basis=10**9), "`num_basis`"),
        (lambda: McncConfig(r=10**9), "`r`"),
        (lambda: McncConfig(r=8, k=10**8, d=10**9), "`d`"),
        (lambda: McncConfig(r=8, d=30, widths=(10**9,)), "`widths`"),
    ],
)
def test_networks_with_factors_out_of_proportion(config: Callable[[], Any], field: str) -> None:
    with refused(field):
        SeededNetwork(tiny_models.vit(), config())


def test_random_matrices_of_a_network_out_of_proportion() -> None:
    with refused("`num_basis` and `r`"):  # 400 x 64 x 2,000 numbers, and as many for B, for each of two shapes
        SeededNetwork(nn.Sequential(nn.Linear(2000, 800), nn.Linear(800, 2000)), NolaConfig(r=64, num_basis=900))


def test_networks_that_read_too_much() -> None:
    with refused("`nnz`"):
        SeededNetwork(tiny_models.vit(), PrancConfig(num_coefficients=20_000, nnz=20_000))


def test_a_large_network_is_not_made(tmp_path: Path) -> None:
    saved_network(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 40_000}))
    with refused("config.json"):
        load_from_seed(tmp_path)
    described = json.loads((tmp_path / "seed_config.json").read_text())
    digest = seeded_network.digest_of_network_config(tmp_path)  # of a stranger who knows how
    (tmp_path / "seed_config.json").write_text(json.dumps({**described, "network_config": digest}))
    with refused("parameters differ"):
        load_from_seed(tmp_path)


# transformers


@every_method
def test_missing_coefficients_through_transformers(method: str, tmp_path: Path) -> None:
    saved(tmp_path, method)
    key = next(name for name in load_file(tmp_path / WEIGHTS) if name.endswith("_coefficients.values"))
    edit_tensors(tmp_path, lambda tensors: tensors.pop(key))
    with refused("checksum of the coefficients"):
        tiny_models.llama().load_adapter(str(tmp_path))


def test_no_record_through_transformers(tmp_path: Path) -> None:
    saved(tmp_path, "NOLA")
    edit_tensors(tmp_path, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("identity"))))
    with refused("nola_identity", "No coefficients were loaded"):
        tiny_models.llama().load_adapter(str(tmp_path))


@pytest.mark.parametrize("change", ["nan", "missing"])
def test_visual_prompts_through_transformers(change: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=3))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    model.save_pretrained(str(tmp_path))
    tiny_models.vit().load_adapter(str(tmp_path))
    (key,) = (name for name in load_file(tmp_path / WEIGHTS) if name.endswith("tokens.values"))
    action = (lambda t: t[key][0].fill_(torch.nan)) if change == "nan" else (lambda t: t.pop(key))
    edit_tensors(tmp_path, action)
    with refused("checksum of the coefficients"):
        tiny_models.vit().load_adapter(str(tmp_path))


# Types


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("NOLA", "target_shapes", 3),
        ("NOLA", "target_shapes", {"32 x 32": "2"}),
        ("NOLA", "target_shapes", ["32 x 32"]),
        ("NOLA", "target_names", "model"),
        ("NOLA", "target_names", [1]),
        ("NOLA", "rank_pattern", 3),
        ("NOLA", "rank_pattern", {"q_proj": "2"}),
        ("NOLA", "rank_pattern", [["q_proj", 2]]),
        ("NOLA", "alpha_pattern", {"q_proj": None}),
        ("NOLA", "share_basis", 1),
        ("NOLA", "share_basis", "yes"),
        ("NOLA", "num_basis", "12"),
        ("NOLA", "identity", []),
        ("NOLA", "identity", {"sha256": 3}),
        ("NOLA", "fingerprint", 3),
        ("NOLA", "base_fingerprint", 3),
        ("NOLA", "coefficient_dtype", "int3"),
        ("NOLA", "coefficient_dtype", None),
        ("NOLA", "target_modules", 3),
        ("NOLA", "target_modules", [["q_proj"]]),
        ("NOLA", "layers_to_transform", "x"),
        ("NOLA", "modules_to_save", 3),
        ("NOLA", "init_weights", "yes"),
        ("NOLA", "inference_mode", "yes"),
        ("PRANC", "adapt_bias", 1),
        ("PRANC", "nnz", 1.5),
        ("PRANC", "basis", []),
        ("MCNC", "normalize", 1),
        ("MCNC", "normalize", "true"),
        ("MCNC", "widths", {"5": 1}),
        ("MCNC", "widths", 5),
        ("MCNC", "frequency", "5"),
        ("MCNC", "d", [13]),
    ],
)
def test_wrong_types(method: str, field: str, value: Any, tmp_path: Path) -> None:
    saved(tmp_path, method)
    edit(tmp_path, **{field: value})
    with refused(f"`{field}"):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.bool, torch.uint8])
def test_wrong_dtypes_of_coefficients(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, method)
    key = next(name for name in load_file(tmp_path / WEIGHTS) if name.endswith("_coefficients.values"))
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    model = tiny_models.llama()
    if dtype == torch.float64:  # the same numbers, in more bits
        model.load_adapter(str(tmp_path))
        assert torch.equal(logits(model), expected)
    else:
        with pytest.raises((ValueError, RuntimeError)):  # torch's, if no parameter can hold them
            model.load_adapter(str(tmp_path))


def test_long_lists(tmp_path: Path) -> None:
    """PEFT takes seconds to look for the names of such a list in a model."""
    saved(tmp_path, "NOLA")
    edit(tmp_path, modules_to_save=["x"] * 100_000)
    with refused("`modules_to_save` must have at most 10,000 entries, got 100,000"):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))


# The base model


def test_a_changed_base_model_is_told(tmp_path: Path) -> None:
    saved(tmp_path, "NOLA")
    changed = tiny_models.llama()
    changed.model.layers[1].self_attn.v_proj.weight.data *= 1.1
    with pytest.warns(UserWarning, match="The base model has other weights than the adapter was trained on"):
        PeftModel.from_pretrained(changed, str(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The base model")
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
        PeftModel.from_pretrained(tiny_models.llama().bfloat16(), str(tmp_path))
    with pytest.warns(UserWarning, match="The base model has other weights"):
        changed = tiny_models.llama()
        changed.model.layers[1].self_attn.v_proj.weight.data *= 1.1
        changed.load_adapter(str(tmp_path))


def test_the_names_of_methods_are_those_of_the_tests() -> None:
    assert {lower(method) for method in METHODS} == {"nola", "pranc", "mcnc"}
