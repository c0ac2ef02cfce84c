"""The solvers: exact where the problem is linear, equal in all their forms, and careful."""

from __future__ import annotations

import copy
import math

import problems
import pytest
import tiny_models
import torch
import unlearning_worker
from problems import PROBLEMS, dense_curvature, fit, images, loader, matrix, ridge_solution, trainable, trained
from torch import nn

from peft_ext.unlearning import FastNTK, GaussNewton
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import CrossEntropy
from peft_ext.unlearning.derivatives.quadratic import CurvatureEstimate


@pytest.mark.parametrize("form", ["parameter", "kernel"])
def test_the_closed_form_is_exact_for_a_linear_model(form):
    torch.manual_seed(1)
    model = problems.Regression().double()
    retain, forget = images(9, 1, (4,)), images(4, 2, (4,))
    initial, reference = trainable(model), matrix(model)
    size = sum(value.numel() for value in initial.values())
    ridge = 0.1 * float(dense_curvature(model, retain + forget, "squared_error").trace()) / size
    trained = ridge_solution(retain + forget, reference, ridge)
    with torch.no_grad():
        model.linear.weight.copy_(trained[:, :-1])
        model.linear.bias.copy_(trained[:, -1])
    report = FastNTK(form=form, damping=0.1).fit(model, loader(retain), loader(forget), reference=initial)
    assert report.solution.form == form
    expected = ridge_solution(retain, reference, ridge)
    assert torch.allclose(matrix(model), expected, atol=1e-10)
    assert (expected - trained).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ViT, NOLA and head", "CNN, batch-norm", "GPT-2, prompt"])
def test_kernel_and_parameter_forms_of_the_closed_form_agree(name):
    make, samples = PROBLEMS[name]
    model = make()
    initial = {key: value + 0.1 for key, value in trainable(model).items()}
    shifts = []
    for form in ("parameter", "kernel"):
        changed = copy.deepcopy(model)
        method = FastNTK(form=form, damping=0.01)
        method.fit(changed, loader(samples(6, 1)), loader(samples(2, 2)), reference=initial)
        shifts.append(
            torch.cat([(trainable(changed)[key] - value).flatten() for key, value in trainable(model).items()])
        )
    assert shifts[0].norm() > 1e-3
    assert (shifts[0] - shifts[1]).norm() <= 1e-8 * shifts[0].norm()


MODELS_OF_TEXTS = [
    "GPT-2, NOLA",
    "GPT-2, prompt, whole texts",
    "BERT, texts",
    "BERT, token classes",
    "BERT, masked tokens",
    "T5",
]


