"""Make a fine-tuned model forget some of its training samples, with several methods, and compare them with retraining.

``python -m recipes.unlearn`` runs the quickstart, which needs no hub; ``--help`` lists the arguments. It runs under
``accelerate launch -m`` unchanged. Every seed trains the original on all samples and, for every case of what is to be
forgotten, the gold: from the same start, without the forget set. Every method starts from the original.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    DataCollatorForSeq2Seq,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessorPil,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import SchedulerType

from peft_ext.training.callbacks import Ridge, trainable_state
from peft_ext.training.trainer import fit
from peft_ext.unlearning.evaluation.metrics import Outcome, observe, truth_ratio
from peft_ext.unlearning.evaluation.report import write_report
from peft_ext.unlearning.evaluation.results import GOLD, ORIGINAL, UnlearningResult
from peft_ext.unlearning.methods import METHODS, Request, Retrain, UnlearningMethod
from peft_ext.unlearning.methods.relabelling import OthersTargets
from recipes.finetune_gpt2 import TextTask, check_lengths
from recipes.finetune_vit import ImageTask
from recipes.support import inputs
from recipes.support.arguments import (
    HEAD,
    UserError,
    check_output_dir,
    claim_output_dir,
    hint,
    load_yaml,
    parse_arguments,
    parse_methods,
    run_main,
)
from recipes.support.usage import Usage
from recipes.tasks import causal_lm, digits, image_classification
from recipes.tasks.resnet import CifarResNet
from recipes.tasks.training import set_up
from recipes.unlearning.cases import Case, CaseArguments, Samples, choose, memorisation_scores, parse_cases

_WRONG_ANSWERS = 3
# The accuracy counts as back this close below the original's; texts, which have none, by their loss in nats.
_POINT, _NATS = 0.01, 0.05


@dataclass
class ModelArguments(image_classification.ModelArguments, causal_lm.ModelArguments):
    """Which model is fine-tuned, and made to forget."""

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
class DataArguments(image_classification.DataArguments, causal_lm.DataArguments):
    """What the model is trained on; --eval_split is the test set."""

    max_retain_eval_samples: int | None = field(
        default=None, metadata={"help": "Measure on a random subset of the retain set of this size. Default: all."}
    )


@dataclass
class UnlearnArguments:
    """What is trained, and the methods that are compared."""

    task: Literal["image", "text"] = field(
        default="image", metadata={"help": "'image': an image classifier; 'text': a causal language model."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "The PEFT method that is trained, beside the head of an image classifier: a name or a YAML mapping "
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
        default_factory=lambda: [name for name in METHODS if name != GOLD],
        metadata={
            "help": f"Unlearning methods: names ({', '.join(METHODS)}), or YAML mappings of a name, options (the "
            "fields of its class in peft_ext.unlearning.methods) and a 'label'. Retraining always runs: it is the "
            "gold. Default: all, with their default options."
        },
    )
    seeds: list[int] = field(
        default_factory=list, metadata={"help": "Train and unlearn once with each of these seeds. Default: --seed."}
    )
    ridge: float = field(
        default=0.0,
        metadata={
            "help": "Half of this times the squared distance from the initial parameters is part of what every "
            "training minimises."
        },
    )
    relearn_limit: int = field(
        default=50,
        metadata={
            "help": "Afterwards fine-tune on the forget set for at most as many steps, until its accuracy is back "
            "within a point of the original's (texts: the loss, within 0.05 nats); 0 leaves it out."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into --output_dir even if it holds files."}
    )
    digits: bool = field(
        default=False,
        metadata={
            "help": "Make the data (scikit-learn's digits, columns image and label) and a small ViT that knows the "
            "digits below 5, in --output_dir, in place of --model_name_or_path and --dataset_name."
        },
    )


class ImageRows(Dataset):
    """Images that were prepared once: unlearning reads them dozens of times.

    Args:
        images: Rows of pixel values and labels, made when they are read.
    """

    def __init__(self, images: datasets.Dataset) -> None:
        batches = [images[start : start + 256] for start in range(0, len(images), 256)]
        self.pixel_values = torch.cat([torch.as_tensor(batch["pixel_values"]) for batch in batches])
        self.labels = [label for batch in batches for label in batch["labels"]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


@dataclass
class Setting:
    """What is fine-tuned on what.

    Attributes:
        fresh: Gives the model as it is before the training with a seed.
        train: Training samples.
        test: Test samples.
        collator: Makes batches.
        wrong_answers: Whether samples are prompts with targets, so that others' targets are wrong answers.
    """

    fresh: Callable[[int], nn.Module]
    train: Samples
    test: Samples
    collator: Callable[[list[Any]], Mapping[str, Any]]
    wrong_answers: bool = False


def load_images(
    model_args: ModelArguments, data_args: DataArguments, args: UnlearnArguments, training: TrainingArguments
) -> Setting:
    """An image classifier and its data."""
    with PartialState().main_process_first():
        data = image_classification.load_image_data(data_args)
        network = _resnet(model_args, len(data.labels)) if model_args.network == "resnet20" else None
        classifier = None if network else image_classification.load_classifier(model_args, data.labels)
    options: dict[str, bool] = {}
    if classifier is None:
        assert network is not None
        size = model_args.image_size or 32
        processor: Any = ViTImageProcessorPil(
            size={"height": size, "width": size}, image_mean=model_args.image_mean, image_std=model_args.image_std
        )
        base, head = partial(copy.deepcopy, network), ["linear"]
    else:
        processor, base, head = classifier.processor, classifier.fresh_model, classifier.head  # type: ignore[assignment]
        options = image_classification.forward_options(classifier.model)
        image_classification.check_model(classifier, data.encoded(data.validation, processor)[:1]["pixel_values"])
    if args.trainable_parameters is not None:
        new_head = classifier is None or classifier.new_head
        fresh = partial(train_by_name, base, args.trainable_parameters, head if new_head else [])
    elif classifier is None:
        raise UserError("network: resnet20 takes no adapter; give --trainable_parameters, such as 'bn|linear'")
    else:
        (method,) = parse_methods([str(args.adapter)], extra=[HEAD])
        task = ImageTask(model_args, processor, training, classifier, data, data_args.data_seeds[0])
        fresh = partial(task.adapt, method)

    def samples(split: datasets.Dataset) -> Samples:
        rows = ImageRows(data.encoded(split, processor))
        return Samples(rows, [data.labels[label] for label in rows.labels])

    train = inputs.random_subset(data.training_set(data_args.data_seeds[0]), data_args.max_train_samples)
    collator: Callable[..., Any] = default_data_collator
    if options:
        collator = partial(image_classification.collate, options=options)
    return Setting(fresh, samples(train), samples(data.validation), collator)


def _resnet(args: ModelArguments, labels: int) -> CifarResNet:
    if args.network_weights is None:
        raise UserError("network: resnet20 needs --network_weights, a safetensors file")
    network = CifarResNet(num_labels=labels)
    with inputs.loading("network_weights", args.network_weights):
        weights = load_file(args.network_weights)
        head = {name: weights.pop(name) for name in list(weights) if name.startswith("linear.")}
        found = network.load_state_dict(weights, strict=False)
        missing = [name for name in found.missing_keys if not name.startswith("linear.")]
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or found.unexpected_keys:
            raise ValueError(f"no ResNet-20: it lacks {missing[:1]}, and has {found.unexpected_keys[:1]} beyond it")
        if all(head[name].shape == value.shape for name, value in network.linear.state_dict(prefix="linear.").items()):
            network.linear.load_state_dict({name.partition(".")[2]: value for name, value in head.items()})
    return network


def train_by_name(base: Callable[[], nn.Module], pattern: str, head: Sequence[str], seed: int) -> nn.Module:
    """A model whose parameters are frozen but for some.

    Args:
        base: Gives the pretrained model.
        pattern: Found in the names of those to train.
        head: Modules to draw anew.
        seed: Of that.
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


