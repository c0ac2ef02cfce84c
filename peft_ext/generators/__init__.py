"""Frozen generators: coefficients -> weights. They know nothing of PEFT, models or layers."""

from .base import Generator
from .copies import SignedCopies
from .linear import RandomBasis, SparseBasis
from .manifold import SineManifold

__all__ = ["Generator", "RandomBasis", "SignedCopies", "SineManifold", "SparseBasis"]