@torch.no_grad()
def own_loss(model: nn.Module, rows) -> float:
    """The model's own mean loss over all targets of some samples."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return float(model.eval()(**batch).loss)


@pytest.mark.parametrize("name", MODELS_OF_TEXTS)
def test_losses_are_the_models_own(name):
    make, samples = PROBLEMS[name]
    model, retain, forget = make(), samples(6, 1), samples(3, 2)
    before = own_loss(model, retain), own_loss(model, forget)
    report = GaussNewton(max_steps=2, tolerance=0.0).fit(model, loader(retain), loader(forget))
    after = own_loss(model, retain), own_loss(model, forget)
    found = [*report.retain_loss, *report.forget_loss]
    assert found == pytest.approx([before[0], after[0], before[1], after[1]], abs=1e-5)
    assert after[1] > before[1] and after[0] <= before[0] + 0.05
    assert sum(step.accepted for step in report.solution.steps) > 0


@pytest.mark.parametrize("form", ["parameter", "kernel", "matrix_free"])
def test_one_gauss_newton_step_solves_a_linear_problem(form):
    torch.manual_seed(1)
    model = problems.Regression().double()
    retain, forget = images(9, 1, (4,)), images(4, 2, (4,))
    initial, reference = trainable(model), matrix(model)
    expected = ridge_solution(retain, reference, 0.3, 1 / len(retain))
    solution = ridge_solution(retain + forget, reference, 0.3, 1 / (len(retain) + len(forget)))
    assert (expected - solution).abs().max() > 1e-2
    with torch.no_grad():
        model.linear.weight.copy_(solution[:, :-1])
        model.linear.bias.copy_(solution[:, -1])
    method = GaussNewton(loss="squared_error", form=form, damping=1e-9, draws=None, max_steps=1)
    method.fit(model, loader(retain), loader(forget), reference=initial, ridge=0.3)
    assert torch.allclose(matrix(model), expected, atol=1e-5 if form == "matrix_free" else 1e-7)


@pytest.mark.parametrize("name", ["ViT, PRANC", "GPT-2, NOLA"])
def test_forms_of_gauss_newton_agree(name):
    make, samples = PROBLEMS[name]
    found = {}
    for form in ("parameter", "kernel", "matrix_free"):
        model = make()
        options = {"form": form, "draws": None, "damping": 10.0, "max_steps": 2, "tolerance": 0.0}
        report = GaussNewton(**options).fit(model, loader(samples(6, 1)), loader(samples(2, 2)))
        found[form] = torch.cat([value.flatten() for value in trainable(model).values()])
        assert report.solution.form == form
        assert any(step.accepted for step in report.solution.steps)
    assert torch.allclose(found["parameter"], found["kernel"], atol=1e-8)
    # Its damping is in units of an estimated mean curvature, so the path differs a little.
    start = torch.cat([value.flatten() for value in trainable(make()).values()])
    assert (found["matrix_free"] - found["kernel"]).norm() < 0.2 * (found["kernel"] - start).norm()


def accuracy(model, rows) -> float:
    x, y = torch.stack([row["pixel_values"] for row in rows]), torch.stack([row["labels"] for row in rows])
    with torch.no_grad():
        return float((model(pixel_values=x).logits.argmax(-1) == y).double().mean())


def test_a_class_is_forgotten_as_if_it_had_never_been_learned():
    model, initial, retain, forget = trained(steps=200)
    assert accuracy(model, forget) == accuracy(model, retain) == 1
    gold = problems.classifier()
    optimizer = torch.optim.AdamW([p for p in gold.parameters() if p.requires_grad], lr=0.03, weight_decay=0.0)
    fit(gold, retain, optimizer, 200, initial, 0.01)

    def distance() -> float:
        x = torch.stack([row["pixel_values"] for row in forget])
        with torch.no_grad():
            a, b = (m(pixel_values=x).logits.softmax(-1) for m in (model, gold))
        return float((a - b).abs().sum(-1).mean())

    before = distance()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    method = GaussNewton(draws=None, max_steps=15)
    report = method.fit(model, loader(retain), loader(forget), reference=initial, ridge=0.01)
    assert distance() < before / 3
    assert accuracy(model, forget) <= accuracy(gold, forget) + 0.125
    assert accuracy(model, retain) == 1
    assert report.retain_loss[1] <= report.retain_loss[0] + 0.05
    assert report.forget_loss[1] > 1 > report.forget_loss[0]
    objectives = [step.objective for step in report.solution.steps if step.accepted]
    assert len(objectives) > 2
    assert objectives == sorted(objectives, reverse=True)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def check_what_steps_say(report) -> None:
    """What came is the fall of the objective from step to step, and both notes say so."""
    steps = report.solution.steps
    kept = [step for step in steps if step.accepted]
    for former, step in zip(kept, kept[1:]):
        assert step.decrease == pytest.approx(former.objective - step.objective)
    (listed,) = (note for note in report.notes() if "predicted -> actual" in note)
    for step in steps:
        bound = "" if step.accepted else "at most "
        undone = "" if step.accepted else ", undone"
        assert f"{step.predicted:.2g} -> {bound}{step.decrease:.2g} ({step.damping:.2g}{undone})" in listed
    ratio = sum(step.decrease for step in kept) / sum(step.predicted for step in kept)
    (trust,) = (note for note in report.notes() if "times what was predicted" in note)
    assert f"{ratio:.2g} times" in trust
    assert ("is wrong" in trust, "holds at" in trust) == (ratio <= 0.25, ratio > 0.75)


def test_the_retain_loss_stays_below_the_bound():
    """Almost undamped, the first step is far too long."""
    model, initial, retain, forget = trained()
    found = {}
    for tolerance in (0.02, 1e9):
        changed = copy.deepcopy(model)
        method = GaussNewton(retain_tolerance=tolerance, damping=1e-2, draws=None, max_steps=1)
        report = method.fit(changed, loader(retain), loader(forget), reference=initial, ridge=1e-5)
        loss, targets, _ = method.function(changed).loss_and_gradient(loader(retain))
        assert loss / targets == pytest.approx(report.retain_loss[1], rel=1e-9)
        found[tolerance] = report
    careful, careless = found.values()
    assert careless.retain_loss[1] > careless.retain_loss[0] + 0.02
    assert careful.retain_loss[1] <= careful.retain_loss[0] + 0.02
    assert "steps were undone: they took the retain loss above" in careful.notes()[1]
    assert any(step.accepted for step in careful.solution.steps)
    assert not any("undone" in note for note in careless.notes())
    for report in found.values():
        check_what_steps_say(report)


def test_a_model_that_nothing_can_improve_is_left_alone():
    model, initial, retain, forget = trained()
    before = trainable(model)
    far = {name: value + 1e9 for name, value in before.items()}  # without a ridge a reference only bounds the distance
    method = GaussNewton(draws=None, damping=1e-12, retain_tolerance=0.0)
    report = method.fit(model, loader(retain), loader(forget), reference=far)
    assert report.solution.ended == "rejections" and len(report.solution.steps) == 6
    assert report.notes()[-1] == "No step was kept: the model is unchanged."
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("known", [True, False])
def test_no_step_leads_further_than_the_training_did(steps, known):
    model, initial, retain, forget = trained(steps=steps)
    before = trainable(model)
    method = GaussNewton(damping=1e-9, retain_tolerance=1e9, max_steps=3)
    report = method.fit(model, loader(retain), loader(forget), reference=initial if known else None)
    furthest = sum(float((value - known * initial[name]).square().sum()) for name, value in before.items()) ** 0.5
    assert report.shift <= furthest * (1 + 1e-6)
    if known and not steps:
        assert report.solution.ended == "distance"
        assert report.notes()[-1] == "No step was kept: the model is unchanged."


def test_estimates_state_their_error():
    model, initial, retain, forget = trained(steps=20)
    exact = GaussNewton(draws=None, max_steps=4).fit(copy.deepcopy(model), loader(retain), loader(forget))
    check_what_steps_say(exact)
    assert exact.solution.curvature == CurvatureEstimate(16, 16)
    assert exact.notes()[0].endswith("curvature exact")
    sampled = GaussNewton(draws=2, curvature_samples=8, max_steps=1).fit(model, loader(retain), loader(forget))
    assert "of 16 retain samples, 2 x random signs each: relative standard error" in sampled.notes()[0]
    estimate = sampled.solution.curvature
    assert (estimate.of, estimate.draws, estimate.estimator) == (16, 2, "signs") and 1 < estimate.samples < 16
    assert f"gradient {estimate.relative_error:.2g}" in sampled.notes()[0] and 0 < estimate.relative_error < 1


def test_training_mode_and_gradients_are_left_as_they_were():
    model, initial, retain, forget = trained(steps=5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    method = GaussNewton(max_steps=1)
    method.fit(model, loader(retain), loader(forget), parameters="classifier.modules_to_save")
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required


def test_batch_norm_statistics_stay():
    model = problems.batch_norm()
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    GaussNewton(max_steps=2).fit(model, loader(images(6, 1)), loader(images(3, 2)))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (GaussNewton, {"loss": "hinge"}, "`loss` must be one of 'cross_entropy', 'squared_error', got 'hinge'"),
        (GaussNewton, {"estimator": "guess"}, "`estimator` must be one of 'signs', 'labels', got 'guess'"),
        (FastNTK, {"form": "matrix_free"}, "`form` must be one of 'auto', 'parameter', 'kernel', got"),
        (GaussNewton, {"form": "dense"}, "`form` must be one of 'auto', 'parameter', 'kernel', 'matrix_free', got"),
        (GaussNewton, {"damping": 0}, "`damping` must be above 0"),
        (FastNTK, {"damping": 0}, "`damping` must be above 0"),
        (GaussNewton, {"damping": math.nan}, "`damping` must be a finite number"),
        (GaussNewton, {"tolerance": -1}, "`tolerance` must be at least 0"),
        (GaussNewton, {"retain_tolerance": -1}, "`retain_tolerance` must be at least 0"),
        (GaussNewton, {"max_steps": 0}, "`max_steps` must be a positive integer"),
        (GaussNewton, {"draws": 0}, "`draws` must be a positive integer"),
        (GaussNewton, {"curvature_samples": 1.5}, "`curvature_samples` must be a positive integer"),
        (FastNTK, {"memory": 0}, "`memory` must be above 0"),
        (FastNTK, {"batch_size": 0}, "`batch_size` must be a positive integer"),
    ],
)
def test_wrong_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"parameters": "no such"}, "no name contains 'no such'"),
        ({"reference": {}}, "There must be a tensor 'base_model"),
        ({"ridge": -1}, "`ridge` must be at least 0"),
    ],
)
def test_what_does_not_fit_the_model(context, message):
    with pytest.raises(ValueError, match=message):
        GaussNewton().fit(problems.classifier(), loader(images(6, 1)), loader(images(3, 2)), **context)


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match="none requires gradients.*is_trainable=True"):
        GaussNewton().fit(problems.classifier().requires_grad_(False), loader(images(6, 1)), loader(images(3, 2)))


def test_dropout_left_on():
    model = problems.classifier()
    dropout = nn.Dropout(0.1).eval()
    model.base_model.model.extra = dropout
    GaussNewton(max_steps=1).fit(model, loader(images(6, 1)), loader(images(3, 2)))
    dropout.train()
    with pytest.raises(
        ValueError, match=r"Dropout is on \(1 modules, first: 'base_model.model.extra'\).*model.eval\(\)"
    ):
        GaussNewton().fit(model, loader(images(6, 1)), loader(images(3, 2)))


@pytest.mark.parametrize("method", [GaussNewton, FastNTK])
def test_wrong_sets(method):
    model, rows = problems.classifier(), images(8)
    with pytest.raises(ValueError, match="The forget set is empty"):
        method().fit(model, loader(rows), [])
    with pytest.raises(ValueError, match="The retain set is empty"):
        method().fit(model, [], loader(rows))
    with pytest.raises(ValueError, match="overlap: 2 samples are in both"):
        method().fit(model, loader(rows[:6]), loader(rows[4:]))
    with pytest.raises(ValueError, match="a tensor 'labels' among them, got the keys \\['pixel_values'\\]"):
        method().fit(model, [{"pixel_values": rows[0]["pixel_values"]}], loader(rows))


def test_numbers_that_are_not_finite_leave_the_model_alone():
    model, rows = problems.classifier(), images(8)
    rows[2]["pixel_values"][0, 0, 0] = math.nan
    before = trainable(model)
    with pytest.raises(ValueError, match="not finite"):
        GaussNewton().fit(model, loader(rows[:6]), loader(rows[6:]))
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


def test_too_little_memory_says_how_much_and_what_else():
    model, retain, forget = problems.classifier(), images(6, 1), images(3, 2)
    size, sets = AdapterFunction(model, CrossEntropy()).size, (loader(retain), loader(forget))
    advice = "form='matrix_free'.*`memory`, or lower `curvature_samples` or `draws`.$"
    with pytest.raises(ValueError, match=rf"form='parameter' needs .* GB \({size} parameters.*{advice}"):
        GaussNewton(form="parameter", memory=1e4).fit(model, *sets)
    with pytest.raises(ValueError, match=r"form='parameter' needs .* GB \(.*Raise `memory`.$"):
        FastNTK(form="parameter", memory=1e4).fit(model, *sets)
    with pytest.raises(ValueError, match="FastNTK needs .* GB in its smallest form, 'kernel'.*GaussNewton"):
        FastNTK(memory=1e4).fit(model, *sets)
    assert GaussNewton(memory=1e4, max_steps=1).fit(model, *sets).solution.form == "matrix_free"


def test_the_smaller_form_is_chosen():
    model, forget = problems.classifier(), images(3, 2)
    size = AdapterFunction(model, CrossEntropy()).size
    for n, form in ((6, "kernel"), (2 * size, "parameter")):
        assert GaussNewton().fitting_form(size, n) == form
    report = GaussNewton(max_steps=1).fit(model, loader(images(6, 1)), loader(forget))
    assert report.solution.form == "kernel"


def test_two_processes_train_as_one_does(two_processes, tmp_path):
    """A gradient is a mean over the samples of all processes; the ledger of the main process is that of all."""
    expected = unlearning_worker.trained(tmp_path, 1)
    classifier = tiny_models.vit().classifier
    start = torch.cat([value.detach().flatten() for value in classifier.parameters()])
    for rank in range(unlearning_worker.WORLD):
        found = torch.load(two_processes / f"trained.{rank}.pt")
        for name, value in expected.items():
            moved = (value - start).abs().max()
            assert moved > 1e-3, name
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4 * float(moved), msg=name)


def test_two_processes_do_what_one_does(two_processes, tmp_path):
    """Eleven and five samples in batches of two, so that Accelerate repeats some to fill up the last round."""
    expected = unlearning_worker.forgotten(lambda x: x, tmp_path)
    start = torch.cat([value.flatten() for value in trainable(problems.batch_norm()).values()])
    for rank in range(unlearning_worker.WORLD):
        found = torch.load(two_processes / f"forgotten.{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (value - start).norm() > 1e-4, name
            assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6 * float((value - start).abs().max())), name
