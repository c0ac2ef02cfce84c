"""Texts, classes, and the unlearning recipe on a tiny BERT: trained to the end and stopped, with the same time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    set_seed,
)

from benchmarks.quality.sst2 import Sst2
from benchmarks.quality.task import Sources
from peft_ext.unlearning import Finetune, GaussNewton, Rewind
from peft_ext.unlearning.evaluation.metrics import Outcome
from peft_ext.unlearning.evaluation.results import UnlearningResult
from recipes import unlearn
from recipes.support.arguments import UserError
from recipes.support.inputs import ModelArguments
from recipes.support.methods import Method, parse_methods
from recipes.tasks.base import adapt
from recipes.tasks.text_classification import load_classifier
from recipes.tasks.training import train
from recipes.unlearn import main
from recipes.unlearning.same_time import SameTime, parse_same_time

WRITERS = ("Ada", "Bo", "Cy")
WORDS = {"Ada": "reads rain ships", "Bo": "sings stones clouds", "Cy": "counts bees moons"}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def rows(start: int, count: int) -> list[dict[str, str]]:
    """Sentences of every writer, of different lengths."""
    rng = np.random.default_rng(start)
    return [
        {"text": " ".join(rng.choice(WORDS[writer].split(), rng.integers(2, 7))), "writer": writer}
        for _ in range(count)
        for writer in WRITERS
    ]


@pytest.fixture(scope="module")
def bert_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved BERT of two thin layers, without a head and without the pooler that classifiers have."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **BERT)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writers")
    for name, samples in {"train": rows(0, 8), "test": rows(1, 4)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


@pytest.fixture
def sentences(bert_folder: Path, writers_folder: Path, tmp_path: Path) -> list[str]:
    """A short run: 8 sentences of each of three writers."""
    text = (
        f"--task text-classification --model_name_or_path {bert_folder} --dataset_name {writers_folder} "
        "--eval_split test --text_column text --label_column writer --max_length 30 --num_train_epochs 8 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 5 --learning_rate 3e-2 --relearn_limit 0 "
        f"--use_cpu --disable_tqdm true --output_dir {tmp_path / 'out'}"
    )
    return [*text.split(), "--adapter", "{name: nola, r: 2, num_basis: 8, target_modules: [query, value]}"]


def result(folder: Path, label: str) -> UnlearningResult:
    return UnlearningResult.load(folder / f"{label}-seed42")


def steps(found: UnlearningResult) -> int:
    assert found.report is not None
    return int(found.report["training"]["steps"])


def test_classes_of_texts_are_forgotten_from_a_training_that_was_stopped(
    sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*sentences, "--cases", "class:Bo", "--stop_training_after", "0.5", "--same_time", "finetune", "retrain"]
    main([*flags, "--methods", "{name: finetune, max_steps: 3}", "{name: gauss_newton, label: GN, max_steps: 1}"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    labels = ["original", "retrain", "finetune max_steps=3", "GN", "fine-tuning, same time", "retraining, same time"]
    assert [row["method"] for row in report["rows"]] == labels
    assert report["rows"][0]["samples"] == {"forget": 8, "retain": 16, "test": 8, "heldout": 4}
    # A head of 3 x 16 and 3, the pooler that the weights lack, and two projections of two layers, 2 x 8 numbers each.
    assert {row["parameters"] for row in report["rows"]} == {51 + 272 + 64}
    assert "stopped after 50 % of the planned steps" in report["notes"]
    assert "fine-tuning, same time: as many optimizer steps as the gold takes in the time that GN" in report["notes"]

    folder = tmp_path / "out" / "class-Bo"
    original, gold, newton = (result(folder, label) for label in ("original", "retrain", "GN"))
    assert original.outcomes["forget"].correct.all() and not gold.outcomes["forget"].correct.any()
    assert steps(gold) == 16  # of 4 batches in 8 epochs
    assert steps(result(folder, "finetune-max_steps=3")) == 3  # what methods train is not cut
    fraction = newton.time_over(gold)
    assert fraction is not None and newton.processor_seconds is not None
    fitting = max(1, round(16 * fraction))
    assert steps(result(folder, "fine-tuning-same-time")) == fitting
    assert steps(result(folder, "retraining-same-time")) == min(16, fitting)

    # A resumed run plans the same from the files.
    before = result(folder, "fine-tuning-same-time")
    (folder / "fine-tuning-same-time-seed42" / "unlearning.json").unlink()
    monkeypatch.setattr(unlearn, "write_report", lambda *_: None)
    methods = ["--methods", "{name: finetune, max_steps: 3}", "{name: gauss_newton, label: GN, max_steps: 1}"]
    main([*flags, *methods, "--resume_from_checkpoint", "true"])
    again = result(folder, "fine-tuning-same-time")
    np.testing.assert_array_equal(before.outcomes["test"].losses, again.outcomes["test"].losses)
    with pytest.raises(UserError, match=r"was started with stop_training_after = 0\.5, now it is 0\.25"):
        main([*flags, *methods, "--stop_training_after", "0.25", "--resume_from_checkpoint", "true"])


@pytest.mark.parametrize("ratio, share", [(0.25, 1.0), (0.25, 0.5), (2.0, 0.5)])
def test_retraining_in_less_time_squeezes_the_schedule_of_the_whole(ratio: float, share: float, tmp_path: Path) -> None:
    @dataclass
    class Training:
        seed: int = 42
        max_steps: int = -1
        warmup_steps: float = 8
        num_train_epochs: float = 4.0

    @dataclass
    class Asked:
        training: Training
        stopped_after: float

    asked: Any = Asked(Training(), share)
    for label, seconds in (("retrain", 10.0), ("GN", 10.0 * ratio)):
        outcomes = {split: _outcome() for split in ("forget", "retain", "test")}
        found = UnlearningResult("case", label, 42, outcomes, seconds, report={"training": {"steps": 40}})
        found.save(tmp_path / f"{label}-seed42")
    planned, method = SameTime("retrain", "GN").plan(asked, tmp_path / "retraining-same-time-seed42")
    if ratio > 1:
        assert planned == asked  # as the gold
    else:  # it is stopped where the gold is, after 10 of 10 or 20 steps in place of 40 of 40 or 80
        assert planned == replace(asked, training=Training(42, round(10 / share), 2, 1.0))
    _, method = SameTime("finetune", "GN").plan(asked, tmp_path / "fine-tuning-same-time-seed42")
    assert method == Finetune(max_steps=int(40 * ratio))


def _outcome() -> Outcome:
    return Outcome(np.zeros(1), np.ones(1, bool), None, np.zeros(1))


def test_whose_time_the_baselines_get() -> None:
    newton: Any = {"tuned": Finetune(), "Newton": GaussNewton(), "second": GaussNewton()}
    assert parse_same_time(["finetune"], None, newton) == {"fine-tuning, same time": SameTime("finetune", "Newton")}
    methods: Any = newton | {"first": Rewind(), "other": Rewind()}
    assert parse_same_time(["finetune"], None, methods) == {"fine-tuning, same time": SameTime("finetune", "first")}
    assert parse_same_time(["retrain"], "tuned", methods) == {"retraining, same time": SameTime("retrain", "tuned")}
    assert parse_same_time(["none"], None, methods) == parse_same_time(["finetune"], None, {"t": Finetune()}) == {}


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_heads_of_other_models_are_trained_whole(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    vocabulary = {"vocab_size": len(tokenizer)}
    if name == "roberta":
        RobertaModel(RobertaConfig(**vocabulary, **BERT), add_pooling_layer=False).save_pretrained(tmp_path)
    else:
        GPT2Model(GPT2Config(**vocabulary, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = load_classifier(ModelArguments(str(tmp_path)), WRITERS)
    targets = {"roberta": "query", "gpt2": "c_attn"}[name]
    (method,) = parse_methods([f"{{name: nola, r: 2, num_basis: 8, target_modules: [{targets}]}}"])
    models: list[Any] = [adapt(classifier.fresh_model, method, seed, classifier.head, "SEQ_CLS") for seed in (0, 0, 1)]
    head = {"roberta": 3 * 16 + 3 + 16 * 16 + 16, "gpt2": 3 * 16}[name]
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert {sum(p.numel() for n, p in each.items() if "nola" not in n) for each in trained} == {head}
    for parameter, same, other in zip(*(each.values() for each in trained)):
        assert torch.equal(parameter, same)
        assert parameter.dim() < 2 or not torch.equal(parameter, other), "a new head is drawn with the run's seed"
    batch = classifier.tokenizer.pad([classifier.tokenizer(text) for text in ("Ada", "Ada reads")], return_tensors="pt")
    models[0].eval()
    alone = models[0](**classifier.tokenizer("Ada", return_tensors="pt")).logits
    torch.testing.assert_close(models[0](**batch).logits[:1], alone)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--cases", "class:Di"], ["no class 'Di'", "Ada, Bo, Cy"]),
        (["--cases", "filter"], ["'filter'", "random, memorised, class"]),
        (["--label_column", "text"], ["text_column and label_column are both 'text'"]),
        (["--text_column", "words"], ["column 'words' is not in split 'train'", "'text', 'writer'"]),
        (["--max_length", "64"], ["max_length is 64", "at most 40 tokens"]),
        (["--max_length", "0"], ["max_length is 0", "at least 1"]),
        (["--shots", "9"], ["shots is 9", "'Ada' has 8"]),
        (["--image_size", "8"], ["image_size is for --task image", "this is --task text-classification"]),
        (["--target_column", "text"], ["target_column is for --task text,"]),
        (["--adapter", "{name: nola, target_modules: [q_proj]}"], ["['q_proj']", "query"]),
        (["--trainable_parameters", "bert"], ["either --adapter", "--trainable_parameters"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_for_texts_with_classes(
    sentences: list[str], refused: Callable[..., str], tmp_path: Path, flags: list[str], said: list[str]
) -> None:
    message = refused([*sentences, *flags], main=main)
    assert all(part in message for part in said), message
    assert not (tmp_path / "out").exists()


def test_columns_must_be_named(sentences: list[str], refused: Callable[..., str]) -> None:
    place = sentences.index("--text_column")
    message = refused([*sentences[:place], *sentences[place + 2 :]], main=main)
    assert "name the columns: --text_column" in message


def test_a_benchmark_trains_a_classifier_of_sentences_and_its_head(bert_folder: Path, tmp_path: Path) -> None:
    for name, samples in {"train": rows(0, 4), "validation": rows(1, 2)}.items():
        lines = [{"sentence": row["text"], "label": WRITERS.index(row["writer"])} for row in samples]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmark = Sst2(Sources(sst2_model=str(bert_folder), sst2_data=str(tmp_path)), steps=2)
    lengths = [len(row["input_ids"]) for row in benchmark.trainer_arguments(None)["eval_dataset"]]
    assert len(lengths) == 6 and benchmark.budget["train_rows"] == 12
    assert benchmark.shapes == [(16, 16)] * 4
    options = {"r": 2, "num_basis": 8, "target_modules": list(benchmark.targets)}
    found = train(benchmark.task, Method("nola", "NOLA", options), 0, False, None, tmp_path / "out")
    assert 0 <= found.metrics["accuracy"] <= 100 and found.validation_loss is not None
    # The classifier and the pooler that the weights lack are trained whole.
    assert found.trainable_parameters - found.head_parameters == 4 * 2 * 8
    assert found.head_parameters == 3 * 17 + 16 * 17
    probes = benchmark.task.probes()
    assert len(probes) == 2 and probes[0]["input_ids"].ndim == 1
