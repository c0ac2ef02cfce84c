"""The unlearning recipe from end to end on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from peft_ext.training.callbacks import trainable_state
from peft_ext.unlearning.evaluation.results import UnlearningResult
from peft_ext.unlearning.methods import METHODS, GaussNewton, Rewind
from recipes import unlearn
from recipes.support.arguments import CONFIGS, UserError, parse_arguments
from recipes.support.methods import parse_methods
from recipes.support.runs import argument_types
from recipes.tasks import digits
from recipes.tasks.resnet import CifarResNet
from recipes.unlearn import Unlearn, main
from recipes.unlearning import experiment, settings
from recipes.unlearning.cases import parse_cases
from recipes.unlearning.same_time import default_like, like_before

ROOT = Path(__file__).resolve().parents[2]
TYPES = argument_types(Unlearn)
ADAPTER = ["--adapter", "{name: nola, r: 2, num_basis: 8, parametrization: plain}"]
FLAGS = (
    "--num_train_epochs 6 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --learning_rate 2e-2 "
    "--relearn_limit 3 --use_cpu --disable_tqdm true"
).split()


@pytest.fixture
def images(vit_folder: Path, image_folder: Path, tmp_path: Path) -> list[str]:
    """A short run on images of three colours: 6 for training and 4 for testing of each."""
    text = f"--model_name_or_path {vit_folder} --dataset_name {image_folder} --eval_split test"
    return [*text.split(), *ADAPTER, "--output_dir", str(tmp_path / "out"), *FLAGS]


@pytest.fixture
def texts(model_folder: Path, data_folder: Path, tmp_path: Path) -> list[str]:
    """A short run on 24 descriptions, two of each of 12 restaurants."""
    text = (
        f"--task text --model_name_or_path {model_folder} --dataset_name {data_folder} --source_column mr "
        "--target_column ref --max_source_length 60 --max_target_length 30"
    )
    return [*text.split(), *ADAPTER, "--output_dir", str(tmp_path / "out"), *FLAGS]


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their tables and figures, which one test looks at."""
    monkeypatch.setattr(unlearn, "write_report", lambda *_: None)


def result(folder: Path, name: str) -> UnlearningResult:
    return UnlearningResult.load(folder / f"{name}-seed42")


def accuracy(found: UnlearningResult, split: str) -> float:
    return float(found.outcomes[split].correct.mean())


def loss(found: UnlearningResult, split: str) -> float:
    return float(found.outcomes[split].losses.mean())


