"""What is saved, that it comes back to the bit in another process, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from dense import coefficients_of
from huggingface_hub import ModelCard
from methods import METHODS, ONE_OF_EACH, config_of, lower
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext.adapters.saved import read, verify
from peft_ext.checkpoint.identity import checksum, read_record, write_record

Snapshot = Callable[[nn.Module], dict[str, Any]]


every_method = pytest.mark.parametrize("method", METHODS)
one_of_each = pytest.mark.parametrize("method", ONE_OF_EACH)


def trained(model: nn.Module, method: str = "NOLA", **options: Any) -> PeftModel:
    config = config_of(method, **{"target_modules": ["q_proj", "v_proj"], "init_weights": True, **options})
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    for parameter in coefficients_of(adapted).values():
        parameter.data.normal_()
    return adapted.eval()


def run_python(code: str, folder: Path) -> str:
    """Runs code in a new process and returns what it prints."""
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Round trips

EVERYTHING = ["embed_tokens", "q_proj", "up_proj", "lm_head"]
# name: (model, method, fields of the configuration)
SAVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("llama", "NOLA", {}),
    "own bases": ("llama", "NOLA, own bases", {"seed": 2**64 - 1}),
    "patterns": (
        "llama",
        "NOLA",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2}},
    ),
    "embeddings": ("llama", "NOLA", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "regular expression": ("llama", "NOLA", {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    "gpt2": ("gpt2", "NOLA", {"target_modules": None}),
    "pranc": ("llama", "PRANC", {"seed": 2**64 - 1, "num_coefficients": 500}),
    "pranc, many targets": ("llama", "PRANC", {"target_modules": [*EVERYTHING, "input_layernorm", "norm"]}),
    "pranc, biases and norms": (
        "gpt2",
        "PRANC, two a weight, biases",
        {"target_modules": ["c_attn", "c_proj", "ln_1", "ln_f"]},
    ),
    "pranc, dense": ("llama", "PRANC, dense", {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    "mcnc": ("llama", "MCNC", {"seed": 2**64 - 1, "target_modules": EVERYTHING}),
    "mcnc, weights": ("gpt2", "MCNC, weight", {"d": 100, "target_modules": None}),
}

LOAD = """
import torch, tiny_models, peft_ext
from peft import PeftModel
torch.set_num_threads(1)  # as here: the order of the base model's sums depends on it
for name, build in {names}:
    base = getattr(tiny_models, build)()
    torch.manual_seed(99)
    model = PeftModel.from_pretrained(base, name).eval()
    with torch.no_grad():
        torch.save(model(tiny_models.tokens()).logits, name + ".pt")
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of every model of `SAVED`, computed in another process from its adapter."""
    folder = tmp_path_factory.mktemp("saved")
    for name, (build, method, options) in SAVED.items():
        trained(getattr(tiny_models, build)(), method, **options).save_pretrained(str(folder / name))
    run_python(LOAD.format(names=[(name, build) for name, (build, _, _) in SAVED.items()]), folder)
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_equal_to_the_bit_in_a_new_process(name: str, reloaded: Path) -> None:
    build, method, options = SAVED[name]
    model = trained(getattr(tiny_models, build)(), method, **options)
    with torch.no_grad():
        assert torch.equal(torch.load(reloaded / f"{name}.pt"), model(tiny_models.tokens()).logits)


@pytest.mark.parametrize(
    ("method", "options", "coefficients"),
    [
        ("NOLA", {"num_basis": 256, "r": 8}, 60 * 512),
        ("PRANC", {"num_coefficients": 10_000}, 10_000),
        ("MCNC", {"r": 8, "d": 100, "k": 5}, 30 * (3 + 3 + 3 + 2) * 6),  # 8 * 32 numbers, and 8 * 16 in B of a value
    ],
    ids=ONE_OF_EACH,
)
def test_size_of_a_checkpoint(method: str, options: dict[str, Any], coefficients: int, tmp_path: Path) -> None:
    """At most 4 bytes for a coefficient, 8 KiB for the names of the 60 layers, 640 bytes for what identifies it."""
    model = trained(tiny_models.llama(30), method, **options)
    model.save_pretrained(str(tmp_path))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == coefficients
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4 * coefficients + 8192 + 640
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@every_method
def test_a_checkpoint_holds_the_coefficients_alone(method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method)
    model(tiny_models.tokens())
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        f"base_model.model.{name}.{lower(method)}_coefficients.values": p for name, p in coefficients_of(model).items()
    }
    record = saved.pop(first(method, "identity"))
    assert record.dtype == torch.uint8 and len(record) == 512
    assert saved.keys() == expected.keys() and len(saved) == (1 if lower(method) == "pranc" else 4)
    assert all(saved[name].dtype == torch.float32 and torch.equal(saved[name], expected[name]) for name in saved)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == lower(method).upper() and config["seed"] == 0 and config["generator_version"] == 1
    assert re.fullmatch(r"[0-9a-f]{16}", config["fingerprint"])
    assert config["target_shapes"] == {"32 x 32": 2, "16 x 32": 2}
    assert config["target_names"] == ["model.layers.{0..1}.self_attn.{q_proj,v_proj}"]
    assert json.loads(bytes(record.numpy()))["identity"] == config["identity"]
    for key, value in METHODS[method][1].items():
        assert config[key] == (list(value) if isinstance(value, tuple) else value), key


@every_method
def test_saved_and_loaded_configuration_are_equal(method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method, seed=12345678901234567890)
    model.save_pretrained(str(tmp_path / "one"))
    config = PeftConfig.from_pretrained(str(tmp_path / "one"))
    assert type(config) is METHODS[method][0] and config.seed == 12345678901234567890
    assert all(getattr(config, key) == value for key, value in METHODS[method][1].items())
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "one"))
    loaded.save_pretrained(str(tmp_path / "two"))
    one, two = ((tmp_path / name / "adapter_config.json").read_text() for name in ("one", "two"))
    assert json.loads(one) == json.loads(two)


@every_method
def test_training_goes_on_after_loading(method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path), is_trainable=True)
    x = tiny_models.tokens()
    for each in (model, loaded):
        each(input_ids=x, labels=x).loss.backward()
    assert coefficients_of(loaded).keys() == coefficients_of(model).keys()
    for a, b in zip(coefficients_of(model).values(), coefficients_of(loaded).values()):
        assert torch.equal(a.grad, b.grad)
    frozen = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    assert not any(p.requires_grad for p in frozen.parameters())


@one_of_each
def test_several_adapters_in_a_folder(method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method)
    model.add_adapter("other", config_of(method, seed=5, target_modules=["o_proj"]))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    loaded.load_adapter(str(tmp_path / "other"), "other")
    x = tiny_models.tokens()
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(x).logits, model(x).logits)


@every_method
def test_loading_over_an_adapter_in_use(method: str, tmp_path: Path) -> None:
    """Coefficients loaded under a name in use replace those that were used before."""
    model = trained(tiny_models.llama(), method)
    x = tiny_models.tokens()
    with torch.no_grad():
        expected = model(x).logits
    model.save_pretrained(str(tmp_path))
    for parameter in coefficients_of(model).values():
        parameter.data.zero_()
    with torch.no_grad():
        assert not torch.equal(model(x).logits, expected)
        model.load_adapter(str(tmp_path), "default")
        assert torch.equal(model(x).logits, expected)


@one_of_each
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_coefficients_in_half_precision(dtype: str, method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method, coefficient_dtype=dtype)
    for parameter in coefficients_of(model).values():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved[first(method)].dtype == getattr(torch, dtype)
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in coefficients_of(loaded).values())
    x = tiny_models.tokens()
    assert torch.equal(loaded(x).logits, model(x).logits)


# What is refused


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


NEW = {"identity": None, "target_names": None, "target_shapes": None, "base_fingerprint": None}  # of no checkpoint


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def first(method: str, what: str = "coefficients.values") -> str:
    """The key of the first coefficients, which PRANC's other layers read too, or of what lies beside them."""
    return f"base_model.model.model.layers.0.self_attn.q_proj.{lower(method)}_{what}"


