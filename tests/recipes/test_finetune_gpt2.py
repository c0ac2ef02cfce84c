"""The recipe from end to end on a tiny model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from recipes.finetune_gpt2 import main
from recipes.support.arguments import CONFIGS, UserError
from recipes.support.methods import parse_methods
from recipes.support.runs import last_checkpoint
from recipes.tasks import training
from recipes.tasks.base import adapt
from recipes.tasks.causal_lm import DataArguments, ModelArguments, load_model, load_text_data
from recipes.tasks.verification import verify_in_fresh_process

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["--methods", "{name: nola, r: 4, num_basis: 16}", "{name: lora, r: 1, learning_rate: 1e-2}"]


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def test_methods_and_seeds_in_one_table(
    flags: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*flags, *METHODS, "--seeds", "0", "1", "--label_smoothing_factor", "0.1"])
    rows = results(out)
    assert [(row["label"], row["seed"]) for row in rows[1:]] == [
        ("nola r=4 num_basis=16", 0),
        ("nola r=4 num_basis=16", 1),
        ("lora r=1", 0),
        ("lora r=1", 1),
    ]
    untrained = rows[0]
    assert untrained["label"] == "untrained" and untrained["trainable_parameters"] == 0
    for row in rows[1:]:
        folder = out / f"{row['label'].replace(' ', '-')}-seed{row['seed']}"
        weights = folder / "adapter" / "adapter_model.safetensors"
        # c_attn of two layers: 2 x 16 coefficients, or a 1 x 32 and a 96 x 1 factor.
        assert row["trainable_parameters"] == (64 if "nola" in row["label"] else 256)
        assert row["adapter_bytes"] == weights.stat().st_size
        assert [step for step, _ in row["validation_curve"]] == [3, 6]
        assert row["validation_loss"] == row["validation_curve"][-1][1] != untrained["validation_loss"]
        assert [step for step, _ in row["training_curve"]] == [2, 4, 6]
        assert row["training_loss"] == row["training_curve"][-1][1]
        assert row["seconds"] > 0 and set(row["metrics"]) == {"BLEU", "ROUGE-L"} and len(row["outputs"]) == 6
    seeds = [load_file(out / f"nola-r=4-num_basis=16-seed{seed}/adapter/adapter_model.safetensors") for seed in (0, 1)]
    assert any(not torch.equal(seeds[0][key], seeds[1][key]) for key in seeds[0])

    # What was saved is what was trained.
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, out / "lora-r=1-seed1" / "adapter")
    ids = tokenizer("name[N0], food[F0]\n", return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(text, skip_special_tokens=True).strip() == rows[-1]["outputs"][0]

    printed = capsys.readouterr().out
    table = (out / "results.md").read_text()
    for text in (printed, table):
        assert [text.index(label) for label in ("untrained", "nola r=4", "lora r=1")] == sorted(
            text.index(label) for label in ("untrained", "nola r=4", "lora r=1")
        )
        assert "±" in text and "256" in text and "reference: N0 serves F0 dishes." in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_helps(flags: list[str], tmp_path: Path) -> None:
    settings = ["--max_steps", "60", "--eval_steps", "60", "--save_strategy", "no", "--learning_rate", "3e-2"]
    main([*flags, *settings, "--methods", "{name: nola, num_basis: 64, target_modules: [c_attn, c_proj, c_fc]}"])
    untrained, nola = results(tmp_path / "out")
    assert nola["validation_loss"] < untrained["validation_loss"] - 0.2


class Interruption(TrainerCallback):
    """Ends the process's work at a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    methods = [*METHODS[:2], "{name: lora, r: 1, lora_dropout: 0.1}", "--flat_sigma", "0.5"]
    main([*flags, *methods, "--output_dir", str(whole)])

    make_trainer = training.make_trainer

    def interrupted(task: Any, model: Any, arguments: Any) -> Trainer:
        trainer = make_trainer(task, model, arguments)
        if "lora" in str(arguments.output_dir):
            trainer.add_callback(Interruption(step=5))
        return trainer

    monkeypatch.setattr(training, "make_trainer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, *methods, "--output_dir", str(broken)])
    monkeypatch.setattr(training, "make_trainer", make_trainer)
    checkpoint = last_checkpoint(broken / "lora-r=1-lora_dropout=0.1-seed42")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    # A checkpoint that the interruption cut short is passed over.
    (checkpoint.with_name("checkpoint-5")).mkdir()
    finished = (broken / "nola-r=4-num_basis=16-seed42" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns

    main([*flags, *methods, "--output_dir", str(broken), "--resume_from_checkpoint", "true"])
    after = (broken / "nola-r=4-num_basis=16-seed42" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert after == finished, "a finished method was trained again"
    for before, again in zip(results(whole), results(broken)):
        for key in ("training_curve", "validation_curve", "training_loss", "validation_loss", "outputs", "metrics"):
            assert before[key] == again[key], key
    for folder in ("nola-r=4-num_basis=16-seed42", "lora-r=1-lora_dropout=0.1-seed42"):
        weights = [load_file(each / folder / "adapter" / "adapter_model.safetensors") for each in (whole, broken)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Two processes and the tests share what cores there are.
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


def test_command_line_with_a_fresh_process(
    flags: list[str], model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = run([sys.executable, "-m", "recipes.finetune_gpt2", *flags, *METHODS[:2], "--verify_adapters"])
    assert done.returncode == 0, done.stderr
    assert "largest difference to the trained model 0.0e+00; same text: True" in done.stdout
    assert "merged into the base model" in done.stdout
    assert "nola r=4" in done.stdout
    done = run([sys.executable, "-m", "recipes.finetune_gpt2", *flags])
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: output_dir: ")
    assert "Traceback" not in done.stderr

    # The comparison can fail: here the model has moved on since the adapter was saved.
    (adapter,) = Path(flags[flags.index("--output_dir") + 1]).glob("nola*/adapter")
    base = ModelArguments(str(model_folder))
    model, tokenizer = load_model(base)
    moved = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, moved.parameters()):
            parameter.normal_()
    row = {"ids": tokenizer("name[N0] =", return_tensors="pt").input_ids[0], "prompt_length": torch.tensor(2)}
    with pytest.raises(UserError, match="did not get the model that was trained"):
        verify_in_fresh_process(moved, tokenizer, [row], adapter, base)
    assert "does not give the text that the trained model gave" in capfd.readouterr().err


@pytest.fixture
def plain(model_folder: Path, tmp_path: Path) -> Path:
    """The model without dropout, whose masks differ from process to process and from training to evaluation."""
    plain = tmp_path / "plain"
    shutil.copytree(model_folder, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
    return plain


def test_two_processes(flags: list[str], plain: Path, tmp_path: Path) -> None:
    flags = [*flags, "--model_name_or_path", str(plain)]
    main([*flags, *METHODS[:2], "--output_dir", str(tmp_path / "one")])
    config = str(CONFIGS / "accelerate_cpu_x2.yaml")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "-m",
        "recipes.finetune_gpt2",
    ]
    # Half the pairs in each process: the same steps as in one.
    done = run([*launch, *flags, *METHODS[:2], "--per_device_train_batch_size", "2"])
    assert done.returncode == 0, done.stderr
    (checkpoint,) = (tmp_path / "out" / "nola-r=4-num_basis=16-seed42").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2, "it was one process"
    assert done.stdout.count("results.json, results.md and loss.png are in") == 1
    for one, two in zip(results(tmp_path / "one"), results(tmp_path / "out")):
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-5)
        assert len(two["outputs"]) == 6 and two["metrics"]
    assert results(tmp_path / "one")[0]["outputs"] == results(tmp_path / "out")[0]["outputs"]


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


def own_loss(model: PeftModel, tokenizer: PreTrainedTokenizerBase, split: datasets.Dataset) -> float:
    """The loss as the model itself reports it, over all tokens of a split."""
    model.eval()
    batch = DataCollatorForSeq2Seq(tokenizer)(split.to_list())
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize(
    "method",
    [
        "{name: prompt_tuning, num_virtual_tokens: 4}",
        "{name: prefix_tuning, num_virtual_tokens: 4}",
        "{name: p_tuning, num_virtual_tokens: 4, encoder_hidden_size: 8}",
    ],
    ids=["prompt_tuning", "prefix_tuning", "p_tuning"],
)
@pytest.mark.parametrize("text", [False, True], ids=["pairs", "text"])
def test_soft_prompts(flags: list[str], data_folder: Path, plain: Path, method: str, text: bool) -> None:
    flags = [*flags, "--model_name_or_path", str(plain), "--num_train_epochs", "1", "--methods", method]
    if text:
        for name in ("--source_column", "--target_column"):
            place = flags.index(name)
            del flags[place : place + 2]
        flags += ["--text_column", "ref"]
    else:
        flags += ["--prompt_template", "{source} ="]
    # One step on all pairs: its logged loss is that of the model as it starts.
    flags += ["--per_device_train_batch_size", "24", "--max_steps", "1", "--logging_steps", "1"]
    main([*flags, "--learning_rate", "1e-1"])
    out = Path(flags[flags.index("--output_dir") + 1])
    untrained, tuned = results(out)
    columns = {"source_column": "mr", "target_column": "ref", "prompt_template": "{source} ="}
    columns = {"text_column": "ref"} if text else columns
    model_args = ModelArguments(str(plain))
    base, tokenizer = load_model(model_args)
    data = load_text_data(
        DataArguments(str(data_folder), max_source_length=60, max_target_length=30, **columns), tokenizer
    )
    (folder,) = out.glob("*-seed42")
    loaded = PeftModel.from_pretrained(load_model(model_args)[0], folder / "adapter")
    assert tuned["validation_loss"] == pytest.approx(own_loss(loaded, tokenizer, data.validation), abs=1e-5)
    with loaded.disable_adapter():
        assert untrained["validation_loss"] == pytest.approx(own_loss(loaded, tokenizer, data.validation), abs=1e-5)
    fresh: Any = adapt(partial(copy.deepcopy, base), parse_methods([method])[0], 42, task_type="CAUSAL_LM")
    assert tuned["training_loss"] == pytest.approx(own_loss(fresh, tokenizer, data.train), abs=1e-5)
    assert tuned["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    if not text:
        batch = tokenizer("name[N0], food[F0] =", return_tensors="pt")
        written = loaded.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
        alone = tokenizer.decode(written[batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert tuned["outputs"][0] == alone != "" and len(tuned["outputs"]) == 6


def test_soft_prompts_in_a_fresh_process(flags: list[str]) -> None:
    methods = ["--methods", "{name: prompt_tuning, num_virtual_tokens: 4}", "--verify_adapters"]
    done = run([sys.executable, "-m", "recipes.finetune_gpt2", *flags, *methods])
    assert done.returncode == 0, done.stderr
    assert "largest difference to the trained model 0.0e+00; same text: True" in done.stdout
    assert "merged into" not in done.stdout and "adapter: 'name[N0]" in done.stdout


def test_what_soft_prompts_cannot_do(flags: list[str], refused: Callable[[list[str]], str]) -> None:
    flags = [*flags, "--methods", "{name: prompt_tuning, num_virtual_tokens: 40}"]
    assert "40 virtual tokens" in refused(flags) and "128 positions" in refused(flags)
    assert "label_smoothing_factor" in refused([*flags, "--label_smoothing_factor", "0.1"])
