"""A reader of checkpoints written from docs/checkpoint-format.md alone, with NumPy and the standard library.

It shows that the document is complete: tests compare it with the library. It is written to be read beside the document,
section by section, and knows nothing of models: a caller says which modules are adapted, or what the parameters of a
network are.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Files


def read_safetensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors of a safetensors file, and their types by the names that checksums use. A bfloat16 is a uint16 here."""
    kinds = {
        "F64": ("<f8", "float64"),
        "F32": ("<f4", "float32"),
        "F16": ("<f2", "float16"),
        "BF16": ("<u2", "bfloat16"),
        "U8": ("u1", "uint8"),
        "I64": ("<i8", "int64"),
    }
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors, types = {}, {}
    for name, described in header.items():
        if name != "__metadata__":
            numpy_type, types[name] = kinds[described["dtype"]]
            first, last = described["data_offsets"]
            flat = np.frombuffer(data[8 + length + first : 8 + length + last], numpy_type)
            tensors[name] = flat.reshape(described["shape"])
    return tensors, types


# Canonical JSON, hashes, names


def canonical(value: Any) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(each) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(each) for each in item]
        return int(item) if isinstance(item, float) and item.is_integer() else item

    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


GENERATING = {
    "NOLA": "alpha alpha_pattern fan_in_fan_out generator_version num_basis parametrization r rank_pattern seed "
    "share_basis",
    "PRANC": "adapt_bias alpha apply_to basis fan_in_fan_out generator_version nnz num_coefficients parametrization r "
    "seed",
    "MCNC": "activation alpha apply_to d fan_in_fan_out frequency generator_version k normalize parametrization r seed "
    "widths",
    "VISUAL_PROMPT": "deep num_prompts",
}


def scaled(config: Mapping[str, Any]) -> bool:
    return config.get("parametrization") == "scaled"


def rule(config: Mapping[str, Any]) -> int:
    """Which rule the factors follow: adapters and networks from when there was one name it in their identity alone."""
    return config.get("factors_version") or 2


def chunk_size(config: Mapping[str, Any]) -> int:
    """`d`, or what it is where it is null."""
    newest = scaled(config) and config["apply_to"] == "factors" and rule(config) == 4
    return config.get("d") or (500 if newest else 5000)