FIRST = first("NOLA")


def poison(value: float, method: str = "NOLA") -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors[first(method)][3].fill_(value))


def damages_of_coefficients(method: str, numbers: int) -> dict[str, tuple[str, Callable[[Path], None], list[str]]]:
    """What can happen to the coefficients of any method; `numbers` are in the first tensor."""
    key = first(method)
    zeros = torch.zeros(numbers + 1)
    return {
        f"{method}: nan": (method, poison(float("nan"), method), ["finite", key, "NaN"]),
        f"{method}: infinity": (method, poison(-float("inf"), method), ["finite", key, "infinity"]),
        f"{method}: missing": (
            method,
            edit_tensors(lambda tensors: tensors.pop(key)),
            ["1 adapted layers find no coefficients", key],
        ),
        f"{method}: additional": (
            method,
            edit_tensors(lambda tensors: tensors.update({key.replace("layers.0", "layers.9"): zeros})),
            ["1 saved coefficients find no layer", "layers.9"],
        ),
        f"{method}: too many": (
            method,
            edit_tensors(lambda tensors: tensors.update({key: zeros})),
            [key, f"({numbers},)", f"({numbers + 1},)", *METHODS[method][0].size_fields, "adapter_config.json"],
        ),
        f"{method}: shape": (
            method,
            edit_tensors(lambda tensors: tensors.update({key: torch.zeros(1, numbers)})),
            [key, f"({numbers},)", f"(1, {numbers})"],
        ),
        f"{method}: seed, other": (method, edit_config(seed=1), ["`fingerprint`", "seed 1", "other random numbers"]),
        f"{method}: shapes": (
            method,
            edit_config(target_shapes={"32 x 32": 3}),
            ["`target_shapes`", "3 layers of 32 x 32", "16 x 32"],
        ),
    }


