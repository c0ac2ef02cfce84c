"""NatMU, MUSO, CovarNav and SFR-on: what each promises, and what is its own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import problems
import pytest
import torch
from method_cases import MethodCases, Network, arguments, changed, loss, padded, samples, text_row
from torch.utils.data import Subset
from transformers import TrainingArguments, default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput

from peft_ext.training.callbacks import trainable_parameters, trainable_state
from peft_ext.training.trainer import fit
from peft_ext.unlearning import METHODS, MUSO, CovarNav, NatMU, Request, SFRon
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import LOSSES
from peft_ext.unlearning.methods.covarnav import without_own_label
from peft_ext.unlearning.methods.inversion import inverted, norms_with_statistics
from peft_ext.unlearning.methods.natmu import masks
from peft_ext.unlearning.methods.sfr_on import FastSlow, adaptive_weights, mean_fisher
from peft_ext.unlearning.methods.soft_targets import SoftCollator, SoftTargets, SoftTrainer

TUNING: list[dict[str, Any]] = [{"epochs": 0}, {"max_steps": 0}, {"learning_rate": -1}, {"batch_size": 0}]


class Pictures(Network):
    """The network of the other tests, of images of 1 x 2 x 3 pixels."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        return super().forward(pixel_values.flatten(1), labels)


def pictures() -> list[dict[str, Any]]:
    return [{"pixel_values": row["x"].view(1, 2, 3), "labels": row["labels"]} for row in samples()]


def forgetting(rows: list[Any], request: Request, labels: Any) -> Request:
    """A request to forget the rows with some labels."""
    places = [i for i, row in enumerate(rows) if row["labels"] in labels]
    rest = [i for i in range(len(rows)) if i not in places]
    return changed(request, retain=Subset(rows, rest), forget=Subset(rows, places))


@pytest.fixture(scope="module")
def trained_pictures(tmp_path_factory: pytest.TempPathFactory) -> Request:
    torch.manual_seed(0)
    model, rows = Pictures(), pictures()
    initial = trainable_state(model)
    training = arguments(tmp_path_factory.mktemp("run"))
    fit(model, rows, default_data_collator, copy.copy(training))
    retain, forget = (Subset(rows, [i for i in range(64) if (i % 4 == 0) == first]) for first in (False, True))
    return Request(model, retain, forget, default_data_collator, training, initial)


@pytest.fixture
def of_pictures(trained_pictures: Request) -> Request:
    return changed(trained_pictures)


def text_request(folder: Path) -> Request:
    rows = [text_row([5, i], [20 + i, 30 + i, 2]) for i in range(8)]
    model = problems.language_model().float()
    return Request(model, rows[:5], rows[5:], padded, arguments(folder), trainable_state(model))


