"""NOLA (Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv 2310.02556)."""

from .config import NolaConfig
from .layer import NolaConv2d, NolaEmbedding, NolaExperts, NolaLayer, NolaLinear
from .model import NolaModel

__all__ = ["NolaConfig", "NolaConv2d", "NolaEmbedding", "NolaExperts", "NolaLayer", "NolaLinear", "NolaModel"]
