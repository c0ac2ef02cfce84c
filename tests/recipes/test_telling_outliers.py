"""Outliers in the recipe for images, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pictures import picture
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    TrainingArguments,
    ViTImageProcessorPil,
)

from peft_ext.training.outliers import OUTLIER, OutlierLoss
from recipes.finetune_vit import FinetuneViT, main
from recipes.support.arguments import CONFIGS, UserError, parse_arguments
from recipes.support.methods import parse_methods
from recipes.support.reporting import RunResult
from recipes.support.runs import argument_types
from recipes.tasks.image_classification import (
    DataArguments,
    ImageData,
    ImageTask,
    ModelArguments,
    load_classifier,
    load_image_data,
)
from recipes.tasks.outlier_sets import SetSpec, load_set, parse_set
from recipes.tasks.outliers import OutlierArguments, Outliers, head_of

NOLA = "{name: nola, label: NOLA, r: 4, num_basis: 16}"
TEST = ["--ood_test", "{name: digits, split: validation}"]


@pytest.fixture(scope="session")
def far_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two times of the day, and of a class whose name is known elsewhere, in columns of other names."""
    folder = tmp_path_factory.mktemp("far")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value("string")})
    for start, name in enumerate(("train", "test")):
        images = [picture("red", 1000 + 100 * start + i) for i in range(9)]
        kinds = ["night", "noon", "red"] * 3
        datasets.Dataset.from_dict({"img": images, "kind": kinds}, features).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture
def known(image_folder: Path) -> ImageData:
    return load_image_data(DataArguments(str(image_folder), eval_split="test", labels=["red", "green"], shots=4))


def test_every_method_with_every_loss(
    vit_flags: list[str], far_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"{{name: {far_folder}, image_column: img, label_column: kind, label: times}}"
    flags = ["--methods", NOLA, "head", "--labels", "red", "green", "--seeds", "0", "--ood_ratio", "2"]
    main([*vit_flags, *flags, "--ood_dataset", "{labels: [blue]}", *TEST, other, "--ood_samples", "20"])
    out = tmp_path / "out"
    rows = json.loads((out / "results.json").read_text())
    labels = ["NOLA, plain", "NOLA, exposure", "NOLA, separation", "head, plain", "head, exposure"]
    assert [row["label"] for row in rows] == labels
    for row in rows:
        assert [(each["outliers"], each["score"]) for each in row["detection"]] == [
            (title, score) for title in ("digits", "times") for score in ("MSP", "energy", "cosine")
        ]
        assert all(0 <= each[name] <= 100 for each in row["detection"] for name in ("auroc", "fpr95"))
        assert row["head_parameters"] == 66 and "accuracy" in row["metrics"]

    def saved(label: str) -> dict[str, torch.Tensor]:
        folder = out / f"{label}-data0-seed0" / "adapter" / "adapter_model.safetensors"
        return {name: value for name, value in load_file(folder).items() if value.is_floating_point()}

    trained = [saved(f"NOLA-{label}") for label in ("plain", "exposure", "separation")]
    for first, second in ((0, 1), (1, 2)):
        assert any(not torch.equal(value, trained[second][name]) for name, value in trained[first].items())

    for text in ((out / "results.md").read_text(), capsys.readouterr().out):
        assert "digits (20 images of '0', '1'" in text and "times (6 images of 'night', 'noon', split test)" in text
        assert "Trained with: blue (6 images of 'blue', split train), 2 for every image." in text
        assert "No separation of head: nothing before the head is trained" in text
        assert "FPR95, times" in text and text.count("NOLA, separation") == 4


def make_task(vit_folder: Path, data: ImageData, folder: Path) -> ImageTask:
    source = ModelArguments(str(vit_folder))
    classifier = load_classifier(source, data.labels)
    training = TrainingArguments(str(folder), use_cpu=True, per_device_eval_batch_size=5, report_to=[])
    return ImageTask(source, classifier.processor, training, classifier, data, 0)


def test_scores_are_of_known_images_against_outliers(vit_folder: Path, known: ImageData, tmp_path: Path) -> None:
    (method,) = parse_methods([NOLA])
    outliers = Outliers(OutlierArguments(ood_test=["{labels: [blue]}"]), [method])
    outliers.load(known)
    task = outliers.task(make_task(vit_folder, known, tmp_path), None)
    model: Any = task.adapt(method, 0)
    result = RunResult("x", 0)
    task.score(model, {"eval_accuracy": 50.0}, result)
    model.eval()

    def sure(split: datasets.Dataset, data: ImageData) -> list[float]:
        pixels = data.encoded(split, task.processor)[:]["pixel_values"]
        with torch.no_grad():
            return model(pixel_values=pixels).logits.softmax(-1).amax(-1).tolist()

    far = replace(known, numbers={OUTLIER: 0})
    scores = sure(known.validation, known) + sure(outliers.tests[0].rows, far)
    area = 100 * roc_auc_score([1] * 8 + [0] * 4, scores)
    assert result.detection[0]["auroc"] == pytest.approx(area, abs=1e-3)
    assert result.metrics == {"accuracy": 50.0}


def test_sets_are_of_classes_that_are_not_known(known: ImageData, far_folder: Path) -> None:
    own = load_set("ood_test", parse_set("ood_test", "{split: train}"), "test", 100, known)
    assert len(own.rows) == 6 and set(own.rows["label"]) == {OUTLIER}
    assert own.rows.column_names == ["image", "label"]
    assert all(image.getpixel((0, 0))[2] > 120 for image in own.rows["image"])
    assert len(load_set("ood_test", SetSpec(), "test", 3, known).rows) == 3
    # Without a column of classes, all images are taken.
    spec = parse_set("ood_test", f"{{name: {far_folder}, image_column: img}}")
    everything = load_set("ood_test", spec, "test", 100, known)
    assert len(everything.rows) == 9 and "9 images of no classes" in everything.description
    assert everything.rows.column_names == ["image", "label"]


def test_what_the_user_writes_of_a_set() -> None:
    assert parse_set("ood_test", "folder/some.parquet") == SetSpec("folder/some.parquet", label="some")
    assert parse_set("ood_test", "{name: digits, labels: [3, 4]}") == SetSpec(
        "digits", labels=("3", "4"), label="digits 3, 4"
    )
    assert parse_set("ood_test", "{split: test, label: the rest}") == SetSpec(split="test", label="the rest")
    assert parse_set("ood_test", "{split: test}").label == "other classes"


def test_weights_of_losses() -> None:
    texts = ["plain", "{name: exposure, exposure: 1}", "{name: separation, clustering: 0, label: no clusters}"]
    found = Outliers(OutlierArguments("digits", ["digits"], texts), [])
    assert found.losses == {
        "plain": None,
        "exposure exposure=1": OutlierLoss(1, 0, 0),
        "no clusters": OutlierLoss(0.5, 1, 0),
    }
    assert list(Outliers(OutlierArguments("digits", ["digits"]), []).losses) == ["plain", "exposure", "separation"]
    assert list(Outliers(OutlierArguments(None, ["digits"]), []).losses) == ["plain"]


BLUE = ["--ood_dataset", "{labels: [blue]}"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*BLUE], "ood_dataset has no use without --ood_test"),
        (["--ood_losses", "plain"], "ood_losses has no use without --ood_test"),
        ([*TEST, "--ood_losses", "exposure"], "'exposure' trains with outliers; name some with --ood_dataset"),
        ([*TEST, *BLUE, "--ood_losses", "plain"], "no loss of --ood_losses, plain, trains with outliers"),
        ([*TEST, *BLUE, "--ood_losses", "exposur"], "unknown method 'exposur'"),
        ([*TEST, *BLUE, "--ood_losses", "{name: exposure, exposure: -1}"], "`exposure` must be at least 0"),
        ([*TEST, *BLUE, "--ood_ratio", "0"], "ood_ratio is 0"),
        ([*TEST, *BLUE, "--soup", "--seeds", "0", "1"], "either soups or outliers"),
        ([*TEST, "digits"], "two are called 'digits'"),
        (["--ood_test", "{names: digits}"], "unknown option 'names'; did you mean 'name'?"),
        (["--ood_test", "{labels: 3}"], "labels is 3; it must be a list"),
        (["--ood_test", "{name: 3}"], "name is 3; it must be text"),
        (["--ood_test", "[digits]"], "neither a name nor a mapping"),
        (["--ood_test", "{name: digits, split: test}"], "have no split 'test'; there are train, validation"),
        (["--ood_test", "nobody/nothing"], "ood_test: nothing: dataset_name: cannot load 'nobody/nothing'"),
        (["--ood_test", "{labels: [red]}"], "class 'red' is among the known classes, 'red', 'green'"),
        ([*TEST, "--ood_dataset", "{labels: [green]}"], "ood_dataset: green: class 'green' is among the known"),
        (
            ["--ood_test", "{labels: [pink]}"],
            "'pink' is no class of its split 'test', which has 'blue', 'green', 'red'",
        ),
        (["--ood_test", "{labels: [blue], split: train}", *BLUE], "6 of the images of blue are auxiliary outliers too"),
        ([*TEST, *BLUE, "--methods", "head", "--ood_losses", "separation"], "nothing before the head is trained"),
    ],
)
def test_refusals(
    vit_flags: list[str], vit_refused: Callable[[list[str]], str], tmp_path: Path, flags: list[str], said: str
) -> None:
    message = vit_refused([*vit_flags, "--labels", "red", "green", "--methods", NOLA, *flags])
    assert said in message
    assert not (tmp_path / "out").exists(), "a refused run must not stand in the way of the next"


