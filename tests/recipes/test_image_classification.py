"""Images, classes, heads, resolutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import evaluate
import pytest
import torch
from pictures import COLOURS, picture
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessorPil,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from recipes.support import inputs
from recipes.support.arguments import CONFIGS, UserError
from recipes.tasks.image_classification import (
    DataArguments,
    ImageData,
    ModelArguments,
    check_model,
    forward_options,
    load_classifier,
    load_image_data,
)

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def load(folder: Path, **options: Any) -> ImageData:
    return load_image_data(DataArguments(str(folder), eval_split="test", **options))


def write(folder: Path, rows: list[dict[str, Any]], name: str = "train", **features: Any) -> Path:
    data = datasets.Dataset.from_list(rows, datasets.Features({"image": datasets.Image(), **features}))
    data.to_parquet(folder / f"{name}.parquet")
    return folder


def test_few_images_of_every_class(image_folder: Path) -> None:
    def chosen(shots: int, seed: int) -> list[bytes]:
        few = load(image_folder, shots=shots).training_set(seed)
        assert sorted(few["label"]) == sorted(list(range(3)) * shots)
        return [image.tobytes() for image in few["image"]]

    assert chosen(4, 0) == chosen(4, 0)
    assert set(chosen(4, 0)) != set(chosen(4, 1))
    assert set(chosen(2, 1)) < set(chosen(4, 1))
    assert len(load(image_folder).training_set(0)) == 18
    assert len(load(image_folder, max_eval_samples=5).validation) == 5


def test_some_of_the_classes(image_folder: Path, vit_folder: Path) -> None:
    data = load(image_folder, labels=["blue", "red"])
    assert data.labels == ["red", "blue"]
    assert (len(data.train), len(data.validation)) == (12, 8)
    processor = load_classifier(ModelArguments(str(vit_folder)), data.labels).processor
    rows = data.encoded(data.validation, processor)[:]
    assert rows["labels"] == [0, 1] * 4
    assert rows["pixel_values"].shape == (8, 3, 16, 16)
    red, blue = rows["pixel_values"][0], rows["pixel_values"][1]
    assert red[0].mean() > 0.5 > -0.5 > red[2].mean() and blue[2].mean() > 0.5


def test_classes_without_names(tmp_path: Path) -> None:
    rows = [{"image": picture("red", i), "label": number} for i, number in enumerate([10, 9, 2, 10])]
    write(tmp_path, rows, label=datasets.Value("int64"))
    write(tmp_path, rows, "test", label=datasets.Value("int64"))
    assert load(tmp_path).labels == ["2", "9", "10"]
    assert load(tmp_path, labels=["10", "2"]).labels == ["2", "10"]


def test_a_folder_of_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for i, colour in enumerate(COLOURS):
            (tmp_path / split / colour).mkdir(parents=True)
            picture(colour, i).save(tmp_path / split / colour / "0.png")
    data = load(tmp_path)
    assert data.labels == sorted(COLOURS) and data.train[0]["image"].size == (20, 20)


def test_paths_in_a_file(tmp_path: Path) -> None:
    rows = []
    for i, colour in enumerate(COLOURS):
        picture(colour, i).save(tmp_path / f"{colour}.png")
        rows.append({"file": str(tmp_path / f"{colour}.png"), "colour": colour})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DataArguments(
        str(tmp_path / "all.jsonl"), eval_split="train", image_column="file", label_column="colour", labels=["red"]
    )
    with pytest.raises(UserError, match="'red' is the only class"):
        load_image_data(args)
    args.labels = []
    data = load_image_data(args)
    assert data.labels == sorted(COLOURS) and data.train[0]["file"].size == (20, 20)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"shots": 7}, ["shots is 7", "'train'", "'red' has 6", "'blue' has 6"]),
        ({"shots": 0}, ["shots is 0", "at least 1"]),
        ({"max_eval_samples": 0}, ["max_eval_samples is 0"]),
        ({"shots": 2, "data_seeds": [0, 0]}, ["data_seeds: 0, 0: one is there twice"]),
        ({"data_seeds": [0, 1]}, ["data_seeds", "[0, 1]", "--shots"]),
        ({"labels": ["red", "pink"]}, ["'pink'", "'red', 'green', 'blue'"]),
        ({"label_column": "colour"}, ["'colour'", "'train'", "'image', 'label'"]),
        ({"image_column": "label"}, ["both 'label'"]),
        ({"train_split": "dev"}, ['"dev"']),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_requests_are_refused(image_folder: Path, options: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(image_folder, **options)
    assert all(part in str(caught.value) for part in said), caught.value


RED, GREEN = ({"image": picture(colour, 0), "label": colour} for colour in ("red", "green"))


@pytest.mark.parametrize(
    "train, test, said",
    [
        ([RED, GREEN], [RED, {**GREEN, "label": "blue"}], ["'train' lacks 'blue'", "'test' lacks 'green'"]),
        ([RED, GREEN], [RED], ["'train' lacks none", "'test' lacks 'green'", "--labels"]),
        ([RED, {**RED, "label": None}], [RED, GREEN], ["'label'", "'train'", "no class in 1 of 2"]),
        ([RED, {**GREEN, "image": None}], [RED, GREEN], ["'image'", "'train'", "without an image"]),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, train: list[Any], test: list[Any], said: list[str]) -> None:
    write(tmp_path, train, label=datasets.Value("string"))
    write(tmp_path, test, "test", label=datasets.Value("string"))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert all(part in str(caught.value) for part in said), caught.value


def test_columns_of_something_else_are_refused(tmp_path: Path) -> None:
    rows = [{"image": "nowhere.png", "size": 0.5, "label": label} for label in "ab"]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def said(**options: str) -> str:
        with pytest.raises(UserError) as caught:
            load_image_data(DataArguments(str(tmp_path / "all.jsonl"), eval_split="train", **options))
        return str(caught.value)

    assert "'image' of split 'train'" in said() and "nowhere.png" in said()
    assert "'size' of split 'train'" in said(image_column="size") and "no images" in said(image_column="size")
    assert "'size' of split 'train'" in said(label_column="size") and "float64" in said(label_column="size")


MODELS: list[tuple[type[PreTrainedModel], PretrainedConfig, list[str]]] = [
    (ViTForImageClassification, ViTConfig(image_size=16, patch_size=8, **SMALL), ["classifier"]),
    (
        Dinov2ForImageClassification,
        Dinov2Config(image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        ["classifier"],
    ),
    (
        DeiTForImageClassificationWithTeacher,
        DeiTConfig(image_size=16, patch_size=8, **SMALL),
        ["cls_classifier", "distillation_classifier"],
    ),
    (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        ["classifier.1"],
    ),
]


@pytest.mark.parametrize("model_class, config, head", MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_head_is_kept_for_the_same_classes_alone(
    tmp_path: Path, model_class: type[PreTrainedModel], config: Any, head: list[str]
) -> None:
    config.id2label = {0: "red", 1: "green"}
    config.label2id = {"red": 0, "green": 1}
    model_class(config).save_pretrained(tmp_path)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path)
    heads = [name for name, _ in saved.named_parameters() if "classifier" in name and name.endswith("weight")]

    def weights(model: PreTrainedModel) -> list[torch.Tensor]:
        return [model.get_parameter(name) for name in heads]

    same = load_classifier(ModelArguments(str(tmp_path)), ["red", "green"])
    assert (same.new_head, same.model.config.id2label) == (False, {0: "red", 1: "green"})
    assert same.head == head
    assert all(map(torch.equal, weights(saved), weights(same.fresh_model())))
    for labels in (["green", "red"], ["red", "green", "blue"]):
        other = load_classifier(ModelArguments(str(tmp_path)), labels)
        assert other.new_head and other.head == head and list(other.model.config.label2id) == labels
        set_seed(0)
        first = other.fresh_model()
        second = other.fresh_model()
        for name, parameter in first.named_parameters():
            drawn_again = name.startswith(tuple(head))
            assert torch.equal(parameter, second.get_parameter(name)) != drawn_again, name
            assert drawn_again or torch.equal(parameter, saved.get_parameter(name)), name
        set_seed(0)
        assert all(map(torch.equal, weights(first), weights(other.fresh_model())))


def test_another_resolution(vit_folder: Path, tmp_path: Path) -> None:
    classifier = load_classifier(ModelArguments(str(vit_folder), image_size=24), ["a", "b"])
    pixels = classifier.processor([picture("red", 0)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    check_model(classifier, pixels)
    # At the size it was trained with, being asked to interpolate changes nothing.
    small = torch.randn(2, 3, 16, 16)
    options = forward_options(classifier.model)
    assert options and torch.equal(
        classifier.model(small).logits, classifier.model(small, interpolate_pos_encoding=True).logits
    )

    # DINOv2 interpolates unasked; its processor cuts out the middle.
    Dinov2ForImageClassification(MODELS[1][1]).save_pretrained(tmp_path)
    BitImageProcessorPil().save_pretrained(tmp_path)
    classifier = load_classifier(ModelArguments(str(tmp_path), image_size=24), ["a", "b"])
    wide = picture("red", 0).resize((60, 40))
    pixels = classifier.processor([wide], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24) and forward_options(classifier.model) == {}
    check_model(classifier, pixels)
    with pytest.raises(UserError, match=r"image_size: images of 28 x 28 pixels.*patches of 8; 24 would be"):
        check_model(classifier, torch.zeros(1, 3, 28, 28))
    with pytest.raises(UserError, match=r"image_size: the model does not take images of 24 x 24 pixels: "):
        check_model(classifier, torch.zeros(1, 1, 24, 24))
    with pytest.raises(UserError, match="image_size is 0"):
        load_classifier(ModelArguments(str(tmp_path), image_size=0), ["a", "b"])


def test_a_model_without_an_image_processor(tmp_path: Path) -> None:
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL)).save_pretrained(tmp_path)
    processor = load_classifier(ModelArguments(str(tmp_path)), ["a", "b"]).processor
    assert processor([picture("red", 0)], return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


def test_models_that_cannot_be_trained_are_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GPT2Config"):
        load_classifier(ModelArguments(str(model_folder)), ["a", "b"])
    model_class, config, _ = MODELS[2]
    model_class(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DeiTForImageClassificationWithTeacher.*no loss"):
        check_model(load_classifier(ModelArguments(str(tmp_path)), ["a", "b"]), torch.zeros(1, 3, 16, 16))


def test_accuracy_is_that_of_the_library() -> None:
    predictions, references = [0, 1, 2, 2, 1], [0, 2, 2, 2, 0]
    expected = {"accuracy": pytest.approx(100 * accuracy_score(references, predictions))}
    assert inputs.load_metric("accuracy").compute(predictions=predictions, references=references) == expected
    # The module works by its folder, without this package.
    folder = CONFIGS.parent / "metrics" / "accuracy"
    assert evaluate.load(str(folder)).compute(predictions=predictions, references=references) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the models and data beside the checkout")
def test_dinov2_on_cifar10() -> None:
    data = load(SHARED / "data" / "cifar10", shots=1, max_eval_samples=2)
    classifier = load_classifier(ModelArguments(str(SHARED / "models" / "dinov2-small"), image_size=28), data.labels)
    assert classifier.new_head and classifier.model.dtype == torch.float32
    assert len(data.training_set(0)) == len(data.labels) == 10
    check_model(classifier, data.encoded(data.validation, classifier.processor)[:]["pixel_values"])