def load_texts(
    model_args: ModelArguments, data_args: DataArguments, args: UnlearnArguments, training: TrainingArguments
) -> Setting:
    """A causal language model and its data."""
    causal_lm.check_arguments(data_args)
    with PartialState().main_process_first():
        base, tokenizer = causal_lm.load_model(model_args)
        splits = causal_lm.load_splits(data_args)
        limits = [data_args.max_train_samples, data_args.max_eval_samples]
        chosen = [inputs.random_subset(split, limit) for split, limit in zip(splits, limits)]
        encoded = [causal_lm.encode_split(split, tokenizer, data_args) for split in chosen]
    (method,) = parse_methods([str(args.adapter)])
    data = causal_lm.TextData(encoded[0], encoded[1], [], [])
    task = TextTask(
        model_args,
        tokenizer,
        training,
        base,
        data,
        causal_lm.GenerationArguments(),
        data_args.max_source_length,
    )
    check_lengths(task, data_args)
    column = data_args.text_column or data_args.source_column
    train, test = (Samples(rows.to_list(), list(split[column])) for rows, split in zip(encoded, chosen))
    return Setting(
        partial(task.adapt, method), train, test, DataCollatorForSeq2Seq(tokenizer), data_args.text_column is None
    )


def parse_unlearning_methods(specs: Sequence[str]) -> dict[str, UnlearningMethod]:
    """Read ``--methods``: the methods by their labels."""
    known = [name for name in METHODS if name != GOLD]
    found: dict[str, UnlearningMethod] = {}
    for spec in specs:
        value = load_yaml(spec)
        options = {"name": value} if isinstance(value, str) else value
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            raise UserError(f"methods: {spec!r} is neither a name nor a mapping with a 'name'")
        options = dict(options)
        name = options.pop("name")
        if name == GOLD:
            raise UserError(f"methods: {GOLD!r} always runs, it is the gold; leave it out")
        if name not in known:
            raise UserError(f"methods: unknown method {name!r} (there are {', '.join(known)}){hint(name, known)}")
        label = str(options.pop("label", " ".join([name, *(f"{key}={value}" for key, value in options.items())])))
        fields = {f.name for f in dataclasses.fields(METHODS[name]) if f.init}  # type: ignore[arg-type]
        for key in options:
            if key not in fields:
                raise UserError(f"method {name!r}: unknown option {key!r} (it has {', '.join(sorted(fields))})")
        if label in (*found, ORIGINAL, GOLD):
            raise UserError(f"methods: two are called {label!r}; give each a 'label' of its own")
        try:
            found[label] = METHODS[name](**options)
        except (TypeError, ValueError) as error:
            raise UserError(f"method {label!r}: {error}") from error
    return found


