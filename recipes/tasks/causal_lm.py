"""Writing targets after prompts with causal language models: loading, data, loss, generation, scores."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_ext.targets import IGNORED, Alignment
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.methods import Method
from recipes.support.reporting import RunResult
from recipes.tasks.base import Task

_METRICS = {"BLEU": "corpus_bleu", "ROUGE-L": "rouge_l"}
OUTPUT = "text"  # what `compute` gives beside the logits, for messages
_NEW_TOKENS = 60


@dataclass
class ModelArguments(inputs.ModelArguments):
    """Which causal language model is adapted."""

    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file inside that model."})


@dataclass
class DataArguments(inputs.DataArguments):
    """What the model is trained and evaluated on."""

    source_column: str | None = field(default=None, metadata={"help": "Column that the prompt is made of."})
    target_column: str | None = field(default=None, metadata={"help": "Column to be written after the prompt."})
    text_column: str | None = field(default=None, metadata={"help": "Plain text, in place of source and target."})
    prompt_template: str = field(
        default="{source}\n",
        metadata={"help": "The prompt. A space precedes the target unless this ends in white space."},
    )
    max_source_length: int = field(default=256, metadata={"help": "Tokens of a prompt; longer ones lose their start."})
    max_target_length: int = field(default=256, metadata={"help": "Tokens of a target or text with its end mark."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Pairs for the validation loss."})
    max_eval_prompts: int | None = field(default=None, metadata={"help": "Prompts that are written out and scored."})


@dataclass
class GenerationArguments:
    """How text is decoded for the scores."""

    max_new_tokens: int = field(default=96, metadata={"help": "Longest output in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Beams; 1 is greedy decoding."})
    length_penalty: float = field(default=1.0, metadata={"help": "Above 0 favours long outputs in beam search."})
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "No n-gram of this size occurs twice; 0 allows all."}
    )


@dataclass
class TextData:
    """Encoded pairs, and the prompts that are written out.

    Attributes:
        train: training pairs as token ids and labels.
        validation: validation pairs.
        prompts: what texts are written after.
        references: the texts that a prompt has in the data, for every prompt.
        name: what the data is called.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    prompts: list[str]
    references: list[list[str]]
    name: str


