"""What every generator promises, as tests: a generator is tested by a subclass that makes small ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from peft_ext import randomness
from peft_ext.generators import Generator
from peft_ext.generators.base import Frozen

LEADS = [(), (1,), (3,), (2, 3), (1, 1), (0,)]
"""Shapes in front of the coefficients."""


class GeneratorCases:
    """A subclass provides the fixture `make` and the method `reference`; it can be parametrised by `make`."""

    @pytest.fixture
    def make(self) -> Callable[[], Generator]:
        """Makes the same generator at every call."""
        raise NotImplementedError

    def reference(self, generator: Generator, coefficients: torch.Tensor) -> torch.Tensor:
        """What `coefficients`, of float64, are expanded to: from the description of the generator alone."""
        raise NotImplementedError

    @pytest.fixture
    def generator(self, make: Callable[[], Generator]) -> Generator:
        return make()

    @staticmethod
    def draw(generator: Generator, *lead: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        numbers = torch.Generator().manual_seed(len(lead))
        return torch.randn(*lead, generator.num_coefficients, dtype=torch.float64, generator=numbers).to(dtype)

    # Values

    @pytest.mark.parametrize("lead", LEADS, ids=str)
    def test_equals_the_reference(self, generator: Generator, lead: tuple[int, ...]) -> None:
        for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):  # frozen numbers are in float32
            coefficients = self.draw(generator, *lead, dtype=dtype)
            weights = generator.expand(coefficients)
            assert weights.shape == (*lead, generator.size) and weights.dtype == dtype
            expected = self.reference(generator, coefficients.double())
            torch.testing.assert_close(weights.double(), expected, rtol=tolerance, atol=tolerance)

    def test_rows_are_expanded_alone(self, generator: Generator) -> None:
        coefficients = self.draw(generator, 2, 3)
        weights = generator.expand(coefficients)
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(weights[i, j], generator.expand(coefficients[i, j]))

    def test_coefficients_in_any_layout(self, generator: Generator) -> None:
        coefficients = self.draw(generator, 3)
        expected = generator.expand(coefficients)
        spread = torch.stack((coefficients, coefficients), -1)[..., 0]
        assert not spread.is_contiguous() and torch.equal(generator.expand(spread), expected)
        assert torch.equal(generator.expand(coefficients.T.contiguous().T), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_coefficients_expand_in_float32(self, generator: Generator, dtype: torch.dtype) -> None:
        coefficients = self.draw(generator, 2, dtype=dtype).requires_grad_()
        weights = generator.expand(coefficients)
        assert weights.dtype == torch.float32
        assert torch.equal(weights, generator.expand(coefficients.detach().float()))
        weights.square().sum().backward()
        assert coefficients.grad is not None and coefficients.grad.dtype == dtype
        grad = torch.randn(2, generator.size)
        found = generator.vjp(coefficients.detach(), grad)
        assert found.dtype == dtype
        assert torch.equal(found, generator.vjp(coefficients.detach().float(), grad).to(dtype))

    @pytest.mark.parametrize("shape", [(1,), (1, -1), ()], ids=["longer", "shorter, two rows", "scalar"])
    def test_coefficients_of_another_length_are_refused(self, generator: Generator, shape: tuple[int, ...]) -> None:
        right = generator.num_coefficients
        wrong = torch.zeros(*shape[:-1], right + shape[-1]) if shape else torch.zeros(1, right)[:, :0]
        message = rf"`coefficients` must have {right} entries in the last dimension, got shape \({wrong.shape[0]}"
        with pytest.raises(ValueError, match=message):
            generator.expand(wrong)

    def test_meta_coefficients_draw_nothing(self, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(randomness, "uniform", None)
        for dtype, expanded in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            weights = generator.expand(torch.empty(2, generator.num_coefficients, dtype=dtype, device="meta"))
            assert weights.is_meta and weights.shape == (2, generator.size) and weights.dtype == expanded
        assert generator.nbytes == 0

    # Derivatives

    def test_derivatives(self, generator: Generator) -> None:
        coefficients = self.draw(generator, 2).requires_grad_()
        assert torch.autograd.gradcheck(
            generator.expand, (coefficients,), check_forward_ad=True, check_batched_grad=True
        )

    def test_second_derivatives(self, generator: Generator) -> None:
        def loss(coefficients: torch.Tensor) -> torch.Tensor:  # not zero for linear generators either
            return torch.sin(generator.expand(coefficients))

        assert torch.autograd.gradgradcheck(loss, (self.draw(generator).requires_grad_(),))

    @pytest.mark.parametrize("lead", LEADS, ids=str)
    def test_vjp_equals_autograd(self, generator: Generator, lead: tuple[int, ...]) -> None:
        coefficients = self.draw(generator, *lead).requires_grad_()
        grad = torch.randn(*lead, generator.size, dtype=torch.float64)
        (expected,) = torch.autograd.grad(self.reference(generator, coefficients), coefficients, grad)
        found = generator.vjp(coefficients.detach(), grad)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        (autograd,) = torch.autograd.grad(generator.expand(coefficients), coefficients, grad)
        torch.testing.assert_close(found, autograd)

    def test_transforms(self, generator: Generator) -> None:
        coefficients = self.draw(generator, 2)
        rows = [torch.autograd.functional.jacobian(lambda x: self.reference(generator, x), row) for row in coefficients]
        close = {"rtol": 1e-5, "atol": 1e-5}
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(generator.expand)(coefficients[0]), rows[0], **close)
            together = torch.func.vmap(transform(generator.expand))(coefficients)
            torch.testing.assert_close(together, torch.stack(rows), **close)
        columns = torch.func.vmap(generator.expand, in_dims=1, out_dims=1)(coefficients.T)
        torch.testing.assert_close(columns.T, generator.expand(coefficients))

        def loss(x: torch.Tensor) -> torch.Tensor:
            return torch.sin(generator.expand(x)).sum()

        x = coefficients[0]
        hessian = torch.autograd.functional.hessian(lambda x: torch.sin(self.reference(generator, x)).sum(), x)
        for twice in (torch.func.hessian(loss), torch.func.jacrev(torch.func.grad(loss))):
            torch.testing.assert_close(twice(x), hessian, **close)

    def test_dual_numbers(self, generator: Generator) -> None:
        """Forward mode without a transform."""
        x, tangent = self.draw(generator), self.draw(generator, 1)[0]
        _, expected = torch.func.jvp(lambda x: self.reference(generator, x), (x,), (tangent,))
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(generator.expand(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(found.tangent, expected, rtol=1e-5, atol=1e-5)

    def test_nothing_is_saved_for_backward(self, generator: Generator) -> None:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda packed: packed):
            weights = generator.expand(self.draw(generator, 2).requires_grad_())
        assert weights.requires_grad and not saved
        for _ in range(2):  # so a graph can be walked again without being retained
            weights.sum().backward()

    def test_coefficients_replaced_before_the_backward_pass(self, generator: Generator) -> None:
        """The gradient is the one at the coefficients that were expanded."""
        leaf = self.draw(generator).requires_grad_()
        grad = torch.randn(generator.size, dtype=torch.float64)
        expected = generator.vjp(leaf.detach().clone(), grad)
        weights = generator.expand(leaf)
        leaf.data = leaf.data * 2
        (found,) = torch.autograd.grad(weights, leaf, grad)
        torch.testing.assert_close(found, expected)

    # Surroundings

    def test_independent_of_autocast_default_dtype_and_device_context(self, make: Callable[[], Generator]) -> None:
        coefficients = self.draw(make(), 3, dtype=torch.float32)
        grad = torch.randn(3, make().size)
        expected, right = make().expand(coefficients), make().vjp(coefficients, grad)  # their numbers are not kept
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
                generator = make()
                found, derivative = generator.expand(coefficients), generator.vjp(coefficients, grad)
                leaf = coefficients.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(generator.expand(leaf), leaf, grad)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        assert derivative.dtype == torch.float32 and torch.equal(derivative, right)
        torch.testing.assert_close(gradient, right)

    def test_backward_under_autocast(self, generator: Generator) -> None:
        coefficients = self.draw(generator, 3, dtype=torch.float32).requires_grad_()
        expected = generator.vjp(coefficients.detach(), torch.ones(3, generator.size))
        total = generator.expand(coefficients).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total.backward()
        torch.testing.assert_close(coefficients.grad, expected)

    @pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
    def test_first_used_without_gradients_then_trained(
        self, generator: Generator, context: Callable[[], torch.autograd.grad_mode.no_grad]
    ) -> None:
        with context():
            generator.expand(self.draw(generator))
        coefficients = self.draw(generator).requires_grad_()
        (generator.expand(coefficients) ** 2).sum().backward()
        assert coefficients.grad is not None and coefficients.grad.abs().max() > 0
        x = torch.ones(generator.size, dtype=torch.float64, requires_grad=True)
        (generator.expand(coefficients.detach()) * x).sum().backward()
        assert x.grad is not None

    # Memory

    def test_equal_generators_hold_the_same_numbers_while_in_use(self, make: Callable[[], Generator]) -> None:
        before = set(Frozen._shared)
        first, second = make(), make()
        assert first == second and hash(first) == hash(second) and repr(first) == repr(second)
        assert all(a is b for a, b in zip(first.frozen, second.frozen))
        first.expand(self.draw(first))
        assert second.nbytes == first.nbytes
        del first, second
        assert set(Frozen._shared) <= before

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda generator: pickle.loads(pickle.dumps(generator))])
    def test_copies_share_the_numbers_and_pickles_hold_none(
        self, generator: Generator, clone: Callable[[Generator], Generator]
    ) -> None:
        size = len(pickle.dumps(generator))
        coefficients = self.draw(generator, 2)
        expected = generator.expand(coefficients)
        other = clone(generator)
        assert other == generator and torch.equal(other.expand(coefficients), expected)
        assert len(other.frozen) == len(generator.frozen) == len(generator.frozen_sizes)
        assert [each.nbytes for each in generator.frozen] == list(generator.frozen_nbytes)
        assert all(a is b for a, b in zip(other.frozen, generator.frozen))
        assert len(pickle.dumps(generator)) == size

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_holds_the_same_numbers_and_the_cpu_no_copy(self, generator: Generator) -> None:
        coefficients = self.draw(generator, 2)
        expected = generator.expand(coefficients)
        derivative = generator.vjp(coefficients, torch.ones_like(expected))
        held = generator.nbytes
        leaf = coefficients.cuda().requires_grad_()
        weights = generator.expand(leaf)
        torch.testing.assert_close(weights.cpu(), expected)
        (gradient,) = torch.autograd.grad(weights.sum(), leaf)
        torch.testing.assert_close(gradient.cpu(), derivative)
        assert generator.nbytes == held

    def test_a_changed_field_is_another_generator(self, make: Callable[[], Generator]) -> None:
        fields = {name: value for name, value in vars(make()).items() if not name.startswith("_")}
        other = type(make())(**{**fields, "seed": fields["seed"] + 1})
        assert other != make()
        assert all(a is not b for a, b in zip(other.frozen, make().frozen))
        coefficients = self.draw(other)
        assert not torch.allclose(other.expand(coefficients), make().expand(coefficients))