class _StopWhen(TrainerCallback):
    """Ends a training after the first step after which something is true, and remembers the step."""

    def __init__(self, reached: Callable[[], bool]) -> None:
        self.reached = reached
        self.step: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look."""
        if self.reached():
            self.step = state.global_step
            control.should_training_stop = True


@dataclass
class Experiment:
    """All models of a run, made when they are asked for."""

    setting: Setting
    training: TrainingArguments
    args: UnlearnArguments
    max_retain: int | None
    states: dict[int, tuple[dict[str, torch.Tensor], float]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(str(self.training.output_dir))

    def arguments(self, seed: int) -> TrainingArguments:
        """The Trainer's with a seed."""
        training = copy.copy(self.training)
        training.seed = seed
        return training

    def request(self, seed: int, forget: Sequence[int]) -> Request:
        """A model as it is before the training, with the samples that are to go and those that stay."""
        model = self.setting.fresh(seed)
        gone = set(forget)
        retain = [place for place in range(len(self.setting.train)) if place not in gone]
        rows = self.setting.train.rows
        return Request(
            model,
            Subset(rows, retain),
            Subset(rows, list(forget)),
            self.setting.collator,
            self.arguments(seed),
            trainable_state(model),
            self.args.ridge,
        )

    def original(self, seed: int) -> tuple[dict[str, torch.Tensor], float]:
        """What the training on all samples made of the trainable parameters, and the seconds that it took."""
        if seed in self.states:
            return self.states[seed]
        path = self.folder / f"{ORIGINAL}-seed{seed}.safetensors"
        if self.training.resume_from_checkpoint and path.is_file():
            with safe_open(path, "pt") as file:
                seconds = float(file.metadata()["seconds"])
            self.states[seed] = load_file(path), seconds
            return self.states[seed]
        model = self.setting.fresh(seed)
        with Usage(self.training.device) as usage:
            ridge = Ridge(model, trainable_state(model), self.args.ridge)
            fit(model, self.setting.train.rows, self.setting.collator, self.arguments(seed), ridge=ridge)
        state = {name: value.cpu() for name, value in trainable_state(model).items()}
        PartialState().wait_for_everyone()  # no process may find the file before all have looked for it
        if PartialState().is_main_process:
            partial_path = path.with_suffix(".partial")
            save_file(state, partial_path, metadata={"seconds": str(usage.seconds)})
            partial_path.replace(path)
        self.states[seed] = state, usage.seconds
        return self.states[seed]

    def loader(self, rows: Any) -> Any:
        """Rows in order; in several processes each reads a share."""
        loader = DataLoader(rows, self.training.per_device_eval_batch_size, collate_fn=self.setting.collator)
        return Accelerator().prepare_data_loader(loader) if PartialState().num_processes > 1 else loader

    def outcomes(self, model: nn.Module, request: Request, case: Case) -> dict[str, Outcome]:
        """What a model says of all sets."""
        retain: Any = request.retain
        if self.max_retain is not None and self.max_retain < len(retain):
            rng = np.random.default_rng(inputs.SUBSET_SEED)
            retain = Subset(retain, sorted(rng.choice(len(retain), self.max_retain, replace=False).tolist()))
        test = self.setting.test.rows
        sets: dict[str, Any] = {"forget": request.forget, "retain": retain, "test": Subset(test, case.test)}
        if case.heldout:
            sets["heldout"] = Subset(test, case.heldout)
        found = {name: observe(model, self.loader(rows)) for name, rows in sets.items()}
        if self.setting.wrong_answers:
            rng = np.random.default_rng(inputs.SUBSET_SEED)
            answers = [OthersTargets(request.forget, request.retain, rng) for _ in range(_WRONG_ANSWERS)]
            wrong = [rows[place] for place in range(len(case.forget)) for rows in answers]
            found["forget"].truth_ratio = truth_ratio(model, self.loader(request.forget), self.loader(wrong))
        return found

    def relearn(self, request: Request, outcome: Outcome, before: Outcome) -> int | None:
        """Steps of fine-tuning on the forget set until the model is back where the original was, if it ever is."""

        def is_back(found: Outcome) -> bool:
            if found.log_probs is None:
                return float(found.losses.mean()) <= float(before.losses.mean()) + _NATS
            return float(found.correct.mean()) >= float(before.correct.mean()) - _POINT

        if is_back(outcome):
            return 0
        training = copy.copy(request.training)
        training.max_steps = self.args.relearn_limit
        training.warmup_steps = 0
        training.lr_scheduler_type = SchedulerType.CONSTANT
        stop = _StopWhen(lambda: is_back(observe(request.model, self.loader(request.forget))))
        request.fit(request.forget, training, callbacks=[stop])
        return stop.step

    def run(self, case: Case, label: str, method: UnlearningMethod | None, seed: int) -> UnlearningResult:
        """Make a model forget with one method, and measure; without a method the original is measured."""
        state, seconds = self.original(seed)
        request = self.request(seed, case.forget)
        with torch.no_grad():
            for name, parameter in request.model.named_parameters():
                if name in state:
                    parameter.copy_(state[name])
        device = self.training.device
        request.model.to(device)  # type: ignore[arg-type]
        before = observe(request.model, self.loader(request.forget))
        result = UnlearningResult(case.name, label, seed, {}, parameters=sum(map(torch.numel, state.values())))
        if method is None:
            result.seconds = seconds
        else:
            try:
                method.prepare(request)
                with Usage(device) as usage:
                    result.report = method.unlearn(request).to_dict()
            except ValueError as error:
                raise UserError(f"method {label!r}, {case.name}: {error}") from error
            result.seconds, result.peak_memory = usage.seconds, usage.peak_memory
        result.outcomes = self.outcomes(request.model, request, case)
        if self.args.relearn_limit and method is not None:
            result.relearn_steps = self.relearn(request, result.outcomes["forget"], before)
            result.relearn_limit = self.args.relearn_limit
        return result

    def run_or_load(self, case: Case, label: str, method: UnlearningMethod | None, seed: int) -> UnlearningResult:
        """A run, or its result if a resumed recipe has it already."""
        name = re.sub(r"[^A-Za-z0-9=._-]+", "-", label).strip("-.")
        folder = self.folder / case.folder / f"{name}-seed{seed}"
        if self.training.resume_from_checkpoint:
            try:
                return UnlearningResult.load(folder)
            except FileNotFoundError:
                pass
        result = self.run(case, label, method, seed)
        if PartialState().is_main_process:
            result.save(folder)
        PartialState().wait_for_everyone()
        PartialState().print(_line(result), flush=True)
        return result

    def memorisation(self, pairs: int, seed: int) -> np.ndarray:
        """Scores of all training samples; a resumed recipe reads those that it has."""
        path = self.folder / "memorisation.npy"
        if self.training.resume_from_checkpoint and path.is_file():
            return np.load(path)
        PartialState().print(f"Training {2 * pairs} models on halves of the samples", flush=True)

        def probabilities(places: list[int], training_seed: int) -> np.ndarray:
            model = self.setting.fresh(training_seed)
            rows = Subset(self.setting.train.rows, places)
            ridge = Ridge(model, trainable_state(model), self.args.ridge)
            fit(model, rows, self.setting.collator, self.arguments(training_seed), ridge=ridge)
            return np.exp(-observe(model, self.loader(self.setting.train.rows)).losses)

        scores = memorisation_scores(len(self.setting.train), pairs, seed, probabilities)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            np.save(path, scores)
        return scores


