"""MCNC's rows for PEFT's own tests of custom models: see run.py."""

from __future__ import annotations

from typing import Any

from peft_ext import McncConfig

_SMALL = {"d": 40, "k": 3, "widths": [8, 8]}
# PEFT trains with SGD and large rates, at which scaled coefficients of two layers run away.
_PLAIN = {**_SMALL, "parametrization": "plain"}

# (name, model in PEFT's tests, configuration class, its arguments)
TEST_CASES: list[tuple[str, str, type, dict[str, Any]]] = [
    ("MCNC linear", "MLP", McncConfig, {"target_modules": "lin0", **_SMALL}),
    ("MCNC two linears", "MLP", McncConfig, {"target_modules": ["lin0", "lin1"], "r": 2, **_PLAIN}),
    ("MCNC weights", "MLP", McncConfig, {"target_modules": ["lin0", "lin1"], "apply_to": "weight", **_SMALL}),
    (
        "MCNC with a saved module",
        "MLP",
        McncConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **_SMALL},
    ),
    ("MCNC dropout", "MLP", McncConfig, {"target_modules": ["lin0", "lin1"], "mcnc_dropout": 0.1, **_PLAIN}),
    (
        "MCNC relu, not normalised",
        "MLP",
        McncConfig,
        {"target_modules": ["lin0", "lin1"], "activation": "relu", "normalize": False, **_PLAIN},
    ),
    ("MCNC embedding", "EmbConv1D", McncConfig, {"target_modules": ["emb"], **_SMALL}),
    ("MCNC embedding and Conv1D", "EmbConv1D", McncConfig, {"target_modules": ["emb", "conv1d"], **_SMALL}),
    (
        "MCNC embedding and Conv1D, weights",
        "EmbConv1D",
        McncConfig,
        {"target_modules": ["emb", "conv1d"], "apply_to": "weight", **_SMALL},
    ),
    ("MCNC Conv2d", "Conv2d", McncConfig, {"target_modules": ["conv2d"], **_SMALL}),
    (
        "MCNC Conv2d and linear, weights",
        "Conv2d",
        McncConfig,
        {"target_modules": ["conv2d", "lin0"], "apply_to": "weight", **_SMALL},
    ),
    ("MCNC Conv2d groups", "Conv2dGroups", McncConfig, {"target_modules": ["conv2d"], **_SMALL}),
]

# (name, method, configuration class, arguments of the first adapter, of the second)
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES: list[tuple[str, str, type, dict[str, Any], dict[str, Any]]] = [
    (
        "MCNC same layer, other seed",
        "mcnc",
        McncConfig,
        {"target_modules": ["lin0"], "init_weights": False, **_SMALL},
        {"target_modules": ["lin0"], "init_weights": False, "seed": 1, **_SMALL},
    ),
    (
        "MCNC factors and weights",
        "mcnc",
        McncConfig,
        {"target_modules": ["lin0"], "init_weights": False, **_SMALL},
        {"target_modules": ["lin0", "lin1"], "init_weights": False, "apply_to": "weight", **_SMALL},
    ),
]

# Tests that do not apply: {part of the test's name: why}. None at present.
DESELECTED: dict[str, str] = {}
