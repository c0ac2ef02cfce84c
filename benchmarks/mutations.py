"""Changes saved adapters and networks at random and loads them: what is noticed, and what is not.

    python -m benchmarks.mutations --number 1000

prints a table of outcomes by kind of change for every method, and writes the counts to
`benchmarks/results/mutations.jsonl`. An outcome is `refused` (a ValueError), `library` (an error of another library,
such as that of safetensors for a broken header), `same` (the very outputs of the untouched checkpoint), or one of those
that must not happen: `silent` (other outputs), `crash` (another error), `slow` (more than 5 s or 1 GB).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save
from torch import nn

import peft_ext
from peft_ext import McncConfig, NolaConfig, PrancConfig, SeededNetwork, VisualPromptConfig

Files = dict[str, bytes]
BAD = ("silent", "crash", "slow")
SECONDS, BYTES = 5.0, 1 << 30
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SEED, NETWORK = "seed_config.json", "model.safetensors"


# What is saved


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    return transformers.ViTForImageClassification(config).eval()


Q_AND_V = {"target_modules": ["q_proj", "v_proj"]}
# name: (base model, configuration, fields, fields of another adapter)
METHODS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], dict[str, Any]]] = {
    "NOLA": (llama, NolaConfig, {"r": 2, "num_basis": (5, 7), **Q_AND_V}, {"seed": 1}),
    "NOLA, own bases": (
        llama,
        NolaConfig,
        {"r": 2, "num_basis": 5, "share_basis": False, "rank_pattern": {"v_proj": 3}, **Q_AND_V},
        {"rank_pattern": {}},
    ),
    "PRANC": (
        gpt2,
        PrancConfig,
        {"num_coefficients": 13, "nnz": 2, "adapt_bias": True, "target_modules": ["c_attn", "c_fc"]},
        {"nnz": 1},
    ),
    "PRANC, dense": (llama, PrancConfig, {"num_coefficients": 13, "basis": "dense", **Q_AND_V}, {"basis": "sparse"}),
    "PRANC, factors": (
        llama,
        PrancConfig,
        {"num_coefficients": 13, "apply_to": "factors", "r": 2, **Q_AND_V},
        {"apply_to": "weight"},
    ),
    "MCNC": (llama, McncConfig, {"r": 2, "k": 3, "d": 13, "widths": (5,), **Q_AND_V}, {"frequency": 4.0}),
    "MCNC, weight": (
        llama,
        McncConfig,
        {"apply_to": "weight", "k": 2, "d": 13, "widths": (5, 4), "activation": "tanh", **Q_AND_V},
        {"normalize": False},
    ),
    "NOLA, head and biases": (
        vit,
        NolaConfig,
        {
            "r": 2,
            "num_basis": 5,
            "bias": "all",
            "modules_to_save": ["classifier"],
            "target_modules": ["q_proj", "v_proj", "query", "value"],
        },
        {"alpha": 3.0},
    ),
    "VisualPrompt": (vit, VisualPromptConfig, {"num_prompts": 3, "deep": True}, {"deep": False}),
    "network, PRANC": (vit, PrancConfig, {"num_coefficients": 20, "nnz": 2}, {}),
    "network, NOLA": (vit, NolaConfig, {"r": 3, "num_basis": (5, 7)}, {}),
    "network, MCNC": (vit, McncConfig, {"apply_to": "weight", "k": 2, "d": 30, "widths": (8,)}, {}),
}
DTYPES = ("float32", "int4")


@dataclass
class Subject:
    """A saved adapter or network, and what an untouched load of it gives.

    Attributes:
        name: of the row of `METHODS`.
        base: the base model, or the network's architecture.
        config: what the adapter was made with.
        other: a configuration that makes another adapter of the same tensors.
        files: what was saved, by name.
        expected: the outputs.
    """

    name: str
    base: nn.Module
    config: Any
    other: Any
    files: Files
    expected: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def is_network(self) -> bool:
        return SEED in self.files

    @property
    def config_name(self) -> str:
        return SEED if self.is_network else ADAPTER

    @property
    def weights_name(self) -> str:
        return NETWORK if self.is_network else WEIGHTS


def make(name: str, dtype: str) -> Subject:
    """Saves an adapter or network of random coefficients."""
    build, config_class, fields, others = METHODS[name]
    config = config_class(**fields, coefficient_dtype=dtype)
    base = build()
    trained: Any
    if name.startswith("network"):
        trained = SeededNetwork(copy.deepcopy(base), config)
        parameters = list(trained.parameters())
    else:
        trained = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix != ".md"}
    subject = Subject(name, base, config, config_class(**{**fields, **others}), files)
    subject.expected = DOORS[doors_of(subject)[0]](subject, files)
    return subject


# The ways in


@contextlib.contextmanager
def written(files: Files) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        yield folder


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":  # type: ignore[union-attr]
        return model(torch.randn(2, 3, 16, 16, generator=generator)).logits
    return model(torch.randint(3, 32, (2, 8), generator=generator)).logits


def from_pretrained(subject: Subject, files: Files) -> torch.Tensor:
    with written(files) as folder:
        return outputs(PeftModel.from_pretrained(copy.deepcopy(subject.base), folder).eval())


def beside_another(subject: Subject, files: Files) -> torch.Tensor:
    model = get_peft_model(copy.deepcopy(subject.base), copy.deepcopy(subject.other))
    with written(files) as folder:
        model.load_adapter(folder, "second")
    model.set_adapter("second")
    return outputs(model.eval())


def into_the_same(subject: Subject, files: Files) -> torch.Tensor:
    model = get_peft_model(copy.deepcopy(subject.base), copy.deepcopy(subject.config))
    with written(files) as folder:
        model.load_adapter(folder, "default")
    return outputs(model.eval())


def into_another(subject: Subject, files: Files) -> torch.Tensor:
    model = get_peft_model(copy.deepcopy(subject.base), copy.deepcopy(subject.other))
    with written(files) as folder:
        model.load_adapter(folder, "default")
    return outputs(model.eval())


def with_transformers(subject: Subject, files: Files) -> torch.Tensor:
    model: Any = copy.deepcopy(subject.base)
    with written(files) as folder:
        model.load_adapter(folder)
    return outputs(model.eval())


def with_transformers_to_train(subject: Subject, files: Files) -> torch.Tensor:
    model: Any = copy.deepcopy(subject.base)
    with written(files) as folder:
        model.load_adapter(folder, is_trainable=True)
    return outputs(model.eval())


def load_from_seed(subject: Subject, files: Files) -> torch.Tensor:
    with written(files) as folder:
        return outputs(peft_ext.load_from_seed(folder))


def load_from_seed_into(subject: Subject, files: Files) -> torch.Tensor:
    with written(files) as folder:
        return outputs(peft_ext.load_from_seed(folder, copy.deepcopy(subject.base)))


DOORS: dict[str, Callable[[Subject, Files], torch.Tensor]] = {
    "from_pretrained": from_pretrained,
    "load_adapter, second": beside_another,
    "load_adapter, same": into_the_same,
    "load_adapter, other": into_another,
    "transformers": with_transformers,
    "transformers, trainable": with_transformers_to_train,
    "load_from_seed": load_from_seed,
    "load_from_seed, network": load_from_seed_into,
}


def doors_of(subject: Subject) -> list[str]:
    return [name for name in DOORS if name.startswith("load_from_seed") == subject.is_network]


# Changes

VALUES: tuple[Any, ...] = (None, True, False, 0, 1, 3, 0.5, 2.0, "x", "", [], ["x"], [3], {}, {"x": 1}, [[1]], [None])
EXTREMES: tuple[Any, ...] = (
    10**6,
    10**9,
    10**30,
    -1,
    -(10**30),
    float("nan"),
    float("inf"),
    1e308,
    [1] * 10_000,
    [10**9],
    [10**5, 10**5],
    [10**4] * 20,
    ["x"] * 100_000,
    "x" * 1_000_000,
    "(a+)+$",
    {"q_proj": 10**6},
    {"16 x 16": 10**9},
    {str(i): i for i in range(10_000)},
    ["h.{0..999999999}"],
    json.loads("[" * 60 + "]" * 60),
)
NAMES = ("q_proj", "k_proj", "v_proj", "c_attn", "c_proj", "lm_head", "embed_tokens", "norm", "classifier", "layers")
CHOICES = ("all", "none", "sparse", "dense", "sine", "relu", "tanh", "weight", "factors", "int8", "bfloat16", "float32")


def other_value(value: Any, chance: random.Random) -> Any:
    """A value of the same type, often one that could be meant."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice([value + 1, value - 1, 2 * value + 1, value + 2**32, -value, 0])
    if isinstance(value, float):
        return chance.choice([value + 0.5, value * 2, value / 3 + 0.1, -value])
    if isinstance(value, str):
        return chance.choice([*CHOICES, *NAMES, value[:-1], value + "0", value.replace("1", "2"), value.upper()])
    if isinstance(value, dict):
        changed = dict(value)
        if changed and chance.random() < 0.7:
            key = chance.choice(list(changed))
            changed[key] = other_value(changed[key], chance)
        else:
            changed[chance.choice(NAMES)] = chance.choice([1, 2, 7])
        return changed
    if isinstance(value, list):
        changed_list = list(value)
        action = chance.choice(["drop", "add", "turn", "change"])
        if action == "drop" and changed_list:
            changed_list.pop(chance.randrange(len(changed_list)))
        elif action == "turn":
            changed_list.reverse()
        elif action == "change" and changed_list:
            index = chance.randrange(len(changed_list))
            changed_list[index] = other_value(changed_list[index], chance)
        else:
            changed_list.append(chance.choice(NAMES) if not changed_list else copy.deepcopy(changed_list[0]))
        return changed_list
    return chance.choice([*NAMES, 1, [chance.choice(NAMES)], [0, 1], {"q_proj": 3}, 0.5, "none"])


