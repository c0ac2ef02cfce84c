"""The recipe for images from end to end on a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from pictures import picture
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Config,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from peft_ext import NolaConfig
from recipes.finetune_vit import FinetuneViT, main
from recipes.support.arguments import CONFIGS, parse_arguments
from recipes.support.methods import HEAD, parse_methods
from recipes.support.runs import argument_types
from recipes.tasks import digits, training
from recipes.tasks.image_classification import ModelArguments

ROOT = Path(__file__).resolve().parents[2]
TYPES = argument_types(FinetuneViT)
METHODS = ["--methods", "{name: nola, r: 4, num_basis: 16}", "head"]


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def parse(*argv: str) -> dict[str, Any]:
    parsed = parse_arguments("finetune_vit", TYPES, argv)
    return {key: value for each in parsed for key, value in vars(each).items()}


def test_methods_and_seeds_in_one_table(
    vit_flags: list[str], vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*vit_flags, *METHODS, "--data_seeds", "0", "1", "--seeds", "5", "6", "--image_size", "24"])
    rows = results(out)
    runs = [(data_seed, seed) for data_seed in (0, 1) for seed in (5, 6)]
    assert [(row["label"], row["data_seed"], row["seed"]) for row in rows] == [
        (label, *run) for label in ("nola r=4 num_basis=16", "head") for run in runs
    ]
    for row in rows:
        folder = out / f"{row['label'].replace(' ', '-')}-data{row['data_seed']}-seed{row['seed']}"
        assert json.loads((folder / "result.json").read_text()) == row
        # A head of 3 x 32 and 3; the query and value projections of two layers, 2 x 16 coefficients each.
        assert row["head_parameters"] == 99
        assert row["trainable_parameters"] == 99 + (128 if "nola" in row["label"] else 0)
        assert row["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        card = (folder / "adapter" / "README.md").read_text()
        assert ("## Data and results" in card) == ("nola" in row["label"])
        if "nola" in row["label"]:
            assert f"| `{round(row['metrics']['accuracy'], 4)}` |" in card
        assert [step for step, _ in row["validation_curve"]] == [3, 6]
        assert [step for step, _ in row["training_curve"]] == [2, 4, 6]
        assert row["validation_loss"] == row["validation_curve"][-1][1]
        assert row["seconds"] > 0 and 0 <= row["metrics"]["accuracy"] <= 100
    for label in ("nola", "head"):  # the images and the head's start differ
        losses = [row["training_curve"][0][1] for row in rows if label in row["label"]]
        assert len(set(losses)) == 4

    text = capsys.readouterr().out
    for table in (text, (out / "results.md").read_text()):
        assert all(heading in table for heading in ("adapter", "head", "accuracy", "±"))
        assert "4 images a class, drawn with data seeds 0, 1, with seeds 5, 6: 4 runs" in table
        assert "3 classes, 12 validation images" in table
    for name in ("loss.png", "accuracy.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "results.json, results.md, loss.png and accuracy.png are in" in text


def test_the_best_model_is_the_one_that_is_scored(vit_flags: list[str], tmp_path: Path) -> None:
    """Here the best one is that with the highest loss, which is the first one."""
    best = "--load_best_model_at_end true --save_steps 3 --metric_for_best_model loss --greater_is_better true"
    main([*vit_flags, *METHODS[:2], *best.split()])
    (row,) = results(tmp_path / "out")
    (first, high), (last, low) = row["validation_curve"]
    assert (first, last) == (3, 6) and low < high
    assert row["validation_loss"] == pytest.approx(high, rel=1e-6)


def test_the_saved_folder_is_all_it_takes_beside_the_base_model(
    vit_flags: list[str], vit_folder: Path, tmp_path: Path
) -> None:
    main([*vit_flags, *METHODS[:2], "--max_steps", "60", "--learning_rate", "2e-2", "--image_size", "24"])
    (row,) = results(tmp_path / "out")
    assert row["metrics"]["accuracy"] > 90
    adapter = tmp_path / "out" / "nola-r=4-num_basis=16-data0-seed42" / "adapter"
    config = AutoConfig.from_pretrained(adapter)
    base = AutoModelForImageClassification.from_pretrained(vit_folder, config=config)
    model = PeftModel.from_pretrained(base, adapter)
    processor = AutoImageProcessor.from_pretrained(adapter, backend="pil")
    for colour in ("red", "green", "blue"):
        pixels = processor(picture(colour, 1000), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 24, 24)
        logits = model(pixel_values=pixels, interpolate_pos_encoding=True).logits[0]
        assert config.id2label[int(logits.argmax())] == colour


def test_the_head_alone_leaves_the_features_as_they_are(vit_flags: list[str], tmp_path: Path) -> None:
    main([*vit_flags, "--methods", "head"])
    tensors = load_file(tmp_path / "out" / "head-data0-seed42" / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "base_model.model.classifier.weight": (3, 32),
        "base_model.model.classifier.bias": (3,),
    }


def test_a_pretrained_classifier_starts_with_its_head(vit_flags: list[str], tmp_path: Path) -> None:
    names = {0: "red", 1: "green", 2: "blue"}
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "model")
    main([*vit_flags, "--model_name_or_path", str(tmp_path / "model"), "--methods", "head", "--learning_rate", "1e-9"])
    folder = tmp_path / "out" / "head-data0-seed42" / "adapter"
    saved = load_file(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    torch.testing.assert_close(saved, model.classifier.weight.detach(), atol=1e-6, rtol=0)


class Interruption(TrainerCallback):
    """Ends the process's work at a step, as a kill would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    vit_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = [*vit_flags, *METHODS, "--data_seeds", "3", "4"]
    main([*arguments, "--output_dir", str(whole)])

    make_trainer = training.make_trainer

    def interrupted(task: Any, model: Any, settings: Any) -> Trainer:
        trainer = make_trainer(task, model, settings)
        if Path(settings.output_dir).name == "nola-r=4-num_basis=16-data4-seed42":
            trainer.add_callback(Interruption())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, "--output_dir", str(broken)])
    finished = broken / "nola-r=4-num_basis=16-data3-seed42" / "adapter" / "adapter_model.safetensors"
    before = finished.stat().st_mtime_ns
    main([*arguments, "--output_dir", str(broken), "--resume_from_checkpoint", "true"])
    assert finished.stat().st_mtime_ns == before, "a finished run was trained again"
    for expected, found in zip(results(whole), results(broken)):
        del expected["seconds"], found["seconds"]
        assert expected == found


