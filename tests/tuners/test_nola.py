"""What NOLA alone has: ranks and alphas by layer, bases that layers share or own."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from dense import close, coefficients_of, run_dense
from methods import adapt, config_of
from peft import get_peft_model

from peft_ext import NolaConfig
from peft_ext.tuners.nola import NolaLayer


def test_rank_and_alpha_patterns() -> None:
    base = tiny_models.llama().to(torch.float64)
    model, config = adapt(
        base,
        "NOLA",
        rank_pattern={"q_proj": 4, "o_proj": 1},
        alpha_pattern={"v_proj": 0.5},
        target_modules=["q_proj", "v_proj", "o_proj"],
    )
    attention = model.base_model.model.model.layers[0].self_attn
    assert [attention.get_submodule(n).r["default"] for n in ("q_proj", "v_proj", "o_proj")] == [4, 2, 1]
    assert [attention.get_submodule(n).scaling["default"] for n in ("q_proj", "v_proj", "o_proj")] == [0.25, 0.25, 1.0]
    x = tiny_models.tokens()
    expected = run_dense(base, config, coefficients_of(model), lambda m: m(x).logits)
    close(model(x).logits, expected, tolerance=1e-4)


def test_patterns_by_regular_expression() -> None:
    config = NolaConfig(target_modules=["q_proj"], rank_pattern={r"layers\.1\.self_attn\.q_proj": 3})
    model = get_peft_model(tiny_models.llama(), config)
    layers = model.base_model.model.model.layers
    assert [layer.self_attn.q_proj.r["default"] for layer in layers] == [8, 3]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_contradicts_itself_is_refused(field: str, snapshot: Any) -> None:
    """PEFT takes the first key that matches, and writes the keys in another order to the file."""
    base = tiny_models.llama()
    before = snapshot(base)
    config = NolaConfig(target_modules=["q_proj", "v_proj"], **{field: {"v_proj": 3, ".*_proj": 2}})
    with pytest.raises(ValueError, match=f"`{field}` must give one value to .*self_attn.v_proj.*3 by 'v_proj', 2 by "):
        get_peft_model(base, config)
    assert snapshot(base)["modules"] == before["modules"]
    get_peft_model(base, NolaConfig(target_modules=["v_proj"], **{field: {"v_proj": 3, ".*_proj": 3}}))


def test_starts_at_zero() -> None:
    model = get_peft_model(tiny_models.llama(), config_of("NOLA", target_modules=["q_proj"], init_weights=True))
    assert not any(parameter.any() for parameter in coefficients_of(model).values())


def test_shared_and_own_bases_differ() -> None:
    deltas = []
    for method in ("NOLA", "NOLA, own bases"):
        model, _ = adapt(tiny_models.Layers(), method, target_modules=["first"])
        coefficients_of(model)["first"].data.fill_(0.3)
        deltas.append(model.base_model.model.first.get_delta_weight("default"))
    assert not torch.allclose(*deltas)


def test_one_basis_per_shape() -> None:
    """Layers of a shape read one copy of their basis, and adapters of one seed too."""
    model = get_peft_model(tiny_models.llama(4), NolaConfig(target_modules=["q_proj", "o_proj"], num_basis=16))
    model.add_adapter("again", NolaConfig(target_modules=["q_proj"], num_basis=16))
    model(tiny_models.tokens())
    model.set_adapter("again")
    model(tiny_models.tokens())
    tensors = {
        id(tensor): tensor
        for layer in model.modules()
        if isinstance(layer, NolaLayer)
        for pair in layer.nola_expansions.values()
        for expansion in pair
        for tensor in expansion.generator.frozen
    }
    assert len(tensors) == 3  # A, its offset, and B, of 32 x 32
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * (2 * 16 * 8 * 32 + 8 * 32)
    assert len(model.state_dict()) - len(tiny_models.llama(4).state_dict()) == 12  # coefficients: no basis


def test_own_bases_keep_nothing() -> None:
    model = get_peft_model(tiny_models.llama(), NolaConfig(target_modules=["q_proj"], share_basis=False))
    model(tiny_models.tokens()).logits.sum().backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert all(expansion.generator.nbytes == 0 for expansion in layer.nola_expansions["default"])
