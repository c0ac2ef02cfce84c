"""What the configurations of all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

from peft import PeftConfig

from .. import randomness
from ..checkpoint.card import CardFacts, write_card
from ..checkpoint.identity import check_fingerprint


@dataclass
class SeededConfig(PeftConfig):
    """PEFT's standard fields, and those of an adapter whose weights are regenerated from a seed.

    Args:
        seed: 0 to 2**64 - 1.
        generator_version: version of the random number specification; see `peft_ext.randomness`.
        fingerprint: of the numbers that the seed stood for when the adapter was saved. If given, it is recomputed
            and compared.
        target_shapes: `{"out x in": number of adapted layers}` when the adapter was saved. If given, the model's own
            are compared with it before anything in the model is changed.

    Raises:
        ValueError: a field holds what it cannot; the message names the field, what was given and what is allowed.
    """

    seed: int = field(
        default=0,
        metadata={"help": "0 to 2**64 - 1. Frozen random numbers are drawn from it, alike on every machine."},
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "Names of the modules to adapt, a regular expression, or 'all-linear'. By default the query and value "
                "projections of known architectures."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Names of modules, or a regular expression, to leave out."}
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "The weight of a layer of unknown type is stored as (in, out). Known types are recognised."},
    )
    bias: str = field(
        default="none", metadata={"help": "Which biases are trained and saved: 'none', 'all' or '<method>_only'."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules that are trained and saved whole beside the adapter, such as a new classifier."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with an update of zero (default), or with random coefficients (False; for tests)."},
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Adapt only the layers of these indexes."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Name of the nn.ModuleList that layers_to_transform indexes, such as 'layers' or 'h'."},
    )
    generator_version: int = field(
        default=randomness.GENERATOR_VERSION,
        metadata={"help": "Version of the random number specification. Leave it alone."},
    )
    fingerprint: Optional[str] = field(
        default=None,
        metadata={"help": "Written to checkpoints and checked when they are loaded. Leave it alone."},
    )
    target_shapes: Optional[dict[str, int]] = field(
        default=None,
        metadata={"help": "Written to checkpoints and checked when they are loaded. Leave it alone."},
    )

    method_name: ClassVar[str]
    paper: ClassVar[str]
    size_fields: ClassVar[tuple[str, ...]]  # that the number of coefficients depends on
    notice: ClassVar[str] = ""  # put into model cards

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seed = randomness.check_seed(self.seed)
        check_fingerprint(self.seed, self.generator_version, self.fingerprint)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` selects among named modules: it must be None when `target_modules` is a "
                f"string, got {self.layers_to_transform!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` needs `layers_to_transform` to say which layers, got {self.layers_pattern!r} alone."
            )

    def check_bias(self, method_only: str) -> None:
        if self.bias not in ("none", "all", method_only):
            raise ValueError(f"`bias` must be 'none', 'all' or {method_only!r}, got {self.bias!r}.")

    def card_rows(self, target_shapes: Mapping[str, int]) -> dict[str, str]:
        """What the method adds to the table of a model card, for `{"out x in": number of layers}`."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        shapes = self.__dict__.get("_saved_shapes")  # set when an adapter's state is collected for saving
        return {
            **super().to_dict(),
            "fingerprint": randomness.fingerprint(self.seed, self.generator_version),
            "target_shapes": shapes or self.target_shapes,
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and describes the adapter in the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        base_model = kwargs.get("auto_mapping_dict") or {}
        in_transformers = str(base_model.get("parent_library", "")).startswith("transformers.")
        fields = self.to_dict()
        shapes = fields["target_shapes"] or {}
        facts = CardFacts(
            self.method_name,
            self.paper,
            self.base_model_name_or_path,
            self.seed,
            self.generator_version,
            fields["fingerprint"],
            shapes,
            self.card_rows(shapes),
            self.notice,
            self.task_type,
            base_model.get("base_model_class") if in_transformers else None,
        )
        write_card(save_directory, facts)
