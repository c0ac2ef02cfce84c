"""The derivatives: equal to dense ones, whatever the model, the loss, the chunks and the batches."""

from __future__ import annotations

import math

import problems
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PROBLEMS, SAME_PLACE, dense_curvature, images, loader
from transformers.modeling_outputs import ImageClassifierOutput

from peft_ext.training.batch import Batch
from peft_ext.unlearning.derivatives.curvature import KernelForm, MatrixFreeForm, ParameterForm
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import LOSSES, CrossEntropy
from peft_ext.unlearning.derivatives.quadratic import SampledQuadratic


def gram(function: AdapterFunction, rows, draws, **options) -> torch.Tensor:
    flat = torch.cat([found.rows.flatten(0, 1) for found in function.linearise(loader(rows), draws, **options)])
    return flat.T @ flat


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_make_the_gauss_newton_matrix(name, loss):
    make, samples = PROBLEMS[name]
    model, rows = make(), samples(3)
    function = AdapterFunction(model, LOSSES[loss]())
    expected = dense_curvature(model, rows, loss, name in SAME_PLACE)
    assert expected.abs().max() > 1e-6
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
        "peft_ext.unlearning.derivatives.function.unit_uniform",
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
            found = LOSSES[loss]().sign_probes(outputs, present, u, draws, own=draws)
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


class Half(problems.Regression):
    """A classifier whose outputs are in bfloat16."""

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=super().forward(pixel_values).logits.to(torch.bfloat16))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_outputs_in_half_precision_are_added_up_in_a_wider_one(loss):
    torch.manual_seed(0)
    model, rows = Half(), images(300, shape=(4,), dtype=torch.float32)
    function = AdapterFunction(model, LOSSES[loss]())
    outputs = torch.stack([model(row["pixel_values"][None]).logits[0] for row in rows]).detach().double()
    targets = torch.stack([row["labels"] for row in rows])
    expected = LOSSES[loss]().values(outputs[:, None], targets[:, None]).sum()
    found, count, _ = function.loss_and_gradient(loader(rows, 300))
    assert count == 300 and found == pytest.approx(float(expected), rel=1e-6)
    many = torch.zeros(1, 20000, 30, dtype=torch.float16)  # 65,504 is the largest number in half precision
    value = LOSSES[loss]().values(many, torch.zeros(1, 20000, dtype=torch.long))
    each = math.log(30) if loss == "cross_entropy" else 0.5
    assert float(value) == pytest.approx(20000 * each, rel=1e-4)


def test_rows_of_outputs_in_half_precision_are_as_exact_as_the_model():
    torch.manual_seed(0)
    model, rows = Half(), images(6, shape=(4,), dtype=torch.float32)
    exact = problems.Regression()
    exact.load_state_dict(model.state_dict())
    half, single = (gram(AdapterFunction(each, CrossEntropy()), rows, None) for each in (model, exact))
    assert torch.allclose(half, single, atol=0.01 * float(single.abs().max()))


def test_a_loss_that_is_not_finite_is_refused_though_its_derivatives_are():
    class Impossible(problems.Regression):
        def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
            logits = super().forward(pixel_values).logits
            return ImageClassifierOutput(logits=logits + torch.tensor([0.0, 0.0, -math.inf]))

    function, rows = AdapterFunction(Impossible(), CrossEntropy()), images(3, shape=(4,), dtype=torch.float32)
    assert torch.isfinite(function.loss_and_gradient(loader(rows))[2]).all()
    with pytest.raises(ValueError, match=r"The loss \(inf over 3 targets\).*not finite: .* Look for samples"):
        SampledQuadratic.of(function, loader(rows), "parameter", None, 0.0, None)
