"""The command line, through `main` and through the entry point."""

from __future__ import annotations

import configparser
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
from methods import METHODS, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_ext import McncConfig, NolaConfig, PrancConfig, SeededNetwork, VisualPromptConfig, load_from_seed, to_lora
from peft_ext.__main__ import main
from peft_ext.adapters.saved import read
from peft_ext.checkpoint.identity import read_record, write_record
from peft_ext.checkpoint.quantization import DTYPES
from peft_ext.tuners.target import Target, together

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "adapter_model.safetensors"
X = tiny_models.tokens()
every_method = pytest.mark.parametrize("method", METHODS)


def randomised(model: Any) -> Any:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model.eval()


def saved(folder: Path, method: str = "NOLA", **options: Any) -> Path:
    config = config_of(method, **{"target_modules": ["q_proj", "v_proj"], "init_weights": True, **options})
    model = get_peft_model(tiny_models.llama(), config)
    randomised(model).save_pretrained(str(folder))
    return folder


def saved_network(folder: Path) -> Path:
    config = PrancConfig(num_coefficients=20, nnz=2)
    randomised(SeededNetwork(tiny_models.vit(), config)).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command: (exit code, what it prints, what it says on stderr)."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what came before
        code = main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


def damage(folder: Path, name: str = WEIGHTS) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)


# inspect


@every_method
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_inspect(method: str, dtype: str, run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, method, seed=42, coefficient_dtype=dtype)
    code, out, err = run("inspect", folder, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert found["kind"] == "adapter" and found["method"] == METHODS[method][0].method_name
    assert found["identity"] == config["identity"]["sha256"] and found["options"]["seed"] == 42
    assert found["bytes"] == (folder / WEIGHTS).stat().st_size and found["coefficient_dtype"] == dtype
    assert found["modules"] == {"32 x 32": 2, "16 x 32": 2}
    assert found["names"] == ["model.layers.{0..1}.self_attn.{q_proj,v_proj}"]
    model = PeftModel.from_pretrained(tiny_models.llama(), str(folder), is_trainable=True)
    assert (
        found["coefficients"] == sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(found["vectors"])
    )
    assert {"r", "seed"} <= set(found["generating"]) or method.startswith("PRANC")
    code, out, _ = run("inspect", folder)
    assert code == 0 and found["identity"] in out and f"{found['coefficients']:,} in {dtype}" in out


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("PRANC, dense", "NOLA, own bases")])
def test_what_would_be_drawn_is_what_is_held(method: str, run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, method)
    drawn = json.loads(run("inspect", folder, "--json")[1])["drawn"]
    model = PeftModel.from_pretrained(tiny_models.llama(), str(folder))
    model(X)
    generators = {
        expansion.generator
        for module in model.modules()
        for expansions in getattr(module, f"{METHODS[method][0].method()}_expansions", {}).values()
        for expansion in expansions
    }
    held = {id(each): each.nbytes for generator in generators for each in generator.frozen}
    assert sum(row["memory"] for row in drawn) == sum(held.values()) > 0
    assert all(row["memory"] == 4 * row["numbers"] for row in drawn) or method.startswith("PRANC")


@pytest.mark.parametrize("method", ["PRANC, dense", "NOLA, own bases"])
def test_what_is_drawn_at_every_use_takes_no_memory(method: str, run: Any, tmp_path: Path) -> None:
    drawn = json.loads(run("inspect", saved(tmp_path, method), "--json")[1])["drawn"]
    config = config_of(method)
    shapes = [(32, 32), (16, 32)]
    targets = together([Target("", *shape) for shape in shapes])
    generators = [each for target in targets for each in config.generators(target)]
    assert sum(row["numbers"] for row in drawn) == 2 * sum(each.num_basis * each.size for each in generators)
    assert all(row["memory"] == 0 and "at every use" in row["what"] for row in drawn)


