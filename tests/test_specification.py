"""The format of checkpoints: docs/checkpoint-format.md describes it, and what was ever written stays readable.

tests/reference_reader.py was written from the document; here it has to give what the library gives. tests/golden holds
checkpoints as text, each with what it must load as. They stand for those that people have: a golden checkpoint is never
changed or removed. Where one fails, the library is wrong. For a new method, or a new version of the format, add one:

    python tests/golden/make.py CASE DTYPE       # a case of tests/specification_cases.py; overwrites nothing
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_reader
import tiny_models
from peft import PeftModel
from safetensors import safe_open
from specification_cases import CASES, DTYPES, NETWORKS, exact, loaded_weights, rebuilt_weights, save
from torch import nn

from peft_ext import McncConfig, NolaConfig, PrancConfig, VisualPromptConfig, load_from_seed
from peft_ext.checkpoint.identity import canonical, fold_names, unfold_names
from peft_ext.randomness import uniform
from peft_ext.tuners.config import CheckpointedConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "checkpoint-format.md"
GOLDEN = Path(__file__).parent / "golden"
# With every type of coefficients.
MAIN = ["nola", "pranc", "mcnc", "prompts", "network-pranc", "network-mcnc", "network-mcnc-factors", "network-nola"]
ROUNDING = 1e-6  # relative to the largest weight


def load(name: str, folder: Path) -> nn.Module:
    base = getattr(tiny_models, name)()
    return load_from_seed(folder, base) if name in NETWORKS else PeftModel.from_pretrained(base, str(folder))


def configuration(folder: Path) -> dict[str, Any]:
    if (folder / "seed_config.json").exists():
        return json.loads((folder / "seed_config.json").read_text())["method"]
    return json.loads((folder / "adapter_config.json").read_text())


# The document


def test_the_reference_reader_stands_alone() -> None:
    tree = ast.parse(Path(reference_reader.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "numpy" in imported and not any(name.startswith(("torch", "peft")) for name in imported)
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"numpy"}


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_random_numbers(seed: int) -> None:
    stream = ("any", 3, "ü")
    expected = uniform(seed, stream, 100).numpy()
    assert np.array_equal(reference_reader.uniform(seed, stream, 100), expected)
    for start, count in [(0, 1), (1, 6), (3, 5), (5, 20), (8, 8), (15, 2)]:
        assert np.array_equal(reference_reader.uniform(seed, stream, count, start), expected[start : start + count])


@pytest.mark.parametrize(
    "value",
    [
        {"b": [1, 2.0, 2.5, -0.0], "a": {"ü😀": None, '"\\\n\x7f': True}, "B": (1e-7, 1e-5, 0.0001, 123456.789)},
        [1e16, 1e22, 2**64 - 1, 0.1 + 0.2, 1e300, -7 / 3],
        "/é",
    ],
)
def test_canonical_json(value: Any) -> None:
    assert reference_reader.canonical(value) == canonical(value)


def test_canonical_json_by_example() -> None:
    value = {"b": 8.0, "a": [0.3, 1e-05, 1.5e-07], "A": "ü"}
    assert canonical(value) == '{"A":"\\u00fc","a":[0.3,1e-05,1.5e-07],"b":8}'


@pytest.mark.parametrize(
    "names",
    [
        [f"h.{i}.attn.{name}" for i in range(2) for name in "qv"],
        ["embedding", "h.0.q", "h.1.q", "h.3.q", "h.3.k", "norm", "a.1.b.2.c", "a.1.b.3.c", "0.q", "x.0", "x.0.q"],
        [],
    ],
)
def test_names(names: list[str]) -> None:
    assert reference_reader.unfold(fold_names(names)) == names == unfold_names(fold_names(names))


@pytest.mark.parametrize("config", [NolaConfig(), PrancConfig(apply_to="factors"), McncConfig(), VisualPromptConfig()])
def test_generating_fields(config: CheckpointedConfig) -> None:
    fields = sorted(config.generating().keys() - {"method", "factors_version"})
    assert reference_reader.GENERATING[config.method_name].split() == fields
    assert f"| {config.method_name} | {', '.join(f'`{name}`' for name in fields)} |\n" in DOCUMENT.read_text("utf-8")


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, dtype) for case in CASES for dtype in (DTYPES if case in MAIN else ["float32", "int4"])]
)
def test_weights_rebuilt_from_the_document(case: str, dtype: str, tmp_path: Path) -> None:
    save(case, dtype, tmp_path)
    expected, found = loaded_weights(load(CASES[case][0], tmp_path)), rebuilt_weights(case, tmp_path)
    assert found.keys() == expected.keys()
    assert sum(map(np.any, expected.values())) > len(expected) / 2  # int4 rounds some to zero
    bits = exact(configuration(tmp_path))
    for name, weight in expected.items():
        assert found[name].shape == weight.shape, name
        if bits:
            assert found[name].dtype == weight.dtype and np.array_equal(found[name], weight), name
        else:
            np.testing.assert_allclose(found[name], weight, rtol=0, atol=ROUNDING * np.abs(weight).max(), err_msg=name)


def test_what_is_saved_beside_the_coefficients(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    save("nola-llama", "int8", tmp_path, **options)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    modules = [reference_reader.Module(f"model.layers.{i}.self_attn.q_proj", 32, 32) for i in range(2)]
    _, beside = reference_reader.read_adapter(configuration(tmp_path), data, modules)
    assert [(name, tensor.shape) for name, tensor in beside.items()] == [("base_model.model.lm_head.weight", (64, 32))]


@pytest.mark.parametrize("case", ["pranc", "network-mcnc"])
def test_the_reference_reader_notices_damage(case: str, tmp_path: Path) -> None:
    """What it verifies is not empty."""
    save(case, "float32", tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    with safe_open(path, "np") as file:
        name = next(name for name in file.keys() if "coefficients" in name)
        number = file.get_tensor(name)[1].tobytes()
    data = path.read_bytes()
    place = data.index(number)
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(AssertionError):
        rebuilt_weights(case, tmp_path)


# Golden checkpoints


def summary(weights: dict[str, np.ndarray], bits: bool) -> Any:
    """What a golden checkpoint says of its weights: a hash of them, or of each three numbers and the norm."""
    if bits:
        return hashlib.sha256(b"".join(weight.tobytes() for weight in weights.values())).hexdigest()
    flat = {name: weight.astype(np.float64).ravel() for name, weight in weights.items()}
    return {
        name: [float(f"{x:.9g}") for x in (each[0], each[len(each) // 2], each[-1], np.linalg.norm(each))]
        for name, each in flat.items()
    }


def golden() -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def test_there_is_a_golden_checkpoint_of_every_method_and_type() -> None:
    assert {f"{case}-{dtype}" for case in MAIN for dtype in DTYPES} <= set(golden())
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.json")) < 200_000


@pytest.mark.filterwarnings("ignore:The base model has other weights")  # torch may initialise it otherwise one day
@pytest.mark.parametrize("name", golden())
def test_golden_checkpoint(name: str, tmp_path: Path) -> None:
    saved = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    for file, content in saved["json"].items():
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    for file, content in saved["base64"].items():
        (tmp_path / file).write_bytes(base64.b64decode(content))
    weights = loaded_weights(load(saved["model"], tmp_path))
    if isinstance(saved["weights"], str):
        assert summary(weights, True) == saved["weights"]
        return
    assert summary(weights, False).keys() == saved["weights"].keys()
    for each, numbers in saved["weights"].items():
        largest = np.abs(weights[each]).max()
        np.testing.assert_allclose(summary(weights, False)[each][:3], numbers[:3], rtol=0, atol=ROUNDING * largest)
        np.testing.assert_allclose(summary(weights, False)[each][3], numbers[3], rtol=ROUNDING)
