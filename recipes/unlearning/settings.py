"""What an unlearning experiment is about: its arguments, and the model and data that it is done with."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import datasets
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainingArguments,
    ViTImageProcessorPil,
    default_data_collator,
    set_seed,
)

from peft_ext.unlearning.evaluation.results import GOLD, ORIGINAL
from peft_ext.unlearning.methods import METHODS, UnlearningMethod
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.methods import HEAD, Method, folder_name, parse_methods, parse_specs
from recipes.tasks import causal_lm, image_classification, text_classification
from recipes.tasks.base import adapt
from recipes.tasks.resnet import load_resnet20
from recipes.tasks.toys import refuse_other_inputs
from recipes.unlearning import tofu
from recipes.unlearning.cases import Samples
from recipes.unlearning.same_time import LABELS, NONE

Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass
class ImageModelArguments(image_classification.ModelArguments):
    """Which image classifier is fine-tuned, and made to forget."""

    network: Literal["pretrained", "resnet20"] = field(
        default="pretrained",
        metadata={"help": "'resnet20': ResNet-20 for CIFAR with --network_weights, in place of --model_name_or_path."},
    )
    network_weights: str | None = field(default=None, metadata={"help": "Safetensors file of its pretrained weights."})
    image_mean: list[float] = field(
        default_factory=lambda: [0.5, 0.5, 0.5], metadata={"help": "What its images are normalised with."}
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.5, 0.5, 0.5], metadata={"help": "What its images are normalised with."}
    )


@dataclass
class ModelArguments(ImageModelArguments, causal_lm.ModelArguments):
    """Which model is fine-tuned, and made to forget."""


@dataclass
class DataArguments(
    image_classification.DataArguments, text_classification.DataArguments, causal_lm.DataArguments, tofu.TofuArguments
):
    """What the model is trained on; --eval_split is the test set."""

    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of the texts to classify; for a language model, in place of source and target."},
    )
    max_retain_eval_samples: int | None = field(
        default=None, metadata={"help": "Measure on a random subset of the retain set of this size. Default: all."}
    )


@dataclass
class UnlearnArguments:
    """What is trained, and the methods that are compared."""

    task: Literal["image", "text", "text-classification", "tofu"] = field(
        default="image",
        metadata={
            "help": "'image': an image classifier; 'text': a causal language model; 'text-classification': a sequence "
            "classifier, with --text_column and --label_column; 'tofu': a causal language model on the benchmark TOFU, "
            "a folder with its files."
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "The PEFT method that is trained, beside the head of a classifier: a name or a YAML mapping "
            "of name and options, as --methods of the other recipes; 'head' for the head alone."
        },
    )
    trainable_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Train, in place of an adapter, the parameters whose names contain this regular expression, such "
            "as 'bn|linear'. A new head is drawn; the others start as they were pretrained. Batch-norm "
            "statistics stay."
        },
    )
    methods: list[str] = field(
        default_factory=lambda: [name for name, kind in METHODS.items() if name != GOLD and kind.universal],
        metadata={
            "help": f"Unlearning methods: names ({', '.join(METHODS)}), or YAML mappings of a name, options (the "
            "fields of its class in peft_ext.unlearning.methods) and a 'label'. Retraining always runs: it is the "
            "gold. Default: all that serve every model, with their default options."
        },
    )
    ridge: float = field(
        default=0.0,
        metadata={
            "help": "Half of this times the squared distance from the initial parameters is part of what every "
            "training minimises."
        },
    )
    stop_training_after: float = field(
        default=1.0,
        metadata={
            "help": "Stop the training of original and gold after this share of its planned optimizer steps, such as "
            "0.25: the learning rate is cut where its schedule stands. What methods train themselves is not cut."
        },
    )
    same_time: list[str] = field(
        default_factory=lambda: ["finetune"],
        metadata={
            "help": f"Baselines with as many optimizer steps as fit into the seconds that another method took in the "
            f"same run: {', '.join(map(repr, LABELS))} (the whole schedule in fewer steps), or {NONE!r}."
        },
    )
    same_time_as: str | None = field(
        default=None,
        metadata={
            "help": "Label of the method whose seconds these baselines get. Default: the first rewind of --methods, or "
            "else the first gauss_newton; without both there are no such baselines."
        },
    )
    further_golds: int = field(
        default=0,
        metadata={
            "help": "Retrain with as many further seeds, those after the highest one: reference models of the "
            "per-example attack, and more distances between golds. Eight references are a fair number."
        },
    )
    relearn_limit: int = field(
        default=50,
        metadata={
            "help": "Afterwards fine-tune on the forget set for at most as many steps, until its accuracy is back "
            "within a point of the original's (texts: the loss, within 0.05 nats); 0 leaves it out."
        },
    )


def _names(*kinds: Any) -> set[str]:
    return {f.name for kind in kinds for f in dataclasses.fields(kind)}


TEXT_TASKS = ("text", "tofu")
"""The tasks of a causal language model."""
_EVERY_TASK = {"max_train_samples", "max_retain_eval_samples"}
_LENGTHS = {"prompt_template", "max_source_length", "max_target_length", "max_eval_samples"}
# What a task takes of all that there is.
_MODELS = {
    "image": _names(ImageModelArguments),
    "text": _names(causal_lm.ModelArguments),
    "text-classification": _names(inputs.ModelArguments),
    "tofu": _names(causal_lm.ModelArguments),
}
_NETWORKS = {
    "pretrained": _names(ModelArguments) - {"network_weights", "image_mean", "image_std"},
    "resnet20": _names(ModelArguments) - {"model_name_or_path", "dtype"},
}
_DATA = {
    "image": _names(image_classification.DataArguments) | _EVERY_TASK,
    "text": (_names(causal_lm.DataArguments) | _EVERY_TASK) - {"max_eval_prompts"},
    "text-classification": _names(text_classification.DataArguments) | _EVERY_TASK,
    "tofu": {"dataset_name", *_LENGTHS, "max_eval_prompts", "max_retain_eval_samples"} | _names(tofu.TofuArguments),
}


def check_arguments(model: ModelArguments, data: DataArguments, args: UnlearnArguments) -> None:
    """Raises a UserError for what shows without model and data."""
    if (args.adapter is None) == (args.trainable_parameters is None):
        raise UserError("give either --adapter, such as nola, or --trainable_parameters, such as 'bn|linear'")
    if args.trainable_parameters is not None:
        if args.task != "image":
            raise UserError("trainable_parameters is for image classifiers; give --adapter")
        try:
            re.compile(args.trainable_parameters)
        except re.error as error:
            raise UserError(
                f"trainable_parameters: {args.trainable_parameters!r} is no regular expression: {error}"
            ) from error
    _refuse_unused(model, _MODELS, "task", args.task)
    _refuse_unused(data, _DATA, "task", args.task)
    _refuse_unused(model, _NETWORKS, "network", model.network)
    if len(data.data_seeds) > 1:
        raise UserError(f"data_seeds: one run has one training set, give one seed, not {data.data_seeds}")
    if not args.ridge >= 0:
        raise UserError(f"ridge is {args.ridge}; it must be at least 0")
    if not 0 < args.stop_training_after <= 1:
        raise UserError(f"stop_training_after is {args.stop_training_after}; it must be above 0 and at most 1")
    for name in ("further_golds", "relearn_limit"):
        if getattr(args, name) < 0:
            raise UserError(f"{name} is {getattr(args, name)}; it must be at least 0")
    inputs.check_counts(data, "max_retain_eval_samples", "max_train_samples")


def _refuse_unused(given: Any, names: Mapping[str, set[str]], flag: str, chosen: str) -> None:
    """Raises a UserError for an option that another task or network would use, and this one would ignore."""
    default = type(given)()
    for f in dataclasses.fields(given):
        if f.name not in names[chosen] and getattr(given, f.name) != getattr(default, f.name):
            others = " or ".join(kind for kind in names if f.name in names[kind])
            raise UserError(f"{f.name} is for --{flag} {others}, this is --{flag} {chosen}; leave it out")


def check_quickstart(model: ModelArguments, data: DataArguments, args: UnlearnArguments) -> None:
    """Refuses another model, data set or task beside those of the digits."""
    refuse_other_inputs("digits", model, data)
    if model.network != "pretrained":
        raise UserError("digits makes its own model: leave out --network")
    if args.task != "image":
        raise UserError("digits is a task of images")


def parse_adapter(args: UnlearnArguments, training: TrainingArguments, seed: int) -> Method | None:
    """Reads ``--adapter``, checks it, and gives the training its learning rate, if it has one of its own."""
    if args.adapter is None:
        return None
    of_texts = args.task in TEXT_TASKS
    (adapter,) = parse_methods([args.adapter], extra=[] if of_texts else [HEAD], flag="adapter")
    adapter.refuse_dropout()
    if of_texts:
        causal_lm.check_method(adapter, seed, training.label_smoothing_factor)
    else:
        adapter.config("SEQ_CLS" if args.task == "text-classification" else None, seed)
    training.learning_rate = adapter.learning_rate or training.learning_rate
    return adapter


def parse_unlearning_methods(texts: Sequence[str]) -> dict[str, UnlearningMethod]:
    """Reads ``--methods``: the methods by their labels."""
    known = {name: {f.name for f in dataclasses.fields(kind) if f.init} for name, kind in METHODS.items()}  # type: ignore[arg-type]
    found: dict[str, UnlearningMethod] = {}
    for spec in parse_specs(texts, known, reserved=[ORIGINAL, *LABELS.values()]):
        if spec.name == GOLD:
            raise UserError(f"methods: {GOLD!r} always runs, it is the gold; leave it out")
        if spec.folder == folder_name(GOLD):
            raise UserError(f"methods: {GOLD!r} is the gold; give {spec.name!r} another 'label'")
        try:
            found[spec.label] = METHODS[spec.name](**spec.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"method {spec.label!r}: {error}") from error
    return found


@dataclass
class Setting:
    """What is fine-tuned on what.

    Attributes:
        fresh: returns the model as it is before the training with a seed.
        train: training samples.
        test: test samples.
        collator: makes batches.
        wrong_answers: whether samples are prompts with targets, so that others' targets are wrong answers.
        benchmark: what else is measured, of TOFU.
        notes: sentences that say what was taken.
    """

    fresh: Callable[[int], nn.Module]
    train: Samples
    test: Samples
    collator: Collator
    wrong_answers: bool = False
    benchmark: tofu.Benchmark | None = None
    notes: list[str] = field(default_factory=list)


def load_images(
    model_args: ModelArguments, data_args: DataArguments, args: UnlearnArguments, adapter: Method | None
) -> Setting:
    """Loads an image classifier and its data.

    Args:
        model_args: which classifier.
        data_args: which data.
        args: says which parameters are trained, without an adapter.
        adapter: what is trained beside the head.
    """
    data = image_classification.load_image_data(data_args)
    base: Callable[[], nn.Module]
    processor: Any
    collator: Collator = default_data_collator
    if model_args.network == "resnet20":
        if model_args.network_weights is None:
            raise UserError("network: resnet20 needs --network_weights, a safetensors file")
        if adapter is not None:
            raise UserError("network: resnet20 takes no adapter; give --trainable_parameters, such as 'bn|linear'")
        size = model_args.image_size or 32
        processor = ViTImageProcessorPil(
            size={"height": size, "width": size}, image_mean=model_args.image_mean, image_std=model_args.image_std
        )
        base = partial(copy.deepcopy, load_resnet20(model_args.network_weights, len(data.labels)))
        head, new_head = ["linear"], True
    else:
        classifier = image_classification.load_classifier(model_args, data.labels)
        processor, base = classifier.processor, classifier.fresh_model
        head, new_head = classifier.head, classifier.new_head
        image_classification.check_model(classifier, data.encoded(data.validation, processor)[:1]["pixel_values"])
        options = image_classification.forward_options(classifier.model)
        if options:
            collator = partial(image_classification.collate, options=options)
    fresh: Callable[[int], nn.Module]
    if adapter is None:
        fresh = partial(train_by_name, base, str(args.trainable_parameters), head if new_head else [])
    else:
        fresh = partial(adapt, base, adapter, head=head)

    def samples(split: datasets.Dataset) -> Samples:
        rows = image_classification.ImageRows(data.encoded(split, processor))
        return Samples(rows, [data.labels[label] for label in rows.labels])

    train = inputs.random_subset(data.training_set(data_args.data_seeds[0]), data_args.max_train_samples)
    return Setting(fresh, samples(train), samples(data.validation), collator)


def train_by_name(base: Callable[[], nn.Module], pattern: str, head: Sequence[str], seed: int) -> nn.Module:
    """Returns a model whose parameters are frozen but for some.

    Args:
        base: returns the pretrained model.
        pattern: regular expression that is found in the names of those to train.
        head: modules that are drawn anew.
        seed: what they are drawn with.
    """
    set_seed(seed)
    model = base()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        names = [name for name, _ in model.named_parameters()]
        raise UserError(f"trainable_parameters: {pattern!r} is in no name; there are {', '.join(names[:20])}...")
    for name, module in model.named_modules():
        if any(name == top or name.startswith(f"{top}.") for top in head) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    return model


def load_texts(model_args: ModelArguments, data_args: DataArguments, adapter: Method) -> Setting:
    """Loads a causal language model and its data.

    Args:
        model_args: which model.
        data_args: which data.
        adapter: what is trained.
    """
    causal_lm.check_arguments(data_args)
    base, tokenizer = causal_lm.load_model(model_args)
    causal_lm.check_lengths(base, data_args, [adapter])
    splits = causal_lm.load_splits(data_args)
    limits = [data_args.max_train_samples, data_args.max_eval_samples]
    chosen = [inputs.random_subset(split, limit) for split, limit in zip(splits, limits)]
    encoded = [causal_lm.encode_split(split, tokenizer, data_args) for split in chosen]
    column = data_args.text_column or data_args.source_column
    train, test = (Samples(rows.to_list(), list(split[column])) for rows, split in zip(encoded, chosen))
    return Setting(
        partial(adapt, partial(copy.deepcopy, base), adapter, task_type="CAUSAL_LM"),
        train,
        test,
        DataCollatorForSeq2Seq(tokenizer),
        wrong_answers=data_args.text_column is None,
    )


def load_tofu(
    model_args: ModelArguments, data_args: DataArguments, adapter: Method, cases: Sequence[str], batch_size: int
) -> Setting:
    """Loads a causal language model and TOFU.

    Args:
        model_args: which model.
        data_args: where TOFU is, and which part of it is used.
        adapter: what is trained.
        cases: the splits that are to be forgotten.
        batch_size: how many answers are written at once.
    """
    causal_lm.check_arguments(data_args)
    data = tofu.load_tofu(data_args, data_args, cases)
    base, tokenizer = causal_lm.load_model(model_args)
    causal_lm.check_lengths(base, data_args, [adapter])

    def samples(rows: list[tofu.Row], kinds: list[str]) -> Samples:
        return Samples(tofu.encode(rows, tokenizer, data_args), kinds)  # type: ignore[arg-type]

    return Setting(
        partial(adapt, partial(copy.deepcopy, base), adapter, task_type="CAUSAL_LM"),
        samples(data.train, data.kinds),
        samples(data.held_out, [""] * len(data.held_out)),
        DataCollatorForSeq2Seq(tokenizer),
        benchmark=data.benchmark(tokenizer, data_args, batch_size),
        notes=data.notes,
    )


def load_labelled_texts(model_args: ModelArguments, data_args: DataArguments, adapter: Method) -> Setting:
    """Loads a sequence classifier and its data.

    Args:
        model_args: which classifier.
        data_args: which data.
        adapter: what is trained beside the head.
    """
    data = text_classification.load_text_data(data_args)
    classifier = text_classification.load_classifier(model_args, data.labels)
    text_classification.check_length(classifier, data_args)

    def samples(split: datasets.Dataset) -> Samples:
        rows: Any = data.encoded(split, classifier.tokenizer)
        return Samples(rows, [data.labels[row["labels"]] for row in rows])

    train = inputs.random_subset(data.training_set(data_args.data_seeds[0]), data_args.max_train_samples)
    return Setting(
        partial(adapt, classifier.fresh_model, adapter, head=classifier.head, task_type="SEQ_CLS"),
        samples(train),
        samples(data.validation),
        DataCollatorWithPadding(classifier.tokenizer),
    )
