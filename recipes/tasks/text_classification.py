"""Telling texts apart with sequence classifiers: loading, data, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.tasks import classification


@dataclass
class DataArguments(classification.DataArguments):
    """What the model is trained and evaluated on."""

    text_column: str | None = field(default=None, metadata={"help": "Column of the texts."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; longer ones lose their end."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})


@dataclass
class TextData(classification.LabelledData):
    """Training and validation texts."""

    args: DataArguments

    def encoded(self, split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Returns the texts of a split as rows of token ids and a label, unpadded."""
        found = tokenizer(list(split[self.args.text_column]), truncation=True, max_length=self.args.max_length)
        labels = [self.numbers[value] for value in split[self.args.label_column]]
        columns = {**found, "labels": labels}
        return [dict(zip(columns, values)) for values in zip(*columns.values())]


@dataclass
class Classifier(classification.Classifier):
    """A classifier of texts.

    Attributes:
        tokenizer: turns texts into token ids, and has a padding token.
    """

    tokenizer: PreTrainedTokenizerBase


def load_classifier(args: inputs.ModelArguments, labels: Sequence[str]) -> Classifier:
    """Loads a model and its tokenizer. It keeps its head if that is for the same classes, in the same order."""
    name = inputs.model_folder(args)
    found = classification.load_classifier(args, labels, AutoModelForSequenceClassification)
    with inputs.loading("model_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    config: Any = found.model.config
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        # Decoders that classify look for the last token that is no padding.
        config.pad_token_id = tokenizer.pad_token_id
    # PEFT wraps whole what is called `classifier` in a model of this kind: what is inside goes with it.
    head = sorted({"classifier" if module.startswith("classifier.") else module for module in found.head})
    return Classifier(found.model, head, found.new_head, tokenizer)


def load_text_data(args: DataArguments) -> TextData:
    """Loads and checks the data."""
    classification.check_arguments(args)
    inputs.check_counts(args, "max_length", "max_train_samples")
    if args.text_column is None:
        raise UserError("name the columns: --text_column, and --label_column if it is not called 'label'")
    if args.text_column == args.label_column:
        raise UserError(f"text_column and label_column are both {args.text_column!r}")
    columns = [args.text_column, args.label_column]
    splits = [split.select_columns(columns) for split in inputs.load_splits(args, columns)]
    inputs.check_strings(args, splits, [args.text_column])
    labels, numbers, splits = classification.keep_classes(splits, args)
    return TextData(splits[0], inputs.random_subset(splits[1], args.max_eval_samples), labels, numbers, args)


def check_length(classifier: Classifier, args: DataArguments) -> None:
    """Refuses texts that are longer than the model has positions."""
    positions = getattr(classifier.model.config, "max_position_embeddings", None)
    longest = min(positions or args.max_length, classifier.tokenizer.model_max_length)
    if args.max_length > longest:
        raise UserError(f"max_length is {args.max_length}; the model takes at most {longest} tokens")


@dataclass
class TextClassificationTask(classification.ClassificationTask):
    """Telling classes of texts apart."""

    classifier: Classifier
    data: TextData

    task_type = "SEQ_CLS"
    hub_task = "text-classification"

    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        few = inputs.random_subset(self.data.training_set(self.data_seed), self.data.args.max_train_samples)
        return {
            "train_dataset": self.data.encoded(few, self.processor),
            "eval_dataset": self.data.encoded(self.data.validation, self.processor),
            "data_collator": DataCollatorWithPadding(self.processor),
            "compute_metrics": classification.accuracy,
            "preprocess_logits_for_metrics": classification.likeliest,
        }

    def probes(self) -> list[dict[str, torch.Tensor]]:
        rows = self.data.encoded(self.data.validation.select(range(min(2, len(self.data.validation)))), self.processor)
        return [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
