"""YAML files, presets, flags and the help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import TrainingArguments

from peft_ext import NolaConfig
from recipes.finetune_gpt2 import FinetuneGPT2
from recipes.finetune_vit import FinetuneViT
from recipes.support.arguments import CONFIGS, UserError, parse_arguments, run_main
from recipes.support.methods import parse_methods
from recipes.support.runs import argument_types
from recipes.train_from_seed import TrainFromSeed
from recipes.unlearn import Unlearn

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
    assert parse("--num_train_epochs", "2")["max_steps"] == -1 != parse()["max_steps"]  # which would win over epochs


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


def test_flags_alone_change_the_quickstart() -> None:
    values = parse("--output_dir", "elsewhere", "--methods", "lora")
    assert values["restaurants"] is True and values["max_steps"] == 150 and values["source_column"] == "meaning"
    assert values["output_dir"] == "elsewhere" and values["methods"] == ["lora"]


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "model-name-or-path"])
def test_with_a_model_or_data_of_ones_own_no_preset_applies(name: str) -> None:
    for flags in ([f"--{name}", "mine"], [f"--{name}=mine"]):
        values = parse(*flags)
        assert values["restaurants"] is False and values["source_column"] is None and values["max_steps"] == -1
    values = parse(f"--{name}", "mine", "--preset", "e2e")
    assert values["source_column"] == "mr" and values[name.replace("-", "_")] == "mine"


def test_with_weights_of_ones_own_no_preset_applies_to_unlearning() -> None:
    types = argument_types(Unlearn)
    *_, quickstart, training = parse_arguments("unlearn", types, ["--output_dir", "X"])
    assert quickstart.digits is True and training.output_dir == "X"
    *_, quickstart, training = parse_arguments("unlearn", types, ["--network_weights", "w.safetensors"])
    assert quickstart.digits is False


@pytest.mark.parametrize("recipe", [FinetuneGPT2, FinetuneViT, TrainFromSeed, Unlearn], ids=lambda recipe: recipe.name)
def test_help_lists_the_options_under_headings(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        parse_arguments(recipe.name, argument_types(recipe), ["nowhere.yaml", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    sections: dict[str, str] = {}
    heading = ""
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            heading = line[:-1]
        sections[heading] = sections.get(heading, "") + line + "\n"
    *own, last = argument_types(recipe)
    headings = [each.__doc__.splitlines()[0].rstrip(".") for each in own]
    assert last is TrainingArguments
    assert list(sections)[1:] == ["options", "Presets", *headings, "Training (transformers.TrainingArguments)"]
    assert "--preset {" in sections["Presets"] and "quickstart" in sections["Presets"]
    for title, each in zip([*headings, list(sections)[-1]], [*own, last]):
        for field in dataclasses.fields(each):
            assert f"--{field.name} " in sections[title] or f"--{field.name}," in sections[title], field.name
    assert "the preset quickstart applies" in " ".join(text.split())
    assert "accelerate_multi_gpu.yaml" in text


@pytest.mark.parametrize(
    "content, said",
    [
        (b"learning_rate: 1\noutput_dir: caf\xe9\n", "is not UTF-8 text"),
        ("learning_rate: 1\n".encode("utf-16"), "is not UTF-8 text"),
        (b"methods: &all [nola, *all]\n", "an anchor refers to itself"),
        (b"&top\nmethods: [*top]\n", "an anchor refers to itself"),
        (b"max_steps: " + b"[" * 5000, "nested too deeply"),
        (b"learning_rate: 2024-02-30\n", "--learning-rate: invalid float value: '2024-02-30'"),
        (b"max_steps: 2024-01-01\n", "--max-steps: invalid int value: '2024-01-01'"),
        (b"max_steps: !!timestamp 2024-02-30\n", "not valid YAML"),
        (b"output_dir: !!timestamp 2024-01-01\n", "output_dir must be text, a number"),
        (b"max_steps: 2024-01-01 10:00:00\n", "--max-steps: invalid int value: '2024-01-01 10:00:00'"),
        (b"max_steps: \x00\n", "not valid YAML"),
        (b"max_steps: [1\nmethods: 2\n", "not valid YAML"),
        (b"max_steps: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_malformed_file_ends_in_a_line(ends: Callable[..., str], tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert said in ends([str(file)])


def test_a_file_that_is_a_folder_or_malformed_methods_end_in_a_line(ends: Callable[..., str], tmp_path: Path) -> None:
    assert f"cannot read {tmp_path}: Is a directory" in ends([str(tmp_path)])
    assert "there is no file" in ends([str(tmp_path / "none.yaml")])
    assert "methods: not valid YAML: an anchor refers to itself" in ends(["--methods", "&m {name: nola, r: *m}"])
    assert "learning_rate is '2024-01-01'; it must be a positive number" in ends(
        ["--methods", "{name: nola, learning_rate: 2024-01-01}"]
    )
    assert "invalid int value: 'many'" in ends(["--max_steps", "many"])


def test_a_date_is_text(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: 2024-02-30\nmethods: [{name: nola, label: 2024-01-01}]\n")
    values = parse(str(file))
    assert values["output_dir"] == "2024-02-30"
    assert parse_methods(values["methods"])[0].label == "2024-01-01"


def test_a_recipe_ends_its_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr("sys.argv", ["recipe"])
    run_main(lambda _: dist.init_process_group("gloo", store=store, rank=0, world_size=1))
    assert not dist.is_initialized()
