"""YAML files, presets, flags, methods by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import FourierFTConfig, LoraConfig

from peft_ext import NolaConfig
from recipes.finetune_gpt2 import FinetuneGPT2
from recipes.support.arguments import CONFIGS, UserError, parse_arguments
from recipes.support.methods import parse_methods
from recipes.support.runs import argument_types, check_output_dir, claim_output_dir

TYPES = argument_types(FinetuneGPT2)


def parse(*argv: str) -> dict[str, Any]:
    parsed = parse_arguments("finetune_gpt2", TYPES, argv)
    return {key: value for each in parsed for key, value in vars(each).items()}


def test_a_file_gives_values_and_flags_override_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 5e-3\nmax_steps: 7\nseeds: [3, 4]\nuse_cpu: true\nmax_eval_samples: null\n"
        'prompt_template: "{source}\\n= "\nmethods:\n  - nola\n  - {name: lora, r: 1}\n'
    )
    values = parse(str(file), "--max_steps", "9")
    assert (values["learning_rate"], values["max_steps"], values["seeds"]) == (5e-3, 9, [3, 4])
    assert values["use_cpu"] is True
    assert values["max_eval_samples"] is None
    assert values["prompt_template"] == "{source}\n= "
    assert [(m.name, m.options) for m in parse_methods(values["methods"])] == [("nola", {}), ("lora", {"r": 1})]


def test_without_arguments_the_quickstart_runs() -> None:
    assert parse()["restaurants"] is True
    assert parse("--preset", "quickstart", "--max_steps", "3")["max_steps"] == 3


def test_the_e2e_preset_holds_the_settings_of_the_paper() -> None:
    values = parse("--preset", "e2e")
    (method,) = parse_methods(values["methods"])
    config = method.config("CAUSAL_LM", seed=0)
    assert isinstance(config, NolaConfig)
    assert (config.r, config.num_basis, config.alpha) == (8, 512, 8)
    expected = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 5,
        "warmup_steps": 500,
        "label_smoothing_factor": 0.1,
        "adam_beta2": 0.999,
        "weight_decay": 0,
        "num_beams": 10,
        "length_penalty": 0.8,
        "no_repeat_ngram_size": 4,
    }
    assert {key: values[key] for key in expected} == expected
    assert values["lr_scheduler_type"] == "linear"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("finetune_gpt2_*.yaml")), ids=lambda path: path.stem)
def test_every_preset_parses(path: Path) -> None:
    for method in parse_methods(parse(str(path))["methods"]):
        method.config("CAUSAL_LM", seed=0)


@pytest.mark.parametrize(
    "text, said",
    [
        ("learning_rat: 1", ["learning_rat", "'learning_rate'"]),
        ("- 1", ["key: value"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(str(file))
    assert all(part in str(caught.value) for part in said), caught.value


def test_other_bad_command_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        parse(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="'--num_beam'.*'num_beams'"):
        parse("--num_beam", "2")
    with pytest.raises(UserError, match="not both"):
        parse(str(CONFIGS / "finetune_gpt2_e2e.yaml"), "--preset", "e2e")
    with pytest.raises(SystemExit) as caught:
        parse("--max_steps", "many")
    assert caught.value.code == 2


def test_methods_by_name() -> None:
    nola, lora, fourier = parse_methods(
        ["nola", "{name: LoRA, r: 1, learning_rate: 2e-4, label: small}", "{name: fourierft, n_frequency: 10}"]
    )
    assert (nola.label, nola.learning_rate, nola.folder) == ("nola", None, "nola")
    assert (lora.label, lora.learning_rate, lora.options) == ("small", 2e-4, {"r": 1})
    assert fourier.folder == "fourierft-n_frequency=10"
    assert isinstance(lora.config("CAUSAL_LM", 0), LoraConfig)
    assert isinstance(fourier.config("CAUSAL_LM", 0), FourierFTConfig)
    # The run's seed is the basis's too, unless the user fixed that.
    assert nola.config("CAUSAL_LM", 5).seed == 5
    (fixed,) = parse_methods(["{name: nola, seed: 9}"])
    assert fixed.config("CAUSAL_LM", 5).seed == 9


@pytest.mark.parametrize(
    "specs, said",
    [
        (["lara"], ["'lara'", "lora", "nola"]),
        (["{name: nola, rank: 3}"], ["'nola'", "'rank'", "3", "num_basis"]),
        (["{name: nola, task_type: SEQ_CLS}"], ["'task_type'"]),
        (["{r: 3}"], ["'name'"]),
        (["{name: nola, learning_rate: -1}"], ["learning_rate", "-1", "positive"]),
        (["nola", "nola"], ["'nola'", "label"]),
        (["{name: nola, r: 0}"], ["'nola r=0'", "`r`", "0"]),
    ],
)
def test_bad_methods_are_refused(specs: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        for method in parse_methods(specs):
            method.config("CAUSAL_LM", 0)
    assert all(part in str(caught.value) for part in said), caught.value


def prepare(folder: Path, *argv: str) -> None:
    parsed = parse_arguments("finetune_gpt2", TYPES, ["--output_dir", str(folder), *argv])
    claim_output_dir(parsed[-1], check_output_dir(parsed[-1], parsed, parsed[4].overwrite_output_dir))


def test_output_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepare(folder, "--max_steps", "3")
    finished = folder / "nola-seed0" / "result.json"
    state = folder / "lora-seed0" / "checkpoint-2" / "trainer_state.json"
    for file in (finished, state):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    with pytest.raises(UserError, match="not empty.*--overwrite_output_dir.*--resume_from_checkpoint"):
        prepare(folder, "--max_steps", "3")
    prepare(folder, "--max_steps", "3", "--resume_from_checkpoint", "true")
    with pytest.raises(UserError, match="max_steps = 3, now it is 4"):
        prepare(folder, "--max_steps", "4", "--resume_from_checkpoint", "true")
    with pytest.raises(UserError, match="the only value is true"):
        prepare(folder, "--max_steps", "3", "--resume_from_checkpoint", "checkpoint-2")
    assert finished.exists() and state.exists()
    prepare(folder, "--max_steps", "4", "--overwrite_output_dir")
    # Nothing of the overwritten run may be taken for finished or continued later.
    assert not finished.exists() and not state.exists()
    assert json.loads((folder / "arguments.json").read_text())["max_steps"] == 4
    with pytest.raises(UserError, match="is a file"):
        prepare(folder / "arguments.json")


def test_bad_input_of_the_recipe(flags: list[str], refused: Callable[[list[str]], str], tmp_path: Path) -> None:
    def without(name: str) -> list[str]:
        place = flags.index(name)
        return flags[:place] + flags[place + 2 :]

    said = refused([*flags, "--source_column", "meaning"])
    assert "'meaning'" in said and "'mr', 'ref'" in said and "'train'" in said
    assert "--preset quickstart" in refused([*without("--model_name_or_path")])
    # The tests run with HF_HUB_OFFLINE=1, which fails as an unreachable hub does, at once.
    for name in ("--model_name_or_path", "--dataset_name"):
        said = refused([*flags, name, "nobody/nothing"])
        assert "'nobody/nothing'" in said and all(
            flag in said for flag in ("--preset quickstart", "--model_name_or_path", "--dataset_name")
        )
    assert '"dev"' in refused([*flags, "--eval_split", "dev"])
    assert "--text_column" in refused([*without("--target_column")])
    assert "{source}" in refused([*flags, "--prompt_template", "x"])
    assert "128 positions" in refused([*flags, "--max_source_length", "120"])
    assert "max_train_samples is 0" in refused([*flags, "--max_train_samples", "0"])
    said = refused([*flags, "--methods", "{name: lora, target_modules: [nowhere]}"])
    assert "nowhere" in said and "lora" in said
    assert "leave out" in refused([*flags, "--restaurants"])
    assert not (tmp_path / "out").exists(), "a refused run must not stand in the way of the next"