def _line(result: UnlearningResult) -> str:
    parts = [
        f"{name} {100 * outcome.correct.mean():.1f} % (loss {outcome.losses.mean():.3f})"
        for name, outcome in result.outcomes.items()
    ]
    return f"{result.case}, {result.method}, seed {result.seed}: {', '.join(parts)}; {result.seconds:.1f} s"


def notes(setting: Setting, cases: Sequence[Case], args: UnlearnArguments, seeds: Sequence[int]) -> str:
    """Markdown that says what was run."""
    trained = args.adapter if args.trainable_parameters is None else f"parameters named {args.trainable_parameters!r}"
    lines = [
        f"Trained: {trained}; {len(setting.train):,} training samples, {len(setting.test):,} test samples; seeds "
        f"{', '.join(map(str, seeds))}. The same samples are forgotten with every seed.",
        "Seconds of the original are those of its training. Peak memory is what a method added to what was in use.",
    ]
    if any(case.name.startswith("class ") for case in cases):
        lines.append("Where a class is forgotten, the test set is that of the other classes.")
    if any(case.name.startswith("memorised ") for case in cases):
        lines.append(
            "Memorised samples: those whose label's probability falls most when they are left out, estimated from "
            "trainings on random halves (Feldman & Zhang 2020)."
        )
    if args.relearn_limit:
        what = "forget accuracy is within a point" if args.task == "image" else f"forget loss is within {_NATS} nats"
        lines.append(f"Relearn steps: fine-tuning on the forget set until the {what} of the original's.")
    return "\n".join(f"- {line}" for line in lines)


