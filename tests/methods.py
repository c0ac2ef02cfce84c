"""The methods that the tests of layers, training, checkpoints and integrations are run with: a new one is a new row."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import McncConfig, NolaConfig, PrancConfig

Config = NolaConfig | PrancConfig | McncConfig

# name: (configuration class, fields of an adapter for layers of at least 13 weights)
METHODS: dict[str, tuple[type[Config], dict[str, Any]]] = {
    "NOLA": (NolaConfig, {"r": 2, "num_basis": (5, 7), "alpha": 1.0}),
    "NOLA, own bases": (NolaConfig, {"r": 2, "num_basis": (5, 7), "alpha": 1.0, "share_basis": False}),
    "PRANC": (PrancConfig, {"num_coefficients": 13}),
    "PRANC, two a weight, biases": (PrancConfig, {"num_coefficients": 13, "nnz": 2, "adapt_bias": True}),
    "PRANC, dense": (PrancConfig, {"num_coefficients": 13, "basis": "dense"}),
    "PRANC, factors": (PrancConfig, {"num_coefficients": 13, "apply_to": "factors", "r": 2, "alpha": 1.0}),
    "MCNC": (McncConfig, {"r": 2, "k": 3, "d": 10, "widths": (5,), "alpha": 1.0}),
    "MCNC, weight": (McncConfig, {"apply_to": "weight", "k": 2, "d": 13, "widths": (5, 4), "activation": "tanh"}),
}
ONE_OF_EACH = ["NOLA", "PRANC", "MCNC"]
"""For tests that take long, or do not depend on where the coefficients go."""

# name in lower case: fields of two further adapters, of other kinds and sizes
FURTHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nola": ({"r": 3, "num_basis": 4, "alpha": 2.0}, {"r": 2, "num_basis": (2, 6), "share_basis": False}),
    "pranc": ({"num_coefficients": 9, "basis": "dense"}, {"num_coefficients": 20, "nnz": 2, "adapt_bias": True}),
    "mcnc": (
        {"apply_to": "weight", "k": 2, "d": 10, "widths": ()},
        {"r": 3, "k": 1, "d": 24, "widths": (4, 3), "alpha": 2.0, "activation": "relu", "normalize": False},
    ),
}


def config_of(method: str, **options: Any) -> Config:
    """The configuration of a row with random coefficients, unless `options` say otherwise."""
    config, fields = METHODS[method]
    return config(**{"init_weights": False, **fields, **options})


def lower(method: str) -> str:
    """The method's name as in the names of its fields and parameters."""
    return METHODS[method][0].method_name.lower()


def adapts_norms(method: str) -> bool:
    """Whether modules that hold vectors only can be targets."""
    return lower(method) == "pranc" and METHODS[method][1].get("apply_to") != "factors"


def adapt(base: nn.Module, method: str, **options: Any) -> tuple[PeftModel, Config]:
    """A copy of a model adapted with random coefficients in the dtype of the model, and the configuration."""
    config = config_of(method, **options)
    return get_peft_model(copy.deepcopy(base), config).to(next(base.parameters()).dtype), config
