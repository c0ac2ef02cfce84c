"""The solver: exact where the problem is linear, equal in all its forms, and careful."""

from __future__ import annotations

import copy
import math

import problems
import pytest
import torch
import torch.nn.functional as F
import unlearning_worker
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PROBLEMS, fit, images, loader, matrix, ridge_solution, trainable, trained
from torch import nn
from torch.func import functional_call

from peft_ext.unlearning import NTKUnlearner
from peft_ext.unlearning.derivatives.curvature import KernelForm, MatrixFreeForm, ParameterForm
from peft_ext.unlearning.derivatives.data import Batch
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import LOSSES, CrossEntropy


def dense_curvature(model: nn.Module, rows, loss: str) -> torch.Tensor:
    """`sum_i J_i^T H_i J_i` sample by sample, from torch's own Jacobian and second derivative of the loss."""
    parameters = trainable(model)
    sizes = [p.numel() for p in parameters.values()]
    total = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for row in rows:
        inputs = {name: value[None] for name, value in row.items() if name != "labels"}
        labels = row["labels"].view(-1)
        keep = labels[-(len(labels) - 1) :] != -100 if len(labels) > 1 else torch.tensor([True])

        def logits(vector, inputs=inputs, keep=keep, labels=labels):
            parts = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), vector.split(sizes))}
            found = functional_call(model, parts, (), inputs).logits
            return found.view(-1, found.shape[-1])[-len(labels) :][: len(keep)][keep]

        vector = torch.cat([p.flatten() for p in parameters.values()])
        J = torch.autograd.functional.jacobian(logits, vector)
        for place, outputs in enumerate(logits(vector)):
            if loss == "cross_entropy":
                H = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z[None], torch.tensor([0])), outputs)
            else:
                H = torch.eye(len(outputs)).double()
            total += J[place].T @ H @ J[place]
    return total


def gram(function: AdapterFunction, rows, draws, **options) -> torch.Tensor:
    flat = torch.cat([found.rows.flatten(0, 1) for found in function.linearise(loader(rows), draws, **options)])
    return flat.T @ flat


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_make_the_gauss_newton_matrix(name, loss):
    make, samples = PROBLEMS[name]
    model, rows = make(), samples(3)
    function = AdapterFunction(model, LOSSES[loss]())
    expected = dense_curvature(model, rows, loss)
    assert torch.allclose(gram(function, rows, None), expected, atol=1e-9 * float(expected.abs().max()))
    v = torch.randn(function.size, dtype=torch.float64)
    product = function.curvature_product(loader(rows), function.vector, v)
    assert torch.allclose(product, expected @ v, atol=1e-9 * float(product.abs().max()))