def test_inspect_visual_prompts_and_networks(run: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=3, deep=True))
    randomised(model).save_pretrained(str(tmp_path / "prompts"))
    found = json.loads(run("inspect", tmp_path / "prompts", "--json")[1])
    assert found["coefficients"] == 2 * 3 * 32 and found["drawn"] == [] and found["modules"] == {"3 x 32": 2}
    found = json.loads(run("inspect", saved_network(tmp_path / "network"), "--json")[1])
    size = sum(parameter.numel() for parameter in tiny_models.vit().parameters())
    assert found["kind"] == "network" and found["network"] == "ViTForImageClassification"
    assert found["coefficients"] == 20 and found["drawn"][0]["numbers"] == size
    assert found["drawn"][1]["numbers"] == 2 * (size + 20)
    for folder in ("prompts", "network"):
        assert run("inspect", tmp_path / folder)[0] == 0


def test_json_has_the_documented_names(run: Any, tmp_path: Path) -> None:
    names = (
        "kind method folder base_model network options generating coefficients vectors coefficient_dtype bytes "
        "identity modules names beside unexplained drawn drawn_exactly"
    )
    for folder in (saved(tmp_path / "adapter"), saved_network(tmp_path / "network")):
        assert list(json.loads(run("inspect", folder, "--json")[1])) == names.split()
        assert list(json.loads(run("verify", folder, "--json")[1])) == ["folder", "identity", "verified", "unexplained"]
        found = json.loads(run("quantize", folder, tmp_path / f"{folder.name}-int4", "--dtype", "int4", "--json")[1])
        assert list(found) == "folder coefficient_dtype bytes bytes_before error not_copied".split()


# verify


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_verify(method: str, dtype: str, run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, method, coefficient_dtype=dtype)
    code, out, err = run("verify", folder)
    assert (
        (code, err) == (0, "")
        and "saved checksum" in out
        and "names and shapes" in out
        and f"in {dtype} are there" in out
    )
    damage(folder)
    code, out, err = run("verify", folder)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("peft-ext: ")


def test_verify_a_network(run: Any, tmp_path: Path) -> None:
    folder = saved_network(tmp_path)
    assert run("verify", folder)[0] == 0
    damage(folder, "model.safetensors")
    assert run("verify", folder)[0] == 1
    code, _, err = run("verify", saved_network(tmp_path / "again"), "--base", "somewhere")
    assert code == 2 and "has no base model" in err


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 1), ("r", 3), ("target_shapes", {"32 x 32": 4}), ("target_names", ["x"]), ("identity", 3)],
)
def test_verify_an_edited_configuration(field: str, value: Any, run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, "NOLA")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    code, _, err = run("verify", folder)
    assert code == 1 and err.startswith("peft-ext: ") and err.count("\n") == 1


def test_verify_tells_what_it_cannot_know(run: Any, tmp_path: Path) -> None:
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.lm_head.weight"
    save_file({**tensors, key: base.lm_head.weight.data}, folder / WEIGHTS)  # of the base model, unchanged
    code, out, _ = run("verify", folder)
    assert code == 0 and f"Not verified: {key}" in out
    assert json.loads(run("verify", folder, "--json")[1])["unexplained"] == [key]
    code, out, _ = run("verify", folder, "--base", tmp_path / "base", "--json")
    assert code == 0 and json.loads(out)["unexplained"] == []
    save_file({**tensors, key: torch.zeros_like(base.lm_head.weight)}, folder / WEIGHTS)
    code, _, err = run("verify", folder, "--base", tmp_path / "base")
    assert code == 1 and "would overwrite the base model" in err


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_verify_with_a_base_model(task: str | None, run: Any, tmp_path: Path) -> None:
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "adapter", task_type=task)
    code, out, _ = run("verify", folder, "--base", tmp_path / "base")
    assert (
        code == 0 and "2 layers of 16 x 32, 2 layers of 32 x 32" in out and "the weights that it was trained on" in out
    )
    base.model.layers[0].self_attn.q_proj.weight.data *= 2
    base.save_pretrained(tmp_path / "changed")
    code, out, _ = run("verify", folder, "--base", tmp_path / "changed")
    assert code == 0 and "The base model has other weights" in out
    tiny_models.llama(3).save_pretrained(tmp_path / "larger")
    code, _, err = run("verify", folder, "--base", tmp_path / "larger")
    assert code == 1 and "`target_shapes`" in err
    assert run("verify", folder, "--base", tmp_path / "nothing")[0] == 2


