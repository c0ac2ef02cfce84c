"""MCNC (Thrash et al., "MCNC: Manifold-Constrained Reparameterization for Neural Compression", arXiv 2406.19301)."""

from .config import McncConfig
from .layer import McncConv2d, McncEmbedding, McncExperts, McncLayer, McncLinear
from .model import McncModel

__all__ = ["McncConfig", "McncConv2d", "McncEmbedding", "McncExperts", "McncLayer", "McncLinear", "McncModel"]
