"""Configuration of visual prompt tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from ... import randomness
from ...checks import check_boolean, check_positive_integer, check_probability
from ..config import CheckpointedConfig, documented
from ..target import Target


@documented
@dataclass
class VisualPromptConfig(CheckpointedConfig):
    """
    Configuration of a [`VisualPromptModel`]: learnable tokens in the input of a frozen vision transformer.

    Paper: Jia et al., "Visual Prompt Tuning", https://huggingface.co/papers/2203.12119. For ViT, DeiT, DINOv2 and
    DINOv2 with registers. The tokens start uniform on +-sqrt(6 / (channels * patch_size**2 + hidden_size)), as
    published; they are trained and saved whole.
    """

    num_prompts: int = field(default=10, metadata={"help": "Number of tokens.", "generates": True})
    deep: bool = field(
        default=False,
        metadata={
            "help": "Every block gets tokens of its own (VPT-deep), instead of the first alone (VPT-shallow).",
            "generates": True,
        },
    )
    prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the tokens."})
    seed: int = field(
        default=0,
        metadata={"help": "0 to 2**64 - 1. The initial tokens are drawn from it, alike on every machine."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules that are trained and saved whole beside the tokens, such as a new classifier."},
    )

    size_fields = ("num_prompts", "deep")
    method_name = "VISUAL_PROMPT"
    paper = "https://huggingface.co/papers/2203.12119"
    summary = "tokens in the input of the blocks, trained and saved whole. They started from a seed."
    target_modules: ClassVar[Any] = None  # PEFT reads it; the targets are always the blocks

    def vector_sizes(self, targets: Sequence[Target]) -> list[int]:
        return [target.fan_out * target.fan_in for target in targets]

    def check_fields(self) -> None:
        super().check_fields()
        check_positive_integer("num_prompts", self.num_prompts)
        check_boolean("deep", self.deep)
        check_probability("prompt_dropout", self.prompt_dropout)
        self.seed = randomness.check_seed(self.seed)