def test_cases_methods_and_seeds_in_one_report(
    images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    methods = ["--methods", "{name: salun, label: SalUn, max_steps: 2, share: 0.3}"]
    main([*images, "--cases", "class:red", "random:0.3", *methods, "--seeds", "3", "4"])
    rows = json.loads((out / "report.json").read_text())["rows"]
    labels = ["original", "retrain", "SalUn"]
    assert [(row["case"], row["method"]) for row in rows] == [
        (name, label) for name in ("class red", "random 30 %") for label in labels
    ]
    assert all(row["seeds"] == [3, 4] for row in rows)
    assert rows[0]["samples"] == {"forget": 6, "retain": 12, "test": 8, "heldout": 4}
    assert rows[3]["samples"] == {"forget": 5, "retain": 13, "test": 12}
    # A head of 3 x 32 and 3; the query and value projections of two layers, 2 x 8 coefficients each.
    assert {row["parameters"] for row in rows} == {99 + 64}
    original, gold = rows[:2]
    assert original["accuracy_forget"]["mean"] == original["accuracy_retain"]["mean"] == 1
    assert gold["accuracy_forget"]["mean"] == 0 and gold["accuracy_retain"]["mean"] == 1
    assert gold["seconds"]["mean"] > 0 and "relearn_steps" in gold and "relearn_steps" not in original
    golds = [UnlearningResult.load(out / "random-30" / f"retrain-seed{seed}") for seed in (3, 4)]
    assert loss(golds[0], "test") != loss(golds[1], "test")
    assert "2 steps, learning rate 0.02" in (out / "report.md").read_text()
    printed = capsys.readouterr().out
    assert printed.count("SalUn, seed 4: forget") == 2 and "report.md, report.json" in printed
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_takes_what_is_there(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    arguments = [*images, "--cases", "class:red", "memorised:0.2", "--methods", "salun", "--memorised_pairs", "1"]
    main(arguments)
    folder = tmp_path / "out" / "class-red"
    before = result(folder, "salun")
    assert len(result(tmp_path / "out" / "memorised-20", "salun").outcomes["forget"]) == 4
    (folder / "salun-seed42" / "unlearning.json").unlink()
    trained = []
    fit = experiment.fit

    def counted(model: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(len(data))
        return fit(model, data, *args, **kwargs)

    monkeypatch.setattr(experiment, "fit", counted)
    main([*arguments, "--resume_from_checkpoint", "true"])
    assert trained in ([6], []), "more was trained than the relearning of one result"
    again = result(folder, "salun")
    for split, outcome in before.outcomes.items():
        np.testing.assert_array_equal(outcome.losses, again.outcomes[split].losses)
    assert (before.relearn_steps, timeless(before.report)) == (again.relearn_steps, timeless(again.report))

    # Methods, seeds, cases and golds can be added, but a label keeps its options.
    trained.clear()
    more = ["--cases", "class:red", "--methods", "{name: finetune, label: new, max_steps: 1}", "--further_golds", "1"]
    main([*images, *more, "--memorised_pairs", "1", "--resume_from_checkpoint", "true"])
    assert trained in ([6], []), "more was trained than the relearning of the new method"
    assert UnlearningResult.load(folder / "retrain-seed43").seed == 43 and not (folder / "new-seed43").exists()
    for methods in (["{name: finetune, label: new}"], ["{name: finetune, label: salun}"]):
        with pytest.raises(UserError, match="was started with methods"):
            main([*arguments, "--methods", *methods, "--resume_from_checkpoint", "true"])


def timeless(report: Any) -> Any:
    """What a method reports, without the time that it took."""
    return {key: value for key, value in report.items() if key != "seconds"}


def test_damaged_results_end_in_a_line(
    images: list[str], tmp_path: Path, ends: Callable[..., str], no_report: None
) -> None:
    arguments = [*images, "--cases", "class:red", "--methods", "{name: finetune, max_steps: 1}", "--relearn_limit", "0"]
    main(arguments)
    folder = tmp_path / "out" / "class-red" / "retrain-seed42"
    for file in (
        folder / "unlearning.json",
        folder / "unlearning.npz",
        tmp_path / "out" / "original-seed42.safetensors",
    ):
        if file.suffix == ".safetensors":
            (folder / "unlearning.json").unlink()  # so that the original is needed
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        said = ends([*arguments, "--resume_from_checkpoint", "true"], main)
        named = file if file.suffix == ".safetensors" else folder
        assert f"resume_from_checkpoint: {named} is damaged (" in said
        file.write_bytes(whole)
    main([*arguments, "--resume_from_checkpoint", "true"])


class Interrupted(Exception):
    """As a kill would be."""


def test_an_overwritten_run_leaves_nothing_to_resume_from(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    flags = [*images, "--cases", "class:red", "--methods", "{name: finetune, max_steps: 1}", "--relearn_limit", "0"]
    seeds = []
    fit = experiment.fit

    def spied(model: Any, data: Any, collator: Any, training: TrainingArguments, **options: Any) -> Any:
        seeds.append(training.seed)
        return fit(model, data, collator, training, **options)

    monkeypatch.setattr(experiment, "fit", spied)
    main([*flags, "--seeds", "9"])
    assert seeds == [9]
    found = UnlearningResult.load(tmp_path / "out" / "class-red" / "retrain-seed9")
    assert found.relearn_steps is found.relearn_limit is None

    def interrupt(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(experiment.Experiment, "original", interrupt)
    with pytest.raises(Interrupted):
        main([*flags, "--seeds", "9", "--overwrite_output_dir", "true"])
    assert not list((tmp_path / "out").rglob("*.json"))[1:], "more than arguments.json is left"
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_texts(texts: list[str], tmp_path: Path, no_report: None) -> None:
    cases = ["--cases", "groups:0.25", "filter", "--group_pattern", r"name\[(.*?)\]", "--forget_filter", r"name\[N1\]"]
    methods = ["--methods", "{name: random_labels, max_steps: 2}", "{name: gradient_ascent, max_steps: 2}"]
    main([*texts, *cases, *methods, "--num_train_epochs", "12"])
    labels = ["original", "retrain", "random_labels-max_steps=2", "gradient_ascent-max_steps=2"]
    for case, size in (("groups-25", 6), ("filter", 2)):
        found = {label: result(tmp_path / "out" / case, label) for label in labels}
        for each in found.values():
            assert len(each.outcomes["forget"]) == size and each.parameters == 32
            ratios = each.outcomes["forget"].truth_ratio
            assert ratios is not None and (ratios > 0).all() and len(ratios) == size
        before = loss(found["original"], "forget")
        assert loss(found["retrain"], "forget") > before and loss(found[labels[3]], "forget") > before
    assert len(found["original"].outcomes["heldout"]) == 2


@pytest.fixture
def resnet(tmp_path: Path) -> tuple[CifarResNet, list[str]]:
    """A saved ResNet-20 with statistics of its own, and flags to use it on the digits."""
    torch.manual_seed(1)
    network = CifarResNet()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias)
    for name, value in network.named_buffers():
        if "running" in name:
            value.uniform_(0.01, 0.1)
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    text = f"--network resnet20 --network_weights {tmp_path / 'resnet.safetensors'} --image_size 8 --max_steps 3"
    return network, [*FLAGS, *text.split(), "--output_dir", str(tmp_path / "out")]


def test_parameters_by_name_in_a_network_with_batch_norm(
    resnet: tuple[CifarResNet, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    network, flags = resnet
    flags += ["--dataset_name", digits.prepare_data(tmp_path), "--trainable_parameters", "bn|linear"]
    flags += ["--max_train_samples", "40", "--max_eval_samples", "20", "--cases", "random:0.2"]
    models = []
    run = settings.train_by_name

    def remembered(*args: Any) -> Any:
        model = run(*args)
        models.append((model, trainable_state(model)))
        return model

    monkeypatch.setattr(settings, "train_by_name", remembered)
    main([*flags, "--methods", "{name: random_labels, max_steps: 2}"])
    pretrained = network.state_dict()
    assert len(models) == 5  # a check, the original, three that start from it
    for model, initial in models:
        assert set(initial) == {name for name in pretrained if ("bn" in name or "linear" in name) and name in initial}
        assert len(initial) == 2 * 19 + 2
        assert all(torch.equal(value, pretrained[name]) for name, value in initial.items() if "bn" in name)
        assert not torch.equal(initial["linear.weight"], pretrained["linear.weight"])
        for name, value in model.state_dict().items():
            if name not in initial:
                assert torch.equal(value, pretrained[name]), name
    saved = load_file(tmp_path / "out" / "original-seed42.safetensors")
    assert saved.keys() == models[0][1].keys()
    for name in ("linear.weight", "linear.bias", "bn1.weight"):
        assert not torch.equal(saved[name], models[0][1][name])


def test_two_processes(images: list[str], tmp_path: Path, no_report: None) -> None:
    methods = [
        "--cases",
        "class:red",
        "--methods",
        "{name: random_labels, epochs: 4}",
        "{name: gauss_newton, draws: null}",
    ]
    main([*images, *methods, "--output_dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(CONFIGS / "accelerate_cpu_x2.yaml"), "-m", "recipes.unlearn"]
    # Half the images in each process: the same steps as in one.
    command = [*launch, *images, *methods, "--per_device_train_batch_size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("random_labels epochs=4, seed 42: forget") == 1
    for label in ("original", "retrain", "random_labels-epochs=4", "gauss_newton-draws=None"):
        one, two = (result(tmp_path / name / "class-red", label) for name in ("one", "out"))
        for split, outcome in one.outcomes.items():
            assert len(outcome) == len(two.outcomes[split])
            assert accuracy(one, split) == pytest.approx(accuracy(two, split), abs=0.2), label
        assert loss(two, "test") == pytest.approx(loss(one, "test"), abs=0.1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("unlearn_*.yaml")), ids=lambda path: path.stem)
def test_every_preset_parses(path: Path) -> None:
    model, data, cases, args, run, _, training = parse_arguments("unlearn", TYPES, [str(path)])
    settings.check_arguments(model, data, args)
    parse_cases(cases, args.task)
    assert settings.parse_unlearning_methods(args.methods)
    if args.adapter:
        parse_methods([args.adapter])[0].config(None, 0)


@pytest.mark.filterwarnings("ignore:A trial deletion")  # so little training foretells that the ledger leaves too much
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> None:
    monkeypatch.setattr(digits, "_STEPS", 20)
    threads = torch.get_num_threads()
    images = [name for name in METHODS if name != "idk_dpo"]
    try:
        short = ["--seeds", "0", "--max_steps", "8", "--relearn_limit", "1", "--max_train_samples", "120"]
        short += ["--max_eval_samples", "60", "--disable_tqdm", "true", "--methods", *images]
        short.remove("retrain")
        main(["--preset", "quickstart", "--output_dir", str(tmp_path / "out"), *short])
    finally:
        torch.set_num_threads(threads)
    names = {path.parent.name for path in tmp_path.glob("out/class-7/*/unlearning.json")}
    assert names == {f"{name}-seed0" for name in ("original", "fine-tuning-same-time", *images)}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--cases", "class:pink"], ["no class 'pink'", "red, green, blue"]),
        (["--cases", "clas:red"], ["'clas'", "did you mean 'class'?"]),
        (["--cases", "filter"], ["'filter'", "random, memorised, class"]),
        (["--cases", "random:1.5"], ["'random:1.5'", "random:0.1"]),
        (["--cases", "random:0.1", "random:0.1"], ["twice"]),
        (["--cases", "random:0.99"], ["takes all of the 18 training samples"]),
        (["--methods", "salum"], ["'salum'", "did you mean 'salun'?"]),
        (["--methods", "retrain"], ["always runs"]),
        (["--methods", "{name: salun, shar: 0.3}"], ["'shar'", "share"]),
        (
            ["--methods", "{name: salun, share: 3}"],
            ["'salun share=3'", "`share` must be a number above 0", "got 3"],
        ),
        (["--methods", "salun", "salun"], ["two are called 'salun'"]),
        (["--trainable_parameters", "bn"], ["either --adapter", "--trainable_parameters"]),
        (["--adapter", "nolo"], ["'nolo'", "nola"]),
        (["--adapter", "{name: nola, target_modules: [nowhere]}"], ["nowhere", "q_proj"]),
        (["--seeds", "1", "1"], ["seeds", "twice"]),
        (["--network", "resnet20"], ["model_name_or_path is for --network pretrained, this is --network resnet20"]),
        (["--network_weights", "x"], ["network_weights is for --network resnet20"]),
        (["--image_mean", "0", "0", "0"], ["image_mean is for --network resnet20"]),
        (["--data_seeds", "1", "2"], ["data_seeds"]),
        (["--relearn_limit", "-1"], ["relearn_limit is -1"]),
        (["--stop_training_after", "0"], ["stop_training_after is 0", "at most 1"]),
        (["--same_time", "finetun"], ["'finetun'", "did you mean 'finetune'?"]),
        (["--same_time", "none", "retrain"], ["'none' goes with no other"]),
        (["--same_time_as", "Newton"], ["no method is called 'Newton'", "finetune", "gauss_newton"]),
        (["--methods", "{name: salun, label: 'fine-tuning, same time'}"], ["'label' of its own"]),
        (["--methods", "idk_dpo"], ["method 'idk_dpo'", "causal language model say", "npo and simnpo"]),
        (["--source_column", "text"], ["source_column is for --task text", "--task image"]),
        (["--max_length", "9"], ["max_length is for --task text-classification"]),
        (["--forget_filter", "red"], ["'filter'", "--forget_filter", "both"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input(
    images: list[str], refused: Callable[..., str], tmp_path: Path, flags: list[str], said: list[str]
) -> None:
    message = refused([*images, *flags], main=main)
    assert all(part in message for part in said), message
    assert not (tmp_path / "out").exists(), "a refused run must not stand in the way of the next"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--cases", "filter", "--forget_filter", "Alimentum"], ["'Alimentum'", "takes none of the 24"]),
        (["--cases", "filter", "--forget_filter", "name"], ["'name'", "takes all of the 24"]),
        (["--cases", "filter", "--forget_filter", "na[me"], ["'na[me'", "no regular expression"]),
        (["--cases", "groups:0.2"], ["--group_pattern"]),
        (["--cases", "groups:0.2", "--group_pattern", "name"], ["parentheses"]),
        (["--cases", "groups:0.2", "--group_pattern", r"near\[(.*?)\]"], ["finds 0 groups"]),
        (["--cases", "class:red"], ["'class'", "random, memorised, filter, groups"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_for_texts(
    texts: list[str], refused: Callable[..., str], tmp_path: Path, flags: list[str], said: list[str]
) -> None:
    message = refused([*texts, *flags], main=main)
    assert all(part in message for part in said), message
    assert not (tmp_path / "out").exists()


def test_names_that_are_in_no_parameter(resnet: tuple[CifarResNet, list[str]], tmp_path: Path) -> None:
    _, flags = resnet
    flags += ["--dataset_name", digits.prepare_data(tmp_path), "--max_train_samples", "20"]
    with pytest.raises(UserError, match="'norm' is in no name; there are conv1.weight, bn1.weight"):
        main([*flags, "--trainable_parameters", "norm"])
    with pytest.raises(UserError, match="resnet20 takes no adapter"):
        main([*flags, "--adapter", "nola"])


def test_labels_that_share_a_folder(images: list[str], refused: Callable[..., str]) -> None:
    methods = ["--methods", "{name: finetune, label: a b}", "{name: salun, label: a-b}"]
    assert "two are called 'a b'; give each a 'label' of its own" in refused([*images, *methods], main=main)
    for label in ("original", "retrain"):
        assert f"'{label}'" in refused([*images, "--methods", f"{{name: finetune, label: {label}}}"], main=main)


def test_damaged_weights(resnet: tuple[CifarResNet, list[str]], tmp_path: Path) -> None:
    _, flags = resnet
    flags += ["--dataset_name", digits.prepare_data(tmp_path), "--trainable_parameters", "bn|linear"]
    file = tmp_path / "resnet.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="network_weights: cannot load"):
        main(flags)


def test_a_resumed_run_keeps_the_method_whose_time_its_baselines_have() -> None:
    newton, rewind = {"newton": GaussNewton()}, {"newton": GaussNewton(), "rewind": Rewind()}
    assert default_like(newton) == "newton" and default_like(rewind) == "rewind" and default_like({}) is None
    for recorded in (None, "newton"):  # older runs wrote down what was named alone
        assert like_before(recorded, None, newton, rewind) == "newton"
        assert like_before(recorded, "newton", newton, rewind) == "newton"
        assert like_before(recorded, "rewind", newton, rewind) is None
    assert like_before(None, None, {}, rewind) == "rewind" and like_before(None, "newton", {}, rewind) == "newton"
    assert like_before("rewind", None, rewind, {}) == "rewind"  # no baselines this time
    with pytest.raises(UserError, match="have the time of 'rewind', .*: name 'rewind' among the --methods too"):
        like_before("rewind", None, rewind, newton)


def test_methods_can_be_added_to_a_run_with_baselines(images: list[str], no_report: None, tmp_path: Path) -> None:
    arguments = [*images, "--cases", "class:red"]
    main([*arguments, "--methods", "gauss_newton"])
    before = result(tmp_path / "out" / "class-red", "fine-tuning-same-time")
    resumed = [*arguments, "--resume_from_checkpoint", "true"]
    main([*resumed, "--methods", "gauss_newton", "rewind"])
    main([*resumed, "--methods", "gauss_newton", "rewind"])
    record = json.loads((tmp_path / "out" / "arguments.json").read_text())
    assert record["same_time_as"] == "gauss_newton" and record["methods"] == ["gauss_newton", "rewind"]
    assert result(tmp_path / "out" / "class-red", "fine-tuning-same-time").report == before.report
    with pytest.raises(UserError, match="same_time_as = 'gauss_newton', now it is 'rewind'"):
        main([*resumed, "--methods", "gauss_newton", "rewind", "--same_time_as", "rewind"])
    main([*resumed, "--methods", "salun"])