def test_verify_with_a_base_of_another_number_of_classes(run: Any, tmp_path: Path) -> None:
    """A head that was trained with the adapter replaces that of the base model, whatever classes that one has."""
    config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj"], modules_to_save=["classifier"])
    get_peft_model(tiny_models.vit(labels=3), config).save_pretrained(str(tmp_path / "adapter"))
    tiny_models.vit(labels=7).save_pretrained(tmp_path / "base")
    code, out, err = run("verify", tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 0 and "It fits ViTForImageClassification" in out, err
    tiny_models.vit(layers=3).save_pretrained(tmp_path / "deeper")
    code, _, err = run("verify", tmp_path / "adapter", "--base", tmp_path / "deeper")
    assert code == 1 and "`target_shapes`" in err


@pytest.mark.parametrize("trained_on", [torch.float16, torch.float32])
def test_base_weights_that_have_no_fingerprint(trained_on: torch.dtype, run: Any, tmp_path: Path) -> None:
    """Nothing is said of whether they are the same, be they so or not."""
    config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_models.llama().to(trained_on), config).save_pretrained(str(tmp_path / "adapter"))
    other = tiny_models.llama()
    for parameter in other.parameters():
        parameter.data *= 2
    other.half().save_pretrained(tmp_path / "base")
    code, out, _ = run("verify", tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 0 and "It fits" in out and "that it was trained on" not in out
    assert "float16, quantized and sharded weights have none: whether they are the same cannot be told" in out


# quantize


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_what_saving_in_that_type_is(method: str, dtype: str, run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", method, task_type="CAUSAL_LM")
    expected = saved(tmp_path / "two", method, task_type="CAUSAL_LM", coefficient_dtype=dtype)
    code, out, _ = run("quantize", folder, tmp_path / "out", "--dtype", dtype, "--json")
    assert code == 0
    found = json.loads(out)
    one, two = load_file(expected / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (expected, tmp_path / "out")]
    assert configs[0] == configs[1]
    cards = [ModelCard.load(path / "README.md") for path in (expected, tmp_path / "out")]
    assert cards[0].text == cards[1].text and cards[0].data.to_dict() == cards[1].data.to_dict()
    assert (found["error"] == 0) == (dtype == "float32") and found["error"] < (0.2 if dtype == "int4" else 0.02)
    assert found["bytes"] == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert run("verify", tmp_path / "out")[0] == 0
    models = [PeftModel.from_pretrained(tiny_models.llama(), str(path)) for path in (expected, tmp_path / "out")]
    assert torch.equal(models[0](X).logits, models[1](X).logits)


def test_quantize_keeps_biases_heads_and_the_text_of_a_card(run: Any, tmp_path: Path) -> None:
    config = NolaConfig(
        r=2, num_basis=4, bias="all", modules_to_save=["classifier"], target_modules=["q_proj", "query"]
    )
    randomised(get_peft_model(tiny_models.vit(), config)).save_pretrained(str(tmp_path / "one"))
    card = tmp_path / "one" / "README.md"
    card.write_text(card.read_text() + "\nTrained with care.\n")
    assert run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "int8")[0] == 0
    one, two = (PeftModel.from_pretrained(tiny_models.vit(), str(tmp_path / name)) for name in ("one", "two"))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters()):
        assert torch.equal(a, b) or "coefficients" in name
    assert "Trained with care." in (tmp_path / "two" / "README.md").read_text()


def test_quantize_copies_what_holds_no_tensors(run: Any, tmp_path: Path) -> None:
    config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj"])
    get_peft_model(tiny_models.llama(), config).save_pretrained(str(tmp_path / "one"))
    beside = ["tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "LICENSE"]
    of_a_run = ["trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state.pth", "x.safetensors.index.json"]
    for name in beside + of_a_run:
        (tmp_path / "one" / name).write_text(name)
    (tmp_path / "one" / "checkpoint-1").mkdir()
    code, out, _ = run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "int8", "--json")
    assert code == 0 and json.loads(out)["not_copied"] == sorted([*of_a_run, "checkpoint-1/"])
    assert "checkpoint-1/" in run("quantize", tmp_path / "one", tmp_path / "three", "--dtype", "int8")[1]
    assert "not copied" not in run("quantize", tmp_path / "two", tmp_path / "four", "--dtype", "int4")[1]
    own = {"README.md", "adapter_config.json", WEIGHTS}
    assert {path.name for path in (tmp_path / "two").iterdir()} == {*beside, *own}
    assert all((tmp_path / "two" / name).read_text() == name for name in beside)


