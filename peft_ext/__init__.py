"""Adapters that are a seed and a few thousand coefficients, as methods of Hugging Face PEFT.

Importing this package registers the methods with PEFT.
"""

from .checkpoint import push_to_hub
from .registration import register
from .tuners.nola import NolaConfig, NolaModel

__version__ = "0.1.0"
__all__ = ["NolaConfig", "NolaModel", "push_to_hub"]

register("NOLA", NolaConfig, NolaModel)