def paths(described: dict[str, Any], nested: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Where a value of a configuration can be changed: its fields, and those inside some of them."""
    found: list[tuple[str, ...]] = [(key,) for key in described]
    for name in nested:
        if isinstance(described.get(name), dict):
            found += [(name, key) for key in described[name]] * 2
    return found


def edit_config(subject: Subject, files: Files, kind: str, chance: random.Random) -> str:
    name = subject.config_name
    if "config.json" in files and chance.random() < 0.25:
        name = "config.json"
    described = json.loads(files[name])
    place = chance.choice(paths(described, ("identity", "method", "weights", "matrices")))
    holder = described if len(place) == 1 else described[place[0]]
    key, old = place[-1], holder[place[-1]]
    if kind == "field removed":
        del holder[key]
        new: Any = "(removed)"
    else:
        if kind == "other value":
            new = other_value(old, chance)
        else:
            new = chance.choice(VALUES if kind == "wrong type" else EXTREMES)
        if chance.random() < 0.15 and isinstance(old, list) and kind != "other value":
            new = [*old, new]
        elif chance.random() < 0.15 and isinstance(old, dict) and kind != "other value":
            new = {**old, "v_proj": new}
        holder[key] = new
    files[name] = json.dumps(described).encode()
    return f"{name}: {'.'.join(place)} = {str(new)[:60]} (was {str(old)[:40]})"


def add_field(subject: Subject, files: Files, kind: str, chance: random.Random) -> str:
    described = json.loads(files[subject.config_name])
    key = chance.choice(["lora_alpha", "runtime_config", "trainable_token_indices", "self", "_saved", "x", "kwargs"])
    described[key] = copy.deepcopy(chance.choice(VALUES))
    files[subject.config_name] = json.dumps(described).encode()
    return f"{key} = {described[key]!r}"


def damage_text(subject: Subject, files: Files, kind: str, chance: random.Random) -> str:
    data = bytearray(files[subject.config_name])
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    files[subject.config_name] = bytes(data)
    return f"byte {place} of the configuration: {data[max(0, place - 10) : place + 10]!r}"


def flip_bits(subject: Subject, files: Files, kind: str, chance: random.Random) -> str:
    data = bytearray(files[subject.weights_name])
    places = [chance.randrange(8 * len(data)) for _ in range(chance.choice([1, 1, 2, 5]))]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    files[subject.weights_name] = bytes(data)
    return f"bits {places} of {8 * len(data)}"


def cut_off(subject: Subject, files: Files, kind: str, chance: random.Random) -> str:
    data = files[subject.weights_name]
    length = chance.randrange(len(data))
    files[subject.weights_name] = data[:length] + (b"\0" * (len(data) - length) if chance.random() < 0.5 else b"")
    return f"after {length} of {len(data)} bytes"


STRANGERS = (
    "base_model.model.lm_head.weight",
    "base_model.model.model.norm.weight",
    "base_model.model.transformer.ln_f.bias",
    "base_model.model.classifier.weight",
    "base_model.model.classifier.bias",
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.weight",
    "lm_head.weight",
    "network.classifier.weight",
    "packed",
    "x",
)


def change_tensors(subject: Subject, files: Files, kind: str, chance: random.Random) -> str:
    tensors = load(files[subject.weights_name])
    key = chance.choice(sorted(tensors))
    tensor = tensors[key]
    told = f"{kind} {key}"
    if kind == "tensor dropped":
        del tensors[key]
    elif kind == "tensor renamed":
        new = chance.choice(
            [
                key.replace(".0.", ".1."),
                key.replace(".0.", ".7."),
                key.replace("q_proj", "k_proj"),
                key.replace("coefficients", "coefficients.default"),
                key.replace("base_model.model.", ""),
                key.replace("identity", "packed"),
                key + ".default",
                "x." + key,
                key[:-1],
            ]
        )
        tensors[new] = tensors.pop(key)
        told += f" to {new}"
    elif kind == "tensor added":
        shapes = {name: parameter.shape for name, parameter in subject.base.named_parameters()}
        new = chance.choice([*STRANGERS, *(f"base_model.model.{name}" for name in shapes), key.replace(".0.", ".8.")])
        shape = shapes.get(new.removeprefix("base_model.model."), tensor.shape)
        tensors[new] = torch.zeros(shape)
        told = f"{kind} {new}"
    elif kind == "dtype changed":
        dtype = chance.choice([torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool])
        tensors[key] = tensor.to(dtype)
        told += f" to {dtype}"
    elif kind == "values changed":
        others = [name for name in tensors if name != key and tensors[name].shape == tensor.shape]
        action = chance.choice(["swap", "negate", "zero", "nan", "shape", "scale"])
        if action == "swap" and others:
            other = chance.choice(others)
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif action == "negate" and tensor.is_floating_point():
            tensors[key] = -tensor
        elif action == "nan" and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[chance.randrange(tensor.numel())] = float("nan")
        elif action == "shape":
            tensors[key] = chance.choice([tensor[None], tensor.flatten()[:-1], torch.cat([tensor.flatten()] * 2)])
        elif action == "scale" and tensor.is_floating_point():
            tensors[key] = tensor * (1 + 2**-20)
        else:
            tensors[key] = torch.zeros_like(tensor)
        told += f" ({action})"
    files[subject.weights_name] = save({name: each.contiguous().clone() for name, each in tensors.items()})
    return told


def edit_record(subject: Subject, files: Files, kind: str, chance: random.Random) -> str:
    tensors = load(files[subject.weights_name])
    key = next(name for name in tensors if name.endswith("identity"))
    content = json.loads(bytes(tensors[key].numpy()))
    place = chance.choice(paths(content, ("identity",)))
    holder = content if len(place) == 1 else content[place[0]]
    old = holder[place[-1]]
    action = chance.choice(["other", "other", "type", "extreme", "removed"])
    if action == "removed":
        del holder[place[-1]]
        new: Any = "(removed)"
    else:
        new = other_value(old, chance) if action == "other" else chance.choice(VALUES if action == "type" else EXTREMES)
        holder[place[-1]] = new
    tensors[key] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    files[subject.weights_name] = save(tensors)
    return f"{'.'.join(place)} = {str(new)[:60]} (was {str(old)[:40]})"


KINDS: dict[str, tuple[int, Callable[[Subject, Files, str, random.Random], str]]] = {
    "other value": (6, edit_config),
    "wrong type": (5, edit_config),
    "extreme value": (4, edit_config),
    "field removed": (3, edit_config),
    "field added": (1, add_field),
    "configuration bit": (1, damage_text),
    "flipped bits": (5, flip_bits),
    "cut off": (1, cut_off),
    "tensor renamed": (2, change_tensors),
    "tensor dropped": (1, change_tensors),
    "tensor added": (2, change_tensors),
    "dtype changed": (2, change_tensors),
    "values changed": (2, change_tensors),
    "record edited": (4, edit_record),
}


# What happens


@dataclass
class Result:
    """What became of one changed checkpoint: the kind of change, the change, the way in, the outcome and why."""

    kind: str
    change: str
    door: str
    outcome: str
    told: str = ""


def is_ours(error: BaseException) -> bool:
    """Whether the innermost frame among those of our library and of its neighbours is ours."""
    places = ("peft_ext", "peft", "transformers", "safetensors", "huggingface_hub")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        owner = next((each for each in places if f"/{each}/" in frame.filename), None)
        if owner is not None:
            return owner == "peft_ext"
    return False


def peak_memory() -> int:
    """Bytes that this process has had resident at most. (What `resource` says begins at the peak of its parent.)"""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0])


def attempt(subject: Subject, files: Files, door: str) -> tuple[str, str]:
    """(outcome, why) of loading some files one way."""
    start, peak = time.perf_counter(), peak_memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = DOORS[door](subject, files)
        same = found.shape == subject.expected.shape and torch.equal(found, subject.expected)
        outcome, told = ("same", "") if same else ("silent", "")
    except ValueError as error:
        outcome, told = "refused", str(error)[:300]
    except Exception as error:  # which one is what is asked
        outcome = "crash" if is_ours(error) else "library"
        told = f"{type(error).__name__}: {str(error)[:200]}"
        if outcome == "crash":
            told += "".join(traceback.format_tb(error.__traceback__)[-2:])
    seconds = time.perf_counter() - start
    grown = peak_memory() - peak
    if seconds > SECONDS or grown > BYTES:
        return "slow", f"{seconds:.1f} s, {grown:,} bytes, {outcome} {told}"
    return outcome, told


def mutate(subject: Subject, chance: random.Random, kinds: tuple[str, ...] = tuple(KINDS)) -> tuple[Files, str, str]:
    """(files, kind, description) of one random change; the files are never those that were saved."""
    while True:
        (kind,) = chance.choices(kinds, [KINDS[kind][0] for kind in kinds])
        files = dict(subject.files)
        told = KINDS[kind][1](subject, files, kind, chance)
        if files != subject.files:
            return files, kind, told


def run(
    subject: Subject, chance: random.Random, number: int, kinds: tuple[str, ...] = tuple(KINDS)
) -> Iterator[Result]:
    """Changes a checkpoint so many times, and loads every changed one by one of the ways in."""
    doors = doors_of(subject)
    for _ in range(number):
        files, kind, change = mutate(subject, chance, kinds)
        door = chance.choice(doors)
        outcome, told = attempt(subject, files, door)
        yield Result(kind, change, door, outcome, told)


def quiet() -> None:
    """Keeps transformers and PEFT from telling of every broken checkpoint."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--number", type=int, default=1000, help="changes for every method, half of them in int4")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "mutations.jsonl")
    options = parser.parse_args()
    quiet()
    lines, bad = [], 0
    for name in options.methods:
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for dtype in DTYPES:
            chance = random.Random(f"{options.seed} {name} {dtype}")
            for result in run(make(name, dtype), chance, -(-options.number // len(DTYPES))):
                counts[result.kind][result.outcome] += 1
                if result.outcome in BAD:
                    bad += 1
                    print(f"{name}, {dtype}: {result}", file=sys.stderr, flush=True)
        lines += [json.dumps({"method": name, "kind": kind, **count}) for kind, count in counts.items()]
        print(f"\n{name}\n{'':20}{'refused':>9}{'library':>9}{'same':>9}{'silent':>9}{'crash':>9}{'slow':>9}")
        for kind, count in counts.items():
            columns = "".join(f"{count[outcome]:9}" for outcome in ("refused", "library", "same", *BAD))
            print(f"{kind:20}{columns}", flush=True)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
