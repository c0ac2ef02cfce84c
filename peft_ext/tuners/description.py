"""Describes saved adapters and networks in the model cards beside them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .. import randomness
from ..checkpoint.card import About, CardFacts, write_card
from ..checkpoint.identity import describe_shapes, read_record
from ..checkpoint.markdown import code, escape, python_string
from .network import saved_targets
from .target import Target

NETWORK_CONFIG_NAME = "seed_config.json"
NETWORK_WEIGHTS_NAME = "model.safetensors"

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


class DescribedConfig(PeftConfig):
    """A configuration that describes its method in the model card beside what it is saved with."""

    method_name: ClassVar[str]  # in capitals, as in PEFT's enum of methods
    paper: ClassVar[str]
    summary: ClassVar[str] = (
        "a seed and the coefficients trained on it. The weight updates are regenerated from them on any machine."
    )
    notice: ClassVar[str] = ""  # put into model cards

    seed: int

    def card_rows(self, target_shapes: Mapping[str, int]) -> dict[str, str]:
        """What the method adds to the table of a model card, for `{"out x in": number of layers}`; Markdown."""
        return {}

    def network_rows(self, targets: Sequence[Target]) -> dict[str, str]:
        """What the method adds to the table of the card of a whole network of such parameters; Markdown."""
        return {}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and describes the adapter in the model card beside it."""
        auto_mapping = kwargs.get("auto_mapping_dict")
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, _adapter_facts(self, Path(save_directory), auto_mapping, About()))


def describe(folder: str | os.PathLike[str], **about: Any) -> None:
    """Describes a saved adapter, or a network from a seed, in the model card `README.md` of its folder.

    Saving does this with what the checkpoint itself tells; here the rest can be said. The text and the metadata of
    others in the card stay.

    Args:
        folder: an adapter of one of our methods, or what `SeededNetwork.save_pretrained` wrote.
        **about: `repository` and `revision` of the hub, `license`, `datasets` (names), `metrics` (a list of
            `huggingface_hub.EvalResult`) and `tags`.

    Raises:
        ValueError: an adapter of another method, or neither.
    """
    folder, told = Path(folder), About(**about)
    if (folder / CONFIG_NAME).is_file():
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, DescribedConfig):
            raise ValueError(f"`folder` must hold an adapter of peft_ext, got one of {type(config).__name__}.")
        facts = _adapter_facts(config, folder, config.auto_mapping, told)
    elif (folder / NETWORK_CONFIG_NAME).is_file():
        facts = _network_facts(json.loads((folder / NETWORK_CONFIG_NAME).read_text(encoding="utf-8")), folder, told)
    else:
        raise ValueError(f"`folder` must hold an adapter or a network from a seed, got {str(folder)!r}.")
    write_card(folder, facts)


