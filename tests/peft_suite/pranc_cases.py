"""PRANC's rows for PEFT's own tests of custom models: see run.py."""

from __future__ import annotations

from typing import Any

from peft_ext import PrancConfig

# (name, model in PEFT's tests, configuration class, its arguments)
TEST_CASES: list[tuple[str, str, type, dict[str, Any]]] = [
    ("PRANC linear", "MLP", PrancConfig, {"target_modules": "lin0", "num_coefficients": 50}),
    ("PRANC two linears", "MLP", PrancConfig, {"target_modules": ["lin0", "lin1"], "num_coefficients": 30}),
    ("PRANC two a weight", "MLP", PrancConfig, {"target_modules": ["lin0", "lin1"], "num_coefficients": 30, "nnz": 2}),
    (
        "PRANC with a saved module",
        "MLP",
        PrancConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "num_coefficients": 50},
    ),
    (
        "PRANC dense",
        "MLP",
        PrancConfig,
        {"target_modules": ["lin0", "lin1"], "basis": "dense", "num_coefficients": 30},
    ),
    (
        "PRANC dropout",
        "MLP",
        PrancConfig,
        {"target_modules": ["lin0", "lin1"], "pranc_dropout": 0.1, "num_coefficients": 30},
    ),
    (
        "PRANC biases",
        "MLP",
        PrancConfig,
        {"target_modules": ["lin0", "lin1"], "adapt_bias": True, "num_coefficients": 30},
    ),
    (
        "PRANC factors",
        "MLP",
        PrancConfig,
        {"target_modules": ["lin0", "lin1"], "apply_to": "factors", "r": 2, "num_coefficients": 30},
    ),
    (
        "PRANC factors, embedding and Conv1D",
        "EmbConv1D",
        PrancConfig,
        {"target_modules": ["emb", "conv1d"], "apply_to": "factors", "num_coefficients": 30},
    ),
    ("PRANC embedding", "EmbConv1D", PrancConfig, {"target_modules": ["emb"], "num_coefficients": 50}),
    (
        "PRANC embedding and Conv1D",
        "EmbConv1D",
        PrancConfig,
        {"target_modules": ["emb", "conv1d"], "num_coefficients": 5},
    ),
    ("PRANC Conv2d", "Conv2d", PrancConfig, {"target_modules": ["conv2d"], "num_coefficients": 50}),
    ("PRANC Conv2d and linear", "Conv2d", PrancConfig, {"target_modules": ["conv2d", "lin0"], "num_coefficients": 50}),
    ("PRANC Conv2d groups", "Conv2dGroups", PrancConfig, {"target_modules": ["conv2d"], "num_coefficients": 40}),
]

# (name, method, configuration class, arguments of the first adapter, of the second)
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES: list[tuple[str, str, type, dict[str, Any], dict[str, Any]]] = [
    (
        "PRANC same layer, other seed",
        "pranc",
        PrancConfig,
        {"target_modules": ["lin0"], "init_weights": False, "num_coefficients": 50},
        {"target_modules": ["lin0"], "init_weights": False, "num_coefficients": 50, "seed": 1},
    ),
    (
        "PRANC other layers, other sizes",
        "pranc",
        PrancConfig,
        {"target_modules": ["lin0", "lin1"], "init_weights": False, "num_coefficients": 50},
        {"target_modules": ["lin1"], "init_weights": False, "num_coefficients": 20},
    ),
]

# Tests that do not apply: {part of the test's name: why}. None at present.
DESELECTED: dict[str, str] = {}