def load_model(args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer, which gets a padding token if it has none."""
    name = inputs.model_folder(args)
    source: dict[str, Any] = {"pretrained_model_name_or_path": name, "gguf_file": args.gguf_file}
    options: dict[str, Any] = {"dtype": args.dtype}
    if args.gguf_file and hasattr(transformers, "GgufConfig"):
        # Newer versions of transformers keep the blocks packed by default, and the Trainer refuses those.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with inputs.loading("model_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, **options)
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token")
    if tokenizer.pad_token is None:
        # Padding is masked by the collator, so that a true end of text keeps its loss.
        tokenizer.pad_token = tokenizer.eos_token
        PartialState().print(
            f"The tokenizer of {name} has no padding token: batches are padded with its end-of-text token, and padding "
            "is masked",
            flush=True,
        )
    return model, tokenizer


def load_splits(args: DataArguments) -> list[datasets.Dataset]:
    """Loads the two splits and checks that they hold text in the columns that were asked for."""
    columns = [args.text_column] if args.text_column else [args.source_column, args.target_column]
    named = [column for column in columns if column is not None]
    if len(named) < len(columns) or (args.text_column and (args.source_column or args.target_column)):
        raise UserError("name the columns: either --source_column and --target_column, or --text_column")
    splits = inputs.load_splits(args, named)
    inputs.check_strings(args, splits, named)
    return splits


def encode(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> dict[str, list[list[int]]]:
    """Turns rows into token ids, with labels on the target and its end mark only.

    A plain text is a target without a prompt. Where nothing precedes its first token, as with GPT-2's tokenizer, that
    is no target: only soft prompts could predict it, and the losses of all methods are over the same tokens.
    """
    if args.text_column:
        targets = batch[args.text_column]
        prompts = [""] * len(targets)
    else:
        targets = batch[str(args.target_column)]
        prompts = render_prompts(batch[str(args.source_column)], args)
        gap = "" if args.prompt_template[-1:].isspace() else " "
        targets = [gap + target for target in targets]
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    heads = tokenizer(prompts)["input_ids"]
    tails = tokenizer(targets, add_special_tokens=False)["input_ids"]
    for head, tail in zip(heads, tails):
        head = head[-args.max_source_length :]
        tail = [*tail, tokenizer.eos_token_id][: args.max_target_length]
        encoded["input_ids"].append(head + tail)
        encoded["attention_mask"].append([1] * len(head + tail))
        first = max(1, len(head))
        encoded["labels"].append([IGNORED] * first + (head + tail)[first:])
    return encoded


def render_prompts(sources: Sequence[str], args: DataArguments) -> list[str]:
    """Returns the prompts of some meanings."""
    # Not str.format: a source or template may hold other braces.
    return [args.prompt_template.replace("{source}", source) for source in sources]


def group_references(sources: Sequence[str], targets: Sequence[str]) -> dict[str, list[str]]:
    """Collects the targets of every distinct source, in order of appearance."""
    groups: dict[str, list[str]] = {}
    for source, target in zip(sources, targets):
        groups.setdefault(source, []).append(target)
    return groups


def check_arguments(args: DataArguments) -> None:
    """Raises a UserError for what shows without the data."""
    if not args.text_column and "{source}" not in args.prompt_template:
        raise UserError(f"prompt_template: {args.prompt_template!r} does not contain {{source}}")
    if args.text_column and args.prompt_template != DataArguments.prompt_template:
        raise UserError("prompt_template: it is for --source_column; the texts of --text_column have no prompts")
    inputs.check_counts(
        args, "max_source_length", "max_target_length", "max_train_samples", "max_eval_samples", "max_eval_prompts"
    )


def check_method(method: Method, seed: int, smoothing: float) -> None:
    """Refuses options that a method does not take, and label smoothing with soft prompts.

    Args:
        method: what is put on the model.
        seed: the run's seed.
        smoothing: the Trainer's label smoothing. It fails on PEFT's models with prompts.
    """
    if method.config("CAUSAL_LM", seed).is_prompt_learning and smoothing:
        raise UserError(f"label_smoothing_factor: no labels are smoothed with {method.name}; leave out one of them")


def check_lengths(model: PreTrainedModel, data: DataArguments, methods: Sequence[Method], new_tokens: int = 0) -> None:
    """Refuses sequences that are longer than a model has positions.

    Args:
        model: the base model.
        data: says how long sources and targets may be.
        methods: whose virtual tokens, if they have some, stand in front.
        new_tokens: longest text that is written.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    tail = max(data.max_target_length, new_tokens)
    virtual = max((int(method.options.get("num_virtual_tokens") or 0) for method in methods), default=0)
    if positions is not None and virtual + data.max_source_length + tail > positions:
        front = f"{virtual} virtual tokens, " if virtual else ""
        raise UserError(
            f"{front}max_source_length ({data.max_source_length}) and the longer of max_target_length and "
            f"max_new_tokens ({tail}) exceed the {positions} positions of the model"
        )


def encode_split(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> datasets.Dataset:
    """Returns the rows of a split as token ids and labels, and nothing else."""
    return split.map(
        encode,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "args": args},
        remove_columns=split.column_names,
        keep_in_memory=True,
        desc="encoding",
    )


def load_text_data(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TextData:
    """Loads, checks, samples and encodes the data."""
    check_arguments(args)
    train, validation = load_splits(args)
    prompts: list[str] = []
    references: list[list[str]] = []
    if not args.text_column:
        groups = group_references(validation[args.source_column], validation[args.target_column])
        chosen = list(groups)
        if args.max_eval_prompts is not None and args.max_eval_prompts < len(chosen):
            chosen = random.Random(inputs.SUBSET_SEED).sample(chosen, args.max_eval_prompts)
        prompts = render_prompts(chosen, args)
        references = [groups[source] for source in chosen]
    return TextData(
        train=encode_split(inputs.random_subset(train, args.max_train_samples), tokenizer, args),
        validation=encode_split(inputs.random_subset(validation, args.max_eval_samples), tokenizer, args),
        prompts=prompts,
        references=references,
        name=inputs.dataset_title(args),
    )


def load_saved(args: ModelArguments, adapter: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the base model of a saved adapter, and its tokenizer."""
    return load_model(args)


@torch.no_grad()
def compute(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits of a whole row of token ids, and the tokens written after its prompt."""
    ids = row["ids"][None].to(model.device)
    start = ids[:, : int(row["prompt_length"])]
    written = model.generate(  # type: ignore[operator]
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=int(tokenizer.pad_token_id),
    )
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0].cpu(), written[0, start.shape[1] :].cpu()


def describe(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, torch.Tensor],
    written: torch.Tensor,
) -> str:
    """Returns a prompt and the text that was written after it."""
    prompt = tokenizer.decode(row["ids"][: int(row["prompt_length"])])
    return f"{prompt!r} -> {tokenizer.decode(written, skip_special_tokens=True)!r}"


@torch.no_grad()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    args: GenerationArguments,
    max_source_length: int,
    batch_size: int,
) -> list[str]:
    """Writes a text for every prompt; the processes of a distributed run share the work and all get the whole.

    Args:
        model: the model, adapted or not.
        tokenizer: its tokenizer.
        prompts: what is continued.
        args: decoding settings.
        max_source_length: prompts are cut to this many tokens, as in training.
        batch_size: how many prompts a process decodes at once.

    Returns:
        The continuations, in the order of the prompts.
    """
    beam_search = {"length_penalty": args.length_penalty} if args.num_beams > 1 else {}
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **beam_search,
    )
    model.eval()
    texts: list[str] = []
    with PartialState().split_between_processes(list(prompts)) as share:
        for start in range(0, len(share), batch_size):
            heads = [ids[-max_source_length:] for ids in tokenizer(share[start : start + batch_size])["input_ids"]]
            batch = tokenizer.pad({"input_ids": heads}, padding_side="left", return_tensors="pt").to(model.device)
            output = model.generate(**batch, generation_config=config)  # type: ignore[operator]
            texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in gather_object(texts)]