def is_described(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter, or a network from a seed, that `describe` knows."""
    if (Path(folder) / NETWORK_CONFIG_NAME).is_file():
        return True
    path = Path(folder) / CONFIG_NAME
    return path.is_file() and isinstance(PeftConfig.from_pretrained(str(folder)), DescribedConfig)


def _adapter_facts(config: DescribedConfig, folder: Path, auto_mapping: Any, about: About) -> CardFacts:
    fields = config.to_dict()
    shapes = fields.get("target_shapes") or {}
    base_model, name = config.base_model_name_or_path, config.method_name
    base_class = str((auto_mapping or {}).get("base_model_class"))
    in_transformers = str((auto_mapping or {}).get("parent_library")).startswith("transformers.")
    auto_class = base_class if in_transformers and base_class.isidentifier() else "AutoModel"
    auto_class = AUTO_CLASSES.get(str(config.task_type or ""), auto_class)
    revision = f", revision={python_string(config.revision)}" if config.revision else ""
    base = (
        [f"from transformers import {auto_class}", ""]
        + [f"model = {auto_class}.from_pretrained({python_string(base_model)}{revision})"]
        if base_model
        else ["", "model = ...  # the base model that the adapter was trained on"]
    )
    where = f" for {code(base_model)}" if base_model else ""
    return CardFacts(
        title=f"{name} adapter",
        method=name,
        library="peft",
        summary=f"A [{name}]({config.paper}) adapter{where}: {config.summary}",
        rows={
            **({"base model": code(base_model)} if base_model else {}),
            **({"adapted": f"{escape(describe_shapes(shapes))} (out x in)"} if shapes else {}),
            **_seed_rows(config),
            **_saved(config, folder / SAFETENSORS_WEIGHTS_NAME),
            **config.card_rows(shapes),
        },
        options=_options(config, {each.name for each in dataclasses.fields(PeftConfig)}),
        hint=f"`import peft_ext` makes the method known to PEFT; without it loading fails with `KeyError: '{name}'`.",
        example="\n".join(
            ["import peft_ext", "from peft import PeftModel", *base]
            + [f"model = PeftModel.from_pretrained(model, {about.place()})"]
        ),
        notice=config.notice,
        base_model=base_model,
        about=about,
    )


def _network_facts(described: Mapping[str, Any], folder: Path, about: About) -> CardFacts:
    config = PeftConfig.from_peft_type(**described["method"])
    if not isinstance(config, DescribedConfig):
        raise ValueError(f"`method` in {NETWORK_CONFIG_NAME} must be one of ours, got {type(config).__name__}.")
    name, network = config.method_name, str(described["network"])
    numbers = sum(math.prod(shape) for shape in described["weights"].values())
    known = (folder / transformers.CONFIG_NAME).is_file() and hasattr(
        transformers, network
    )  # load_from_seed makes it then
    made = "" if known else "network = ...  # of the class named above, whatever its weights\n"
    place = about.place() if known else about.place("network")
    bases = filter(dataclasses.is_dataclass, type(config).__mro__[1:])
    placing = {each.name for base in bases for each in dataclasses.fields(base)}
    return CardFacts(
        title=f"{name} network",
        method=name,
        library="peft_ext",
        summary=f"A {code(network)} made by [{name}]({config.paper}) from a seed and the coefficients trained on it. "
        "All its weights are regenerated from them on any machine.",
        rows={
            "network": f"{code(network)}, {numbers:,} parameters in {len(described['weights']):,} tensors",
            **_seed_rows(config),
            **_saved(config, folder / NETWORK_WEIGHTS_NAME),
            **config.network_rows(saved_targets(described["weights"], described.get("matrices", {}))),
        },
        options=_options(config, placing | {f"{name.lower()}_dropout"}),
        hint="The network comes back with ordinary weights, in evaluation mode.",
        example=f"from peft_ext import load_from_seed\n\n{made}network = load_from_seed({place})",
        notice=config.notice,
        about=about,
    )


def _seed_rows(config: DescribedConfig) -> dict[str, str]:
    version = getattr(config, "generator_version", randomness.GENERATOR_VERSION)
    fingerprint = randomness.fingerprint(config.seed, version)
    return {"seed": str(config.seed), "generator version, fingerprint": f"{version}, `{fingerprint}`"}


def _saved(config: DescribedConfig, weights: Path) -> dict[str, str]:
    """How many coefficients a weights file holds, in what and in how many bytes; nothing if it is not there."""
    if not weights.is_file():
        return {}
    with safe_open(weights, "pt") as file:
        records = [name for name in file.keys() if name.endswith("identity")]
        content = read_record(
            file.get_tensor(records[0]) if records else None, f"{config.method_name.lower()}_identity"
        )
    count, error = content["count"], config.to_dict().get("coefficient_error")
    changed = f" (changed by {100 * error:.2g} %)" if error else ""
    return {"saved": f"{count:,} coefficients in {content['dtype']}{changed}, {weights.stat().st_size:,} bytes"}


def _options(config: DescribedConfig, without: set[str]) -> list[tuple[str, str, str]]:
    """Rows of all options of a method: name, value and default. What has its own row, or is no choice, is left out."""
    rows = []
    for each in dataclasses.fields(config):
        no_choice = each.name == "seed" or each.metadata.get("help", "").endswith("Leave it alone.")
        if each.name not in without and not no_choice:
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            value = getattr(config, each.name)
            rows.append((code(each.name), code(_shown(value)), code(_shown(default))))
    return rows


def _shown(value: Any) -> str:
    """An option as Python, so that a set or a pair reads like the list that is in the file."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    return repr(list(value) if isinstance(value, tuple) else value)
