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
from dense_nola import coefficients_of
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ext import NolaConfig

Snapshot = Callable[[nn.Module], dict[str, Any]]


def trained(model: nn.Module, **options: Any) -> PeftModel:
    config = NolaConfig(**{"r": 2, "num_basis": (5, 7), "target_modules": ["q_proj", "v_proj"], **options})
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

# name: (model, fields of the configuration)
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "own bases": ("llama", {"share_basis": False, "seed": 2**64 - 1}),
    "patterns": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2}},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "regular expression": ("llama", {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    "gpt2": ("gpt2", {"target_modules": None}),
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
    for name, (build, options) in SAVED.items():
        trained(getattr(tiny_models, build)(), **options).save_pretrained(str(folder / name))
    run_python(LOAD.format(names=[(name, build) for name, (build, _) in SAVED.items()]), folder)
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_equal_to_the_bit_in_a_new_process(name: str, reloaded: Path) -> None:
    build, options = SAVED[name]
    model = trained(getattr(tiny_models, build)(), **options)
    with torch.no_grad():
        assert torch.equal(torch.load(reloaded / f"{name}.pt"), model(tiny_models.tokens()).logits)


def test_size_of_a_checkpoint(tmp_path: Path) -> None:
    """At most 4 bytes for a coefficient and 8 KiB for the names of the 60 layers of a 30-layer model."""
    model = trained(tiny_models.llama(30), num_basis=256, r=8)
    model.save_pretrained(str(tmp_path))
    coefficients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert coefficients == 60 * 512
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4 * coefficients + 8192
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_checkpoint_holds_the_coefficients_alone(tmp_path: Path) -> None:
    model = trained(tiny_models.llama())
    model(tiny_models.tokens())
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}.nola_coefficients": p for name, p in coefficients_of(model).items()}
    assert saved.keys() == expected.keys()
    assert all(saved[name].dtype == torch.float32 and torch.equal(saved[name], expected[name]) for name in saved)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NOLA" and config["seed"] == 0 and config["generator_version"] == 1
    assert re.fullmatch(r"[0-9a-f]{16}", config["fingerprint"])
    assert config["target_shapes"] == {"32 x 32": 2, "16 x 32": 2}
    assert config["num_basis"] == [5, 7]


def test_saved_and_loaded_configuration_are_equal(tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), rank_pattern={"q_proj": 3}, alpha=2.5, seed=12345678901234567890)
    model.save_pretrained(str(tmp_path / "one"))
    config = NolaConfig.from_pretrained(str(tmp_path / "one"))
    assert config.seed == 12345678901234567890 and config.num_basis == (5, 7) and config.rank_pattern == {"q_proj": 3}
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "one"))
    loaded.save_pretrained(str(tmp_path / "two"))
    one, two = ((tmp_path / name / "adapter_config.json").read_text() for name in ("one", "two"))
    assert json.loads(one) == json.loads(two)


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    model = trained(tiny_models.llama())
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path), is_trainable=True)
    x = tiny_models.tokens()
    for each in (model, loaded):
        each(input_ids=x, labels=x).loss.backward()
    for a, b in zip(coefficients_of(model).values(), coefficients_of(loaded).values()):
        assert torch.equal(a.grad, b.grad)
    frozen = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_several_adapters_in_a_folder(tmp_path: Path) -> None:
    model = trained(tiny_models.llama())
    model.add_adapter("other", NolaConfig(r=3, num_basis=4, seed=5, target_modules=["o_proj"], init_weights=False))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    loaded.load_adapter(str(tmp_path / "other"), "other")
    x = tiny_models.tokens()
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(x).logits, model(x).logits)


def test_loading_over_an_adapter_in_use(tmp_path: Path) -> None:
    """Coefficients loaded under a name in use replace those that were used before."""
    model = trained(tiny_models.llama())
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(tiny_models.llama())
    for parameter in coefficients_of(model).values():
        parameter.data = parameter.data.to(dtype).float()
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path))
    x = tiny_models.tokens()
    assert torch.equal(loaded(x).logits, model(x).logits)


# What is refused


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.nola_coefficients"


def poison(value: float) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors[FIRST][3].fill_(value))


