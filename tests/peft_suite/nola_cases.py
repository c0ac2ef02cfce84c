"""NOLA's rows for PEFT's own tests of custom models: see run.py."""

from __future__ import annotations

from typing import Any

from peft_ext import NolaConfig

# (name, model in PEFT's tests, configuration class, its arguments)
TEST_CASES: list[tuple[str, str, type, dict[str, Any]]] = [
    ("NOLA linear", "MLP", NolaConfig, {"target_modules": "lin0"}),
    ("NOLA two linears", "MLP", NolaConfig, {"target_modules": ["lin0", "lin1"], "num_basis": [8, 16], "r": 2}),
    ("NOLA with a saved module", "MLP", NolaConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("NOLA own bases", "MLP", NolaConfig, {"target_modules": ["lin0", "lin1"], "share_basis": False}),
    ("NOLA dropout", "MLP", NolaConfig, {"target_modules": ["lin0", "lin1"], "nola_dropout": 0.1}),
    (
        "NOLA patterns",
        "MLP",
        NolaConfig,
        {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 2}},
    ),
    ("NOLA embedding", "EmbConv1D", NolaConfig, {"target_modules": ["emb"]}),
    ("NOLA embedding and Conv1D", "EmbConv1D", NolaConfig, {"target_modules": ["emb", "conv1d"]}),
    ("NOLA Conv2d", "Conv2d", NolaConfig, {"target_modules": ["conv2d"]}),
    ("NOLA Conv2d and linear", "Conv2d", NolaConfig, {"target_modules": ["conv2d", "lin0"]}),
    ("NOLA Conv2d 1x1", "Conv2d1x1", NolaConfig, {"target_modules": ["conv2d"]}),
    ("NOLA Conv2d groups", "Conv2dGroups", NolaConfig, {"target_modules": ["conv2d"]}),
    ("NOLA Conv2d more groups", "Conv2dGroups2", NolaConfig, {"target_modules": ["conv2d"]}),
]

# (name, method, configuration class, arguments of the first adapter, of the second)
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES: list[tuple[str, str, type, dict[str, Any], dict[str, Any]]] = [
    (
        "NOLA same layer, other seed",
        "nola",
        NolaConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False, "seed": 1},
    ),
    (
        "NOLA same layer, other sizes",
        "nola",
        NolaConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False, "r": 3, "num_basis": [4, 9]},
    ),
    (
        "NOLA other layer",
        "nola",
        NolaConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
]

# Tests that do not apply: {part of the test's name: why}.
DESELECTED: dict[str, str] = {
    "test_safe_merge[NOLA Conv2d-Conv2d": "it compares float32 convolutions to a part in a million, which holds on "
    "some processors (a logit of -29.2 is off by 3e-5 on others, and by 4e-14 in float64); PEFT grants its own LoRA a "
    "thousandth there. tests/tuners/test_layers.py compares merged convolutions.",
}
