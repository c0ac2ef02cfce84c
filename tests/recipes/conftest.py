"""A tiny GPT-2 and a handful of pairs, a tiny ViT and a handful of images, and a way to run the recipes on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest
from pictures import COLOURS, picture

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes are run from the root, not installed

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    set_seed,
)

from recipes import finetune_gpt2, finetune_vit
from recipes.support.arguments import UserError, run_main
from recipes.tasks import restaurants

ROWS = [
    {"mr": f"name[N{i // 2}], food[F{i % 3}]", "ref": f"N{i // 2} serves F{i % 3} {'food' if i % 2 else 'dishes'}."}
    for i in range(24)
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without a padding token, as GPT-2's."""
    tokenizer = restaurants.train_tokenizer([row["mr"] + row["ref"] for row in ROWS])
    tokenizer.pad_token = None
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved GPT-2 of two thin layers, with dropout so that a resumed run must restore the random state."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("model")
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training pairs and validation pairs; the latter have one, two or more references a source."""
    folder = tmp_path_factory.mktemp("data")
    validation = [*ROWS[:6], {"mr": ROWS[0]["mr"], "ref": "F0 food at N0."}, {"mr": ROWS[0]["mr"], "ref": "N0: F0."}]
    for name, rows in {"train": ROWS, "validation": validation}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def flags(model_folder: Path, data_folder: Path, tmp_path: Path) -> list[str]:
    """A short run of the recipe."""
    text = (
        f"--model_name_or_path {model_folder} --dataset_name {data_folder} --output_dir {tmp_path / 'out'} "
        "--source_column mr --target_column ref --max_source_length 60 --max_target_length 30 --max_new_tokens 8 "
        "--max_steps 6 --logging_steps 2 --eval_strategy steps --eval_steps 3 --save_steps 2 --save_total_limit 1 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --learning_rate 5e-2 --use_cpu "
        "--disable_tqdm true"
    )
    return text.split()


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved ViT of two thin layers without a head."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test images of three colours: 6 and 4 of each."""
    folder = tmp_path_factory.mktemp("images")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    for start, (name, count) in enumerate({"train": 6, "test": 4}.items()):
        rows = [(picture(colour, 100 * start + i), colour) for i in range(count) for colour in COLOURS]
        columns = {"image": [image for image, _ in rows], "label": [colour for _, colour in rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture
def vit_flags(vit_folder: Path, image_folder: Path, tmp_path: Path) -> list[str]:
    """A short run of the recipe for images."""
    text = (
        f"--model_name_or_path {vit_folder} --dataset_name {image_folder} --output_dir {tmp_path / 'out'} "
        "--eval_split test --shots 4 --max_steps 6 --logging_steps 2 --eval_strategy steps --eval_steps 3 "
        "--save_steps 2 --save_total_limit 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
        "--learning_rate 1e-2 --use_cpu --disable_tqdm true"
    )
    return text.split()


@pytest.fixture
def refused() -> Callable[..., str]:
    """Runs a recipe on bad input and returns what it says."""

    def run(arguments: list[str], main: Callable[[list[str]], None] = finetune_gpt2.main) -> str:
        with pytest.raises(UserError) as caught:
            main(arguments)
        return str(caught.value)

    return run


@pytest.fixture
def vit_refused(refused: Callable[..., str]) -> Callable[[list[str]], str]:
    """The same for images."""
    return lambda arguments: refused(arguments, main=finetune_vit.main)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a recipe from the command line on bad input; it must end with status 2 and one line, which is returned."""

    def run(arguments: list[str], main: Callable[[Sequence[str]], None] = finetune_gpt2.main) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_main(main)
        assert caught.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run