def score(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns BLEU and ROUGE-L. An output that runs on is cut at its first line break where no reference has one.

    That favours the untrained model, which seldom ends by itself.
    """
    if not any("\n" in text for texts in references for text in texts):
        outputs = [text.split("\n")[0] for text in outputs]
    scores: dict[str, float] = {}
    for name, module in _METRICS.items():
        computed = inputs.load_metric(module).compute(predictions=outputs, references=references)
        (scores[name],) = computed.values()
    return scores


def token_losses(alignment: Alignment, logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Returns the loss of every row, summed over its target tokens, and their number, in place of the logits.

    Args:
        alignment: which outputs belong to which labels.
        logits: what the Trainer passes: logits of shape `(batch, length, vocabulary)`, or a tuple that begins with
            them. Soft prompts make them longer than the labels.
        labels: `(batch, length)`, -100 where there is no target.

    Returns:
        Shape `(batch, 2)`.
    """
    outputs, targets = alignment.pair(logits[0] if isinstance(logits, tuple) else logits, labels)
    losses = nn.functional.cross_entropy(
        outputs.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.sum(1), (targets != IGNORED).sum(1)], dim=1)


def mean_token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the mean loss over all target tokens, however they are cut into batches and processes."""
    loss, tokens = np.asarray(prediction.predictions).sum(0)
    return {"token_loss": float(loss / tokens)}


@dataclass
class TextTask(Task):
    """Writing targets after prompts.

    Attributes:
        base: the base model.
        data: what it is trained and evaluated on.
        generation: how texts are written.
        max_source_length: longest prompt in tokens.
    """

    base: PreTrainedModel
    data: TextData
    generation: GenerationArguments
    max_source_length: int

    task_type = "CAUSAL_LM"
    hub_task = "text-generation"
    loss = "eval_token_loss"

    @property
    def dataset(self) -> str:
        return self.data.name

    def fresh_model(self) -> PreTrainedModel:
        return copy.deepcopy(self.base)

    def trainer_arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "train_dataset": self.data.train,
            "eval_dataset": self.data.validation,
            "data_collator": DataCollatorForSeq2Seq(self.processor),
            "compute_metrics": mean_token_loss,
            "preprocess_logits_for_metrics": partial(token_losses, Alignment.of(model)),
        }

    def score(self, model: PeftModel, evaluation: Mapping[str, float], result: RunResult) -> None:
        if not self.data.prompts:
            return
        batch_size = self.training.per_device_eval_batch_size
        result.outputs = generate(
            model, self.processor, self.data.prompts, self.generation, self.max_source_length, batch_size
        )
        if PartialState().is_main_process:
            result.metrics = score(result.outputs, self.data.references)

    def probes(self) -> list[dict[str, torch.Tensor]]:
        rows = self.data.validation.select(range(min(2, len(self.data.validation))))
        lengths = [max(1, labels.count(IGNORED)) for labels in rows["labels"]]
        return [
            {"ids": torch.tensor(ids), "prompt_length": torch.tensor(length)}
            for ids, length in zip(rows["input_ids"], lengths)
        ]
