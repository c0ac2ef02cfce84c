"""The recipe that trains networks from a seed, from end to end on a few digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

import recipes
from peft_ext import SeededNetwork, load_from_seed
from peft_ext.tuners.config import SeededConfig
from recipes.support.arguments import UserError
from recipes.support.methods import parse_methods
from recipes.tasks.image_classification import DataArguments, load_image_data
from recipes.tasks.resnet import CifarResNet
from recipes.tasks.seeded import FULL
from recipes.train_from_seed import main

FLAGS = ["--use_cpu", "true", "--max_steps", "4", "--per_device_train_batch_size", "8", "--logging_steps", "2"]
FLAGS += ["--max_eval_samples", "20", "--disable_tqdm", "true", "--learning_rate", "1e-1"]
METHODS = [
    "--methods",
    "{name: pranc, num_coefficients: 100}",
    "{name: mcnc, apply_to: weight, k: 3, d: 4000, widths: [8]}",
    "{name: full, learning_rate: 1e-3}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the three kinds of methods with two seeds."""
    folder = tmp_path_factory.mktemp("run") / "out"
    main([*FLAGS, *METHODS, "--digits", "true", "--image_size", "8", "--seeds", "0", "1", "--output_dir", str(folder)])
    return folder


def test_what_is_saved_is_a_seed_and_coefficients(folder: Path) -> None:
    rows = json.loads((folder / "results.json").read_text())
    assert [row["trainable_parameters"] for row in rows[::2]] == [100, 140, 136_650]
    pranc, mcnc, full = (
        folder / name / "adapter"
        for name in ("pranc-num_coefficients=100-seed0", "mcnc-k=3-d=4000-seed0", "full-seed0")
    )
    assert rows[0]["adapter_bytes"] == (pranc / "model.safetensors").stat().st_size < 4 * 100 + 300 + 600
    assert (mcnc / "model.safetensors").stat().st_size < 4 * 140 + 300 + 600
    assert (full / "model.safetensors").stat().st_size > 4 * 136_650
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "accuracy.png"))


def test_rebuilt_networks_have_the_accuracy_of_the_trained_ones(folder: Path) -> None:
    data = load_image_data(DataArguments(str(folder / "data"), max_eval_samples=20))
    rows = json.loads((folder / "results.json").read_text())
    images = data.encoded(data.validation, ViTImageProcessorPil(size={"height": 8, "width": 8}))[:]
    for row in rows[:4]:
        (saved,) = folder.glob(f"{row['label'].replace(' ', '-')}-seed{row['seed']}/adapter")
        network = load_from_seed(saved)
        with torch.no_grad():
            logits = network(images["pixel_values"]).logits
        labels = torch.tensor(images["labels"])
        assert 100 * (logits.argmax(1) == labels).float().mean().item() == pytest.approx(row["metrics"]["accuracy"])
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert row["validation_loss"] == pytest.approx(loss, abs=1e-3)


def test_a_resumed_run_ends_as_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, *METHODS[:2], "--digits", "true", "--image_size", "8", "--save_steps", "2"]
    flags += ["--output_dir", str(tmp_path / "out")]
    main(flags)
    run = tmp_path / "out" / "pranc-num_coefficients=100-seed42"
    (run / "result.json").unlink()
    before = load_file(run / "adapter" / "model.safetensors")
    for checkpoint in run.glob("checkpoint-4"):
        (checkpoint / "trainer_state.json").unlink()
    main([*flags, "--resume_from_checkpoint", "true"])
    after = load_file(run / "adapter" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batch_norm_statistics_are_saved(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--digits", "true", "--image_size", "8", "--network", "resnet20", "--output_dir", str(out)]
    main([*FLAGS, *METHODS[:2], *flags])
    network = load_from_seed(out / "pranc-num_coefficients=100-seed42" / "adapter", CifarResNet())
    assert int(network.bn1.num_batches_tracked) == 4 and network.bn1.running_mean.abs().max() > 0


def test_networks_with_factors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = ["--methods", "{name: nola, num_basis: 64, r: 8}", "{name: mcnc, r: 64, k: 16, d: 1600, widths: [8]}"]
    flags = ["--digits", "true", "--image_size", "8", "--network", "resnet20", "--output_dir", str(out)]
    main([*FLAGS, *methods, *flags])
    rows = json.loads((out / "results.json").read_text())
    assert [row["trainable_parameters"] for row in rows] == [41 * 64, 17 * 190]
    for folder in ("nola-num_basis=64-r=8-seed42", "mcnc-r=64-k=16-d=1600-seed42"):
        assert int(load_from_seed(out / folder / "adapter", CifarResNet()).bn1.num_batches_tracked) == 4


def test_the_long_preset_has_the_numbers_of_coefficients_that_its_labels_say() -> None:
    (preset,) = Path(recipes.__file__).parent.glob("configs/train_from_seed_resnet20_cifar10_long.yaml")
    values = yaml.safe_load(preset.read_text())
    methods = parse_methods([yaml.dump(each) for each in values["methods"]], extra=[FULL])
    assert len(methods) == 13 and methods[-1].name == FULL
    for method in methods[:-1]:
        config = method.config(None, 0)
        assert isinstance(config, SeededConfig) and config.parametrization == "scaled"
        network = SeededNetwork(CifarResNet(), config)
        assert method.label.endswith(f"{network.coefficients['network'].numel():,}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "{name: pranc, num_coefficients: 200000}"], "must be at most the 136650 parameters"),
        (["--methods", "{name: mcnc, r: 99}"], "`r` must be at most 64, the highest rank"),
        (["--methods", "{name: nola, num_basis: 5000}"], "`num_basis` must give at most as many coefficients"),
        (["--methods", "{name: nola, alpha: 3.0}"], "`alpha` must be 8.0, its default"),
        (["--methods", "lora"], "`config` must be a NolaConfig, a PrancConfig or a McncConfig, got LoraConfig"),
        (["--methods", "pranc", "--shots", "3"], "--shots, --verify_adapters and --flat_sigma are for adapters"),
        (["--methods", "pranc", "--image_size", "0"], "image_size is 0; it must be at least 1"),
        (["--methods", "pranc", "--image_size", "6"], "image_size is 6; the ViT cuts images into 4 by 4 patches"),
        (["--methods", "pranc", "--flat_sigma", "0.1"], "--flat_sigma are for adapters"),
        (["--methods", "pranc", "--dataset_name", "here"], "digits makes its own data"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([*FLAGS, "--digits", "true", "--image_size", "8", "--output_dir", str(tmp_path / "out"), *flags])
    assert not list((tmp_path / "out").glob("*/checkpoint-*"))
