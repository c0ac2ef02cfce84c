"""Copies of a basis with signs of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from generator_cases import GeneratorCases

from peft_ext.generators import Generator, RandomBasis, SignedCopies
from peft_ext.randomness import uniform

STREAM = ("test", 1)


class TestSignedCopies(GeneratorCases):
    @pytest.fixture(params=[(0.5, False), (0.0, False), (0.25, True)], ids=str)
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Generator]:
        offset_scale, streamed = request.param
        return lambda: SignedCopies(RandomBasis(7, STREAM, 5, 6, scale=0.5, streamed=streamed), 4, offset_scale)

    def reference(self, generator: SignedCopies, coefficients: torch.Tensor) -> torch.Tensor:
        basis = uniform(7, (*STREAM, "basis"), 30).view(5, 6).double() * 0.5
        signs = torch.where(uniform(7, (*STREAM, "sign"), 20) < 0, -1.0, 1.0).view(4, 5).double()
        offset = uniform(7, (*STREAM, "offset"), 24).double() * generator.offset_scale
        parts = [(coefficients * signs[e]) @ basis for e in range(4)]
        return torch.cat(parts, -1) + offset

    def test_a_changed_field_is_another_generator(self, make: Callable[[], Generator]) -> None:
        basis = RandomBasis(7, STREAM, 5, 6, scale=0.5)
        for other in (SignedCopies(basis, 3), SignedCopies(basis, 4, 0.75), SignedCopies(replace(basis, seed=8), 4)):
            assert other != make()
            if other.copies == 4:
                coefficients = self.draw(other)
                assert not torch.allclose(other.expand(coefficients), make().expand(coefficients))


def test_the_parts_differ_and_the_vectors_are_nearly_orthogonal() -> None:
    copies = SignedCopies(RandomBasis(0, STREAM, 40, 60), 16)
    vectors = copies.expand(torch.eye(40, dtype=torch.float64))
    parts = vectors.sum(0).view(16, 60)
    assert len(torch.unique(parts, dim=0)) == 16
    normal = torch.nn.functional.normalize(vectors, dim=1)
    own = torch.nn.functional.normalize(RandomBasis(0, STREAM, 40, 60).expand(torch.eye(40)), dim=1)

    def overlap(rows: torch.Tensor) -> torch.Tensor:
        return ((rows @ rows.T) - torch.eye(40)).square().mean().sqrt()

    assert overlap(normal) < overlap(own) / 2