class Unreadable(torch.utils.data.Dataset):
    """A retain set that is gone when the request comes."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the retain set was read")


class TestNatMU(MethodCases):
    method, trains = NatMU, True
    wrong = [*TUNING, {"hybrids": 0}, {"delta": 1}, {"retain_share": 0}]

    @pytest.fixture
    def request_(self, of_pictures: Request) -> Request:
        return of_pictures

    def test_a_language_model_with_an_adapter(self, tmp_path: Path) -> None:
        """It is refused before anything is trained."""
        request = text_request(tmp_path)
        before = trainable_state(request.model)
        for serve in (NatMU().check, NatMU().unlearn):
            with pytest.raises(ValueError, match="NatMU needs images.*GPT2LMHeadModel has rows of 'input_ids'"):
                serve(request)
        assert all(torch.equal(value, before[name]) for name, value in trainable_state(request.model).items())

    def test_it_forgets_and_keeps(self, request_: Request) -> None:
        NatMU(epochs=10).unlearn(request_)
        assert loss(request_, request_.forget) > 1 and loss(request_, request_.retain) < 0.3

    def test_hybrids_are_mixtures_with_the_label_of_the_retain_image(self, request_: Request) -> None:
        data: Any = NatMU(hybrids=3, delta=0.1).data(request_)
        hybrids, retain = data.datasets
        assert len(hybrids) == 3 * 16 and len(retain) == 48
        shares = masks(2, 3, 0.1)
        for index in range(len(hybrids)):
            first, second, number = hybrids.pairs[index]
            row, own, other = hybrids[index], request_.forget[first], request_.retain[second]
            expected = shares[number] * own["pixel_values"] + (1 - shares[number]) * other["pixel_values"]
            torch.testing.assert_close(row["pixel_values"], expected)
            assert row["labels"] == other["labels"] != own["labels"]
        dealt = [second for _, second, _ in hybrids.pairs]
        assert max(map(dealt.count, dealt)) == 1, "the images of a class are dealt out in turn"

    def test_hybrids_are_with_the_most_probable_of_the_other_classes(self, request_: Request) -> None:
        hybrids = NatMU(hybrids=1).data(request_).datasets[0]  # type: ignore[attr-defined]
        with torch.no_grad():
            outputs = request_.model.eval()(**default_data_collator(list(request_.forget))).logits
        outputs[:, 0] = -math.inf  # their own class
        labels = outputs.argmax(1).tolist()
        assert len(set(labels)) > 1
        assert [hybrids[i]["labels"] for i in range(len(hybrids))] == labels

    def test_classes_without_retain_images_are_passed_over_or_refused(self, request_: Request) -> None:
        request = forgetting(pictures(), request_, {0, 1})
        hybrids = NatMU().data(request).datasets[0]  # type: ignore[attr-defined]
        assert len(hybrids) == 2 * 32 and {hybrids[i]["labels"] for i in range(64)} == {2, 3}
        rows = pictures()
        alone = changed(request_, retain=Subset(rows, [0, 4]), forget=Subset(rows, [8, 12]))
        before = trainable_state(alone.model)
        for serve in (NatMU().check, NatMU().unlearn):
            with pytest.raises(ValueError, match=r"of class 0 there are none: the retain set holds the classes \[0\]"):
                serve(alone)
        assert all(torch.equal(value, before[name]) for name, value in trainable_state(alone.model).items())


def test_masks_are_triangles_turned_four_ways() -> None:
    rows, columns, *others = masks(32, 32, 0.0)
    assert torch.equal(rows[:, 0], torch.tensor([*range(16), *reversed(range(16))]) / 16)
    assert torch.equal(columns, rows.T) and (rows == rows[:, :1]).all()
    for mask, other in zip((rows, columns), others):
        assert torch.equal(mask + other, torch.full((32, 32), 15 / 16))
    means = [float(masks(32, 32, delta)[0].mean()) for delta in (-0.19, -0.053, 0.045)]
    assert [round(mean, 2) for mean in means] == [0.3, 0.42, 0.51]  # those of the published settings
    assert all(float(mask.max()) == 0 for mask in masks(1, 1, -0.1))


def with_ones(rows: Any) -> torch.Tensor:
    return torch.stack([torch.cat((row["pixel_values"], torch.ones(1))) for row in rows])


def linear(folder: Path, ridge: float) -> tuple[Request, torch.Tensor, torch.Tensor]:
    """A linear model that fits its samples, trained by least squares to the end, and the weights of retraining."""
    generator = torch.Generator().manual_seed(2)
    features = torch.linalg.qr(torch.randn(12, 8, generator=generator, dtype=torch.float64))[0].T
    features = (torch.eye(8).double() + 0.05 * torch.randn(8, 8, generator=generator, dtype=torch.float64)) @ features
    rows = [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(features)]
    model = problems.Regression(12).double()
    initial, start = trainable_state(model), problems.matrix(model)

    def solution(part: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        if ridge:
            return problems.ridge_solution(part, start, ridge, 1 / len(part))
        X = with_ones(part)  # of all that fit the samples, what gradient descent finds: the nearest to the start
        Y = torch.nn.functional.one_hot(torch.stack([row["labels"] for row in part]), 3).double()
        return start + (torch.linalg.pinv(X) @ (Y - X @ start.T)).T

    whole, alone = solution(rows), solution(rows[:5])
    with torch.no_grad():
        model.linear.weight.copy_(whole[:, :-1])
        model.linear.bias.copy_(whole[:, -1])
    training = TrainingArguments(
        output_dir=str(folder), optim="sgd", learning_rate=0.75, lr_scheduler_type="constant", max_grad_norm=0,
        per_device_train_batch_size=8, max_steps=300, use_cpu=True, dataloader_pin_memory=False, report_to=[],
    )  # fmt: skip
    return Request(model, rows[:5], rows[5:], default_data_collator, training, initial, ridge), whole, alone


class TestMUSO(MethodCases):
    method, trains = MUSO, True
    wrong = [
        *TUNING, {"loss": "hinge"}, {"damping": 0}, {"rounds": 0}, {"retain_share": 0}, {"form": "dense"}, {"draws": 0},
        {"memory": 0},
    ]  # fmt: skip

    def test_it_needs_the_parameters_before_the_training(self, request_: Request) -> None:
        loaders = request_.loader(request_.retain), request_.loader(request_.forget)
        with pytest.raises(ValueError, match="MUSO needs `reference`"):
            MUSO().fit(request_.model, *loaders, training=request_.training)

    @pytest.mark.parametrize(("ridge", "form"), [(0.0, "kernel"), (0.05, "matrix_free")])
    def test_it_is_retraining_for_a_linear_model(self, ridge: float, form: str, tmp_path: Path) -> None:
        """Theorem 1 of the paper, and with a ridge too: 1e-6 from the weights of retraining, which are far away."""
        request, whole, alone = linear(tmp_path, ridge)
        method = MUSO(loss="squared_error", damping=1e-8, draws=None, form=form, max_steps=300)
        assert float((whole - alone).norm()) > 0.3
        if form != "matrix_free":
            wanted = torch.cat(method.labels(request))
            torch.testing.assert_close(wanted, with_ones(request.forget) @ alone.T, rtol=0, atol=1e-6)
        method.unlearn(request)
        # Conjugate gradients stop at a relative residual of 1e-4.
        assert float((problems.matrix(request.model) - alone).norm()) < (1e-3 if form == "matrix_free" else 1e-6)

    def test_what_training_left_undone_stays_undone(self, request_: Request) -> None:
        """Where what goes is as what stays, there is nothing to forget, however large the gradient still is."""
        request = changed(request_, forget=[dict(row) for row in request_.retain], ridge=0.05)
        with torch.no_grad():
            for parameter in trainable_parameters(request.model).values():
                parameter.mul_(0.5)
        function = AdapterFunction(request.model, LOSSES["cross_entropy"]())
        _, targets, gradient = function.loss_and_gradient(request.loader(request.retain))
        assert float((gradient / targets).norm()) > 0.1
        assert float(MUSO(damping=1e-9).step(request, function).norm()) < 1e-4

    def test_steps_of_all_rounds(self, request_: Request) -> None:
        report = MUSO(rounds=3, max_steps=2).unlearn(request_)
        assert report.training is not None and report.training.steps == 6

    def test_it_forgets_and_keeps(self, request_: Request) -> None:
        MUSO(epochs=8).unlearn(request_)
        assert loss(request_, request_.forget) > 1 and loss(request_, request_.retain) < 0.3

    def test_a_form_that_does_not_fit_is_refused(self, request_: Request) -> None:
        with pytest.raises(ValueError, match="form='kernel' needs .* GB .* form='matrix_free' needs no matrix"):
            MUSO(form="kernel", memory=1e4).unlearn(request_)
        assert MUSO(memory=1e4)._form(100, 100) == "matrix_free"


def test_outputs_along_a_step_are_those_of_the_jacobian(tmp_path: Path) -> None:
    for name in ("ViT, NOLA and head", "GPT-2, NOLA"):
        make, data = problems.PROBLEMS[name]
        rows = data(3, 1)
        function = AdapterFunction(make(), LOSSES["squared_error"]())
        step = torch.randn(function.size, generator=torch.Generator().manual_seed(0)).double()
        found = function.along(problems.loader(rows, 2), step)
        exact = [
            each for part in function.linearise(problems.loader(rows, 2), None) for each in zip(part.rows, part.outputs)
        ]
        for along, (jacobian, outputs) in zip(found, exact, strict=True):
            expected = outputs.flatten() + jacobian @ step
            torch.testing.assert_close(along.flatten(), expected[: along.numel()])


@pytest.mark.parametrize("name", ["ViT, NOLA and head", "GPT-2, NOLA", "T5"])
def test_the_loss_of_soft_targets_is_the_models_own_where_they_are_its_labels(name: str, tmp_path: Path) -> None:
    make, data = problems.PROBLEMS[name]
    rows, model = data(4, 1), make()
    batch = default_data_collator(rows)
    trainer = SoftTrainer("cross_entropy", model, arguments(tmp_path), data_collator=default_data_collator)
    expected = model(**batch).loss
    function = AdapterFunction(model, LOSSES["cross_entropy"]())
    classes = function.along([batch], torch.zeros(function.size))[0].shape[-1]
    kept = [function.alignment.pair(model(**function.alignment.split(batch)[0]), batch["labels"])[1]]
    wanted = [torch.nn.functional.one_hot(row[row != -100], classes).double() for row in kept[0]]
    for each in (None, wanted, [*wanted[:2], None, wanted[3]]):
        soft = SoftTargets(rows, each)
        found = trainer.compute_loss(model, SoftCollator(default_data_collator)([soft[i] for i in range(4)]))
        torch.testing.assert_close(found.to(expected), expected)


class TestSFRon(MethodCases):
    method, trains = SFRon, True
    wrong = [
        *TUNING, {"ascent": 0}, {"every": 0}, {"inner": 0}, {"slow": 0}, {"slow": 1.5}, {"weighting": -1},
        {"threshold": -1}, {"max_length": 0},
    ]  # fmt: skip
    text_options: ClassVar[dict[str, Any]] = {"threshold": 0}

    def test_it_forgets_and_keeps(self, request_: Request) -> None:
        SFRon(epochs=8, every=1).unlearn(request_)
        assert loss(request_, request_.forget) > 1 and loss(request_, request_.retain) < 0.3

    def test_slow_weights_go_a_part_of_the_way(self, request_: Request) -> None:
        start, found = trainable_state(request_.model), []
        for slow in (1.0, 0.25):
            request = changed(request_)
            SFRon(max_steps=4, inner=4, slow=slow).unlearn(request)
            found.append(trainable_state(request.model))
        for name, value in start.items():
            torch.testing.assert_close(found[1][name], value + 0.25 * (found[0][name] - value))

    def test_an_ascent_is_masked_and_bounded(self, request_: Request) -> None:
        masks = {name: torch.ones_like(value) for name, value in trainable_state(request_.model).items()}
        masks["head.bias"].zero_()
        before, start = loss(request_, request_.forget), trainable_state(request_.model)
        FastSlow(SFRon(batch_size=16, max_length=2.0), request_, masks)._ascend(0.01, 1e6)
        away = {name: value - start[name] for name, value in trainable_state(request_.model).items()}
        assert not away["head.bias"].any() and away["head.weight"].any()
        size = sum(map(torch.numel, away.values()))
        length = math.sqrt(sum(float(part.square().sum()) for part in away.values()))
        assert length == pytest.approx(0.01 * 2 * math.sqrt(size), rel=1e-4)
        assert loss(request_, request_.forget) > before

    def test_ascents_come_every_so_many_rounds_and_fall_to_zero_by_a_cosine(
        self, request_: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found: list[tuple[float, float]] = []
        monkeypatch.setattr(FastSlow, "_ascend", lambda self, rate, ascent: found.append((rate, ascent)))
        training = copy.copy(request_.training)
        training.lr_scheduler_type = "constant"
        SFRon(max_steps=10, every=2, inner=2, ascent=8.0, learning_rate=0.01).unlearn(
            changed(request_, training=training)
        )
        ascents = [4 * (1 + math.cos(math.pi * step / 10)) for step in (0, 4, 8)]
        assert found == [(0.01, pytest.approx(ascent)) for ascent in ascents]

    def test_a_sample_known_by_heart_does_not_stop_an_ascent(self, request_: Request) -> None:
        with torch.no_grad():
            for parameter in trainable_parameters(request_.model).values():
                parameter.mul_(0.3)  # so that the others are known less well
        row = request_.forget[0]
        surer = {**row, "x": 400 * row["x"]}
        assert loss(request_, [surer]) == 0
        moved = []
        for rows in ([request_.forget[1]], [request_.forget[1], surer]):
            request = changed(request_, forget=rows)
            masks = {name: torch.ones_like(value) for name, value in trainable_state(request.model).items()}
            before = loss(request, rows[:1])
            FastSlow(SFRon(batch_size=2, max_length=1e9), request, masks)._ascend(0.01, 1.0)
            moved.append(loss(request, rows[:1]) - before)
        assert moved[1] > 0.05 * moved[0] > 1e-5

    def test_masks_without_a_parameter_are_refused(self, request_: Request) -> None:
        with pytest.raises(ValueError, match="no parameter whose curvature on the forget set is 1e\\+09 times"):
            SFRon(threshold=1e9).unlearn(request_)


def test_samples_of_low_loss_weigh_more() -> None:
    weights = adaptive_weights(torch.tensor([0.01, 1.0]), 0.5)
    assert float(weights.mean()) == pytest.approx(1) and float(weights[0] / weights[1]) == pytest.approx(10)
    assert adaptive_weights(torch.tensor([0.0, 2.0]), 0.0).tolist() == [1, 1]
    weights = adaptive_weights(torch.tensor([0.0, 2.0, 2.0, 4.0]), 0.5)  # nothing counts as less than 0.02
    assert float(weights[0] / weights[1]) == pytest.approx(10) and float(weights[1:].sum()) > 0.5
    assert adaptive_weights(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_the_fisher_matrix_is_a_mean_over_samples() -> None:
    model, rows = problems.batch_norm(), problems.images(4)
    expected = problems.dense_curvature(model, rows, "cross_entropy").diagonal() / 4
    function = AdapterFunction(model, LOSSES["cross_entropy"]())
    torch.testing.assert_close(mean_fisher(function, problems.loader(rows, 3)), expected)


class TestCovarNav(MethodCases):
    method, trains, exact = CovarNav, True, False
    options: ClassVar[dict[str, Any]] = {"energy": 0.8}
    wrong = [
        *TUNING, {"protect": "all"}, {"energy": 0}, {"labels": "wrong"}, {"first_damping": 0}, {"max_loss": 0},
        {"draws": 0}, {"memory": 0}, {"images": 0}, {"inversion_steps": 0},
    ]  # fmt: skip

    def test_it_forgets_and_keeps_without_the_retain_set(self, request_: Request) -> None:
        method = CovarNav(energy=0.8)
        method.prepare(request_)
        retain, request_.retain = request_.retain, Unreadable()
        report = method.unlearn(request_)
        assert loss(request_, request_.forget) > 1 and loss(request_, retain) < 0.3
        assert report.training is not None and report.training.ended == "bound"
        asked = CovarNav(energy=0.8, max_loss=1e-9, epochs=20).unlearn(changed(request_, retain=retain)).training
        assert asked is not None and asked.steps == 1, "it goes on where its bound is reached"

    def test_the_ledger_and_the_retain_set_protect_the_same(self, request_: Request) -> None:
        requests = [changed(request_) for _ in range(2)]
        for protect, request in zip(("ledger", "retain"), requests):
            method = CovarNav(protect=protect, energy=0.8, max_steps=3)
            method.prepare(request)
            method.unlearn(request)
        first, second = (trainable_state(request.model) for request in requests)
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)

    def test_the_first_step_and_the_predicted_loss_are_those_of_dense_matrices(self, request_: Request) -> None:
        request_.ridge = 0.01
        for name, parameter in request_.model.named_parameters():
            parameter.requires_grad_(name.startswith("head"))  # in which the outputs are linear
        function = AdapterFunction(request_.model.eval(), LOSSES["cross_entropy"]())
        weights, start = function.vector, function.flatten(request_.initial)
        everything = [*request_.retain, *request_.forget]  # type: ignore[attr-defined]

        def curvature(rows: list[Any]) -> torch.Tensor:
            found = torch.cat([part.rows.flatten(0, 1) for part in function.linearise(request_.loader(rows), None)])
            return found.T @ found / len(rows)

        def newton(rows: list[Any], shift: float) -> torch.Tensor:
            slope = function.loss_and_gradient(request_.loader(rows))[2] / len(rows) + 0.01 * (weights - start)
            return -torch.linalg.solve(curvature(rows) + (0.01 + shift) * torch.eye(function.size).double(), slope)

        unit = float(curvature(everything).diagonal().mean())
        away, predicted = (
            newton(list(request_.retain), damping * unit) - newton(everything, damping * unit)  # type: ignore
            for damping in (2.0, 0.03)
        )
        served = changed(request_)
        _, expected = CovarNav(protect="retain", draws=None, first_damping=2.0, energy=0.8).plan(served)
        moved = AdapterFunction(served.model, LOSSES["cross_entropy"]()).vector - weights
        torch.testing.assert_close(moved, away, rtol=1e-3, atol=1e-5)
        function.vector = weights + predicted
        assert expected == pytest.approx(loss(request_, request_.forget), rel=1e-3)

    def test_no_step_is_taken_where_the_projection_is_refused(
        self, request_: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuses(*args: Any) -> None:
            raise ValueError("All directions would be protected.")

        monkeypatch.setattr(CovarNav, "_projection", refuses)
        before = trainable_state(request_.model)
        with pytest.raises(ValueError, match="All directions"):
            CovarNav().plan(request_)
        assert all(torch.equal(value, before[name]) for name, value in trainable_state(request_.model).items())

    def test_what_is_protected_stays(self, of_pictures: Request) -> None:
        """The outputs of a linear layer on inputs of fewer directions than it has weights do not move at all."""
        request = of_pictures
        for name, parameter in request.model.named_parameters():
            parameter.requires_grad_(name.startswith("head"))
        few = changed(request, retain=Subset(pictures(), [1, 2, 3]))
        parts: Any = (few.retain, few.forget)
        before = [[few.model.eval()(row["pixel_values"][None]).logits for row in part] for part in parts]
        CovarNav(protect="retain", energy=1.0, first_damping=None, draws=None, max_steps=40, max_loss=50).unlearn(few)
        after = [[few.model(row["pixel_values"][None]).logits for row in part] for part in parts]

        def moved(place: int) -> float:
            pairs = zip(before[place], after[place])
            return max(float((one.softmax(-1) - other.softmax(-1)).detach().abs().max()) for one, other in pairs)

        assert moved(0) < 1e-3 < 0.1 < moved(1)

    def test_inverted_images_are_those_of_the_statistics(self, of_pictures: Request) -> None:
        """Noise becomes images of their classes, with the statistics that the layer keeps."""
        (norm,) = norms_with_statistics(of_pictures.model)
        labels = [1, 2, 3] * 8

        def look(steps: int) -> tuple[float, float]:
            parts = (of_pictures.model, of_pictures.forget, of_pictures.collator)
            rows = inverted(*parts, "pixel_values", labels, steps, of_pictures.training.seed)
            batch = default_data_collator(rows)
            assert batch["pixel_values"].shape == (24, 1, 2, 3) and batch["labels"].tolist() == labels
            inputs: list[torch.Tensor] = []
            hook = norm.register_forward_pre_hook(lambda _, found: inputs.append(found[0]))
            with torch.no_grad():
                found = of_pictures.model(**batch).loss
            hook.remove()
            away = (inputs[0].mean(0) - norm.running_mean).norm() + (inputs[0].var(0) - norm.running_var).norm()
            return float(found), float(away)

        (noise_loss, noise_away), (image_loss, image_away) = look(0), look(120)
        assert image_loss < 0.2 < 1 < noise_loss and image_away < 0.7 * noise_away

    def test_it_protects_inverted_images(self, of_pictures: Request) -> None:
        retain, of_pictures.retain = of_pictures.retain, Unreadable()
        CovarNav(protect="inverted", energy=0.9, inversion_steps=60, images=24).unlearn(of_pictures)
        assert loss(of_pictures, of_pictures.forget) > 1 and loss(of_pictures, retain) < 0.5

    def test_inversion_needs_images_and_batch_norm(self, tmp_path: Path, of_pictures: Request) -> None:
        method = CovarNav(protect="inverted")
        request = text_request(tmp_path)
        rows = problems.images(4, dtype=torch.float32)
        model = problems.classifier().float()
        without = Request(model, rows[:2], rows[2:], padded, arguments(tmp_path), trainable_state(model))
        for refused, message in ((request, "needs images.*GPT2LMHeadModel"), (without, "PeftModel has no such layer")):
            before = trainable_state(refused.model)
            for serve in (method.check, method.unlearn):
                with pytest.raises(ValueError, match=message):
                    serve(refused)
            assert all(torch.equal(value, before[name]) for name, value in trainable_state(refused.model).items())

    def test_a_curvature_that_does_not_fit_is_refused(self, request_: Request) -> None:
        with pytest.raises(ValueError, match="curvature of .* parameters and 64 samples needs .* lower `draws`"):
            CovarNav(memory=1e3).unlearn(request_)


def test_labels_without_the_own_one() -> None:
    outputs, targets = torch.tensor([[3.0, 1.0, 1.0], [0.0, 2.0, 5.0]]), torch.tensor([0, 2])
    assert without_own_label(outputs, targets, "runner_up").tolist()[1] == [0, 1, 0]
    found = without_own_label(outputs, targets, "others")
    torch.testing.assert_close(found[0], torch.tensor([0, 0.5, 0.5]))
    assert found[1, 2] == 0 and found[1, 1] == pytest.approx(1 / (1 + math.exp(-2)))


def test_the_page_of_the_methods_has_every_method_in_both_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "unlearning-methods.md").read_text(encoding="utf-8")
    needs, costs = page.split("## What each costs")
    for name in METHODS:
        for table in (needs, costs):
            assert f"\n| `{name}`" in table, name