@pytest.mark.parametrize("estimator", ["signs", "labels"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["CNN, batch-norm", "GPT-2, prompt"])
def test_sampled_rows_have_that_mean(name, loss, estimator, monkeypatch):
    make, samples = PROBLEMS[name]
    model, rows = make(), samples(2)
    numbers = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "peft_ext.unlearning.derivatives.function.uniform",
        lambda key, *purpose, shape: torch.rand(shape, generator=numbers, dtype=torch.float64),
    )
    function = AdapterFunction(model, LOSSES[loss](), estimator=estimator)
    expected = dense_curvature(model, rows, loss)

    def error(repetitions: int) -> float:
        mean = sum(gram(function, rows, 2) for _ in range(repetitions)) / repetitions
        return float((mean - expected).norm() / expected.norm())

    few, many = error(4), error(256)
    assert many < 0.2
    assert many < 0.4 * few  # the error of a mean falls with the root of 64


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_signs_leave_less_to_chance_the_more_there_are(loss):
    torch.manual_seed(0)
    outputs, present = 2 * torch.randn(1, 7, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    exact = LOSSES[loss]().exact_probes(outputs, present)[:, 0]
    expected = exact.T @ exact
    errors = []
    for draws in range(1, 8):
        error = 0.0
        for _ in range(50):
            u = torch.rand(1, 7, dtype=torch.float64)
            found = LOSSES[loss]().sign_probes(outputs, present, u, draws)
            assert found.shape == (draws, 1, 7)
            error += float((found[:, 0].T @ found[:, 0] - expected).norm() / expected.norm()) / 50
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.2
    assert errors[-1] < 1e-12


def test_places_of_a_text_have_rows_of_their_own():
    torch.manual_seed(0)
    outputs, present = torch.randn(5, 4), torch.tensor([0.0, 1, 0, 1, 1])
    found = CrossEntropy().sign_probes(outputs, present, torch.rand(5, 4), 3)
    used = found.abs().sum(-1) > 0
    assert used.tolist() == [
        [False, True, False, False, False],
        [False, False, False, True, False],
        [False, False, False, False, True],
    ]
    found = CrossEntropy().sign_probes(outputs, present, torch.rand(5, 4), 2)
    assert torch.equal(found.abs().sum(-1) > 0, torch.stack((used[0] | used[2], used[1])))


def test_as_many_draws_as_labels_are_exact():
    make, samples = PROBLEMS["CNN, batch-norm"]
    model, rows = make(), samples(3)
    function = AdapterFunction(model, CrossEntropy())
    expected = dense_curvature(model, rows, "cross_entropy")
    for draws in (3, 100):
        assert function.rows_of_a_sample(loader(rows), draws) == 3
        assert torch.allclose(gram(function, rows, draws), expected, atol=1e-9 * float(expected.abs().max()))


def test_forward_mode_equals_reverse_mode():
    model, rows = problems.language_model(), problems.texts(2)
    model.requires_grad_(False)
    function = AdapterFunction(model, CrossEntropy(), r"h\.1\..*coefficients")
    probes = 5 * 24
    assert function.size < probes  # so forward mode is taken
    model.requires_grad_(False)
    forward = gram(function, rows, None)
    for parameter in function.parameters.values():
        parameter.requires_grad_(True)
    expected = dense_curvature(model, rows, "cross_entropy")
    assert torch.allclose(forward, expected, atol=1e-10 * float(expected.abs().max()))


def test_chunks_and_batches_change_nothing():
    model, rows = problems.classifier(), images(7)
    whole = AdapterFunction(model, CrossEntropy())
    small = AdapterFunction(model, CrossEntropy(), memory=1.0)
    for draws in (None, 2):
        assert torch.allclose(gram(whole, rows, draws), gram(small, rows, draws), rtol=1e-9)
        assert torch.allclose(gram(whole, rows, draws), gram(whole, rows[::-1], draws), rtol=1e-9)
    sizes = [len(found.rows) for found in small.linearise(loader(rows), 1)]
    assert sizes == [1] * 7


def test_labels_and_subsets_depend_on_the_sample_alone():
    rows = problems.texts(40)
    function = AdapterFunction(problems.language_model(), CrossEntropy())
    half = [len(found.rows) for found in function.linearise(loader(rows), 1, share=0.5)]
    assert 10 < sum(half) < 30
    padded = [
        {name: F.pad(value, (0, 3), value=-100 if name == "labels" else 0) for name, value in row.items()}
        for row in rows
    ]
    assert torch.allclose(gram(function, rows, 1, share=0.5), gram(function, padded[::-1], 1, share=0.5), rtol=1e-9)


def test_keys_tell_samples_apart_and_ignore_padding():
    rows = problems.texts(6)
    keys = Batch({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, {}).keys()
    assert len(set(keys)) == 6
    single = Batch({name: value[None] for name, value in rows[3].items()}, {})
    cut = Batch({name: value[None, : int(rows[3]["attention_mask"].sum())] for name, value in rows[3].items()}, {})
    assert single.keys() == cut.keys() == [keys[3]]
    other = dict(rows[3], labels=rows[3]["labels"].roll(1))
    assert Batch({name: value[None] for name, value in other.items()}, {}).keys() != [keys[3]]


@pytest.mark.parametrize("form", ["parameter", "kernel"])
def test_the_closed_form_is_exact_for_a_linear_model(form):
    torch.manual_seed(1)
    model = problems.Regression().double()
    retain, forget = images(9, 1, (4,)), images(4, 2, (4,))
    initial, reference = trainable(model), matrix(model)
    unlearner = NTKUnlearner(model, "squared_error", "fast_ntk", form, damping=0.1, reference=initial)
    function = unlearner.function
    ridge = 0.1 * float(dense_curvature(model, retain + forget, "squared_error").trace()) / function.size
    trained = ridge_solution(retain + forget, reference, ridge)
    with torch.no_grad():
        model.linear.weight.copy_(trained[:, :-1])
        model.linear.bias.copy_(trained[:, -1])
    report = unlearner.fit(loader(retain), loader(forget))
    assert report.form == form
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
        NTKUnlearner(changed, method="fast_ntk", form=form, damping=0.01, reference=initial).fit(
            loader(samples(6, 1)), loader(samples(2, 2))
        )
        shifts.append(
            torch.cat([(trainable(changed)[key] - value).flatten() for key, value in trainable(model).items()])
        )
    assert shifts[0].norm() > 1e-3
    assert (shifts[0] - shifts[1]).norm() <= 1e-8 * shifts[0].norm()


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
    options = {"damping": 1e-9, "weight_decay": 0.3, "reference": initial, "draws": None, "max_steps": 1}
    NTKUnlearner(model, "squared_error", form=form, **options).fit(loader(retain), loader(forget))
    assert torch.allclose(matrix(model), expected, atol=1e-5 if form == "matrix_free" else 1e-7)


@pytest.mark.parametrize("name", ["ViT, PRANC", "GPT-2, NOLA"])
def test_forms_of_gauss_newton_agree(name):
    make, samples = PROBLEMS[name]
    found = {}
    for form in ("parameter", "kernel", "matrix_free"):
        model = make()
        options = {"form": form, "draws": None, "damping": 10.0, "max_steps": 2, "tolerance": 0.0}
        report = NTKUnlearner(model, **options).fit(loader(samples(6, 1)), loader(samples(2, 2)))
        found[form] = torch.cat([value.flatten() for value in trainable(model).values()])
        assert report.form == form
        assert any(step.accepted for step in report.steps)
    assert torch.allclose(found["parameter"], found["kernel"], atol=1e-8)
    # Its damping is in units of an estimated mean curvature, so the path differs a little.
    start = torch.cat([value.flatten() for value in trainable(make()).values()])
    assert (found["matrix_free"] - found["kernel"]).norm() < 0.2 * (found["kernel"] - start).norm()


@given(
    n=st.integers(1, 8),
    p=st.integers(1, 8),
    shift=st.floats(1e-3, 10),
    columns=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_forms_of_a_matrix_are_one_matrix(n, p, shift, columns, seed):
    torch.manual_seed(seed)
    rows = torch.randn(n, p, dtype=torch.float64)
    G = rows.T @ rows
    v = torch.randn((p, columns) if columns else (p,), dtype=torch.float64)
    expected = torch.linalg.solve(G + shift * torch.eye(p).double(), v)
    for form in (ParameterForm(G), KernelForm(rows)):
        assert torch.allclose(form.solve(v, shift), expected, atol=1e-8)
        assert torch.allclose(form.product(v), G @ v)
        assert math.isclose(form.mean, float(G.diagonal().mean()), rel_tol=1e-9)
    if not columns:
        found = MatrixFreeForm(lambda x: G @ x, 1.0).solve(v, shift)
        residual = (G @ found + shift * found - v).norm()
        assert residual <= 1e-4 * v.norm() * (1 + 1e-6)


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
    report = NTKUnlearner(model, reference=initial, weight_decay=0.01, draws=None, max_steps=15).fit(
        loader(retain), loader(forget)
    )
    assert distance() < before / 3
    assert accuracy(model, forget) <= accuracy(gold, forget) + 0.125
    assert accuracy(model, retain) == 1
    assert report.retain_loss[1] <= report.retain_loss[0] + 0.05
    assert report.forget_loss[1] > 1 > report.forget_loss[0]
    objectives = [step.objective for step in report.steps if step.accepted]
    assert len(objectives) > 2
    assert objectives == sorted(objectives, reverse=True)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_retain_loss_stays_below_the_bound():
    """Almost undamped, the first step is far too long."""
    model, initial, retain, forget = trained()
    found = {}
    for tolerance in (0.02, 1e9):
        changed = copy.deepcopy(model)
        options = {"reference": initial, "weight_decay": 1e-5, "damping": 1e-2, "draws": None, "max_steps": 1}
        unlearner = NTKUnlearner(changed, retain_tolerance=tolerance, **options)
        report = unlearner.fit(loader(retain), loader(forget))
        loss, targets, _ = unlearner.function.loss_and_gradient(loader(retain))
        assert loss / targets == pytest.approx(report.retain_loss[1], rel=1e-9)
        found[tolerance] = report
    careful, careless = found.values()
    assert careless.retain_loss[1] > careless.retain_loss[0] + 0.02
    assert careful.retain_loss[1] <= careful.retain_loss[0] + 0.02
    assert "steps were undone: they took the retain loss above" in careful.notes[0]
    assert any(step.accepted for step in careful.steps)
    assert not any("undone" in note for note in careless.notes)


def test_a_model_that_nothing_can_improve_is_left_alone():
    model, initial, retain, forget = trained()
    before = trainable(model)
    unlearner = NTKUnlearner(model, draws=None, damping=1e-12, weight_decay=0.0, retain_tolerance=0.0)
    report = unlearner.fit(loader(retain), loader(forget))
    assert report.notes[-1] == "No step was kept: the model is unchanged."
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


def test_estimates_state_their_error():
    model, initial, retain, forget = trained(steps=20)
    exact = NTKUnlearner(copy.deepcopy(model), draws=None, max_steps=1).fit(loader(retain), loader(forget))
    assert exact.curvature == "exact"
    sampled = NTKUnlearner(model, draws=2, curvature_samples=8, max_steps=1).fit(loader(retain), loader(forget))
    assert "of 16 retain samples, 2 x random signs each: relative standard error" in sampled.curvature


def test_training_mode_and_gradients_are_left_as_they_were():
    model, initial, retain, forget = trained(steps=5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    NTKUnlearner(model, max_steps=1, parameters="classifier.modules_to_save").fit(loader(retain), loader(forget))
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required


def test_batch_norm_statistics_stay():
    model = problems.batch_norm()
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    NTKUnlearner(model, max_steps=2).fit(loader(images(6, 1)), loader(images(3, 2)))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "`loss` must be one of 'cross_entropy', 'squared_error', got 'hinge'"),
        ({"method": "newton"}, "`method` must be one of"),
        ({"method": "fast_ntk", "form": "matrix_free"}, "`form` must be one of 'auto', 'parameter', 'kernel', got"),
        ({"damping": 0}, "`damping` must be above 0"),
        ({"damping": math.nan}, "`damping` must be a finite number"),
        ({"retain_tolerance": -1}, "`retain_tolerance` must be at least 0"),
        ({"max_steps": 0}, "`max_steps` must be a positive integer"),
        ({"draws": 0}, "`draws` must be a positive integer"),
        ({"curvature_samples": 1.5}, "`curvature_samples` must be a positive integer"),
        ({"parameters": "no such"}, "no name contains 'no such'"),
        ({"reference": {}}, "There must be a tensor 'base_model"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        NTKUnlearner(problems.classifier(), **arguments)


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match="none requires gradients.*is_trainable=True"):
        NTKUnlearner(problems.classifier().requires_grad_(False))


def test_dropout_left_on():
    model = problems.classifier()
    dropout = nn.Dropout(0.1).eval()
    model.base_model.model.extra = dropout
    NTKUnlearner(model)
    dropout.train()
    with pytest.raises(
        ValueError, match=r"Dropout is on \(1 modules, first: 'base_model.model.extra'\).*model.eval\(\)"
    ):
        NTKUnlearner(model)


@pytest.mark.parametrize("method", ["gauss_newton", "fast_ntk"])
def test_wrong_sets(method):
    unlearner = NTKUnlearner(problems.classifier(), method=method)
    rows = images(8)
    with pytest.raises(ValueError, match="The forget set is empty"):
        unlearner.fit(loader(rows), [])
    with pytest.raises(ValueError, match="The retain set is empty"):
        unlearner.fit([], loader(rows))
    with pytest.raises(ValueError, match="overlap: 2 samples are in both"):
        unlearner.fit(loader(rows[:6]), loader(rows[4:]))
    with pytest.raises(ValueError, match="a tensor 'labels' among them, got the keys \\['pixel_values'\\]"):
        unlearner.fit([{"pixel_values": rows[0]["pixel_values"]}], loader(rows))


def test_numbers_that_are_not_finite_leave_the_model_alone():
    model, rows = problems.classifier(), images(8)
    rows[2]["pixel_values"][0, 0, 0] = math.nan
    before = trainable(model)
    with pytest.raises(ValueError, match="not finite"):
        NTKUnlearner(model).fit(loader(rows[:6]), loader(rows[6:]))
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


def test_too_little_memory_says_how_much_and_what_else():
    model, retain, forget = problems.classifier(), images(6, 1), images(3, 2)
    size = NTKUnlearner(model).function.size
    with pytest.raises(ValueError, match=rf"form='parameter' needs .* GB \({size} parameters.*form='matrix_free'"):
        NTKUnlearner(model, form="parameter", memory=1e4).fit(loader(retain), loader(forget))
    with pytest.raises(ValueError, match="fast_ntk' needs .* GB in its smallest form, 'kernel'.*gauss_newton"):
        NTKUnlearner(model, method="fast_ntk", memory=1e4).fit(loader(retain), loader(forget))
    assert NTKUnlearner(model, memory=1e4, max_steps=1).fit(loader(retain), loader(forget)).form == "matrix_free"


def test_the_smaller_form_is_chosen():
    model, forget = problems.classifier(), images(3, 2)
    size = NTKUnlearner(model).function.size
    for n, form in ((6, "kernel"), (2 * size, "parameter")):
        unlearner = NTKUnlearner(model, max_steps=1)
        assert unlearner._form(n) == form
    assert NTKUnlearner(model, max_steps=1).fit(loader(images(6, 1)), loader(forget)).form == "kernel"


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