def identity(config: Mapping[str, Any], modules: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The identity of an adapter or a network, from its configuration and a row for every module or parameter."""
    fields = {"method": config["peft_type"]}
    fields |= {name: config.get(name) for name in GENERATING[config["peft_type"]].split()}
    if not scaled(config):
        fields.pop("parametrization", None)
    elif fields["method"] in ("NOLA", "MCNC"):
        fields["factors_version"] = rule(config)
    if fields["method"] == "PRANC" and fields["apply_to"] in ("weight", None):
        for name in ("alpha", "apply_to", "r"):
            del fields[name]
    if config.get("ensure_weight_tying"):
        fields["ensure_weight_tying"] = True
    described = {}
    for name, value in fields.items():
        text = canonical(value)
        described[name] = json.loads(text) if len(text) <= 96 else f"sha256:{digest(text.encode())}"
    described["modules"] = digest(canonical(modules).encode())
    return {"sha256": digest(canonical(described).encode()), **described}


def checksum(tensors: Iterable[tuple[str, np.ndarray, str]]) -> str:
    """Of (label, tensor, type)."""
    lines = [f"{label} {kind} {list(array.shape)} {digest(array.tobytes())}" for label, array, kind in tensors]
    return digest("\n".join(sorted(lines)).encode())


def unfold(folded: Sequence[str]) -> list[str]:
    """The names of `target_names`."""
    names = []
    for text in folded:
        range_found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
        before, numbers, after = text, [""], ""
        if range_found:
            before, after = text[: range_found.start()], text[range_found.end() :]
            numbers = [str(n) for n in range(int(range_found[1]), int(range_found[2]) + 1)]
        else:
            before, after = "", text
        head, brace, choices = after.partition("{")
        names += [
            f"{before}{number}{head}{choice}"
            for number in numbers
            for choice in (choices[:-1].split(",") if brace else [""])
        ]
    return names


# Coefficients


def as_float32(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return (array.astype("<u4") << 16).view("<f4")
    return array.astype(np.float32)


def unpack(packed: np.ndarray, lengths: Sequence[int], dtype: str) -> list[np.ndarray]:
    """The parts of packed coefficients, one for every kind."""
    groups = [-(-length // 128) for length in lengths]
    total = sum(groups)
    body, scales = packed[: len(packed) - 2 * total], packed[len(packed) - 2 * total :]
    if dtype == "int8":
        integers = body.view(np.int8).astype(np.float32)
    else:
        halves = np.stack([body & 15, body >> 4], axis=1).reshape(-1).astype(np.int16)
        integers = np.where(halves >= 8, halves - 16, halves).astype(np.float32)
    numbers = integers.reshape(total, 128) * as_float32(scales.view("<u2"), "bfloat16")[:, None]
    starts = np.cumsum([0, *groups])
    return [numbers[start : start + n].reshape(-1)[:length] for start, n, length in zip(starts, groups, lengths)]


# Random numbers

_MASK = np.uint64(0xFFFFFFFF)


def _multiply(a: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of products of 64-bit numbers."""
    low_a, high_a = a & _MASK, a >> np.uint64(32)
    low_b, high_b = np.uint64(b & 0xFFFFFFFF), np.uint64(b >> 32)
    low = low_a * low_b
    middle = high_a * low_b + (low >> np.uint64(32))
    other = low_a * high_b + (middle & _MASK)
    high = high_a * high_b + (middle >> np.uint64(32)) + (other >> np.uint64(32))
    return high, (other << np.uint64(32)) | (low & _MASK)


def philox(key: tuple[int, int], blocks: np.ndarray) -> np.ndarray:
    """Philox4x64-10: four 64-bit words for every block, of which number i has the counter i + 1."""
    zeros = np.zeros_like(blocks)
    c0, c1, c2, c3 = blocks + np.uint64(1), zeros, zeros, zeros
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2E7470EE14C6C93)
        high1, low1 = _multiply(c2, 0xCA5A826395121157)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return np.stack([c0, c1, c2, c3], axis=1)


