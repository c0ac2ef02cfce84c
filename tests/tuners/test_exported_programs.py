"""`torch.export` of adapted models, for any number of rows."""

from __future__ import annotations

import io
from typing import Any

import pytest
import tiny_models
import torch
from methods import config_of
from peft import get_peft_model
from torch import nn
from torch.export import Dim, export, load, save

from peft_ext import VisualPromptConfig


class Logits(nn.Module):
    """A model with one tensor as input and output."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.options = {"use_cache": False} if name == "input_ids" else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(**{self.name: x}, **self.options).logits


def text(rows: int, length: int = 10) -> torch.Tensor:
    return tiny_models.tokens(rows, length, seed=rows)


def images(rows: int, _: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))


def check(model: nn.Module, name: str, strict: bool) -> None:
    make, free = (text, 2) if name == "input_ids" else (images, 1)
    module = Logits(model.eval(), name)
    sizes = {0: Dim("rows", min=1, max=64), 1: Dim("length", min=2, max=32)}
    dynamic: dict[str, Any] = {"x": {place: sizes[place] for place in range(free)}}
    with torch.no_grad():
        file = io.BytesIO()
        save(export(module, (make(3),), dynamic_shapes=dynamic, strict=strict), file)
        file.seek(0)
        program = load(file).module()
        for rows, length in ((1, 4), (2, 7), (5, 10), (40, 12)):
            x = make(rows, length)
            torch.testing.assert_close(program(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["NOLA", "NOLA, own bases", "PRANC", "PRANC, dense", "MCNC", "MCNC, weight"])
@pytest.mark.parametrize(
    ("architecture", "strict"), [("llama", False), ("llama", True), ("gpt2", False), ("vit", False)]
)
def test_export(architecture: str, method: str, strict: bool) -> None:
    """The program computes what the model does, with other numbers of rows and tokens too, also from a file.

    The seed is used nowhere else: the frozen numbers are made while the program is traced.
    """
    base = getattr(tiny_models, architecture)(layers=1)
    model = get_peft_model(base, config_of(method, target_modules="all-linear", seed=77 + strict))
    check(model, "pixel_values" if architecture == "vit" else "input_ids", strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_export_with_prompts(deep: bool, strict: bool) -> None:
    model = get_peft_model(tiny_models.vit(layers=2), VisualPromptConfig(num_prompts=3, deep=deep))
    check(model, "pixel_values", strict)


def test_an_exported_basis_is_not_left_behind() -> None:
    """What is made under a trace has numbers: the model itself goes on as before."""
    config = config_of("NOLA", target_modules=["q_proj"], seed=99)
    torch.manual_seed(0)
    model = get_peft_model(tiny_models.llama(), config)
    torch.manual_seed(0)
    other = get_peft_model(tiny_models.llama(), config)
    with torch.no_grad():
        export(Logits(model, "input_ids"), (text(3),))
        assert torch.equal(model(text(4)).logits, other(text(4)).logits)