def test_quantize_refuses_a_type_that_is_too_small(run: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_models.llama(), PrancConfig(num_coefficients=20, target_modules=["q_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(1e5)
    model.save_pretrained(str(tmp_path / "one"))
    code, _, err = run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "float16")
    assert code == 1 and "got 'float16', in which 20 of them would be infinite: the largest is 1e+05" in err
    assert not (tmp_path / "two").exists()
    assert run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "bfloat16")[0] == 0


def test_quantize_writes_the_type_that_it_is_told_for_coefficients_in_float64(run: Any, tmp_path: Path) -> None:
    config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj"])
    randomised(get_peft_model(tiny_models.llama().double(), config)).save_pretrained(str(tmp_path / "one"))
    name = "base_model.model.model.layers.0.self_attn.q_proj.nola_coefficients.values"
    assert load_file(tmp_path / "one" / WEIGHTS)[name].dtype == torch.float64
    code, out, _ = run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "bfloat16", "--json")
    assert code == 0 and 0 < json.loads(out)["error"] < 0.01
    assert load_file(tmp_path / "two" / WEIGHTS)[name].dtype == torch.bfloat16
    assert run("verify", tmp_path / "two")[0] == 0
    PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "two"))


def test_quantize_a_network(run: Any, tmp_path: Path) -> None:
    folder = saved_network(tmp_path / "one")
    images = torch.randn(2, 3, 16, 16)
    expected = load_from_seed(folder)(images).logits
    for dtype in DTYPES:
        out = tmp_path / dtype
        assert run("quantize", folder, out, "--dtype", dtype)[0] == 0
        assert json.loads((out / "seed_config.json").read_text())["method"]["coefficient_dtype"] == dtype
        found = load_from_seed(out)(images).logits
        assert torch.equal(found, expected) if dtype == "float32" else not torch.equal(found, expected)
        assert run("verify", out)[0] == 0


@pytest.mark.parametrize(
    "config",
    [
        McncConfig(r=4, k=2, d=50, widths=(8,), frequency=0.5),
        NolaConfig(r=4, num_basis=(9, 5)),
        NolaConfig(r=4, num_basis=6, share_basis=False),
    ],
)
def test_a_network_with_factors(config: Any, run: Any, tmp_path: Path) -> None:
    network = randomised(SeededNetwork(tiny_models.vit(), config))
    network.save_pretrained(tmp_path / "one")
    found = json.loads(run("inspect", tmp_path / "one", "--json")[1])
    assert found["coefficients"] == sum(parameter.numel() for parameter in network.parameters())
    network.weights()
    held = {id(each): each.nbytes for generator in network.generators for each in generator.frozen}
    assert sum(row["memory"] for row in found["drawn"][1:]) == sum(held.values())
    assert run("verify", tmp_path / "one")[0] == 0
    assert run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "int8")[0] == 0
    assert run("verify", tmp_path / "two")[0] == 0
    before, after = (load_from_seed(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(before[name], weight) for name, weight in network.weights().items())
    change = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert 0 < change.norm() < 0.5 * torch.cat([weight.flatten() for weight in before.values()]).norm()


def test_packed_coefficients_of_several_shapes_stay_packed(run: Any, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_models.llama(), McncConfig(r=2, k=3, d=13, target_modules=["q_proj", "up_proj"], coefficient_dtype="int8")
    )
    randomised(model).save_pretrained(str(tmp_path / "one"))
    assert run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "int4")[0] == 0
    again = get_peft_model(
        tiny_models.llama(), McncConfig(r=2, k=3, d=13, target_modules=["q_proj", "up_proj"], coefficient_dtype="int4")
    )
    again.load_adapter(str(tmp_path / "one"), "default")
    again.peft_config["default"].coefficient_dtype = "int4"
    again.save_pretrained(str(tmp_path / "three"))
    two, three = (load_file(tmp_path / name / WEIGHTS) for name in ("two", "three"))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert run("quantize", tmp_path / "one", tmp_path / "four", "--dtype", "float32")[0] == 0  # the hash tells which
    four = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "four"))
    one = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "one"))
    assert torch.equal(four(X).logits, one(X).logits)


