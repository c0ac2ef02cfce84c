"""The recipe that learns tasks in turn, from end to end on a Swiss roll and on a few images, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers.modeling_outputs import SequenceClassifierOutput

import recipes
from peft_ext.training.trainer import fit
from recipes.continual import learners
from recipes.continual.learners import parse_learners
from recipes.continual.problems import ByTask, RollRows, split_classes
from recipes.continual.results import TurnResult
from recipes.learn_in_turn import main
from recipes.support.arguments import UserError

ROLL = ["--swiss_roll", "3", "--samples", "20", "--adapter", "{name: pranc, num_coefficients: 60}"]
SHORT = ["--use_cpu", "--max_steps", "3", "--per_device_train_batch_size", "10", "--learning_rate", "1e-2"]
SHORT += ["--per_device_eval_batch_size", "20", "--disable_tqdm", "true", "--preset", "swiss_roll"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two test images of each of four shades."""
    folder = tmp_path_factory.mktemp("shades")
    names = ["black", "dark", "light", "white"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, count in {"train": 4, "test": 2}.items():
        rows = [
            (Image.fromarray(np.full((16, 16, 3), 80 * i + n, np.uint8)), i) for i in range(4) for n in range(count)
        ]
        columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def shades(vit_folder: Path, images: Path, tmp_path: Path) -> list[str]:
    text = (
        f"--model_name_or_path {vit_folder} --dataset_name {images} --eval_split test --output_dir {tmp_path / 'out'} "
        "--use_cpu --max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --learning_rate 1e-2 "
        "--disable_tqdm true"
    )
    return [*text.split(), "--adapter", "{name: nola, r: 2, num_basis: 8}"]


def results(folder: Path) -> dict[str, TurnResult]:
    return {row["label"]: TurnResult(**row) for row in json.loads((folder / "results.json").read_text())}


def test_every_learner_on_a_swiss_roll(tmp_path: Path) -> None:
    out = tmp_path / "out"
    learners = ["finetune", "{name: ewc, elastic: 10}", "{name: projection, components: 4, winners: 8, dropout: 1}"]
    flags = [*SHORT, *ROLL, "--seeds", "0", "--output_dir", str(out)]
    main([*flags, "--learners", *learners, "separate", "together"])
    found = results(out)
    shape = [[value is not None for value in row] for row in found["finetune"].accuracy]
    assert shape == [[True, False, False], [True, True, False], [True, True, True]]
    assert found["finetune"].protected == [0, 0, 0] and found["finetune"].parameters == 60
    assert found["projection components=4 winners=8 dropout=1"].protected == [4, 8, 8]
    assert found["separate"].backward_transfer(2) == 0
    assert [row[0] for row in found["together"].accuracy][:2] == [None, None]
    assert found["together"].mean_accuracy(2) is not None and found["together"].backward_transfer(2) is None
    assert found["finetune"].accuracy[0] == found["ewc elastic=10"].accuracy[0]  # no task came before the first one
    assert (out / "matrix.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "results.md").read_text()
    assert "| finetune, transfer " in table and "seeds 0." in table
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    main([*flags, "--learners", *learners, "separate", "together", "--resume_from_checkpoint", "true"])
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")} and len(written) == 5
    assert results(out) == found


def test_classes_of_images_as_tasks(shades: list[str], tmp_path: Path) -> None:
    main([*shades, "--learners", "{name: projection, winners: 1}", "--tasks", "white,black", "dark, light"])
    (found,) = results(tmp_path / "out").values()
    assert found.tasks == ["white, black", "dark, light"]
    assert found.accuracy[0][1] is None and len(found.accuracy[1]) == 2 and found.protected[0] > 0


def test_a_task_chooses_among_its_classes() -> None:
    class Logits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=x)  # type: ignore[arg-type]

    x = torch.randn(3, 4, requires_grad=True)
    task, labels = torch.tensor([0, 1, 0]), torch.tensor([3, 1, 0])
    found = ByTask(Logits(), [[0, 3], [1, 2]], 4)(task=task, labels=labels, x=x)
    own = torch.stack([x[0, [0, 3]], x[1, [1, 2]], x[2, [0, 3]]])
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(own, torch.tensor([1, 0, 0])))
    found.loss.backward()
    assert x.grad is not None and x.grad[0, 1] == x.grad[0, 2] == x.grad[1, 0] == 0 != x.grad[1, 1]


def test_pieces_of_the_roll() -> None:
    pieces = [RollRows(i, 4, 50, "train") for i in range(4)]
    radius = [piece.points.norm(dim=1) for piece in pieces]
    assert all(float(inner.mean()) < float(outer.mean()) for inner, outer in zip(radius, radius[1:]))
    inner = [float(r[p.labels == 0].mean()) < float(r[p.labels == 1].mean()) for r, p in zip(radius, pieces)]
    assert all(inner) and float(radius[-1].max()) <= 1.05
    assert torch.equal(pieces[0].points, RollRows(0, 4, 50, "train").points)
    assert not torch.equal(pieces[0].points, RollRows(0, 4, 50, "test").points)


