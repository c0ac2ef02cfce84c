"""Outliers: the terms of the loss, the draws, a training against a loop, scores and areas against counting."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_ext import NolaConfig
from peft_ext.training.callbacks import trainable_parameters, trainable_state
from peft_ext.training.outliers import (
    OUTLIER,
    SCORES,
    HeadPass,
    OutlierLoss,
    OutlierTrainer,
    WithOutliers,
    cosine_score,
    detection,
    linear_head,
    observe,
)

NOLA: dict[str, Any] = {"r": 2, "num_basis": 4, "init_weights": False}


def model(**options: Any) -> Any:
    base = tiny_models.vit()
    torch.manual_seed(1)
    return get_peft_model(base, NolaConfig(**{**NOLA, "modules_to_save": ["classifier"], **options}))


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": place % 3} for place, image in enumerate(pixels)]


def outliers(count: int = 5, seed: int = 9) -> list[dict[str, Any]]:
    return [{"pixel_values": row["pixel_values"]} for row in rows(count, seed)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return tiny_models.arguments(folder, **{"max_steps": 4, "seed": 3, **options})


def train(adapted: Any, folder: Path, loss: OutlierLoss, resume: Any = None, ratio: int = 2, **options: Any) -> Any:
    given = {"outliers": outliers(), "ratio": ratio} if loss.needs_outliers else {}
    trainer = OutlierTrainer(
        adapted, arguments(folder, **options), train_dataset=rows(8, 0), eval_dataset=rows(6, 5),
        data_collator=default_data_collator, head="classifier", outlier_loss=loss, **given,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def found(count: int = 6, seed: int = 0) -> HeadPass:
    generator = torch.Generator().manual_seed(seed)
    features, logits, weight = (torch.randn(size, generator=generator) for size in ((count, 5), (count, 3), (3, 5)))
    return HeadPass(features.requires_grad_(), logits, weight)


def by_hand(passed: HeadPass, labels: list[int]) -> dict[str, float]:
    """The three terms, number by number."""
    sums, known = {"exposure": 0.0, "separation": 0.0, "clustering": 0.0}, 0
    for feature, logits, label in zip(passed.features.detach(), passed.logits, labels):
        cosines = [cosine(feature, row) for row in passed.weight]
        if label == OUTLIER:
            log_total = math.log(sum(math.exp(logit) for logit in logits.tolist()))
            sums["exposure"] += sum(log_total - logit for logit in logits.tolist()) / len(logits)
            sums["separation"] += sum(map(abs, cosines))
        else:
            sums["clustering"] -= cosines[label]
            known += 1
    counts = {"exposure": len(labels) - known, "separation": len(labels) - known, "clustering": known}
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize("weights", [(0.5, 0, 0), (0, 2.0, 0), (0, 0, 3.0), (0.5, 2.0, 3.0)])
def test_the_terms_are_those_written_by_hand(weights: tuple[float, ...]) -> None:
    passed, labels = found(), [0, OUTLIER, 2, 1, OUTLIER, OUTLIER]
    expected = sum(weight * term for weight, term in zip(weights, by_hand(passed, labels).values()))
    assert OutlierLoss(*weights)(passed, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-5)


def test_the_defaults_are_the_published_weights() -> None:
    loss = OutlierLoss()
    assert (loss.exposure, loss.separation, loss.clustering) == (0.5, 1.0, 1.0)


def test_a_training_is_that_of_a_loop(tmp_path: Path) -> None:
    """Known samples and outliers go through the model apart, and the terms are dense."""
    trained, reference = model(), model()
    train(trained, tmp_path, OutlierLoss(0.5, 0.7, 0.3))
    known, others = rows(8, 0), outliers()
    drawn = WithOutliers(known, others, 2, seed=3)
    optimizer = torch.optim.AdamW(trainable_parameters(reference).values(), lr=1e-2, weight_decay=0.0)
    head = reference.base_model.model.classifier
    read: list[torch.Tensor] = []
    head.register_forward_hook(lambda module, args, output: read.append(args[0]))
    reference.train()
    for step in range(4):
        drawn.set_epoch(step // 2)
        places = range(4 * (step % 2), 4 * (step % 2) + 4)
        batch = default_data_collator(drawn.__getitems__(list(places))[:4])
        own = reference(**batch)
        far = reference(pixel_values=torch.stack([row["pixel_values"] for row in drawn.__getitems__(list(places))[4:]]))
        weight = head.weight.detach()
        cosines = [nn.functional.cosine_similarity(each[:, None], weight[None], dim=-1) for each in read[-2:]]
        uniform = -nn.functional.log_softmax(far.logits, -1).mean()
        loss = own.loss + 0.5 * uniform + 0.7 * cosines[1].abs().sum(1).mean()
        loss = loss - 0.3 * sum(cosines[0][place, int(label)] for place, label in enumerate(batch["labels"])) / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = trainable_state(reference)
    for name, value in trainable_state(trained).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)

    parts = model()
    train(
        parts, tmp_path, OutlierLoss(0.5, 0.7, 0.3), per_device_train_batch_size=2, gradient_accumulation_steps=2
    )  # batches of a step are as one
    for name, value in trainable_state(parts).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_the_rows_of_the_head_are_not_trained_by_separation_and_clustering() -> None:
    adapted = model()
    batch = default_data_collator(rows(4, 0))
    features = []
    linear_head(adapted, "classifier").register_forward_hook(lambda module, args, out: features.append((args[0], out)))
    adapted(pixel_values=batch["pixel_values"])
    weight = adapted.base_model.model.classifier.weight
    loss = OutlierLoss(0.0, 1.0, 1.0)(HeadPass(*features[0], weight.detach()), torch.tensor([0, 1, OUTLIER, OUTLIER]))
    loss.backward()
    assert weight.grad is None
    assert all(p.grad is not None for name, p in trainable_parameters(adapted).items() if "nola" in name)


def test_features_of_outliers_are_turned_away_and_known_ones_towards(tmp_path: Path) -> None:
    def seen(*weights: float) -> tuple[float, float]:
        adapted = model(r=8, num_basis=64)
        train(adapted, tmp_path, OutlierLoss(*weights), max_steps=30)
        known = default_data_collator(rows(8, 0))
        far = observe(adapted, "classifier", [default_data_collator(outliers())]).cosines.abs().sum(1).mean()
        near = observe(adapted, "classifier", [{"pixel_values": known["pixel_values"]}]).cosines
        return float(far), float(near[range(8), known["labels"]].mean())

    plain = seen(1e-9, 0, 0)
    assert seen(0, 5, 0)[0] < 0.7 * plain[0]
    assert 1 - seen(0, 0, 5)[1] < 0.8 * (1 - plain[1])


def test_evaluations_are_without_the_terms(tmp_path: Path) -> None:
    trainer = train(model(), tmp_path, OutlierLoss(), max_steps=1)
    plain = Trainer(trainer.model, arguments(tmp_path), data_collator=default_data_collator, eval_dataset=rows(6, 5))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_clustering_alone_needs_no_outliers(tmp_path: Path) -> None:
    adapted, start = model(), trainable_state(model())
    train(adapted, tmp_path, OutlierLoss(0.0, 0.0, 1.0))
    assert any(not torch.equal(value, start[name]) for name, value in trainable_state(adapted).items())


def test_batches_have_outliers_behind_the_known_samples() -> None:
    known, others = rows(6, 0), outliers(50)
    drawn = WithOutliers(known, others, ratio=3, seed=0)
    loader = DataLoader(drawn, batch_size=2, collate_fn=default_data_collator)
    batches = list(loader)
    assert len(drawn) == 6 and len(batches) == 3
    for number, batch in enumerate(batches):
        assert batch["labels"].tolist() == [*(row["labels"] for row in known[2 * number :][:2]), *[OUTLIER] * 6]
        assert torch.equal(batch["pixel_values"][1], known[2 * number + 1]["pixel_values"])
        assert all(
            any(torch.equal(image, row["pixel_values"]) for row in others) for image in batch["pixel_values"][2:]
        )
    images = [image for batch in batches for image in batch["pixel_values"][2:]]
    assert len({image.numpy().tobytes() for image in images}) > 12

    def again(epoch: int, seed: int = 0) -> list[torch.Tensor]:
        other = WithOutliers(known, others, ratio=3, seed=seed)
        other.set_epoch(epoch)
        return [batch["pixel_values"] for batch in DataLoader(other, batch_size=2, collate_fn=default_data_collator)]

    assert all(torch.equal(batch["pixel_values"], found) for batch, found in zip(batches, again(0)))
    for other in (again(1), again(0, seed=1)):
        assert not any(torch.equal(batch["pixel_values"][2:], found[2:]) for batch, found in zip(batches, other))
    # Those beside a sample do not depend on its batch, and so on the number of processes.
    assert torch.equal(drawn.__getitems__([4])[1]["pixel_values"], drawn.__getitems__([1, 4])[2 + 3]["pixel_values"])


def test_a_training_that_goes_on_from_a_checkpoint_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random", "max_steps": 6}
    whole, resumed = model(), model()
    train(whole, tmp_path, OutlierLoss(), **saving)
    train(resumed, tmp_path, OutlierLoss(), resume=str(tmp_path / "checkpoint-3"), **saving)  # in the second pass
    expected = trainable_state(whole)
    for name, value in trainable_state(resumed).items():
        assert torch.equal(value, expected[name])


# Scores.


def test_scores_are_those_written_by_hand() -> None:
    passed = found(4)
    for place in range(4):
        exponentials = [math.exp(logit) for logit in passed.logits[place].tolist()]
        probability = max(exponentials) / sum(exponentials)
        turned = sum(abs(cosine(passed.features[place].detach(), row)) for row in passed.weight)
        expected = {"MSP": probability, "energy": math.log(sum(exponentials)), "cosine": turned + probability}
        for name, score in SCORES.items():
            assert score(passed)[place].item() == pytest.approx(expected[name], rel=1e-5), name


def test_areas_and_rates_are_those_of_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    known = (torch.randn(40, generator=generator) + 1).mul(4).round() / 4  # with ties
    others = torch.randn(30, generator=generator).mul(4).round() / 4
    pairs = [(a > b) + 0.5 * (a == b) for a in known.tolist() for b in others.tolist()]
    threshold = max(t for t in known.tolist() if (known >= t).sum() >= 0.95 * len(known))
    result = detection(known, others)
    assert result.auroc == pytest.approx(100 * sum(pairs) / len(pairs))
    assert result.fpr95 == pytest.approx(100 * float((others >= threshold).float().mean()))
    assert detection(known + 100, others) == (100, 0)
    assert detection(torch.arange(20), torch.arange(20)) == pytest.approx((50, 95))  # in a row
    assert all(map(math.isnan, detection(torch.tensor([1.0, math.nan]), others)))
    with pytest.raises(ValueError, match="known samples and outliers, got 40 and 0"):
        detection(known, others[:0])


def test_what_is_observed_is_what_the_head_reads() -> None:
    adapted = model(nola_dropout=0.5).train()
    batches = [default_data_collator(outliers(count)) for count in (3, 2)]
    seen = observe(adapted, "classifier", batches)
    adapted.eval()
    with torch.no_grad():
        pixels = torch.cat([batch["pixel_values"] for batch in batches])
        outputs = adapted.base_model.model.vit(pixels)
        torch.testing.assert_close(seen.features, outputs.last_hidden_state[:, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen.logits, adapted(pixels).logits, atol=1e-5, rtol=1e-4)
    head = adapted.base_model.model.classifier
    assert torch.equal(seen.weight, head.modules_to_save["default"].weight)
    head.modules_to_save["default"].weight.data.neg_()
    with adapted.disable_adapter():
        assert torch.equal(observe(adapted, "classifier", batches).weight, head.original_module.weight)
    assert not head._forward_hooks
    plain = tiny_models.vit()
    assert cosine_score(observe(plain, "classifier", batches)).shape == (5,)
    with pytest.raises(ValueError, match="at least one batch"):
        observe(plain, "classifier", [])


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OutlierLoss(exposure=-1), "`exposure` must be at least 0, got -1"),
        (lambda: OutlierLoss(clustering=math.nan), "`clustering` must be a finite"),
        (lambda: OutlierLoss(0, 0, 0), "must be above 0, got 0 for all"),
        (lambda: WithOutliers(rows(2, 0), []), r"`outliers` must be samples .*, at least one, got \[\]"),
        (lambda: WithOutliers(rows(2, 0), outliers(), ratio=0), "`ratio` must be a positive integer"),
        (lambda: WithOutliers(rows(2, 0), outliers(), seed=-1), "`seed` must be"),
        (lambda: WithOutliers(outliers(), outliers()), "with `labels`, got one with pixel_values"),
        (lambda: OutlierLoss()(found(2), torch.tensor([OUTLIER, OUTLIER])), "All samples of a batch are outliers"),
        (lambda: OutlierLoss()(found(2), torch.tensor([0, 1])), "no outliers, with the label -100"),
        (lambda: OutlierLoss()(found(2), torch.tensor([0, 1, OUTLIER])), r"shape \(2, 3\) for 3 labels"),
        (lambda: linear_head(model(), "head"), "name of a layer of the model, got 'head'"),
        (lambda: linear_head(model(), "vit.layernorm"), "must be a linear layer.*a LayerNorm"),
        (
            lambda: linear_head(
                get_peft_model(tiny_models.vit(), LoraConfig(target_modules=["classifier"])), "classifier"
            ),
            "must be a linear layer, whose weight has a row for every class.*instead of adapting",
        ),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_trainings_that_are_refused(tmp_path: Path) -> None:
    head = get_peft_model(
        tiny_models.vit(), NolaConfig(**{**NOLA, "target_modules": ["classifier"], "modules_to_save": None})
    )
    alone = copy.deepcopy(model())
    for name, parameter in alone.named_parameters():
        parameter.requires_grad = "modules_to_save" in name
    with pytest.raises(ValueError, match="depends on nothing that is trained"):
        train(alone, tmp_path, OutlierLoss())
    train(alone, tmp_path, OutlierLoss(0.5, 0.0, 0.0), max_steps=1)
    with pytest.raises(ValueError, match="`head` must be a linear layer"):
        train(head, tmp_path, OutlierLoss())
    with pytest.raises(ValueError, match="`dataloader_persistent_workers` must be False with `outliers`"):
        train(model(), tmp_path, OutlierLoss(), dataloader_persistent_workers=True, dataloader_num_workers=1)
    for loss, given, message in (
        (OutlierLoss(), {}, "needs them"),
        (OutlierLoss(0, 0, 1), {"outliers": outliers()}, "has no use for them"),
    ):
        with pytest.raises(ValueError, match=message):
            OutlierTrainer(
                model(), arguments(tmp_path), train_dataset=rows(4, 0), head="classifier", outlier_loss=loss, **given
            )