# name: (method, what is done to the saved adapter, what the message says: the field, what was given, what is allowed)
DAMAGES: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    **damages_of_coefficients("NOLA", 12),
    **damages_of_coefficients("PRANC", 13),
    **damages_of_coefficients("MCNC", 56),
    **damages_of_coefficients("MCNC, weight", 79 * 3),
    "r": ("NOLA", edit_config(r=0), ["`r`", "positive integer", "got 0"]),
    "r, text": ("NOLA", edit_config(r="8"), ["`r`", "positive integer", "got '8'"]),
    "num_basis": ("NOLA", edit_config(num_basis=[5, -1]), ["`num_basis`", "positive integer", "got -1"]),
    "num_basis, three": ("NOLA", edit_config(num_basis=[5, 7, 9]), ["`num_basis`", "pair", "[5, 7, 9]"]),
    "num_basis, fraction": ("NOLA", edit_config(num_basis=2.5), ["`num_basis`", "positive integer", "2.5"]),
    "num_basis, other": ("NOLA", edit_config(num_basis=[5, 8]), ["`num_basis`", "was [5, 7]", "is [5, 8] here"]),
    "seed": ("NOLA", edit_config(seed=-1), ["`seed`", "0 and 2**64 - 1", "got -1"]),
    "seed, large": ("NOLA", edit_config(seed=2**64), ["`seed`", "0 and 2**64 - 1", str(2**64)]),
    "version": ("NOLA", edit_config(generator_version=2), ["`generator_version`", "must be 1", "got 2", "upgrade"]),
    "fingerprint": ("NOLA", edit_config(fingerprint="0" * 16), ["`fingerprint`", "0" * 16, "edited"]),
    "no target": ("NOLA", edit_config(target_modules=["qkv"]), ["`target_modules`", "qkv", "q_proj"]),
    "unsupported target": (
        "NOLA",
        edit_config(target_modules=["norm"]),
        ["`target_modules`", "LlamaRMSNorm", "nn.Linear"],
    ),
    "bias": ("NOLA", edit_config(bias="some"), ["`bias`", "'none', 'all' or 'nola_only'", "'some'"]),
    "dropout": ("NOLA", edit_config(nola_dropout=1.5), ["`nola_dropout`", "0 to below 1", "1.5"]),
    "num_coefficients": (
        "PRANC",
        edit_config(num_coefficients=0),
        ["`num_coefficients`", "positive integer", "got 0"],
    ),
    "num_coefficients, other": (
        "PRANC",
        edit_config(num_coefficients=14),
        ["`num_coefficients`", "was 13", "is 14 here"],
    ),
    "num_coefficients, more than weights": (
        "PRANC",
        edit_config(num_coefficients=3073, **NEW),
        ["`num_coefficients`", "at most", "3072 in the 4 target modules", "got 3073"],
    ),
    "basis": ("PRANC", edit_config(basis="gaussian"), ["`basis`", "one of 'sparse', 'dense'", "got 'gaussian'"]),
    "nnz": ("PRANC", edit_config(nnz=14), ["`nnz`", "at most `num_coefficients` (13)", "got 14"]),
    "k": ("MCNC", edit_config(k=0), ["`k`", "positive integer", "got 0"]),
    "k, other": ("MCNC", edit_config(k=4), ["`k`", "was 3", "is 4 here"]),
    "d": ("MCNC", edit_config(d=3), ["`d`", "larger than `k` (3)", "got 3"]),
    "d, too long": (
        "MCNC",
        edit_config(d=65, **NEW),
        ["`d`", "at most", "64 in the largest factor of the 4", "got 65"],
    ),
    "widths": ("MCNC", edit_config(widths=[8, 0]), ["`widths`", "positive integer", "got 0"]),
    "activation": (
        "MCNC",
        edit_config(activation="gelu"),
        ["`activation`", "'sine', 'relu', 'tanh', 'none'", "gelu"],
    ),
    "apply_to": ("MCNC", edit_config(apply_to="bias"), ["`apply_to`", "'factors', 'weight'", "'bias'"]),
    "apply_to, other": ("MCNC", edit_config(apply_to="weight"), ["`apply_to`", "was 'factors'", "is 'weight' here"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(name: str, tmp_path: Path, snapshot: Snapshot) -> None:
    method, damage, parts = DAMAGES[name]
    trained(tiny_models.llama(), method).save_pretrained(str(tmp_path))
    damage(tmp_path)
    base = tiny_models.llama()
    before = snapshot(base)
    with pytest.raises(ValueError) as refused:
        PeftModel.from_pretrained(base, str(tmp_path))
    for part in parts:
        assert part in str(refused.value).replace(".default.", ".")
    unchanged(before, snapshot(base))


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"] == after["modules"]
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(before["tensors"][name], after["tensors"][name]) for name in before["tensors"])


@pytest.mark.parametrize("name", DAMAGES)
def test_a_refused_checkpoint_leaves_other_adapters_alone(name: str, tmp_path: Path, snapshot: Snapshot) -> None:
    method, damage, _ = DAMAGES[name]
    trained(tiny_models.llama(), method).save_pretrained(str(tmp_path))
    damage(tmp_path)
    model = trained(tiny_models.llama(), method, seed=4)
    x = tiny_models.tokens()
    expected, before = model(x).logits, snapshot(model)
    with pytest.raises(ValueError):
        model.load_adapter(str(tmp_path), "second")
    assert torch.equal(model(x).logits, expected)
    unchanged(before, snapshot(model))
    assert list(model.peft_config) == ["default"]


@one_of_each
@pytest.mark.parametrize("build", [lambda: tiny_models.llama(3), lambda: tiny_models.llama(hidden_size=64)])
def test_another_base_model_is_refused(
    build: Callable[[], nn.Module], method: str, tmp_path: Path, snapshot: Snapshot
) -> None:
    trained(tiny_models.llama(), method).save_pretrained(str(tmp_path))
    base = build()
    before = snapshot(base)
    with pytest.raises(ValueError, match="`target_shapes`.*2 layers of 32 x 32.*does not fit the model"):
        PeftModel.from_pretrained(base, str(tmp_path))
    unchanged(before, snapshot(base))


NAMES = {"target_modules": ["qkv"]}, ["`target_modules`", "qkv", "q_proj"]
INDEXES = (
    {"target_modules": ["q_proj"], "layers_to_transform": [7]},
    ["`target_modules`", "q_proj", "[7]"],
)
NORM = (
    {"target_modules": ["q_proj", "norm"]},
    ["`target_modules`", "'model.norm'", "LlamaRMSNorm", "nn.Linear"],
)
BLOCK = {"target_modules": ["self_attn"]}, ["`target_modules`", "LlamaAttention", "nn.Linear"]


@pytest.mark.parametrize(
    ("method", "options", "parts"),
    [(method, *row) for method in ONE_OF_EACH for row in (NAMES, INDEXES, BLOCK)]
    + [("NOLA", *NORM), ("MCNC", *NORM)]
    + [("PRANC", BLOCK[0], ["which PRANC cannot adapt", "modules that hold vectors only (norms)"])],
)
def test_targets_are_checked_before_the_model_is_changed(
    method: str, options: dict[str, Any], parts: list[str], snapshot: Snapshot
) -> None:
    base = tiny_models.llama()
    before = snapshot(base)
    with pytest.raises(ValueError) as refused:
        get_peft_model(base, config_of(method, **options))
    for part in parts:
        assert part in str(refused.value).replace(".default.", ".")
    unchanged(before, snapshot(base))


class Reordered(nn.Module):
    """Three equal layers, registered in any order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {name: nn.Linear(8, 8) for name in "abc"}
        for name in order:
            self.add_module(name, layers[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("c")(torch.tanh(self.get_submodule("b")(torch.tanh(self.get_submodule("a")(x)))))


@one_of_each
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_layers_in_another_order_are_refused(dtype: str, method: str, tmp_path: Path, snapshot: Snapshot) -> None:
    """Packed coefficients are known by their place alone."""
    options = {"target_modules": ["a", "b", "c"], "coefficient_dtype": dtype}
    get_peft_model(Reordered("abc"), config_of(method, **options)).save_pretrained(str(tmp_path))
    base = Reordered("acb")
    before = snapshot(base)
    with pytest.raises(ValueError, match="belongs to other modules.*in the order of the model"):
        PeftModel.from_pretrained(base, str(tmp_path))
    unchanged(before, snapshot(base))


@pytest.mark.parametrize("key", ["base_model.model.a.base_layer.weight", "base_model.model.c.base_layer.bias"])
def test_no_record_allows_tensors_of_the_base_model(key: str, tmp_path: Path) -> None:
    """A file may declare what it likes: a tensor that would overwrite the base model is refused."""
    get_peft_model(Reordered("abc"), config_of("NOLA", target_modules=["a", "b"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    record = "base_model.model.a.nola_identity"
    extra = {key: torch.zeros(8, 8) if key.endswith("weight") else torch.zeros(8)}
    content = {**read_record(tensors[record], record), "strangers": checksum(extra.items())}
    save_file({**tensors, **extra, record: write_record(content)}, path)
    with pytest.raises(ValueError, match="tensors that are no part of it.*would overwrite the base model"):
        PeftModel.from_pretrained(Reordered("abc"), str(tmp_path))


@one_of_each
def test_attention_of_torch_is_refused_as_a_whole(method: str, snapshot: Snapshot) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    before = snapshot(base)
    with pytest.raises(ValueError, match="`target_modules` matches '1', a MultiheadAttention, which .* cannot adapt"):
        get_peft_model(base, config_of(method, target_modules=["0", "1"]))
    unchanged(before, snapshot(base))


@one_of_each
@pytest.mark.parametrize("trainable", [False, True])
def test_transformers_refuses_broken_coefficients(method: str, trainable: bool, tmp_path: Path) -> None:
    """transformers fills parameters without our hooks: verified when it is done, or at the first forward pass."""
    trained(tiny_models.llama(), method).save_pretrained(str(tmp_path))
    poison(float("nan"), method)(tmp_path)
    model = tiny_models.llama()
    with pytest.raises(ValueError, match="The checksum of the coefficients is"):
        model.load_adapter(str(tmp_path), is_trainable=trainable)
        assert trainable
        model(tiny_models.tokens())


def test_no_pickle(tmp_path: Path) -> None:
    """A checkpoint that is a pickle does not run code."""
    trained(tiny_models.llama()).save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({FIRST: Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(Exception):  # noqa: B017 - torch's unpickler chooses what to raise
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    assert not (tmp_path / "ran").exists()


# Model card


CARDS = {
    "NOLA": ["https://huggingface.co/papers/2310.02556"],
    "PRANC": ["https://huggingface.co/papers/2206.08464"],
    "MCNC": [
        "https://huggingface.co/papers/2406.19301",
        "A patent application covers the method (US 20250384255 A1).",
        # 2 x (2 x (32 + 32) + 2 x (32 + 16)) numbers; 2 x (7 + 7 + 7 + 4) chunks of 10; 3 x 5 + 5 x 10 weights
        "| compression | 448 numbers from 200 coefficients (2 to 1), by a frozen network of 65 weights",
    ],
    "MCNC, weight": ["| compression | 3,072 numbers from 714 coefficients (4 to 1)"],  # 2 x (79 + 40) chunks
}


@pytest.mark.parametrize("method", CARDS)
def test_model_card(method: str, tmp_path: Path) -> None:
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = "somebody/tiny-llama"
    trained(base, method, seed=42, task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "adapter"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "somebody/tiny-llama"
    assert {lower(method), "peft_ext"} <= set(card.data.tags)
    for part in (
        f"# {lower(method).upper()} adapter",
        *CARDS[method],
        "`somebody/tiny-llama`",
        "| seed | 42 |",
        "2 layers of 16 x 32, 2 layers of 32 x 32",
        "import peft_ext",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert part in card.text, part
    assert "More Information Needed" not in card.text
    assert ("patent" in card.text) == (lower(method) == "mcnc")
    assert card.text.count("coefficients (") == (lower(method) == "mcnc")


def test_code_of_the_model_card_runs(tmp_path: Path) -> None:
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = "base"
    model = trained(base, task_type="CAUSAL_LM")
    model.save_pretrained(str(tmp_path / "adapter"))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)
    code = code.replace("<this folder or repository>", "adapter")
    check = "import torch, tiny_models\ntorch.save(model.eval()(tiny_models.tokens()).logits.detach(), 'logits.pt')"
    run_python(code + check, tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tiny_models.tokens()).logits)


def test_without_the_import_the_error_names_the_method(tmp_path: Path) -> None:
    trained(tiny_models.llama()).save_pretrained(str(tmp_path))
    code = (
        "import tiny_models\nfrom peft import PeftModel\n"
        "try:\n    PeftModel.from_pretrained(tiny_models.llama(), '.')\n"
        "except KeyError as error:\n    print(repr(error))"
    )
    assert "NOLA" in run_python(code, tmp_path)


def test_a_card_that_somebody_wrote_keeps_its_text(tmp_path: Path) -> None:
    written = "---\nlicense: mit\ntags:\n- restaurants\n---\n\n# My adapter\n\nTrained with care, {braces} and all.\n"
    (tmp_path / "README.md").write_text(written)
    model = trained(tiny_models.llama())
    model.save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert "# My adapter\n\nTrained with care, {braces} and all." in card.text
    assert card.data.license == "mit" and "nola" in card.data.tags
    assert "import peft_ext" in card.text


def test_saving_again_replaces_the_description(tmp_path: Path) -> None:
    for _ in range(2):  # PEFT adds its version when there is a card already
        trained(tiny_models.llama(), seed=1).save_pretrained(str(tmp_path))
    before = (tmp_path / "README.md").read_text()
    trained(tiny_models.llama(), seed=1).save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == before
    with open(tmp_path / "README.md", "a") as card:
        card.write("\nA note at the end.\n")
    trained(tiny_models.llama(), seed=2).save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "| seed | 2 |" in text and "| seed | 1 |" not in text
    assert text.count("import peft_ext") == before.count("import peft_ext") == 2
    assert text.rstrip().endswith("A note at the end.")


def test_a_local_base_model_stays_out_of_the_metadata(tmp_path: Path) -> None:
    tiny_models.llama().save_pretrained(tmp_path / "base")
    base = type(tiny_models.llama()).from_pretrained(tmp_path / "base")
    trained(base).save_pretrained(str(tmp_path / "adapter"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model is None
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text().split("---")[1]


# A resized vocabulary, whose embeddings PEFT saves too


def resized(folder: Path, method: str, **options: Any) -> PeftModel:
    """A model with two rows more than the base in the folder."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(base.config.vocab_size + 2, mean_resizing=False)
    return get_peft_model(base, config_of(method, task_type="CAUSAL_LM", **options)).eval()


@one_of_each
@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["lm_head"]], ids=len)
def test_trained_embeddings_of_a_resized_vocabulary(method: str, modules: list[str], tmp_path: Path) -> None:
    tiny_models.llama().save_pretrained(tmp_path / "base")
    model = resized(tmp_path / "base", method, modules_to_save=modules)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    expected = model(tiny_models.tokens()).logits
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained(str(tmp_path / "adapter"))
    verify(read(tmp_path / "adapter"))
    model.load_adapter(str(tmp_path / "adapter"), "again")
    model.set_adapter("again")
    assert torch.equal(model(tiny_models.tokens()).logits, expected)
    if len(modules) == 2:  # no row of the base matters
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        other.resize_token_embeddings(other.config.vocab_size + 2, mean_resizing=False)
        loaded = PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
        assert torch.equal(loaded(tiny_models.tokens()).logits, expected)