# name: (what is done to the saved adapter, what the message says: the field, what was given, what is allowed)
DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "r": (edit_config(r=0), ["`r`", "positive integer", "got 0"]),
    "r, text": (edit_config(r="8"), ["`r`", "positive integer", "got '8'"]),
    "num_basis": (edit_config(num_basis=[5, -1]), ["`num_basis`", "positive integer", "got -1"]),
    "num_basis, three": (edit_config(num_basis=[5, 7, 9]), ["`num_basis`", "pair", "[5, 7, 9]"]),
    "num_basis, fraction": (edit_config(num_basis=2.5), ["`num_basis`", "positive integer", "2.5"]),
    "num_basis, other": (edit_config(num_basis=[5, 8]), [FIRST, "(13,)", "(12,)", "`num_basis`"]),
    "seed": (edit_config(seed=-1), ["`seed`", "0 and 2**64 - 1", "got -1"]),
    "seed, large": (edit_config(seed=2**64), ["`seed`", "0 and 2**64 - 1", str(2**64)]),
    "seed, other": (edit_config(seed=1), ["`fingerprint`", "seed 1", "other random numbers"]),
    "version": (edit_config(generator_version=2), ["`generator_version`", "must be 1", "got 2", "upgrade"]),
    "fingerprint": (edit_config(fingerprint="0" * 16), ["`fingerprint`", "0" * 16, "edited"]),
    "shapes": (edit_config(target_shapes={"32 x 32": 3}), ["`target_shapes`", "3 layers of 32 x 32", "16 x 32"]),
    "no target": (edit_config(target_modules=["qkv"]), ["`target_modules`", "qkv", "q_proj"]),
    "unsupported target": (edit_config(target_modules=["norm"]), ["`target_modules`", "LlamaRMSNorm", "nn.Linear"]),
    "bias": (edit_config(bias="some"), ["`bias`", "'none', 'all' or 'nola_only'", "'some'"]),
    "dropout": (edit_config(nola_dropout=1.5), ["`nola_dropout`", "0 to below 1", "1.5"]),
    "nan": (poison(float("nan")), ["finite", FIRST, "NaN"]),
    "infinity": (poison(-float("inf")), ["finite", FIRST, "infinity"]),
    "missing layer": (
        edit_tensors(lambda tensors: tensors.pop(FIRST)),
        ["1 adapted layers find no coefficients", FIRST],
    ),
    "additional layer": (
        edit_tensors(lambda tensors: tensors.update({FIRST.replace("layers.0", "layers.9"): torch.zeros(12)})),
        ["1 saved coefficients find no layer", "layers.9"],
    ),
    "shape": (
        edit_tensors(lambda tensors: tensors.update({FIRST: torch.zeros(2, 6)})),
        [FIRST, "(12,)", "(2, 6)"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(name: str, tmp_path: Path, snapshot: Snapshot) -> None:
    damage, parts = DAMAGES[name]
    trained(tiny_models.llama()).save_pretrained(str(tmp_path))
    damage(tmp_path)
    base = tiny_models.llama()
    before = snapshot(base)
    with pytest.raises(ValueError) as refused:
        PeftModel.from_pretrained(base, str(tmp_path))
    for part in parts:
        assert part in str(refused.value)
    unchanged(before, snapshot(base))


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"] == after["modules"]
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(before["tensors"][name], after["tensors"][name]) for name in before["tensors"])


@pytest.mark.parametrize("name", DAMAGES)
def test_a_refused_checkpoint_leaves_other_adapters_alone(name: str, tmp_path: Path, snapshot: Snapshot) -> None:
    damage, _ = DAMAGES[name]
    trained(tiny_models.llama()).save_pretrained(str(tmp_path))
    damage(tmp_path)
    model = trained(tiny_models.llama(), seed=4)
    x = tiny_models.tokens()
    expected, before = model(x).logits, snapshot(model)
    with pytest.raises(ValueError):
        model.load_adapter(str(tmp_path), "second")
    assert torch.equal(model(x).logits, expected)
    unchanged(before, snapshot(model))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("build", [lambda: tiny_models.llama(3), lambda: tiny_models.llama(hidden_size=64)])
def test_another_base_model_is_refused(build: Callable[[], nn.Module], tmp_path: Path, snapshot: Snapshot) -> None:
    trained(tiny_models.llama()).save_pretrained(str(tmp_path))
    base = build()
    before = snapshot(base)
    with pytest.raises(ValueError, match="`target_shapes`.*2 layers of 32 x 32.*does not fit the model"):
        PeftModel.from_pretrained(base, str(tmp_path))
    unchanged(before, snapshot(base))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target_modules": ["qkv"]}, ["`target_modules`", "qkv", "q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, ["`target_modules`", "q_proj", "[7]"]),
        ({"target_modules": ["q_proj", "norm"]}, ["`target_modules`", "'model.norm'", "LlamaRMSNorm", "nn.Linear"]),
        ({"target_modules": ["self_attn"]}, ["`target_modules`", "LlamaAttention", "nn.Linear"]),
    ],
)
def test_targets_are_checked_before_the_model_is_changed(
    options: dict[str, Any], parts: list[str], snapshot: Snapshot
) -> None:
    base = tiny_models.llama()
    before = snapshot(base)
    with pytest.raises(ValueError) as refused:
        get_peft_model(base, NolaConfig(**options))
    for part in parts:
        assert part in str(refused.value)
    unchanged(before, snapshot(base))


def test_unused_projection_of_attention_is_refused(snapshot: Snapshot) -> None:
    base = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    before = snapshot(base)
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear.*nn.MultiheadAttention"):
        get_peft_model(base, NolaConfig(target_modules=["out_proj"]))
    unchanged(before, snapshot(base))


def test_broken_coefficients_are_refused_at_the_first_pass(tmp_path: Path) -> None:
    """The adapters of transformers are loaded without our checks: then the first forward pass finds it."""
    trained(tiny_models.llama()).save_pretrained(str(tmp_path))
    poison(float("nan"))(tmp_path)
    model = tiny_models.llama()
    model.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="coefficients of an adapter must be finite"):
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


def test_model_card(tmp_path: Path) -> None:
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = "somebody/tiny-llama"
    trained(base, seed=42, task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "adapter"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "somebody/tiny-llama"
    assert {"nola", "peft_ext"} <= set(card.data.tags)
    for part in (
        "NOLA",
        "https://huggingface.co/papers/2310.02556",
        "`somebody/tiny-llama`",
        "| seed | 42 |",
        "2 layers of 16 x 32, 2 layers of 32 x 32",
        "import peft_ext",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert part in card.text, part
    assert "More Information Needed" not in card.text


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
