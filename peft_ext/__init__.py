"""Adapters that are a seed and a few thousand coefficients, as methods of Hugging Face PEFT.

Importing this package registers the methods with PEFT.
"""

from .adapters.hub import push_to_hub
from .adapters.lora import to_lora
from .adapters.pool import AdapterPool
from .adapters.scaling import rescale_adapter_scale
from .from_seed import load_from_seed
from .registration import register
from .seeded_network import SeededNetwork
from .tuners.description import describe
from .tuners.idle import set_expansion_budget
from .tuners.mcnc import McncConfig, McncModel
from .tuners.nola import NolaConfig, NolaModel
from .tuners.pranc import PrancConfig, PrancModel
from .tuners.visual_prompt import VisualPromptConfig, VisualPromptModel

__version__ = "0.1.0"
__all__ = [
    "AdapterPool",
    "McncConfig",
    "McncModel",
    "NolaConfig",
    "NolaModel",
    "PrancConfig",
    "PrancModel",
    "SeededNetwork",
    "VisualPromptConfig",
    "VisualPromptModel",
    "describe",
    "load_from_seed",
    "push_to_hub",
    "rescale_adapter_scale",
    "set_expansion_budget",
    "to_lora",
]

register(NolaConfig, NolaModel)
register(PrancConfig, PrancModel)
register(McncConfig, McncModel)
register(VisualPromptConfig, VisualPromptModel)
