"""The pages of the methods name the options that the configurations have, and their formulas of costs hold."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_models
import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

from peft_ext import McncConfig, NolaConfig, PrancConfig, VisualPromptConfig
from peft_ext.generators.base import Frozen
from peft_ext.tuners.config import CheckpointedConfig, SeededConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {NolaConfig: "nola.md", PrancConfig: "pranc.md", McncConfig: "mcnc.md", VisualPromptConfig: "visual-prompts.md"}


def table(page: str, heading: str) -> list[tuple[str, ...]]:
    """The rows of the table below a heading that names its first column, without the words around code."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (rows,) = re.findall(rf"^\| {heading} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, flags=re.M)
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows.splitlines()]


def options(page: str) -> dict[str, str]:
    return {name.strip("`"): default.strip("`") for name, default, _ in table(page, "option")}


def fields(config: type, leave_out: type) -> dict[str, str]:
    """The fields of a configuration that users set, and their defaults."""
    inherited = {each.name for each in dataclasses.fields(leave_out)} | {"generator_version"}
    found = {}
    for each in dataclasses.fields(config):
        if each.name not in inherited and not each.metadata["help"].endswith("Leave it alone."):
            factory = each.default_factory
            found[each.name] = repr(each.default if factory is dataclasses.MISSING else factory())
    return found


@pytest.mark.parametrize("config", PAGES, ids=PAGES.values())
def test_a_page_names_the_options_and_defaults_of_its_method(config: type) -> None:
    shared = PeftConfig if config is VisualPromptConfig else SeededConfig
    assert options(PAGES[config]) == fields(config, shared)


def test_the_page_of_shared_options_names_them_all() -> None:
    assert options("options.md") == fields(SeededConfig, PeftConfig)
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    written = {each.name for each in dataclasses.fields(SeededConfig)} - {
        e.name for e in dataclasses.fields(PeftConfig)
    }
    assert {name for name in written if f"`{name}`" not in text} == set()


def formulas(page: str, **known: Any) -> dict[str, float]:
    """What the formulas of a page come to; `coefficients` is known to those below its row."""
    found: dict[str, float] = {}
    for what, formula in table(page, "what"):
        found[what.replace("`", "")] = eval(formula.strip("`"), {}, {**known, **found})
    return found


def frozen_bytes() -> dict[Frozen, int]:
    # By the tensors themselves: those of another test may go meanwhile, and new ones have their addresses then.
    return {each: each.nbytes for each in list(Frozen._shared.values())}


def ceil(number: float, by: int = 128) -> int:
    return -(-int(number) // by)


# Sizes that differ: q is 32 x 32, v is 16 x 32, the down projection 32 x 48; two layers of each.
MODULES = ["q_proj", "v_proj", "down_proj"]
SIZES = [(32, 32), (16, 32), (32, 48)]
KNOWN = {"modules": 6, "inputs": 32 + 48, "outputs": 32 + 16, "weights": 2 * sum(o * i for o, i in SIZES)}
CHUNKS = 2 * sum(ceil(3 * o, 50) + ceil(3 * i, 50) for o, i in SIZES)
WHOLE = 2 * sum(ceil(o * i, 500) for o, i in SIZES)
CASES = [
    (NolaConfig(r=3, num_basis=(40, 70)), {"num_A": 40, "num_B": 70, "r": 3}, [6 * 40, 6 * 70]),
    (PrancConfig(num_coefficients=300, nnz=2), {"num_coefficients": 300, "nnz": 2, "r": 8}, [300]),
    (
        PrancConfig(num_coefficients=300, nnz=2, apply_to="factors", r=3),
        {
            "num_coefficients": 300,
            "nnz": 2,
            "r": 3,
            "inputs": 2 * sum(i for _, i in SIZES),
            "outputs": 2 * sum(o for o, _ in SIZES),
        },
        [300],
    ),
    (
        McncConfig(r=3, d=50),
        {"network": 5 * 32 + 32 * 32 + 32 * 50, "chunks": CHUNKS, "k": 5, "r": 3},
        [CHUNKS * 5, CHUNKS],
    ),
    (
        McncConfig(d=500, k=7, apply_to="weight"),
        {"network": 7 * 32 + 32 * 32 + 32 * 500, "chunks": WHOLE, "k": 7, "r": 3},
        [WHOLE * 7, WHOLE],
    ),
    (VisualPromptConfig(num_prompts=5), {"num_prompts": 5, "hidden": 32, "blocks": 1}, [5 * 32]),
    (VisualPromptConfig(num_prompts=5, deep=True), {"num_prompts": 5, "hidden": 32, "blocks": 2}, [5 * 32 * 2]),
]  # configuration, what its formulas know, how many coefficients there are of each kind that is packed apart


@pytest.mark.parametrize(("config", "known", "kinds"), CASES, ids=[each[0].method_name for each in CASES])
def test_the_formulas_of_a_page_hold(
    config: CheckpointedConfig, known: dict[str, int], kinds: list[int], tmp_path: Path
) -> None:
    images = isinstance(config, VisualPromptConfig)
    base = tiny_models.vit() if images else tiny_models.llama()
    config.seed = 2**33 + 5  # random numbers that no other test holds
    if not images:
        config.target_modules = set(MODULES)
    before = frozen_bytes()
    model = get_peft_model(base, config)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if images else {"input_ids": tiny_models.tokens()}
    model(**inputs)
    groups = sum(ceil(number) for number in kinds)
    expected = formulas(PAGES[type(config)], **{**KNOWN, **known}, groups=groups, header=0)

    assert expected["coefficients"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(size for key, size in frozen_bytes().items() if key not in before)
    memory = next(key for key in expected if key.startswith("memory") and getattr(config, "apply_to", "") in key)
    assert expected[memory] == held
    for dtype, header_of_all in (("float32", 150 * KNOWN["modules"] + 150), ("int8", 300), ("int4", 300)):
        config.coefficient_dtype = dtype
        if dtype == "float32":
            model.save_pretrained(tmp_path)
            file = (tmp_path / "adapter_model.safetensors").read_bytes()
        else:
            file = safetensors.torch.save(get_peft_model_state_dict(model))
        header = 8 + int.from_bytes(file[:8], "little")
        assert expected[f"bytes of the file, {dtype}"] + header == len(file)
        assert header < header_of_all
