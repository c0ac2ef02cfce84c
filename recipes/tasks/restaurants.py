"""A self-made task for machines without a hub: invented restaurants, and a small GPT-2 that can describe them.

The model is trained on plain paragraphs, some about each place, so that it learns English sentences of this little
world and to take names and facts from what stands before. It never sees the ``key: value`` meanings of the task; those
are left to the adapter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from recipes.support import inputs
from recipes.tasks.causal_lm import DataArguments, encode
from recipes.tasks.toys import make_once, train_base, write_data

Meaning = dict[str, str]

_SEED = 2024
_PLACES, _PARAGRAPHS, _TRAINING_PAIRS, _VALIDATION_MEANINGS, _REFERENCES = 12_000, 3, 4_000, 100, 3
_VOCABULARY = 1024
_END = "<|endoftext|>"
_STEPS = 500

_FIRST = (
    "Amber Brass Copper Crooked Drowsy Early Friendly Gilded Hidden Hollow Humble Idle Ivory Jolly Lazy Little Lucky "
    "Merry Mossy Old Painted Patient Plain Quiet Restless Rusty Salty Secret Silent Sleepy Smoky Sunny Tall Velvet "
    "Wandering Wild Windy Wise Wooden Yellow"
).split()
_SECOND = (
    "Badger Barrel Bell Bicycle Bridge Button Candle Cellar Chimney Cloud Compass Crane Dumpling Falcon Fiddle Fig "
    "Garden Goose Hammer Hare Kettle Ladder Lantern Lemon Loaf Magpie Mirror Orchard Otter Oven Pepper Pigeon Plum "
    "Ribbon River Spoon Stove Tailor Thimble Turnip"
).split()
_VALUES = {
    "food": "Thai Greek Peruvian Korean Turkish Polish Lebanese Mexican Vietnamese Moroccan".split(),
    "place": ["harbour", "old town", "market square", "train station", "castle hill", "university"],
    "price": ["cheap", "fair", "high"],
    "children": ["welcome", "not allowed"],
    "closed": ["Monday", "Tuesday", "Wednesday", "Sunday"],
}
_OPENINGS = [
    "{name} serves {food} food near the {place}.",
    "{name} is a {food} kitchen by the {place}.",
    "Near the {place} you find {name}, a house for {food} dishes.",
    "For {food} cooking go to {name} at the {place}.",
]
_DETAILS = {
    "price=cheap": ["The prices are cheap.", "{name} is cheap."],
    "price=fair": ["The prices are fair.", "At {name} you pay a fair price."],
    "price=high": ["The prices are high.", "At {name} you pay a high price."],
    "children=welcome": ["Children are welcome.", "{name} likes children, they are welcome."],
    "children=not allowed": ["Children are not allowed.", "{name} is for adults, children are not allowed."],
    "closed": ["It is closed on {closed}.", "On {closed} {name} stays closed."],
}


@dataclass
class QuickstartArguments:
    """The self-made task."""

    restaurants: bool = field(
        default=False,
        metadata={
            "help": "Make the data (columns meaning and text) and a small GPT-2 that knows the plain texts, "
            "in --output_dir, in place of --model_name_or_path and --dataset_name."
        },
    )


def invent(rng: random.Random) -> Meaning:
    """Returns a place with a name, a cuisine, a neighbourhood and one to three further facts."""
    meaning = {"name": f"{rng.choice(_FIRST)} {rng.choice(_SECOND)}"}
    kept = {"food", "place", *rng.sample(["price", "children", "closed"], rng.randint(1, 3))}
    return meaning | {key: rng.choice(values) for key, values in _VALUES.items() if key in kept}


def describe(meaning: Meaning, rng: random.Random) -> str:
    """Returns one of the many texts that say a meaning."""
    details = [key for key in meaning if key not in ("name", "food", "place")]
    rng.shuffle(details)
    choices = [_OPENINGS, *(_DETAILS.get(key) or _DETAILS[f"{key}={meaning[key]}"] for key in details)]
    return " ".join(rng.choice(sentences) for sentences in choices).format(**meaning)


def render(meaning: Meaning) -> str:
    """Returns a meaning as the task's source."""
    return "; ".join(f"{key}: {value}" for key, value in meaning.items())


def paragraphs(rng: random.Random) -> str:
    """Returns several descriptions of one place, a line each."""
    meaning = invent(rng)
    return "\n".join(describe(meaning, rng) for _ in range(_PARAGRAPHS))


def write_pairs(folder: Path) -> None:
    """Writes the task's splits as JSON lines; a validation meaning has several texts and is no training meaning."""
    rng = random.Random(_SEED)
    validation = {render(meaning): meaning for meaning in (invent(rng) for _ in range(_VALIDATION_MEANINGS))}
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for source, meaning in validation.items():
        splits["validation"] += [{"meaning": source, "text": describe(meaning, rng)} for _ in range(_REFERENCES)]
    while len(splits["train"]) < _TRAINING_PAIRS:
        meaning = invent(rng)
        if render(meaning) not in validation:
            splits["train"].append({"meaning": render(meaning), "text": describe(meaning, rng)})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def make_base(folder: Path, use_cpu: bool) -> None:
    """Trains the tokenizer and the small GPT-2 and saves both."""
    rng = random.Random(_SEED + 1)
    texts = [paragraphs(rng) for _ in range(_PLACES)]
    tokenizer = train_tokenizer(texts)
    encoded = encode({"text": texts}, tokenizer, DataArguments(text_column="text", max_target_length=256))
    set_seed(_SEED)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=128,
            n_layer=2,
            n_head=4,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    settings = {
        "max_steps": _STEPS,
        "per_device_train_batch_size": 24 // PartialState().num_processes or 1,
        "learning_rate": 4e-3,
        "adam_beta2": 0.98,
        "warmup_steps": 50,
        "lr_scheduler_type": "cosine",
        "seed": _SEED,
        "use_cpu": use_cpu,
    }
    data = datasets.Dataset.from_dict(encoded)
    train_base(folder, model, tokenizer, settings, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer))


def prepare(output_dir: Path, model: inputs.ModelArguments, data: inputs.DataArguments, use_cpu: bool) -> None:
    """Makes data and base model below a folder, unless the model is there, and puts their folders in the arguments."""
    data.dataset_name = write_data(output_dir / "data", write_pairs)
    make = partial(make_base, use_cpu=use_cpu)
    model.model_name_or_path = make_once(output_dir / "base", "a small GPT-2", make)
