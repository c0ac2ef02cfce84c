"""NolaConfig: what it accepts, and the errors for what it does not."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from peft_ext import NolaConfig, randomness

REFUSED = [
    ({"r": 0}, "`r` must be a positive integer, got 0"),
    ({"r": 2.0}, "`r` must be a positive integer, got 2.0"),
    ({"r": True}, "`r` must be a positive integer, got True"),
    ({"num_basis": -1}, "`num_basis` must be a positive integer, got -1"),
    ({"num_basis": "64"}, "`num_basis` must be a positive integer, got '64'"),
    ({"num_basis": (8, 0)}, "`num_basis` must be a positive integer, got 0"),
    ({"num_basis": (8, 8, 8)}, r"`num_basis` must be a positive integer or a pair of them \(A, B\), got \(8, 8, 8\)"),
    ({"alpha": "8"}, "`alpha` must be a finite number, got '8'"),
    ({"alpha": float("nan")}, "`alpha` must be a finite number, got nan"),
    ({"nola_dropout": 1.0}, "`nola_dropout` must be a number from 0 to below 1, got 1.0"),
    ({"nola_dropout": -0.1}, "`nola_dropout` must be a number from 0 to below 1, got -0.1"),
    ({"seed": -1}, r"`seed` must be an integer between 0 and 2\*\*64 - 1, got -1"),
    ({"seed": 2**64}, r"`seed` must be an integer between 0 and 2\*\*64 - 1, got 18446744073709551616"),
    ({"seed": 0.5}, r"`seed` must be an integer between 0 and 2\*\*64 - 1, got 0.5"),
    ({"bias": "lora_only"}, "`bias` must be 'none', 'all' or 'nola_only', got 'lora_only'"),
    ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` must be a positive integer, got 0"),
    ({"alpha_pattern": {"q_proj": None}}, r"`alpha_pattern\['q_proj'\]` must be a finite number, got None"),
    ({"layers_pattern": "h"}, "`layers_pattern` needs `layers_to_transform`.* got 'h' alone"),
    ({"target_modules": "q.*", "layers_to_transform": 1}, "`layers_to_transform`.*must be None.*got 1"),
    ({"generator_version": 2}, "`generator_version` must be 1 .* got 2"),
    ({"generator_version": None}, "`generator_version` must be 1 .* got None"),
    ({"fingerprint": "0" * 16}, "`fingerprint` must be '5aa95d294f358835' for seed 0 .* got '0000000000000000'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_bad_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NolaConfig(**fields)


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 64),
    num_basis=st.one_of(st.integers(1, 4096), st.tuples(st.integers(1, 4096), st.integers(1, 4096))),
    seed=st.integers(0, 2**64 - 1),
    alpha=st.floats(0.01, 100),
    dropout=st.floats(0, 0.99),
    share_basis=st.booleans(),
)
def test_saved_and_loaded_it_is_the_same(tmp_path_factory, r, num_basis, seed, alpha, dropout, share_basis):
    config = NolaConfig(
        r=r, num_basis=num_basis, seed=seed, alpha=alpha, nola_dropout=dropout, share_basis=share_basis,
        target_modules=["b", "a"], task_type="CAUSAL_LM",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(str(folder))
    loaded = PeftConfig.from_pretrained(str(folder))
    assert type(loaded) is NolaConfig
    assert loaded.fingerprint == randomness.fingerprint(seed)
    assert dataclasses.replace(loaded, fingerprint=None) == config
    assert loaded.num_basis_per_factor == (num_basis if isinstance(num_basis, tuple) else (num_basis, num_basis))


def test_every_field_is_described():
    for field in dataclasses.fields(NolaConfig):
        assert field.metadata.get("help"), field.name
        if field.name not in {base.name for base in dataclasses.fields(PeftConfig)}:
            assert f"{field.name} (`" in (NolaConfig.__doc__ or ""), field.name


def test_an_edited_seed_is_refused(tmp_path):
    NolaConfig(seed=1).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "seed": 2}))
    with pytest.raises(ValueError, match="`fingerprint` must be .* for seed 2 .*was edited"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_a_seed_changed_before_saving_is_saved_with_its_fingerprint(tmp_path):
    config = NolaConfig(seed=1)
    config.seed = 2
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).seed == 2