def check_arguments(
    model_args: ModelArguments, data_args: DataArguments, args: UnlearnArguments, training: TrainingArguments
) -> None:
    """What shows without model and data."""
    if (args.adapter is None) == (args.trainable_parameters is None):
        raise UserError("give either --adapter, such as nola, or --trainable_parameters, such as 'bn|linear'")
    if args.trainable_parameters is not None:
        if args.task == "text":
            raise UserError("trainable_parameters is for image classifiers; give --adapter")
        try:
            re.compile(args.trainable_parameters)
        except re.error as error:
            raise UserError(
                f"trainable_parameters: {args.trainable_parameters!r} is no regular expression: {error}"
            ) from error
    if args.digits and (model_args.model_name_or_path or data_args.dataset_name or model_args.network != "pretrained"):
        raise UserError("digits makes its own model and data: leave out --model_name_or_path and --dataset_name")
    if args.digits and args.task != "image":
        raise UserError("digits is a task of images")
    if len(data_args.data_seeds) > 1:
        raise UserError(f"data_seeds: one run has one training set, give one seed, not {data_args.data_seeds}")
    if not args.ridge >= 0:
        raise UserError(f"ridge is {args.ridge}; it must be at least 0")
    if args.relearn_limit < 0:
        raise UserError(f"relearn_limit is {args.relearn_limit}; it must be at least 0")
    for name in ("max_retain_eval_samples", "max_train_samples"):
        value = getattr(data_args, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    seeds = args.seeds or [training.seed]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {seeds} has one twice")


def main(argv: Sequence[str]) -> None:
    """Run the recipe."""
    arguments = parse_arguments(
        "unlearn", [ModelArguments, DataArguments, CaseArguments, UnlearnArguments, TrainingArguments], argv
    )
    model_args, data_args, case_args, args, training = arguments
    check_arguments(model_args, data_args, args, training)
    methods = parse_unlearning_methods(args.methods)
    specs = parse_cases(case_args, args.task == "text")
    seeds = args.seeds or [training.seed]
    if args.adapter is not None:
        (adapter,) = parse_methods([args.adapter], extra=[HEAD] if args.task == "image" else [])
        adapter.config("CAUSAL_LM" if args.task == "text" else None, seeds[0])
        training.learning_rate = adapter.learning_rate or training.learning_rate
    set_up(training)
    is_main = PartialState().is_main_process
    record = check_output_dir(training, arguments, args.overwrite_output_dir)
    PartialState().wait_for_everyone()  # no process may write before all have looked
    output_dir = Path(training.output_dir)

    if args.digits:
        data_args.dataset_name = digits.prepare_data(output_dir)
        model_args.model_name_or_path = digits.prepare_base(output_dir, data_args.dataset_name, training.use_cpu)
    load = load_images if args.task == "image" else load_texts
    setting = load(model_args, data_args, args, training)
    setting.fresh(seeds[0])  # whether the adapter fits the model shows here
    zero = partial(np.zeros, len(setting.train))
    for spec in specs:
        choose(spec, case_args, setting.train, setting.test, zero)  # and here whether there is something to forget
    if is_main:
        claim_output_dir(training, record)
        if not training.resume_from_checkpoint:
            for pattern in ("*/*/unlearning.json", "*.safetensors", "*.npy"):
                for stale in output_dir.glob(pattern):
                    stale.unlink()
    PartialState().wait_for_everyone()

    experiment = Experiment(setting, training, args, data_args.max_retain_eval_samples)
    memorisation = partial(experiment.memorisation, case_args.memorised_pairs, case_args.forget_seed)
    cases = [choose(spec, case_args, setting.train, setting.test, memorisation) for spec in specs]
    everything: dict[str, UnlearningMethod | None] = {ORIGINAL: None, GOLD: Retrain(), **methods}
    # The Trainer collects garbage whenever it starts; going through all that was loaded would be part of every time.
    gc.collect()
    gc.freeze()
    results = [
        experiment.run_or_load(case, label, method, seed)
        for case in cases
        for seed in seeds
        for label, method in everything.items()
    ]
    gc.unfreeze()
    if is_main:
        write_report(results, output_dir, "Unlearning", notes(setting, cases, args, seeds))
        print(f"report.md, report.json, accuracy.png, losses.png and tradeoff.png are in {output_dir}")


if __name__ == "__main__":
    run_main(main)
