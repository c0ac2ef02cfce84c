"""Frozen generators: coefficients -> weights. They know nothing of PEFT, models or layers."""

from .linear import RandomBasis

__all__ = ["RandomBasis"]
