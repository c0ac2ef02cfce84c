"""PRANC (Nooralinejad et al., "PRANC: Pseudo RAndom Networks for Compacting deep models", arXiv 2206.08464)."""

from .config import PrancConfig
from .layer import PrancConv2d, PrancEmbedding, PrancExperts, PrancLayer, PrancLinear, PrancVector
from .model import PrancModel

__all__ = [
    "PrancConfig",
    "PrancConv2d",
    "PrancEmbedding",
    "PrancExperts",
    "PrancLayer",
    "PrancLinear",
    "PrancModel",
    "PrancVector",
]
