"""Which outputs of a model belong to which targets: one rule for losses, derivatives and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100
"""The label of what is no target, as everywhere in transformers."""

_CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_PERMUTATION = ("XLNetLMHeadModel", "XLMWithLMHeadModel")  # their labels stand where the outputs stand
_PEFT_TASKS = {"SEQ_CLS": "sample", "CAUSAL_LM": "next token", "TOKEN_CLS": "token", "SEQ_2_SEQ_LM": "token"}


def _not_classes(config: Any) -> str:
    problem, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    if problem in ("regression", "multi_label_classification"):
        return f"problem_type={problem!r}"
    return "num_labels=1, which transformers takes for a regression" if labels == 1 else ""


@dataclass(frozen=True)
class Alignment:
    """How the outputs of a model and its labels belong together.

    Attributes:
        kind: `"sample"`, one target a sample: classifiers of texts, images and other samples, with labels `(n,)`.
            `"next token"`, causal language models: the output at a token belongs to the label of the next one.
            `"token"`, token classifiers, masked language models and encoder-decoders: the output at a token (of the
            decoder) belongs to the label at the same place. `None` for a model that does not say what it is: it can
            have labels `(n,)` alone.
        model: Class of the model, for messages.
        encoder_decoder: Whether the model also needs `decoder_input_ids`.
        decoder_inputs: The model's own way to derive them from labels, where it has one.
        not_classes: What its configuration says it gives in place of one class a sample; empty if it does not.
    """

    kind: Literal["sample", "next token", "token"] | None
    model: str
    encoder_decoder: bool = False
    not_classes: str = ""
    decoder_inputs: Callable[..., torch.Tensor] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Alignment:
        """The alignment of a model, adapted, wrapped or not.

        The class of transformers that it is, or contains, decides; otherwise the task type of a PEFT model.
        """
        inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        name = type(model if inner is None else inner).__name__
        encoder_decoder = inner is not None and bool(getattr(inner.config, "is_encoder_decoder", False))
        kind: Any = None
        if name in _PERMUTATION or name.endswith(("ForTokenClassification", "ForMaskedLM")):
            kind = "token"
        elif name.endswith(("ForConditionalGeneration", "EncoderDecoderModel")):
            kind = "token" if encoder_decoder else "next token"
        elif name in _CAUSAL or name.endswith(("ForCausalLM", "LMHeadModel")):
            kind = "next token"
        elif name.endswith("Classification"):
            kind = "sample"
        elif isinstance(model, PeftModel):
            kind = _PEFT_TASKS.get(str(getattr(model.active_peft_config, "task_type", None)))
        not_classes = "" if inner is None or kind != "sample" else _not_classes(inner.config)
        derived = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
        return cls(kind, name, encoder_decoder and kind == "token", not_classes, derived)

    def split(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """The arguments of the model without the labels, and the labels.

        Where an encoder-decoder gets no `decoder_input_ids`, they are the labels shifted by the model itself, as its
        own loss has them.

        The label of a text's first token is left out where padding stands before it: what a causal language model says
        at padding is no prediction, and without padding the first token has none either.

        Raises:
            ValueError: no labels, labels of another kind than the model's, or no `decoder_input_ids` for a model that
                needs them and cannot derive them.
        """
        arguments = dict(batch)
        labels = arguments.pop("labels", None)
        if not isinstance(labels, torch.Tensor):
            raise ValueError(f"A batch must have a tensor 'labels', got {', '.join(map(repr, batch)) or 'nothing'}.")
        self._check(labels)
        if self.encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & arguments.keys():
            arguments["decoder_input_ids"] = self._decoder_inputs(labels, batch)
        mask = arguments.get("attention_mask")
        if self.kind == "next token" and isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
            first = torch.cat((torch.zeros_like(mask[:, :1]), (mask[:, 1:] != 0) & (mask[:, :-1] == 0)), 1)
            labels = labels.masked_fill(first.bool(), IGNORED)
        return arguments, labels

    def _decoder_inputs(self, labels: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        why = "the model has no way to derive them from labels"
        if self.decoder_inputs is not None:
            try:
                return self.decoder_inputs(labels=labels)
            except (AttributeError, TypeError, ValueError) as error:  # as without `decoder_start_token_id`
                why = str(error)
        raise ValueError(
            f"A batch for {self.model} must have 'decoder_input_ids' beside 'labels', got "
            f"{', '.join(map(repr, batch))}: {why.rstrip('.')}. Add them to the batches, such as by "
            "DataCollatorForSeq2Seq(tokenizer, model=model)."
        )

    def _check(self, labels: torch.Tensor) -> None:
        if self.not_classes:
            raise ValueError(
                f"{self.model} must choose one of several classes for every sample; its configuration has "
                f"{self.not_classes}. Regression and several labels a sample are not supported where classes are meant "
                "(derivatives, wrong labels, attacks): Retrain and Finetune take the loss of any model."
            )
        if labels.is_floating_point() or labels.dim() not in (1, 2):
            raise ValueError(
                f"`labels` must be numbers of classes or tokens, of shape (n,) or (n, length), got {labels.dtype} of "
                f"shape {tuple(labels.shape)}: regression and several labels a sample are not supported where classes "
                "are meant (derivatives, wrong labels, attacks). Retrain and Finetune take the loss of any model."
            )
        if labels.dim() != {"next token": 2, "token": 2}.get(str(self.kind), 1):
            if self.kind is None:
                raise ValueError(
                    f"Whether `labels` of shape {tuple(labels.shape)} belong to a token's own output or to that of the "
                    "token before is known for the classes of transformers that end in ForCausalLM, "
                    "ForTokenClassification, ForMaskedLM or ForConditionalGeneration, and for adapters whose PEFT "
                    f"config has a `task_type`; got {self.model}."
                )
            raise ValueError(
                f"`labels` for {self.model} must have shape {'(n,)' if self.kind == 'sample' else '(n, length)'}, got "
                f"{tuple(labels.shape)}."
            )

    @staticmethod
    def targets(labels: torch.Tensor, places: int) -> torch.Tensor:
        """The targets at the places of outputs that `pair` gave.

        Args:
            labels: `(n,)`, or `(n, length)`.
            places: Their number, the second dimension of those outputs.

        Returns:
            Shape `(n, places)`.
        """
        return labels[:, None] if labels.dim() == 1 else labels[:, labels.shape[1] - places :]

    def pair(self, outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model says at every place that can have a target, and the targets.

        Args:
            outputs: Of the model, with `logits` of shape `(n, c)` for labels `(n,)`, or `(n, length, c)` for
                `(n, length)`. Soft prompts put further outputs in front, which nobody labelled; the last of them
                says what it expects of the first token.
            labels: `(n,)`, or `(n, length)`, -100 where there is no target.

        Returns:
            Outputs of shape `(n, places, c)` and targets of shape `(n, places)`. A classifier of samples has one place;
            a causal language model `length - 1`, and `length` behind a soft prompt; others `length`.

        Raises:
            ValueError: other shapes, or outputs without logits.
        """
        logits = getattr(outputs, "logits", outputs)
        self._check(labels)
        if not isinstance(logits, torch.Tensor):
            raise ValueError(f"{self.model} must give logits, got {type(outputs).__name__}.")
        if logits.dim() == 2 and labels.dim() == 1 and len(logits) == len(labels):
            return logits[:, None], self.targets(labels, 1)
        if logits.dim() == 3 and labels.dim() == 2 and logits.shape[1] >= labels.shape[1]:
            first = logits.shape[1] - labels.shape[1]
            if self.kind == "next token":
                outputs = logits[:, max(first - 1, 0) : -1]
            else:
                outputs = logits[:, first:]
            return outputs, self.targets(labels, outputs.shape[1])
        raise ValueError(
            f"{self.model} must give logits of shape (n, classes) for labels of shape (n,), or (n, length, classes) "
            f"for (n, length), got {tuple(logits.shape)} for {tuple(labels.shape)}."
        )
