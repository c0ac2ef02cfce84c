"""What a saved adapter or network is: its options, its size, and what would be drawn to use it."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import transformers
from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, _BaseAutoPeftModel

from ..checkpoint.identity import describe_shapes
from ..generators import Generator
from ..generators.linear import RandomBasis
from ..tuners.checkpointed import provenance_of
from ..tuners.config import SeededConfig
from ..tuners.surroundings import base_fingerprint
from .saved import Saved, unexplained

_HEADS = {"classifier", "score"}  # of the classifiers of transformers; their last layer has a row for every class
_UNTOLD = {
    "auto_mapping",
    "base_fingerprint",
    "fingerprint",
    "identity",
    "peft_version",
    "target_names",
    "target_shapes",
}


def inspect(saved: Saved) -> dict[str, Any]:
    """Describes a checkpoint.

    Returns:
        Values that JSON can hold, always under these names:

        - `kind` (`"adapter"` or `"network"`), `method`, `folder`, `base_model` (or null), `network` (or null);
        - `options`: the fields of the configuration by name, `generating`: names of those that make weights;
        - `coefficients`: their number, `vectors`: the lengths that they are cut into, smallest first,
          `coefficient_dtype`;
        - `bytes`: of the weights file;
        - `identity`: the hash of all that turns the coefficients into weights;
        - `modules`: the adapted modules, `{"out x in": number}`, and `names`: theirs, folded as in the file;
        - `beside`: names of other tensors in the file, `unexplained`: those that only a base model can tell about;
        - `drawn`: what using the checkpoint draws, a list of objects with `what`, `number` (of generators alike),
          `numbers` (frozen numbers) and `memory` (bytes in which they are kept; 0 if they are drawn at every use);
          and `drawn_exactly`: false if ranks differ between modules whose shapes the checkpoint does not tell.
    """
    config, drawn = saved.config, _drawn(saved)
    fields = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.name not in _UNTOLD}
    return {
        "kind": "network" if saved.is_network else "adapter",
        "method": config.method_name,
        "folder": str(saved.folder),
        "base_model": config.base_model_name_or_path,
        "network": saved.described.get("network"),
        "options": {name: _plain(value) for name, value in fields.items()},
        "generating": [name for name in config.generating() if name != "method"],
        "coefficients": sum(saved.sizes),
        "vectors": sorted(saved.sizes),
        "coefficient_dtype": saved.dtype,
        "bytes": saved.weights_path.stat().st_size,
        "identity": saved.identity["sha256"],
        "modules": {} if saved.is_network else dict(config.target_shapes),
        "names": [] if saved.is_network else list(config.target_names),
        "beside": sorted(saved.others),
        "unexplained": sorted(unexplained(saved)),
        "drawn": drawn,
        "drawn_exactly": saved.shapes_known or not getattr(config, "rank_pattern", None),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return value.value if hasattr(value, "value") else value


def _drawn(saved: Saved) -> list[dict[str, Any]]:
    config = saved.config
    if not isinstance(config, SeededConfig):
        return []
    if saved.is_network:
        size = sum(target.size for target in saved.targets)
        start = {"what": "start of the network", "number": 1, "numbers": size, "memory": 4 * size}
        return [start, *_drawn_by([filling.generator for filling in config.network_fillings(saved.targets)])]
    return _drawn_by([generator for target in saved.targets for generator in config.generators(target)])


def _drawn_by(generators: list[Generator]) -> list[dict[str, Any]]:
    """What generators draw, those that differ in their streams alone in one row; a shared tensor counts once."""
    rows: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for generator in generators:
        frozen = zip(generator.frozen, generator.frozen_sizes, generator.frozen_nbytes)
        new = [(size, nbytes) for each, size, nbytes in frozen if id(each) not in seen]
        seen |= {id(each) for each in generator.frozen}
        numbers, memory = (sum(each[i] for each in new) for i in (0, 1))
        if isinstance(generator, RandomBasis) and generator.streamed:
            numbers = generator.num_basis * generator.size
        row = rows.setdefault(_kind(generator), {"what": _kind(generator), "number": 0, "numbers": 0, "memory": 0})
        row["number"] += 1
        row["numbers"] += numbers
        row["memory"] += memory
    return list(rows.values())


def _kind(generator: Generator) -> str:
    again = ", drawn at every use" if isinstance(generator, RandomBasis) and generator.streamed else ""
    return f"{type(generator).__name__} of {generator.num_coefficients} x {generator.size}{again}"  # type: ignore[attr-defined]


def load_with_base(saved: Saved, base: str) -> list[str]:
    """Loads the base model and then the adapter into it, which verifies all of it.

    Args:
        base: a folder or the id of a model of transformers on the hub.

    Returns:
        What was verified or found, a sentence each.

    Raises:
        ValueError: the checkpoint is a network, which has no base model, or does not fit the base model.
        OSError: there is no such base model.
    """
    if saved.is_network:
        raise ValueError("`base` must be None for a network from a seed, which has no base model.")
    model = model_class(saved).from_pretrained(base, **head_options(saved))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(model, str(saved.folder))
        except RuntimeError as error:  # what torch raises for modules that are saved whole, of other shapes
            raise ValueError(str(error)[:500]) from error
    told = [
        f"It fits {type(model).__name__} of {base!r}: {describe_shapes(saved.config.target_shapes)} by their names."
    ]
    changed = [str(each.message) for each in caught if "The base model has other weights" in str(each.message)]
    return told + (changed or [_compared(saved.config.base_fingerprint, loaded)])


def _compared(saved: str | None, loaded: PeftModel) -> str:
    """What can be told of base weights that are not known to be others than those of a saved fingerprint."""
    none = "float16, quantized and sharded weights have none: whether they are the same cannot be told."
    if saved is None:
        return f"No fingerprint of the base model's weights was saved; {none}"
    provenance = provenance_of(loaded, loaded.active_adapter)
    if provenance is None or base_fingerprint(provenance.layers) != saved:
        return (
            f"The weights of this base model have no fingerprint to compare with the saved one; {none} Give `base` in "
            "float32 or bfloat16 to compare them."
        )
    return f"The base model has the weights that it was trained on, fingerprint {saved}."


def head_options(saved: Saved) -> dict[str, Any]:
    """What gives a base model as many classes as the head has that was saved whole, if one was."""
    modules = set(getattr(saved.config, "modules_to_save", None) or ()) & _HEADS
    heads = [tensor for name, tensor in saved.others.items() if modules & set(name.split("."))]
    return {"num_labels": len(heads[-1]), "ignore_mismatched_sizes": True} if heads else {}


def model_class(saved: Saved) -> Any:
    """The class of transformers that loads the base model: that of the task, or the one that was adapted."""
    task, mapping = saved.config.task_type, saved.config.auto_mapping or {}
    for each in _BaseAutoPeftModel.__subclasses__():
        if (
            task is not None
            and each._target_peft_class is MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task)
            and each._target_class
        ):
            return each._target_class
    found = getattr(transformers, str(mapping.get("base_model_class")), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModel
