"""Methods by name."""

from __future__ import annotations

import pytest
from peft import FourierFTConfig, LoraConfig

from recipes.support.arguments import UserError
from recipes.support.methods import parse_methods


def test_methods_by_name() -> None:
    nola, lora, fourier = parse_methods(
        ["nola", "{name: LoRA, r: 1, learning_rate: 2e-4, label: small}", "{name: fourierft, n_frequency: 10}"]
    )
    assert (nola.label, nola.learning_rate, nola.folder) == ("nola", None, "nola")
    assert (lora.label, lora.learning_rate, lora.options) == ("small", 2e-4, {"r": 1})
    assert fourier.folder == "fourierft-n_frequency=10"
    assert isinstance(lora.config("CAUSAL_LM", 0), LoraConfig)
    assert isinstance(fourier.config("CAUSAL_LM", 0), FourierFTConfig)
    # The run's seed is the basis's too, unless the user fixed that.
    assert nola.config("CAUSAL_LM", 5).seed == 5
    (fixed,) = parse_methods(["{name: nola, seed: 9}"])
    assert fixed.config("CAUSAL_LM", 5).seed == 9


@pytest.mark.parametrize(
    "specs, said",
    [
        (["lara"], ["'lara'", "lora", "nola"]),
        (["{name: nola, rank: 3}"], ["'nola'", "'rank'", "3", "num_basis"]),
        (["{name: nola, task_type: SEQ_CLS}"], ["'task_type'"]),
        (["{r: 3}"], ["'name'"]),
        (["{name: nola, learning_rate: -1}"], ["learning_rate", "-1", "positive"]),
        (["nola", "nola"], ["'nola'", "label"]),
        (["{name: nola, r: 0}"], ["'nola r=0'", "`r`", "0"]),
    ],
)
def test_bad_methods_are_refused(specs: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        for method in parse_methods(specs):
            method.config("CAUSAL_LM", 0)
    assert all(part in str(caught.value) for part in said), caught.value
