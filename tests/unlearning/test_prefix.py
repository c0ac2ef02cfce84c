"""Frozen blocks that are computed once give what computing them every time gives."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from peft import get_peft_model
from problems import PROBLEMS, bert, images, loader, texts, token_classes
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from peft_ext import NolaConfig
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import LOSSES

LAST = {"r": 2, "num_basis": 6, "init_weights": False, "layers_to_transform": [2]}


def vit() -> nn.Module:
    return get_peft_model(tiny_models.vit(3), NolaConfig(**LAST, modules_to_save=["classifier"])).double().eval()


def gpt2() -> nn.Module:
    return get_peft_model(tiny_models.gpt2(3, vocab_size=24), NolaConfig(**LAST)).double().eval()


def llama() -> nn.Module:
    return get_peft_model(tiny_models.llama(3, vocab_size=24), NolaConfig(**LAST)).double().eval()


def left_padded(n: int):
    rows = texts(n)
    return [{name: value.flip(0) for name, value in row.items()} for row in rows]


CASES = {
    "ViT": (vit, images),
    "GPT-2": (gpt2, texts),
    "GPT-2, left-padded": (gpt2, left_padded),
    "Llama": (llama, texts),
    "BERT": (lambda: bert("BertForTokenClassification", 3, 2), token_classes),
}


def function_of(model: nn.Module, memory: float = 1e9) -> AdapterFunction:
    return AdapterFunction(model, LOSSES["cross_entropy"](), memory=memory)


def everything(function: AdapterFunction, rows) -> list[torch.Tensor]:
    """Loss, gradient, rows of the Jacobian and a product with the curvature, in batches of changing make-up."""
    loss, targets, gradient = function.loss_and_gradient(loader(rows, 4))
    linearised = list(function.linearise(loader(rows, 3), 2))
    product = function.curvature_product(loader(rows, 5), function.vector, gradient)
    return [torch.tensor([loss, targets]), gradient, torch.cat([part.rows for part in linearised]), product]


def frozen_calls(model: nn.Module) -> list[int]:
    """Grows with every computation of the first block."""
    calls: list[int] = []
    first = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)[0]
    inner = next(module for module in first.modules() if "Norm" in type(module).__name__)
    inner.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_changes_nothing_but_the_work(case):
    make, samples = CASES[case]
    model, rows = make(), samples(9)
    function = function_of(model)
    expected = everything(function, rows)
    calls = frozen_calls(model)
    with function.prefix.remembering():
        function.loss_and_gradient(loader(rows, 4))
        assert calls
        calls.clear()
        found = everything(function, rows)
        assert not calls
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    function.loss_and_gradient(loader(rows, 4))
    assert calls, "afterwards the blocks are computed as ever"


def test_options_of_the_model_are_part_of_the_sample():
    model, rows = vit(), images(6)
    function = function_of(model)

    def loss(**options) -> float:
        return function.loss_and_gradient([{**batch, **options} for batch in loader(rows)])[0]

    expected = loss()
    calls = frozen_calls(model)
    with function.prefix.remembering():
        loss(interpolate_pos_encoding=True)
        calls.clear()
        assert loss(interpolate_pos_encoding=True) == pytest.approx(expected, rel=1e-9)
        assert not calls
        loss(interpolate_pos_encoding=False)
        assert calls


def test_a_change_of_the_parameters_is_seen():
    model, rows = vit(), images(6)
    function = function_of(model)
    with function.prefix.remembering():
        before = function.loss_and_gradient(loader(rows))[0]
        function.vector = function.vector + 0.1
        after = function.loss_and_gradient(loader(rows))[0]
    assert after == pytest.approx(function.loss_and_gradient(loader(rows))[0], rel=1e-12)
    assert after != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("name", PROBLEMS)
def test_where_everything_can_change_nothing_is_kept(name):
    make, samples = PROBLEMS[name]
    model, rows = make(), samples(6)
    function = function_of(model)
    expected = everything(function, rows)
    with function.prefix.remembering():
        found = [everything(function, rows) for _ in range(2)][-1]
        assert not function.prefix.blocks
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def test_no_more_is_kept_than_fits():
    model, rows = vit(), images(6)
    function = function_of(model)
    calls = frozen_calls(model)
    with function.prefix.remembering():
        function.loss_and_gradient(loader(rows, 1))
        one = 5 * 32 * 8  # tokens, hidden size, bytes
        assert all(kept.nbytes == one for kept in function.prefix._kept.values())
    function.prefix.memory = 2.5 * one
    with function.prefix.remembering():
        function.loss_and_gradient(loader(rows, 1))
        calls.clear()
        function.loss_and_gradient(loader(rows, 1))
        assert len(calls) == 4


class Skipping(nn.Module):
    """A network whose head also reads what the first block gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(16, 3)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(("blocks.0", "blocks.1")))

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        first = hidden = self.blocks[0](pixel_values)
        for block in self.blocks[1:]:
            hidden = torch.relu(block(hidden))
        return ImageClassifierOutput(logits=self.head(torch.cat((first, hidden), 1)))


def test_a_network_that_needs_the_frozen_blocks_elsewhere_is_computed_whole():
    model, rows = Skipping().double().eval(), images(6, shape=(8,))
    function = function_of(model)
    expected = everything(function, rows)
    with function.prefix.remembering():
        found = [everything(function, rows) for _ in range(2)][-1]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_forward_methods_are_put_back():
    model, rows = gpt2(), texts(4)
    blocks = model.get_submodule("base_model.model.transformer.h")
    original = blocks[0].forward
    blocks[0].forward = lambda *args, **kwargs: original(*args, **kwargs)  # as Accelerate's hooks do
    mine = blocks[0].forward
    function = function_of(model)
    with function.prefix.remembering():
        for _ in range(2):
            function.loss_and_gradient(loader(rows))
    assert blocks[0].forward is mine
    assert "forward" not in vars(blocks[1])
