"""The configurations: what they accept, and the errors for what they do not."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from peft_ext import McncConfig, NolaConfig, PrancConfig, randomness

CONFIGS = [NolaConfig, PrancConfig, McncConfig]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method_name)

SEED = r"`seed` must be an integer between 0 and 2\*\*64 - 1"
# fields of every configuration; NAME is the method in lower case
REFUSED_BY_ALL: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, SEED + ", got -1"),
    ({"seed": 2**64}, SEED + ", got 18446744073709551616"),
    ({"seed": 0.5}, SEED + ", got 0.5"),
    ({"seed": True}, SEED + ", got True"),
    ({"seed": None}, SEED + ", got None"),
    ({"bias": "lora_only"}, "`bias` must be 'none', 'all' or 'NAME_only', got 'lora_only'"),
    ({"NAME_dropout": 1.0}, "`NAME_dropout` must be a number from 0 to below 1, got 1.0"),
    ({"NAME_dropout": -0.1}, "`NAME_dropout` must be a number from 0 to below 1, got -0.1"),
    ({"NAME_dropout": "0.1"}, "`NAME_dropout` must be a number from 0 to below 1, got '0.1'"),
    ({"layers_pattern": "h"}, "`layers_pattern` needs `layers_to_transform`.* got 'h' alone"),
    ({"target_modules": "q.*", "layers_to_transform": 1}, "`layers_to_transform`.*must be None.*got 1"),
    ({"generator_version": 2}, "`generator_version` must be 1 .* got 2"),
    ({"generator_version": None}, "`generator_version` must be 1 .* got None"),
    ({"fingerprint": "0" * 16}, "`fingerprint` must be '5aa95d294f358835' for seed 0 .* got '0000000000000000'"),
]
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (NolaConfig, {"r": 0}, "`r` must be a positive integer, got 0"),
    (NolaConfig, {"r": 2.0}, "`r` must be a positive integer, got 2.0"),
    (NolaConfig, {"r": True}, "`r` must be a positive integer, got True"),
    (NolaConfig, {"num_basis": -1}, "`num_basis` must be a positive integer, got -1"),
    (NolaConfig, {"num_basis": "64"}, "`num_basis` must be a positive integer, got '64'"),
    (NolaConfig, {"num_basis": (8, 0)}, "`num_basis` must be a positive integer, got 0"),
    (
        NolaConfig,
        {"num_basis": (8, 8, 8)},
        r"`num_basis` must be a positive integer or a pair of them \(A, B\), got \(8, 8, 8\)",
    ),
    (NolaConfig, {"alpha": "8"}, "`alpha` must be a finite number, got '8'"),
    (NolaConfig, {"alpha": float("nan")}, "`alpha` must be a finite number, got nan"),
    (NolaConfig, {"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` must be a positive integer, got 0"),
    (NolaConfig, {"alpha_pattern": {"q_proj": None}}, r"`alpha_pattern\['q_proj'\]` must be a finite number, got None"),
    (PrancConfig, {"num_coefficients": 0}, "`num_coefficients` must be a positive integer, got 0"),
    (PrancConfig, {"num_coefficients": 1e4}, "`num_coefficients` must be a positive integer, got 10000.0"),
    (PrancConfig, {"num_coefficients": (8, 8)}, r"`num_coefficients` must be a positive integer, got \(8, 8\)"),
    (PrancConfig, {"basis": "gaussian"}, "`basis` must be one of 'sparse', 'dense', got 'gaussian'"),
    (PrancConfig, {"basis": None}, "`basis` must be one of 'sparse', 'dense', got None"),
    (PrancConfig, {"nnz": 0}, "`nnz` must be a positive integer, got 0"),
    (PrancConfig, {"nnz": 1.5}, "`nnz` must be a positive integer, got 1.5"),
    (PrancConfig, {"num_coefficients": 3, "nnz": 4}, r"`nnz` must be at most `num_coefficients` \(3\).*, got 4"),
    (McncConfig, {"k": 0}, "`k` must be a positive integer, got 0"),
    (McncConfig, {"k": "5"}, "`k` must be a positive integer, got '5'"),
    (McncConfig, {"d": 0}, "`d` must be a positive integer, got 0"),
    (McncConfig, {"d": 100.0}, "`d` must be a positive integer, got 100.0"),
    (McncConfig, {"d": 5, "k": 5}, r"`d` must be larger than `k` \(5\): a chunk of d numbers .*, got 5"),
    (McncConfig, {"k": 500}, r"`d` must be larger than `k` \(500\).*, got 500"),
    (McncConfig, {"widths": 32}, "`widths` must be a list of positive integers, got 32"),
    (McncConfig, {"widths": "32"}, "`widths` must be a list of positive integers, got '32'"),
    (McncConfig, {"widths": None}, "`widths` must be a list of positive integers, got None"),
    (McncConfig, {"widths": [32, 0]}, "`widths` must be a positive integer, got 0"),
    (McncConfig, {"widths": [32, "32"]}, "`widths` must be a positive integer, got '32'"),
    (McncConfig, {"activation": "gelu"}, "`activation` must be one of 'sine', 'relu', 'tanh', 'none', got 'gelu'"),
    (McncConfig, {"frequency": 0}, "`frequency` must be positive, got 0"),
    (McncConfig, {"frequency": -1.0}, "`frequency` must be positive, got -1.0"),
    (McncConfig, {"frequency": float("inf")}, "`frequency` must be a finite number, got inf"),
    (McncConfig, {"frequency": "1"}, "`frequency` must be a finite number, got '1'"),
    (McncConfig, {"apply_to": "bias"}, "`apply_to` must be one of 'factors', 'weight', got 'bias'"),
    (McncConfig, {"r": 0}, "`r` must be a positive integer, got 0"),
    (McncConfig, {"alpha": None}, "`alpha` must be a finite number, got None"),
]


@every_config
@pytest.mark.parametrize(("fields", "message"), REFUSED_BY_ALL)
def test_a_bad_field_is_refused(config: type, fields: dict[str, Any], message: str) -> None:
    name = config.method_name.lower()
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        config(**{key.replace("NAME", name): value for key, value in fields.items()})


@pytest.mark.parametrize(("config", "fields", "message"), REFUSED)
def test_a_bad_field_of_one_method_is_refused(config: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


size = st.integers(1, 4096)
# Fields that each configuration accepts in any combination.
ACCEPTED: dict[type, st.SearchStrategy[dict[str, Any]]] = {
    NolaConfig: st.fixed_dictionaries(
        {
            "r": st.integers(1, 64),
            "num_basis": st.one_of(size, st.tuples(size, size)),
            "alpha": st.floats(0.01, 100),
            "share_basis": st.booleans(),
            "nola_dropout": st.floats(0, 0.99),
        }
    ),
    PrancConfig: st.fixed_dictionaries(
        {
            "num_coefficients": st.integers(8, 10**6),
            "basis": st.sampled_from(["sparse", "dense"]),
            "nnz": st.integers(1, 8),
            "adapt_bias": st.booleans(),
            "pranc_dropout": st.floats(0, 0.99),
        }
    ),
    McncConfig: st.fixed_dictionaries(
        {
            "k": st.integers(1, 30),
            "d": st.one_of(st.none(), st.integers(31, 10**5)),
            "widths": st.lists(size, max_size=3).map(tuple),
            "activation": st.sampled_from(["sine", "relu", "tanh", "none"]),
            "frequency": st.floats(0.01, 100),
            "normalize": st.booleans(),
            "apply_to": st.sampled_from(["factors", "weight"]),
            "r": st.integers(1, 64),
            "alpha": st.floats(-100, 100),
            "mcnc_dropout": st.floats(0, 0.99),
        }
    ),
}


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**64 - 1))
@every_config
def test_saved_and_loaded_it_is_the_same(
    config: type, data: st.DataObject, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = data.draw(ACCEPTED[config])
    made = config(**fields, seed=seed, target_modules=["b", "a"], task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("config")
    made.save_pretrained(str(folder))
    loaded = PeftConfig.from_pretrained(str(folder))
    assert type(loaded) is config and loaded.peft_type == config.method_name
    assert loaded.fingerprint == randomness.fingerprint(seed)
    assert dataclasses.replace(loaded, fingerprint=None) == made
    assert all(getattr(loaded, name) == value for name, value in fields.items())


@pytest.mark.parametrize(("num_basis", "expected"), [(3, (3, 3)), ((3, 4), (3, 4)), ([3, 4], (3, 4))])
def test_number_of_coefficients_of_each_factor(num_basis: Any, expected: tuple[int, int]) -> None:
    assert NolaConfig(num_basis=num_basis).num_basis_per_factor == expected


@every_config
def test_every_field_is_described(config: type) -> None:
    for field in dataclasses.fields(config):
        assert field.metadata.get("help"), field.name
        if field.name not in {base.name for base in dataclasses.fields(PeftConfig)}:
            assert f"{field.name} (`" in (config.__doc__ or ""), field.name


@every_config
def test_the_fields_that_sizes_depend_on_are_fields(config: type) -> None:
    assert config.size_fields and set(config.size_fields) <= {field.name for field in dataclasses.fields(config)}


@every_config
def test_an_edited_seed_is_refused(config: type, tmp_path: Path) -> None:
    config(seed=1).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "seed": 2}))
    with pytest.raises(ValueError, match="`fingerprint` must be .* for seed 2 .*was edited"):
        PeftConfig.from_pretrained(str(tmp_path))


@every_config
def test_a_seed_changed_before_saving_is_saved_with_its_fingerprint(config: type, tmp_path: Path) -> None:
    made = config(seed=1)
    made.seed = 2
    made.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).seed == 2


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: PrancConfig(r=64), "`r` has no effect with apply_to='weight', .*; give apply_to='factors'"),
        (lambda: PrancConfig(alpha=32), "`alpha` has no effect with apply_to='weight'"),
        (lambda: McncConfig(apply_to="weight", r=4), "`r` has no effect with apply_to='weight'"),
        (lambda: PrancConfig(basis="dense", nnz=2), "`nnz` has no effect with basis='dense'"),
    ],
)
def test_fields_without_an_effect_are_warned_of(made: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        made()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (PrancConfig(), McncConfig(apply_to="weight"), PrancConfig(apply_to="factors", r=4, alpha=2)):
            assert config.identity is None
