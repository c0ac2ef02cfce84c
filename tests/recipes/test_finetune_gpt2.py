"""The recipe from end to end on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from recipes.finetune_gpt2 import main
from recipes.support.arguments import CONFIGS
from recipes.support.runs import last_checkpoint
from recipes.tasks import training

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
    methods = [*METHODS[:2], "{name: lora, r: 1, lora_dropout: 0.1}"]
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


def test_command_line_with_a_fresh_process(flags: list[str]) -> None:
    done = run([sys.executable, "-m", "recipes.finetune_gpt2", *flags, *METHODS[:2], "--verify_adapters"])
    assert done.returncode == 0, done.stderr
    assert "largest difference to the trained model 0.0e+00; same text: True" in done.stdout
    assert "merged into the base model" in done.stdout
    assert "nola r=4" in done.stdout
    done = run([sys.executable, "-m", "recipes.finetune_gpt2", *flags])
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: output_dir: ")
    assert "Traceback" not in done.stderr


def test_two_processes(flags: list[str], model_folder: Path, tmp_path: Path) -> None:
    # Without dropout, whose masks the processes draw for themselves.
    plain = tmp_path / "plain"
    shutil.copytree(model_folder, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
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
