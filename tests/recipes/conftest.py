"""A tiny GPT-2 and a handful of pairs, and a way to run the recipe on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes are run from the root, not installed

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from recipes import restaurants
from recipes.finetune_gpt2 import main

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


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs the recipe on bad input and returns what it says."""

    def run(arguments: list[str]) -> str:
        from recipes.common import UserError

        with pytest.raises(UserError) as caught:
            main(arguments)
        return str(caught.value)

    return run
