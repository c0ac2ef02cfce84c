"""Frozen generators: coefficients -> weights. They know nothing of PEFT, models or layers."""

from .base import Generator
from .linear import RandomBasis, SparseBasis
from .manifold import SineManifold

__all__ = ["Generator", "RandomBasis", "SineManifold", "SparseBasis"]
