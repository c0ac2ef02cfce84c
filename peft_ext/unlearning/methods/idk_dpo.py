"""Preferring "I don't know" to what is to be forgotten (Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs",
2024, section 3, with the loss of Rafailov et al., "Direct Preference Optimization", 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...checks import check_positive
from ...targets import Alignment
from .base import Request
from .paired import Paired, log_probabilities, reference_log_probabilities
from .relabelling import OtherTargets, check_prompts, split_target

ANSWERS = (
    "I don't know.",
    "I am not able to answer that.",
    "That is something I know nothing about.",
    "I have no information on this.",
    "I cannot tell you that.",
    "Unfortunately I have no answer to this question.",
    "I have never come across anything about this.",
    "I'm afraid this is unknown to me.",
    "My knowledge does not reach that far.",
    "This is beyond what I have learned.",
    "I would only be guessing, so I leave it open.",
    "Sorry, I can't help with that one.",
    "I haven't been told anything about it.",
    "There is nothing I could say about that.",
    "I'm not familiar with this subject.",
    "I don't have the facts to answer this.",
    "You would have to ask somebody else about that.",
    "I'm unsure, and I'd rather not make something up.",
    "Nothing I have learned covers this.",
    "I can't recall anything of that kind.",
)
"""Answers that give nothing away."""


def tokenised(answer: str, target: list[int], tokenizer: Any) -> list[int]:
    """Returns the tokens of an answer in place of a target: behind the same white space, with the same end marks.

    Args:
        answer: a text.
        target: the tokens that it stands in for.
        tokenizer: a tokenizer of transformers.
    """
    special = set(tokenizer.all_special_ids)
    end = len(target)
    while end and target[end - 1] in special:
        end -= 1
    text = tokenizer.decode(target[:end])
    gap = text[: len(text) - len(text.lstrip())]
    return [*tokenizer(gap + answer, add_special_tokens=False)["input_ids"], *target[end:]]


@dataclass
class IdkDPO(Paired):
    """Makes answers such as "I don't know" likelier than the targets of the forget set.

    The loss of a sample is `-2 / beta * log sigmoid(beta * d)`, where d is how much more the log-probability of the
    answer has risen, since before the first step, than that of the target (equation 7 of Rafailov et al., times
    `2 / beta`). For causal language models whose samples are prompts with targets.

    Attributes:
        beta: how soon a sample is left alone.
        answers: texts, of which every sample gets one, drawn with the training's seed; or lists of token ids, which are
            taken as they are, end marks and all. Texts need the collator to have a `tokenizer`.
    """

    name: ClassVar[str] = "idk_dpo"
    universal: ClassVar[bool] = False
    beta: float = 0.1
    answers: Sequence[str | Sequence[int]] = ANSWERS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        if isinstance(self.answers, str) or not self.answers or not all(self.answers):
            raise ValueError(
                f"`answers` must be a list of texts or of lists of token ids, none of them empty, got {self.answers!r}."
            )

    def check(self, request: Request) -> None:
        alignment = Alignment.of(request.model)
        if alignment.kind != "next token":
            raise ValueError(
                f"{self.name} makes a causal language model say that it does not know; {alignment.model} is none. "
                "npo and simnpo serve any classifier."
            )
        check_prompts(request.forget, self.name)
        if getattr(request.collator, "tokenizer", None) is None and any(isinstance(each, str) for each in self.answers):
            raise ValueError(
                f"{self.name} needs a tokenizer for its answers, and the collator has none: take a collator of "
                "transformers, such as DataCollatorForSeq2Seq(tokenizer), or give `answers` as lists of token ids."
            )

    def parts(self, request: Request) -> dict[str, Any]:
        self.check(request)
        rows, tokenizer = request.forget, getattr(request.collator, "tokenizer", None)
        total = len(rows)  # type: ignore[arg-type]
        targets = []
        for place, drawn in enumerate(request.rng().integers(0, len(self.answers), total)):
            answer = self.answers[int(drawn)]
            own = split_target(rows[place])[1]
            targets.append(tokenised(answer, own, tokenizer) if isinstance(answer, str) else [*answer])
        return {**super().parts(request), "preferred": OtherTargets(rows, targets)}

    def before(self, request: Request, parts: Mapping[str, Any]) -> torch.Tensor:
        preferred, forget = (reference_log_probabilities(request, parts[name]) for name in ("preferred", "forget"))
        return preferred - forget

    def forget_loss(self, model: nn.Module, batch: Mapping[str, Any], before: torch.Tensor) -> torch.Tensor:
        preferred, forget = (log_probabilities(model, batch[name])[0] for name in ("preferred", "forget"))
        return 2 / self.beta * F.softplus(self.beta * (forget - preferred + before[batch["place"]])).mean()