def test_accuracy_and_backward_transfer() -> None:
    result = TurnResult("x", 0, ["a", "b", "c"], [[90.0, None, None], [80.0, 70.0, None], [60.0, 75.0, 99.0]])
    assert [result.mean_accuracy(i) for i in range(3)] == [90, 75, 78]
    assert [result.backward_transfer(i) for i in range(3)] == [None, -10, pytest.approx((-30 + 5) / 2)]


def test_default_tasks_are_pairs() -> None:
    assert split_classes([], list("abcde")) == [[0, 1], [2, 3]]
    assert split_classes(["e,a", "b, c ,d"], list("abcde")) == [[4, 0], [1, 2, 3]]
    labels = ["tench, Tinca tinca", "goldfish", "shark", "hen"]
    assert split_classes([], labels) == [[0, 1], [2, 3]]
    assert split_classes(['hen, "tench, Tinca tinca"', "goldfish,shark"], labels) == [[3, 0], [1, 2]]


def test_as_many_steps_for_all_tasks_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def note(*arguments: Any, **options: Any) -> Any:
        trainer = fit(*arguments, **options)
        steps.append(trainer.state.global_step)
        return trainer

    monkeypatch.setattr(learners, "fit", note)
    main(
        [
            *SHORT,
            *ROLL,
            "--max_steps",
            "2",
            "--seeds",
            "0",
            "--learners",
            "finetune",
            "together",
            "--output_dir",
            str(tmp_path / "out"),
        ]
    )
    assert steps == [2, 2, 2, 6]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a,b", "c,a"], "'a,b' and 'c,a' share the class 'a'"),
        (["a,b", "c,f"], "'f' is not a class of the data; it has a, b, c, d, e"),
        (["a,b", " "], "' ' has 0 class"),
        (["a,b", "c"], "'c' has 1 class"),
        (["a,b"], "there is 1; at least two"),
    ],
)
def test_tasks_that_cannot_be(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_classes(texts, list("abcde"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learners", "{name: projection, components: 30}"], "30 components of each of the 2 tasks before the last"),
        (["--learners", "{name: finetune, winners: 65}"], "learner 'finetune winners=65': `k` must be at most .* 64"),
        (["--learners", "{name: projection, energy: 2}"], "learner 'projection energy=2': `energy` must be"),
        (["--learners", "{name: finetune, energy: 0.9}"], "unknown option 'energy'"),
        (["--tasks", "a,b"], "swiss_roll makes its own tasks"),
        (["--digits", "true"], "swiss_roll and digits are two problems"),
        (["--dataset_name", "x"], "dataset_name: swiss_roll has no images; leave it out"),
        (["--shots", "5"], "shots: swiss_roll has no images"),
        (["--image_size", "8"], "image_size: swiss_roll has no images"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor is for other recipes"),
        (["--gradient_checkpointing", "true"], "gradient_checkpointing is for other recipes"),
        (["--adapter", "{name: pranc, pranc_dropout: 0.1}"], "pranc_dropout is 0.1, but this recipe trains in evalua"),
        (["--swiss_roll", "1"], "swiss_roll is 1; at least two"),
        (["--samples", "1"], "samples is 1"),
        (["--adapter", "head"], "'head' is for classifiers of images"),
        (["--adapter", "{name: pranc, num_coefficients: 99999}"], "adapter .*must be at most the 4,?482 parameters"),
        (["--memory_samples", "0"], "memory_samples is 0"),
        (["--data_seeds", "0", "1"], "data_seeds"),
    ],
)
def test_bad_input(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([*SHORT, *ROLL, "--output_dir", str(tmp_path / "out"), *flags])


def test_points_of_a_roll_that_is_none(shades: list[str]) -> None:
    with pytest.raises(UserError, match="samples is for --swiss_roll"):
        main([*shades, "--samples", "7"])


def test_tasks_without_images(shades: list[str]) -> None:
    with pytest.raises(UserError, match="'black, white' has 8 training and 0 validation images"):
        main([*shades, "--max_eval_samples", "1", "--tasks", "black,white", "dark, light"])


def test_presets_name_learners_that_there_are() -> None:
    presets = sorted(Path(recipes.__file__).parent.glob("configs/learn_in_turn_*.yaml"))
    assert len(presets) == 3
    for preset in presets:
        learners = parse_learners([yaml.dump(each) for each in yaml.safe_load(preset.read_text())["learners"]])
        assert [each.kind for each in learners.values()].count("projection") == 3 and len(learners) == 7