def test_flat_training_is_another_one(vit_flags: list[str], tmp_path: Path) -> None:
    found = []
    for flags in ([], ["--flat_sigma", "0.9"]):
        main([*vit_flags, *METHODS[:2], "--max_steps", "3", "--overwrite_output_dir", *flags])
        (row,) = results(tmp_path / "out")
        found.append(row["validation_loss"])
    assert found[0] != found[1]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Two processes and the tests share what cores there are.
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


def test_command_line_with_a_fresh_process(vit_flags: list[str]) -> None:
    settings = ["--verify_adapters", "--image_size", "24"]
    done = run([sys.executable, "-m", "recipes.finetune_vit", *vit_flags, *METHODS[:2], *settings])
    assert done.returncode == 0, done.stderr
    assert "largest difference to the trained model 0.0e+00; same class: True" in done.stdout
    assert "merged into the base model" in done.stdout and "adapter: image of '" in done.stdout


def test_the_first_run_of_every_method_is_verified(
    vit_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[tuple[str, int]] = []

    def note(model: PeftModel, processor: Any, rows: list[Any], adapter: Path, source: ModelArguments) -> None:
        verified.append((adapter.parent.name, len(rows)))

    monkeypatch.setattr(training, "verify_in_fresh_process", note)
    settings = ["--max_steps", "1", "--data_seeds", "1", "2", "--seeds", "3", "4", "--verify_adapters"]
    main([*vit_flags, *METHODS, *settings])
    assert verified == [("nola-r=4-num_basis=16-data1-seed3", 2), ("head-data1-seed3", 2)]


def test_two_processes(vit_flags: list[str], tmp_path: Path) -> None:
    place = vit_flags.index("--shots")  # the images are chosen, which both processes have to do together
    vit_flags = [*vit_flags[:place], "--budget", "12", *vit_flags[place + 2 :]]
    methods = ["--methods", "{name: nola, r: 4, num_basis: 16}"]
    main([*vit_flags, *methods, "--output_dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(CONFIGS / "accelerate_cpu_x2.yaml"), "-m", "recipes.finetune_vit"]
    # Half the images in each process: the same steps as in one.
    done = run([*launch, *vit_flags, *methods, "--per_device_train_batch_size", "2"])
    assert done.returncode == 0, done.stderr
    (checkpoint,) = (tmp_path / "out" / "nola-r=4-num_basis=16-data0-seed42").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2, "it was one process"
    assert done.stdout.count("loss.png and accuracy.png are in") == 1
    (one,), (two,) = results(tmp_path / "one"), results(tmp_path / "out")
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=0.01)
    assert two["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=10)


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(digits, "_STEPS", 60)
    threads = torch.get_num_threads()
    try:
        short = ["--data_seeds", "0", "--max_steps", "20", "--verify_adapters", "false", "--disable_tqdm", "true"]
        main(["--preset", "quickstart", "--output_dir", str(tmp_path / "out"), *short])
    finally:
        torch.set_num_threads(threads)
    rows = {row["label"]: row for row in results(tmp_path / "out")}
    assert list(rows) == ["linear head", "LoRA r=1", "NOLA", "PRANC", "MCNC"]
    head = 5 * 64 + 5
    for label, row in rows.items():
        assert row["head_parameters"] == head
        assert row["trainable_parameters"] - head == (0 if label == "linear head" else 768), label
        assert row["validation_loss"] < math.log(5), label
    assert "10 images a class" in capsys.readouterr().out


def test_digits_split_cleanly(tmp_path: Path) -> None:
    folder = Path(digits.prepare_data(tmp_path))
    data = {name: digits.datasets.load_dataset(str(folder), split=name) for name in ("train", "validation")}
    assert {name: len(split) for name, split in data.items()} == {"train": 898, "validation": 899}
    assert data["train"].features["label"].names == list("0123456789")
    assert set(data["train"]["label"]) == set(data["validation"]["label"]) == set(range(10))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("finetune_vit_*.yaml")), ids=lambda path: path.stem)
def test_every_preset_parses(path: Path) -> None:
    for method in parse_methods(parse(str(path))["methods"], extra=[HEAD]):
        method.config(None, 0, ["classifier"])


def test_the_cifar100_preset_holds_the_settings_of_the_paper() -> None:
    values = parse("--preset", "cifar100")
    (method,) = parse_methods(values["methods"])
    config = method.config(None, 0, ["classifier"])
    assert isinstance(config, NolaConfig)
    assert (config.r, config.num_basis, config.target_modules) == (1, 1024, {"fc1", "fc2"})
    assert config.modules_to_save == ["classifier"]
    assert (values["learning_rate"], values["num_train_epochs"], values["per_device_train_batch_size"]) == (
        5e-3,
        50,
        16,
    )
    assert values["shots"] == 5 and len(values["data_seeds"]) * len(values["seeds"]) == 12


def test_the_methods_of_the_cifar10_preset_train_equally_many_parameters() -> None:
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12)
    with torch.device("meta"):
        base = AutoModelForImageClassification.from_config(config)
    shapes = [module for name, module in base.named_modules() if name.endswith(("q_proj", "v_proj"))]
    assert len(shapes) == 24
    for method in parse_methods(parse("--preset", "dinov2_cifar10")["methods"], extra=[HEAD]):
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
        adapted = get_peft_model(model, method.config(None, 0, ["classifier"]), low_cpu_mem_usage=True)
        count = sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad and "classifier" not in name)
        assert count == (0 if method.name == HEAD else 18_432), method


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--shots", "9"], ["shots is 9", "'red' has 6"]),
        (["--labels", "red", "pink"], ["'pink'"]),
        (["--label_column", "colour"], ["'colour'", "'image', 'label'"]),
        (["--eval_split", "dev"], ['"dev"']),
        (["--image_size", "20"], ["20 x 20", "patches of 8", "16"]),
        (["--methods", "{name: head, r: 3}"], ["'head'", "'r'", "none"]),
        (["--methods", "hed"], ["'hed'", "head", "nola"]),
        (["--methods", "{name: nola, target_modules: [nowhere]}"], ["nowhere", "nola", "fc1, fc2", "q_proj"]),
        (["--methods", "{name: nola, r: 0}"], ["'nola r=0'", "`r`"]),
        (["--methods", "{name: prompt_tuning, num_virtual_tokens: 3}"], ["prompt_tuning", "text"]),
        (["--methods", "{name: pranc, num_coefficients: 1000000}"], ["pranc", "1000000"]),
        (["--methods", "head", "--flat_sigma", "0.1"], ["flat_sigma: method 'head'", "no merged weight"]),
        (["--methods", "nola", "--flat_sigma", "0"], ["flat_sigma: method 'nola'", "must be above 0, got 0.0"]),
        (["--digits"], ["leave out"]),
        (["--model_name_or_path", "nobody/nothing"], ["'nobody/nothing'", "--preset quickstart"]),
        (["--dataset_name", "nobody/nothing"], ["'nobody/nothing'", "--preset quickstart"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input(
    vit_flags: list[str], vit_refused: Callable[[list[str]], str], tmp_path: Path, flags: list[str], said: list[str]
) -> None:
    message = vit_refused([*vit_flags, *flags])
    assert all(part in message for part in said), message
    assert not (tmp_path / "out").exists(), "a refused run must not stand in the way of the next"


def test_the_head_is_no_method_of_text(flags: list[str], refused: Callable[..., str]) -> None:
    assert "unknown method 'head'" in refused([*flags, "--methods", "head"])