def test_shapes_that_do_not_follow_from_names(run: Any, tmp_path: Path) -> None:
    """Layers of one name and two shapes: which is which is in no file."""
    base = tiny_models.llama()
    base.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    base.model.layers[1].mlp.gate_proj = torch.nn.Linear(32, 64, bias=False)
    base.model.layers[1].mlp.down_proj = torch.nn.Linear(64, 32, bias=False)
    config = McncConfig(r=2, k=3, d=13, target_modules=["up_proj"], coefficient_dtype="int4")
    randomised(get_peft_model(base, config)).save_pretrained(str(tmp_path / "one"))
    code, out, _ = run("verify", tmp_path / "one")
    assert code == 0 and "names and shapes" not in out
    assert run("quantize", tmp_path / "one", tmp_path / "two", "--dtype", "int8")[0] == 0
    code, _, err = run("quantize", tmp_path / "one", tmp_path / "three", "--dtype", "float32")
    assert code == 1 and "without the base model" in err and not (tmp_path / "three").exists()


def test_quantize_does_not_write_over_anything(run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for out in (folder, folder / ".." / "one"):
        code, _, err = run("quantize", folder, out, "--dtype", "int4", "--overwrite")
        assert code == 2 and "another folder" in err
    other = saved(tmp_path / "two", seed=1)
    code, _, err = run("quantize", folder, other, "--dtype", "int4")
    assert code == 2 and "new or empty" in err and read(other).config.seed == 1
    assert run("quantize", folder, other, "--dtype", "int4", "--overwrite")[0] == 0
    assert read(other).config.seed == 0 and run("verify", other)[0] == 0
    (tmp_path / "file").write_text("")
    assert run("quantize", folder, tmp_path / "file", "--dtype", "int4", "--overwrite")[0] == 2
    (tmp_path / "empty").mkdir()
    assert run("quantize", folder, tmp_path / "empty", "--dtype", "int4")[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_and_a_network_in_one_folder(run: Any, tmp_path: Path) -> None:
    adapter, network = saved(tmp_path / "one"), saved_network(tmp_path / "two")
    for source, out in ((adapter, network), (network, adapter)):
        code, _, err = run("quantize", source, out, "--dtype", "int8", "--overwrite")
        assert code == 2 and "nothing would say which of the two is meant" in err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (network / name).write_bytes((adapter / name).read_bytes())
    code, _, err = run("verify", network)
    assert code == 1 and "nothing says which of them is meant" in err


def test_a_count_that_is_wrong(run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(key for key in state if key.endswith("identity"))
    for count in (7, None):
        state[name] = write_record({**read_record(state[name], name), "count": count})
        save_file(state, weights)
        code, _, err = run("verify", folder)
        assert code == 1 and "`count` in" in err


def test_quantize_refuses_a_damaged_checkpoint(run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    damage(folder)
    assert run("quantize", folder, tmp_path / "two", "--dtype", "int4")[0] == 1
    assert not (tmp_path / "two").exists()


def test_a_network_whose_identity_lacks_its_hash(run: Any, tmp_path: Path) -> None:
    folder = saved_network(tmp_path / "one")
    described = json.loads((folder / "seed_config.json").read_text())
    del described["identity"]["sha256"]
    (folder / "seed_config.json").write_text(json.dumps(described))
    code, _, err = run("inspect", folder)
    assert code == 1 and "seed_config.json' is damaged: KeyError('sha256')" in err


# export


@every_method
def test_export_is_to_lora(method: str, run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", method)
    exact = method.startswith("NOLA") or method in ("MCNC", "PRANC, factors")
    size = [] if exact else ["--error", "0.25"]
    code, out, err = run("export", folder, tmp_path / "lora", *size, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["folder"] == str(tmp_path / "lora") and len(found["modules"]) == 4
    expected = to_lora(folder, tmp_path / "again", **({"error": 0.25} if size else {}))
    assert {**expected, "folder": found["folder"]} == found
    assert (tmp_path / "lora" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    code, out, _ = run("export", folder, tmp_path / "lora", *size, "--overwrite")
    assert code == 0 and f"{found['bytes']:,}" in out and f"{found['r']}, {found['lora_alpha']}" in out
    assert ("none, to rounding" in out) != bool(size)
    if size:
        assert f"{found['error']:.2e}; worst: {found['worst_error']:.2e}, {found['worst_module']}" in out
    lora = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "lora"))
    assert lora.peft_config["default"].peft_type == "LORA"


def test_export_with_a_base_model(run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"], nola_dropout=0.1)
    code, _, err = run("export", folder, tmp_path / "lora")
    assert code == 1 and "`base` must be given" in err and not (tmp_path / "lora").exists()
    tiny_models.llama().save_pretrained(tmp_path / "base")
    code, out, _ = run("export", folder, tmp_path / "lora", "--base", tmp_path / "base")
    assert code == 0 and "Dropout (0.1) is not exported" in out


def test_export_refuses_by_exit_code(run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "PRANC")
    code, _, err = run("export", folder, tmp_path / "lora")
    assert code == 1 and "`rank` or `error` must be given for PRANC" in err
    code, _, err = run("export", folder, folder, "--rank", "2")
    assert code == 2 and "`out` must be another folder" in err
    damage(folder)
    assert run("export", folder, tmp_path / "lora", "--rank", "2")[0] == 1
    assert not (tmp_path / "lora").exists()


# What is not there


@pytest.mark.parametrize("command", ["inspect", "verify", "quantize", "export"])
def test_missing_files(command: str, run: Any, tmp_path: Path) -> None:
    more = {"quantize": [tmp_path / "out", "--dtype", "int4"], "export": [tmp_path / "out"]}.get(command, [])
    get_peft_model(tiny_models.llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "lora"))
    folder = saved(tmp_path / "adapter")
    (folder / WEIGHTS).unlink()
    (tmp_path / "nothing").mkdir()
    for place in (tmp_path / "absent", tmp_path / "nothing", tmp_path / "lora", folder, "a/b/c"):
        code, out, err = run(command, place, *more)
        assert (code, out) == (2, "") and err.count("\n") == 1, place


@pytest.mark.parametrize("command", ["inspect", "verify", "quantize", "export"])
def test_a_folder_has_no_revisions(command: str, run: Any, tmp_path: Path) -> None:
    more = {"quantize": [tmp_path / "out", "--dtype", "int4"], "export": [tmp_path / "out"]}.get(command, [])
    code, out, err = run(command, saved(tmp_path / "adapter"), *more, "--revision", "main")
    assert (code, out) == (2, "") and "`revision` must be left out for a folder on this machine" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["inspect"],
        ["verify", "a", "b"],
        ["quantize", "a", "b"],
        ["quantize", "a", "b", "--dtype", "int3"],
        ["export", "a"],
        ["export", "a", "b", "--rank", "2", "--error", "0.1"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: peft-ext" in capsys.readouterr().err


def test_names_of_strangers_do_not_reach_the_terminal(run: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "\x1b[31mred [bold]x"}))
    code, out, _ = run("inspect", folder)
    assert code == 0 and "\x1b" not in out and "\\x1b[31mred [bold]x" in out


# The entry point


def test_a_repository_that_cannot_be_reached(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "peft_ext", "verify", "user/name", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("peft-ext:")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1)


def test_entry_point(tmp_path: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split() == ["peft-ext", "=", "peft_ext.__main__:main"]
    folder = saved(tmp_path)
    for code in (0, 1):
        done = subprocess.run([sys.executable, "-m", "peft_ext", "verify", str(folder)], cwd=ROOT, capture_output=True)
        assert done.returncode == code
        damage(folder)