def test_nothing_is_left_where_all_classes_are_known(
    vit_flags: list[str], vit_refused: Callable[[list[str]], str]
) -> None:
    message = vit_refused([*vit_flags, "--methods", NOLA, "--ood_test", "{split: test}"])
    assert "there is no image in it: all classes of its split 'test'" in message and "--labels names" in message


def test_a_head_that_is_not_one_linear_layer(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    classifier = load_classifier(ModelArguments(str(tmp_path)), ["red", "green"])
    classifier.head = ["cls_classifier", "distillation_classifier"]
    with pytest.raises(
        UserError, match=r"head is cls_classifier \(Linear\), dist.*must be one linear layer with a row"
    ):
        head_of(classifier)
    classifier.head = ["deit.layernorm"]
    with pytest.raises(UserError, match=r"head is deit.layernorm \(LayerNorm\)"):
        head_of(classifier)


@pytest.mark.parametrize("name", ["digits_ood", "dinov2_cifar10_ood"])
def test_presets(name: str) -> None:
    assert (CONFIGS / f"finetune_vit_{name}.yaml").exists()
    parsed = parse_arguments("finetune_vit", argument_types(FinetuneViT), ["--preset", name])
    values = {key: value for each in parsed for key, value in vars(each).items()}
    args = OutlierArguments(**{key: value for key, value in values.items() if key.startswith("ood_")})
    outliers = Outliers(args, parse_methods(values["methods"], extra=["head"]))
    assert list(outliers.losses) == ["plain", "exposure", "separation"] and values["seeds"] == [0, 1, 2]
    chosen = {
        *values["labels"],
        *parse_set("ood_dataset", args.ood_dataset).labels,
        *parse_set("x", args.ood_test[0]).labels,
    }
    assert len(chosen) == 10