def uniform(seed: int, stream: Sequence[Any], count: int, start: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` of a stream: float32."""
    name = json.dumps(["peft_ext", 1, *stream], separators=(",", ":"))
    stream_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    blocks = np.arange(start // 8, -(-(start + count) // 8), dtype=np.uint64)
    words = philox((seed, stream_key), blocks)
    halves = np.stack([words & _MASK, words >> np.uint64(32)], axis=2).reshape(-1)
    kept = halves[start % 8 : start % 8 + count].astype(np.uint32)
    return (kept >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)


# Generators. Products are computed in float64, from numbers that are float32 where the document says so.


def dense(seed: int, stream: Sequence[Any], coefficients: np.ndarray, size: int, scale: float) -> np.ndarray:
    basis = uniform(seed, [*stream, "basis"], len(coefficients) * size).reshape(len(coefficients), size)
    return scale * (coefficients.astype(np.float64) @ basis.astype(np.float64))


def offset(seed: int, stream: Sequence[Any], size: int, scale: float) -> np.ndarray:
    return (uniform(seed, stream, size) * np.float32(scale)).astype(np.float64)


def sparse(seed: int, stream: Sequence[Any], coefficients: np.ndarray, size: int, scale: float, nnz: int) -> np.ndarray:
    """In float32 throughout: equal to the bit."""
    k = len(coefficients)
    whole, rest = size // k, size % k
    total = np.zeros(0, np.float32)
    for t in range(nnz):
        runs = -(-size // k)
        keys = uniform(seed, [*stream, "order", t], runs * k).reshape(runs, k)
        order = np.argsort(keys, axis=1, kind="stable")
        signs = uniform(seed, [*stream, "sign", t], size)
        factors = np.ones(k, np.float32)
        if whole and rest:
            factors[:] = np.float32(math.sqrt((size / k) / whole))
            factors[order[-1, :rest]] = np.float32(math.sqrt((size / k) / (whole + 1)))
        scaled = coefficients * factors * np.float32(scale / math.sqrt(nnz))
        read = scaled[order.reshape(-1)[:size]]
        part = np.where(signs < 0, -read, read)
        total = total + part if t else part
    return total


ACTIVATIONS = {
    "sine": (np.sin, math.sqrt(2)),
    "relu": (lambda x: np.maximum(x, 0), math.sqrt(2)),
    "tanh": (np.tanh, 5 / 3),
    "none": (lambda x: x, 1.0),
}


def manifold(
    config: Mapping[str, Any], coefficients: np.ndarray, size: int, scale: float, part: str, phase: float = 50.0
) -> np.ndarray:
    """`part` is what the numbers are: those of a factor `A` or `B`, or of a `weight`."""
    k, d = config["k"], chunk_size(config)
    factor_inputs = factor_amplitudes = 1.0
    if scaled(config):
        root = math.sqrt(min(d, size) / (1 if part == "weight" else k + 1))
        factor_inputs, factor_amplitudes = phase / config["frequency"], math.sqrt(root) if part == "A" else root
    sizes = [k, *config["widths"], d]
    activation, gain = ACTIVATIONS[config["activation"]]
    layers = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        stream = ["mcnc", "phi", k, *config["widths"], d, "layer", i]
        factor = np.float32((gain if i else 1.0) * math.sqrt(3 / fan_in))
        layers.append((uniform(config["seed"], stream, fan_in * fan_out) * factor).reshape(fan_in, fan_out))
    chunks = coefficients.astype(np.float64).reshape(-1, k + 1)
    hidden = chunks[:, :k] * (config["frequency"] * factor_inputs)
    for layer in layers[:-1]:
        hidden = activation(hidden @ layer)
    outputs = hidden @ layers[-1]
    if config["normalize"]:
        outputs = outputs / np.sqrt((outputs**2).mean(axis=1, keepdims=True) + 1e-12)
    return (scale * factor_amplitudes * chunks[:, k:] * outputs).reshape(-1)[:size]


# Adapters


class Module(NamedTuple):
    """An adapted module or parameter: its name when it was saved, rows and columns of its weight as a matrix, biases.

    A stack of experts has several matrices.
    """

    name: str
    fan_out: int
    fan_in: int
    biases: int = 0
    experts: int = 1


def owners(modules: Sequence[Module], parameters: Sequence[str]) -> list[str]:
    """The names in the file that the tensors of every module or parameter begin with."""
    found: list[str] = []
    for i, module in enumerate(modules):
        inside = any(("." + module.name).endswith("." + name) for name in parameters)
        parent = module.name.rpartition(".")[0]
        later = [each for each in modules[i + 1 :] if each.name.rpartition(".")[0] == parent]
        found.append(parent + ".base_layer" * len(later) if inside else module.name)
    return found


def matching(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    values = [value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)]
    return values[0] if values else default


def lengths(config: Mapping[str, Any], module: Module) -> list[int]:
    """How many coefficients of every kind a module has."""
    if config["peft_type"] == "NOLA":
        pair = config["num_basis"]
        return list(pair) if isinstance(pair, list) else [pair, pair]
    if config["peft_type"] == "MCNC":
        d = chunk_size(config)
        chunks = sum(-(-size // d) for size in _generated(config, module))
        return [chunks * config["k"], chunks]
    return [config["num_coefficients"]] if config["peft_type"] == "PRANC" else [module.fan_out * module.fan_in]


def _generated(config: Mapping[str, Any], module: Module) -> list[int]:
    """The numbers of every sequence that is cut into chunks."""
    if config["apply_to"] == "weight":
        return [module.experts * module.fan_out * module.fan_in]
    A, B = (module.experts * config["r"] * size for size in (module.fan_in, module.fan_out))
    return [A, B] if scaled(config) else [A + B]


def joined(config: Mapping[str, Any], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The coefficients of a module from those of every kind."""
    if config["peft_type"] != "MCNC":
        return np.concatenate(parts)
    return np.concatenate([parts[0].reshape(-1, config["k"]), parts[1][:, None]], axis=1).reshape(-1)


def pranc_factor(config: Mapping[str, Any], size: int) -> float:
    return math.sqrt(size / config["num_coefficients"]) if scaled(config) else 1.0


def from_one_vector(
    config: Mapping[str, Any], stream: Sequence[Any], coefficients: np.ndarray, size: int, scale: float
) -> np.ndarray:
    """Numbers that PRANC makes of an adapter's vector."""
    if config["basis"] == "dense":
        return dense(config["seed"], stream, coefficients, size, scale * math.sqrt(3 / len(coefficients)))
    return sparse(config["seed"], stream, coefficients, size, scale, config["nnz"])


def part_of_all(sizes: Sequence[int], place: int, flat: np.ndarray) -> np.ndarray:
    """What one module has of numbers that all have together."""
    start = sum(sizes[:place])
    return flat[start : start + sizes[place]]


def update(
    config: Mapping[str, Any], module: Module, coefficients: np.ndarray, modules: Sequence[Module]
) -> tuple[np.ndarray, np.ndarray]:
    """What the weight, as a matrix, and the bias of one of the adapted modules get."""
    seed, method, (name, fan_out, fan_in, biases, experts) = config["seed"], config["peft_type"], module
    none = np.zeros(0, np.float32)
    stack = [experts] if experts > 1 else []
    if method == "PRANC" and config.get("apply_to") != "factors":
        weights = experts * fan_out * fan_in
        size = weights + (biases if config["adapt_bias"] else 0)
        stream = ["pranc", config["basis"], name, fan_out, fan_in]
        adapted = sum(each.experts * each.fan_out * each.fan_in for each in modules)
        scale = pranc_factor(config, adapted) / math.sqrt(fan_in)
        flat = from_one_vector(config, stream, coefficients, size, scale)
        return flat[:weights].reshape(*stack, fan_out, fan_in), flat[weights:]
    if method == "MCNC" and config["apply_to"] == "weight":
        flat = manifold(config, coefficients, experts * fan_out * fan_in, 1 / math.sqrt(fan_in), "weight")
        return flat.reshape(*stack, fan_out, fan_in), none
    if method == "PRANC":
        r, alpha, place = config["r"], config["alpha"], list(modules).index(module)
        all_A = [each.experts * r * each.fan_in for each in modules]
        all_B = [each.experts * each.fan_out * r for each in modules]
        scale_A, scale_B = math.sqrt(pranc_factor(config, sum(all_A))), pranc_factor(config, sum(all_B))
        start = offset(seed, ["pranc", "sparse", "A", "offset"], sum(all_A), 0.1 / math.sqrt(fan_in))
        A = sparse(seed, ["pranc", "sparse", "A"], coefficients, sum(all_A), scale_A, config["nnz"]) + start
        B = sparse(seed, ["pranc", "sparse", "B"], coefficients, sum(all_B), scale_B, config["nnz"])
        A, B = part_of_all(all_A, place, A), part_of_all(all_B, place, B)
    elif method == "MCNC":
        r, alpha = config["r"], config["alpha"]
        size_A = experts * r * fan_in
        if scaled(config):
            _, size_B = _generated(config, module)
            first = -(-size_A // chunk_size(config)) * (config["k"] + 1)
            phase = 50.0 if rule(config) == 2 else 150.0
            A = manifold(config, coefficients[:first], size_A, 1.0, "A", phase)
            B = manifold(config, coefficients[first:], size_B, 1.0, "B", phase)
        else:
            flat = manifold(config, coefficients, experts * r * (fan_in + fan_out), 1.0, "A and B")
            A, B = flat[:size_A], flat[size_A:]
        start = (0.1 if scaled(config) and rule(config) > 2 else 1.0) / math.sqrt(fan_in)
        A = A + offset(seed, ["mcnc", "A", r, fan_in, "offset"], experts * r * fan_in, start)
    else:
        r = matching(config["rank_pattern"], name, config["r"])
        alpha = matching(config["alpha_pattern"], name, config["alpha"])
        own = [] if config["share_basis"] else [name]
        num_A, num_B = lengths(config, module)
        stream_A, stream_B = ["nola", "A", r, fan_in, *own], ["nola", "B", fan_out, r, *own]
        factor_A = math.sqrt(3) * math.sqrt(math.sqrt(experts * r * fan_in / num_A)) if scaled(config) else 1.0
        factor_B = math.sqrt(3 * experts * fan_out * r / num_B) if scaled(config) else 1.0
        own_A = signed(seed, stream_A, coefficients[:num_A], experts)
        own_B = signed(seed, stream_B, coefficients[num_A:], experts)
        A = np.concatenate([dense(seed, stream_A, each, r * fan_in, factor_A / math.sqrt(num_A)) for each in own_A])
        A = A + offset(seed, [*stream_A, "offset"], experts * r * fan_in, 1 / math.sqrt(fan_in))
        B = np.concatenate([dense(seed, stream_B, each, fan_out * r, factor_B / math.sqrt(num_B)) for each in own_B])
    return alpha / r * (B.reshape(*stack, fan_out, r) @ A.reshape(*stack, r, fan_in)), none


def signed(seed: int, stream: Sequence[Any], coefficients: np.ndarray, experts: int) -> np.ndarray:
    """The coefficients as every expert reads them."""
    if experts == 1:
        return coefficients[None]
    signs = uniform(seed, [*stream, "sign"], experts * len(coefficients)).reshape(experts, -1)
    return np.where(signs < 0, -coefficients, coefficients)


def read_adapter(
    config: Mapping[str, Any], data: bytes, modules: Sequence[Module]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The coefficients of every adapted module by its name, verified, and what is saved whole beside them.

    Args:
        config: what is in `adapter_config.json`.
        data: the weights file.
        modules: the adapted ones, in the order of the model.
    """
    method = config["peft_type"]
    prefix = "visual_prompt" if method == "VISUAL_PROMPT" else method.lower()
    tensors, types = read_safetensors(data)
    assert [module.name for module in modules] == unfold(config["target_names"])

    names = dict(zip(modules, owners(modules, config.get("target_parameters") or [])))

    def key(module: Module, what: str) -> str:
        return f"base_model.model.{names[module]}.{prefix}_{what}"

    record = json.loads(tensors.pop(key(modules[0], "identity")).tobytes())
    biased = bool(config.get("adapt_bias"))
    rows = [[*each[: 4 if biased else 3], *([each.experts] if each.experts > 1 else [])] for each in modules]
    assert record["format"] == 1
    assert record["identity"] == config["identity"] == identity(config, rows)

    own = modules[:1] if method == "PRANC" else modules
    found = {}
    if record["dtype"] in ("int8", "int4"):
        packed = tensors.pop(key(modules[0], "packed"))
        assert record["coefficients"] == checksum([("packed", packed, "uint8")])
        counts = np.array([lengths(config, module) for module in own])  # (modules, kinds)
        kinds = [
            np.split(numbers, np.cumsum(counts[:-1, kind]))
            for kind, numbers in enumerate(unpack(packed, counts.sum(axis=0).tolist(), record["dtype"]))
        ]
        found = {module.name: joined(config, parts) for module, parts in zip(own, zip(*kinds))}
    else:
        what = "tokens.values" if method == "VISUAL_PROMPT" else "coefficients.values"
        keys = [key(module, what) for module in own]
        labelled = [(f"coefficients {i}", tensors[name], types[name]) for i, name in enumerate(keys)]
        assert record["coefficients"] == checksum(labelled)
        found = {module.name: as_float32(tensors.pop(n), types[n]).reshape(-1) for module, n in zip(own, keys)}
    whole = [name for name in tensors if trained_whole(config, name)]
    assert record["others"] == checksum((name.rpartition(".")[2], tensors[name], types[name]) for name in whole)
    return {module.name: found.get(module.name, found[modules[0].name]) for module in modules}, tensors


def trained_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor beside the coefficients was trained whole; others repeat weights of the base model."""
    parts = name.split(".")
    if config.get("bias", "none") != "none" and parts[-1] == "bias":
        return True
    return bool({*parts} & {*(config.get("modules_to_save") or [])}) and not {*parts} & {
        "modules_to_save",
        "original_module",
    }


def base_weight(matrix: np.ndarray, kind: str, shape: Sequence[int]) -> np.ndarray:
    """A matrix of fan_out rows as what is added to a base weight of a kind and shape."""
    return (matrix.swapaxes(-1, -2) if kind in ("Conv1D", "Embedding", "transposed") else matrix).reshape(shape)


# Networks from a seed


class Parameter(NamedTuple):
    """A parameter of a network: `"linear"`, `"Conv1D"`, `"weight"` or `"bias"` of one dimension, or `"other"`."""

    name: str
    shape: tuple[int, ...]
    kind: str


def start_of(parameter: Parameter) -> tuple[float, float, float]:
    """(mean, width, spread) of a parameter."""
    if parameter.kind in ("linear", "Conv1D"):
        fan_in = parameter.shape[0] if parameter.kind == "Conv1D" else math.prod(parameter.shape[1:])
        return 0.0, math.sqrt(3 / fan_in), 1 / math.sqrt(fan_in)
    if len(parameter.shape) == 1:
        return (1.0 if parameter.kind == "weight" else 0.0), 0.0, 0.1
    return 0.0, 0.02 * math.sqrt(3), 0.02


def read_network(described: Mapping[str, Any], data: bytes, parameters: Sequence[Parameter]) -> dict[str, np.ndarray]:
    """The parameters and buffers of a network by name, verified.

    Args:
        described: what is in `seed_config.json`.
        data: the weights file.
        parameters: in the order of the network.
    """
    config = described["method"]
    tensors, types = read_safetensors(data)
    record = json.loads(tensors.pop("identity").tobytes())
    assert described["weights"] == {each.name: list(each.shape) for each in parameters}
    rows = [
        [i, each.name, *each.shape, *start_of(each), *((matrix_of(each) or ()) if has_factors(config) else ())]
        for i, each in enumerate(parameters)
    ]
    if has_factors(config):
        assert described["matrices"] == {each.name: list(fans) for each in parameters if (fans := matrix_of(each))}
    assert record["format"] == 1
    assert record["identity"] == described["identity"] == identity(config, rows)

    if record["dtype"] in ("int8", "int4"):
        packed = tensors.pop("packed")
        assert record["coefficients"] == checksum([("coefficients", packed, "uint8")])
        coefficients = joined(config, unpack(packed, network_lengths(config, parameters), record["dtype"]))
    else:
        stored = tensors.pop("coefficients.network")
        kind = types["coefficients.network"]
        assert record["coefficients"] == checksum([("coefficients", stored, kind)])
        coefficients = as_float32(stored, kind)
    assert record["others"] == checksum((name, tensor, types[name]) for name, tensor in tensors.items())

    found = {name.removeprefix("network."): buffer for name, buffer in tensors.items()}
    make = factored_updates if has_factors(config) else joint_updates
    for parameter, update in zip(parameters, make(config, coefficients, parameters)):
        mean, width, spread = start_of(parameter)
        count = math.prod(parameter.shape)
        start = np.full(count, mean, np.float32)
        if width:
            start = uniform(config["seed"], ["network", parameter.name], count) * np.float32(width)
        found[parameter.name] = (start + update.reshape(-1) * np.float32(spread)).reshape(parameter.shape)
    return found


def joint_updates(
    config: Mapping[str, Any], coefficients: np.ndarray, parameters: Sequence[Parameter]
) -> list[np.ndarray]:
    """The updates of all parameters, of one sequence."""
    sizes = [math.prod(each.shape) for each in parameters]
    size = sum(sizes)
    if config["peft_type"] == "MCNC":
        flat = manifold(config, coefficients, size, 1.0, "weight")
    else:
        flat = from_one_vector(config, ["network", config["basis"]], coefficients, size, pranc_factor(config, size))
    return np.split(flat, np.cumsum(sizes)[:-1])


def has_factors(config: Mapping[str, Any]) -> bool:
    return config["peft_type"] == "NOLA" or config.get("apply_to") == "factors"


def matrix_of(parameter: Parameter) -> tuple[int, int] | None:
    """(fan_out, fan_in) of a parameter whose update has factors."""
    shape = parameter.shape
    if parameter.kind == "linear":
        fans = shape[0], math.prod(shape[1:])
    elif parameter.kind == "Conv1D":
        fans = shape[1], shape[0]
    else:
        fans = math.prod(shape[:-1]), shape[-1]
    return fans if min(fans) > 1 else None


def network_lengths(config: Mapping[str, Any], parameters: Sequence[Parameter]) -> list[int]:
    """How many coefficients of every kind a network has."""
    if not has_factors(config):
        return lengths(config, Module("", sum(math.prod(each.shape) for each in parameters), 1))
    sizes_A, sizes_B, vectors = factor_sizes(config, parameters)
    if config["peft_type"] == "NOLA":
        num_A, num_B = lengths(config, Module("", 1, 1))
        return [len(sizes_A) * num_A, len(sizes_B) * num_B, *([num_B] if vectors else [])]
    d = chunk_size(config)
    chunks = sum(-(-size // d) for size in (sum(sizes_A), sum(sizes_B), vectors))
    return [chunks * config["k"], chunks]


def factor_sizes(config: Mapping[str, Any], parameters: Sequence[Parameter]) -> tuple[list[int], list[int], int]:
    """Numbers in A and in B of every matrix, and in all vectors together."""
    fans = [each for parameter in parameters if (each := matrix_of(parameter))]
    vectors = sum(math.prod(each.shape) for each in parameters if not matrix_of(each))
    return (
        [min(config["r"], *each) * each[1] for each in fans],
        [min(config["r"], *each) * each[0] for each in fans],
        vectors,
    )


def factored_updates(
    config: Mapping[str, Any], coefficients: np.ndarray, parameters: Sequence[Parameter]
) -> Iterator[np.ndarray]:
    """The update of every parameter: a product of factors for a matrix."""
    seed, names = config["seed"], [each.name for each in parameters if matrix_of(each)]
    sizes_A, sizes_B, vectors = factor_sizes(config, parameters)
    if config["peft_type"] == "MCNC":
        chunks = [-(-size // chunk_size(config)) for size in (sum(sizes_A), sum(sizes_B), vectors)]
        own = np.split(coefficients, np.cumsum(chunks)[:-1] * (config["k"] + 1))
        all_A = manifold(config, own[0], sum(sizes_A), 1.0, "A")
        all_A = all_A + offset(seed, ["network", "mcnc", "A", "offset"], sum(sizes_A), math.sqrt(3))
        factors_A = np.split(all_A, np.cumsum(sizes_A)[:-1])
        factors_B = np.split(manifold(config, own[1], sum(sizes_B), 1.0, "B"), np.cumsum(sizes_B)[:-1])
        rest = manifold(config, own[2], vectors, 1.0, "weight") if vectors else np.zeros(0)
    else:
        num_A, num_B = lengths(config, Module("", 1, 1))
        own_A, own_B, own_rest = np.split(coefficients, [len(names) * num_A, len(names) * (num_A + num_B)])
        factors_A, factors_B = [], []
        for i, parameter in enumerate(each for each in parameters if matrix_of(each)):
            fan_out, fan_in = matrix_of(parameter) or (0, 0)
            r = min(config["r"], fan_out, fan_in)
            name = [] if config["share_basis"] else [parameter.name]
            stream_A, stream_B = ["network", "nola", "A", r, fan_in, *name], ["network", "nola", "B", fan_out, r, *name]
            factor_A = math.sqrt(3) * math.sqrt(math.sqrt(fan_in * r / num_A)) if scaled(config) else 1.0
            A = dense(seed, stream_A, own_A[i * num_A :][:num_A], r * fan_in, factor_A / math.sqrt(num_A))
            factors_A.append(A + offset(seed, [*stream_A, "offset"], r * fan_in, math.sqrt(3)))
            factor_B = math.sqrt(3 * fan_out * r / num_B) if scaled(config) else 1.0
            factors_B.append(
                dense(seed, stream_B, own_B[i * num_B :][:num_B], fan_out * r, factor_B / math.sqrt(num_B))
            )
        factor = math.sqrt(3 * vectors / num_B) if scaled(config) else 1.0
        rest = np.zeros(0)
        if vectors:
            rest = dense(seed, ["network", "nola", "vectors"], own_rest, vectors, factor / math.sqrt(num_B))
    place = 0
    for parameter in parameters:
        fans = matrix_of(parameter)
        if fans is None:
            size = math.prod(parameter.shape)
            yield rest[place : place + size]
            place += size
            continue
        r = min(config["r"], *fans)
        i = names.index(parameter.name)
        scale = math.sqrt(fans[1]) / r if scaled(config) else 1 / math.sqrt(r)
        matrix = scale * (factors_B[i].reshape(fans[0], r) @ factors_A[i].reshape(r, fans[1]))
        yield matrix.T if parameter.kind == "Conv1D" else matrix
