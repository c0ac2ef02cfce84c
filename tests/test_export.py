"""Exported LoRA adapters: what they give in a process without this package, and what their readers ask of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from methods import METHODS, config_of
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

import peft_ext
from peft_ext import McncConfig, NolaConfig, PrancConfig, SeededNetwork, VisualPromptConfig, to_lora
from peft_ext.adapters.low_rank import LowRank

WEIGHTS = "adapter_model.safetensors"
X = tiny_models.tokens()
PREFIX = "base_model.model."
BASES = {
    "llama": (tiny_models.llama, ["q_proj", "down_proj"]),
    "gpt2": (tiny_models.gpt2, ["c_attn", "c_proj"]),
}
EXACT: dict[str, dict[str, Any]] = {name: {} for name in ("NOLA", "NOLA, own bases", "MCNC")} | {
    name: {"error": 0.0} for name in ("PRANC", "PRANC, dense", "MCNC, weight", "PRANC, two a weight, biases")
}
"""How each method is exported without a loss."""


def randomised(model: Any) -> Any:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model.eval()


def adapted(base: nn.Module, config: Any) -> PeftModel:
    """The update is about as large as the weights, so that what it gives differs from what the base gives."""
    return randomised(get_peft_model(base, config))


@torch.no_grad()
def outputs(model: Any, *inputs: Any) -> torch.Tensor:
    found = model(*inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def loaded(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, str(folder)).eval()


def adapted_names(model: PeftModel) -> set[str]:
    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


# In a process without this package

WITHOUT = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_ext":
            raise ImportError("peft_ext is not installed here")
sys.meta_path.insert(0, Blocker())
try:
    import peft_ext
except ImportError:
    pass
else:
    sys.exit("peft_ext can be imported")
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
out, tokens, *folders = sys.argv[1:]
tokens, found = torch.tensor(json.loads(tokens)), {}
for folder in folders:
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found[f"{folder} logits"] = model(tokens).logits
    found[f"{folder} text"] = model.generate(input_ids=tokens[:, :4], max_new_tokens=12, do_sample=False, pad_token_id=0)
save_file(found, out)
"""


def without_the_package(folders: list[Path]) -> dict[str, torch.Tensor]:
    """Logits and greedy text that adapters give where `peft_ext` cannot be imported."""
    place = folders[0].parent
    arguments = [sys.executable, "-c", WITHOUT, str(place / "found"), json.dumps(X.tolist()), *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(arguments, env=environment, cwd=place, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return load_file(place / "found")


@pytest.mark.parametrize("base", BASES)
def test_same_logits_and_text_without_the_package(base: str, tmp_path: Path) -> None:
    make, targets = BASES[base]
    make().save_pretrained(tmp_path / "base")
    expected = {}
    sizes: dict[str, dict[str, Any]] = {**EXACT, "PRANC": {"error": 1e-5}, "MCNC, weight": {"rank": 99}}
    for method, size in sizes.items():
        model = type(make()).from_pretrained(tmp_path / "base")
        model = adapted(model, config_of(method, target_modules=targets, task_type="CAUSAL_LM"))
        logits = outputs(model, X)
        with model.disable_adapter():
            assert not torch.allclose(outputs(model, X), logits, atol=1e-2)
        text = model.generate(input_ids=X[:, :4], max_new_tokens=12, do_sample=False, pad_token_id=0)
        model.save_pretrained(str(tmp_path / method))
        for source, place in (("model", model), ("folder", tmp_path / method)):
            expected[tmp_path / f"{method} from a {source}"] = logits, text
            to_lora(place, tmp_path / f"{method} from a {source}", **size)
    found = without_the_package(list(expected))
    for folder, (logits, text) in expected.items():
        torch.testing.assert_close(found[f"{folder} logits"], logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[f"{folder} text"], text)