def test_random_rows_of_a_resized_vocabulary(tmp_path: Path) -> None:
    tiny_models.llama().save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        resized(tmp_path / "base", "NOLA").save_pretrained(str(tmp_path / "adapter"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(other.config.vocab_size + 2, mean_resizing=False)
    with pytest.raises(ValueError, match="holds embeddings that are no part of it .*`modules_to_save`"):
        PeftModel.from_pretrained(other, str(tmp_path / "adapter"))


# Names, and what cannot be loaded again


@one_of_each
def test_an_adapter_may_be_called_like_its_method(method: str, tmp_path: Path) -> None:
    base, name = tiny_models.llama(), f"{lower(method)}_v1"
    model = get_peft_model(base, config_of(method, target_modules=["q_proj"], modules_to_save=["lm_head"]), name).eval()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / name), name).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tiny_models.tokens(2)).logits, model(tiny_models.tokens(2)).logits)


@one_of_each
def test_an_adapter_with_the_name_of_modules_does_not_empty_the_files_of_others(method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method)
    model.save_pretrained(str(tmp_path))
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.add_adapter("self_attn", config_of(method, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="'default' cannot be saved beside 'self_attn': modules of the model have"):
        model.save_pretrained(str(tmp_path), selected_adapters=["default"])
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == written


@one_of_each
def test_coefficients_that_are_not_finite(method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method)
    first = next(iter(coefficients_of(model).values()))
    first.data[0] = 1e6
    model.peft_config["default"].coefficient_dtype = "float16"
    with pytest.raises(ValueError, match="Coefficients of up to 1e.06 are infinite in float16"):
        model.save_pretrained(str(tmp_path))
    model.peft_config["default"].coefficient_dtype = "float32"
    first.data[0] = torch.nan
    with pytest.warns(UserWarning, match="coefficients are not finite: what is saved cannot be loaded again"):
        model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="must be finite"):
        PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))


@one_of_each
def test_an_adapter_of_the_same_name_in_other_modules(method: str, tmp_path: Path) -> None:
    base = tiny_models.llama()
    trained(base, method).save_pretrained(str(tmp_path))
    for other in (["q_proj", "k_proj"], ["k_proj"]):
        with pytest.raises(ValueError, match="has an adapter 'default' already, in '.*v_proj|q_proj'.*`unload\\(\\)`"):
            get_peft_model(base, config_of(method, target_modules=other))
    get_peft_model(base, config_of(method, target_modules=["q_proj", "v_proj", "k_proj"]))


@one_of_each
def test_a_merged_adapter_is_not_loaded_into(method: str, tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), method)
    model.save_pretrained(str(tmp_path))
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    before = weight.detach().clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match="Adapter 'default' is merged: .* Call `unmerge_adapter"):
        model.load_adapter(str(tmp_path), "default")
    model.unmerge_adapter()
    torch.testing.assert_close(weight.detach(), before)
    model.load_adapter(str(tmp_path), "default")
