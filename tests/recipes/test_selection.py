"""Choosing the images to label."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from transformers import TrainingArguments

from recipes.finetune_vit import main
from recipes.tasks.image_classification import (
    DataArguments,
    ImageData,
    ModelArguments,
    load_classifier,
    load_image_data,
)
from recipes.tasks.selection import SelectionArguments, features, nearest_members, select


@pytest.fixture
def data(image_folder: Path) -> ImageData:
    return load_image_data(DataArguments(str(image_folder), eval_split="test"))


@pytest.fixture
def choose(data: ImageData, vit_folder: Path, tmp_path: Path) -> Callable[..., ImageData]:
    classifier = load_classifier(ModelArguments(str(vit_folder)), data.labels)
    training = TrainingArguments(str(tmp_path / "out"), use_cpu=True, per_device_eval_batch_size=5)
    data.args.data_seeds = list(range(4))
    return lambda seed=0, **options: select(SelectionArguments(**options), data, classifier, training)[seed]


def images(chosen: ImageData) -> list[bytes]:
    return [image.tobytes() for image in chosen.train["image"]]


def test_the_member_nearest_to_each_centre() -> None:
    points = np.random.default_rng(0).normal(size=(60, 3))
    chosen = nearest_members(points, 7, 3)
    found = KMeans(7, n_init=5, max_iter=20, random_state=3).fit(points)
    assert len(chosen) == 7
    assert {int(found.labels_[place]) for place in chosen} == set(range(7))
    for place in chosen:
        centre = found.cluster_centers_[found.labels_[place]]
        members = points[found.labels_ == found.labels_[place]]
        assert np.isclose(np.linalg.norm(points[place] - centre), np.linalg.norm(members - centre, axis=1).min())


def test_fewer_than_asked_for_if_fewer_differ() -> None:
    assert len(nearest_members(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), 3, 0)) == 2


def test_clusters_cover_the_classes(choose: Callable[..., ImageData]) -> None:
    for seed in range(3):
        assert sorted(choose(seed, budget=3).train["label"]) == [0, 1, 2]
    assert images(choose(1, budget=5)) == images(choose(1, budget=5))


def test_random_images(choose: Callable[..., ImageData], data: ImageData) -> None:
    draws = [images(choose(seed, budget=5, selection="random")) for seed in range(4)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert all(len(set(draw)) == 5 and set(draw) < set(images(data)) for draw in draws)
    assert images(choose(2, budget=5, selection="random")) == draws[2]


def test_the_pool_is_the_same_for_all_seeds(choose: Callable[..., ImageData]) -> None:
    pools = [set(images(choose(seed, budget=6, pool_size=6, selection="random"))) for seed in range(3)]
    assert pools[0] == pools[1] == pools[2]
    assert images(choose()) == images(choose(1))  # without a budget all are taken


def test_features_are_what_the_head_reads(data: ImageData, vit_folder: Path, tmp_path: Path) -> None:
    classifier = load_classifier(ModelArguments(str(vit_folder)), data.labels)
    training = TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=4)
    found = features(data, classifier, training)
    assert found.shape == (18, 32)
    pixels = data.encoded(data.train, classifier.processor)[:]["pixel_values"]
    with torch.no_grad():
        hidden = classifier.model.eval().base_model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(torch.from_numpy(found), torch.nn.functional.normalize(hidden))
    assert not any(module._forward_pre_hooks for module in classifier.model.modules())


def test_recipe(vit_flags: list[str], tmp_path: Path) -> None:
    place = vit_flags.index("--shots")
    flags = [*vit_flags[:place], *vit_flags[place + 2 :], "--methods", "head"]
    main([*flags, "--budget", "3", "--pool_size", "12", "--data_seeds", "0", "1", "--seeds", "0"])
    said = (tmp_path / "out" / "results.md").read_text()
    assert "3 images chosen by kmeans from 12, without their classes" in said
    assert "data seed 0: 3 images of 3 classes; data seed 1: 3 images of 3 classes" in said
    assert [row["data_seed"] for row in json.loads((tmp_path / "out" / "results.json").read_text())] == [0, 1]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--budget", "19"], "budget is 19, but there are 18 images to choose from"),
        (["--budget", "6", "--pool_size", "5"], "budget is 6, but there are 5 images to choose from"),
        (["--budget", "0"], "budget is 0"),
        (["--budget", "3", "--shots", "1"], "shots and budget"),
        (["--selection", "random"], "selection says how --budget chooses"),
        (["--pool_size", "9"], "pool_size says how --budget chooses"),
    ],
)
def test_refusals(
    vit_flags: list[str], tmp_path: Path, vit_refused: Callable[[list[str]], str], flags: list[str], said: str
) -> None:
    place = vit_flags.index("--shots")
    assert said in vit_refused([*vit_flags[:place], *vit_flags[place + 2 :], *flags])
    assert not (tmp_path / "out").exists()
