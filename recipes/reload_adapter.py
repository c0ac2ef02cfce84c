"""Load a saved adapter in a process of its own and compare it with the model it was saved from.

``--verify_adapters`` of the recipes writes what the trained model computes and starts this; it is also the shortest
example of loading an adapter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import HfArgumentParser

import peft_ext  # PEFT must know the methods before it meets a saved one
from recipes.support import inputs
from recipes.tasks import causal_lm, image_classification

EXPECTED = "expected.safetensors"
# Each has ModelArguments, load_saved, compute and describe.
_KINDS: dict[str, Any] = {"causal_lm": causal_lm, "image_classification": image_classification}


@dataclass
class ReloadArguments:
    """What is loaded."""

    kind: Literal["causal_lm", "image_classification"] = field(metadata={"help": "What the base model does."})
    adapter: str = field(metadata={"help": f"Folder of the adapter; {EXPECTED} lies beside it."})


def verify_in_fresh_process(
    model: PeftModel,
    processor: Any,
    rows: Sequence[dict[str, torch.Tensor]],
    adapter: Path,
    base: inputs.ModelArguments,
) -> None:
    """Have a fresh process load a saved adapter and compare; it prints what it finds.

    Args:
        model: The trained model.
        processor: Its tokenizer or image processor.
        rows: Examples to compare on.
        adapter: Folder the adapter was saved in.
        base: How the base model is loaded.

    Raises:
        subprocess.CalledProcessError: The loaded adapter computes something else.
    """
    kind = type(base).__module__.rpartition(".")[-1]
    model.eval()
    tensors = {}
    for index, row in enumerate(rows):
        logits, output = _KINDS[kind].compute(model, processor, row)
        for name, tensor in {**row, "logits": logits, "output": output}.items():
            tensors[f"{index}.{name}"] = tensor.contiguous()
    save_file(tensors, adapter.parent / EXPECTED, metadata={"device": model.device.type})
    command = [sys.executable, "-m", "recipes.reload_adapter", "--kind", kind, "--adapter", str(adapter)]
    for name, value in vars(base).items():
        command += [f"--{name}", str(value)] if value is not None else []
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    # Equal to the bit only with as many threads as here.
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    sys.stdout.flush()
    subprocess.run(command, check=True, env={**os.environ, **environment})


def main() -> None:
    """Load, compare, merge, print."""
    flags = sys.argv[1:]
    args, flags = HfArgumentParser(ReloadArguments).parse_args_into_dataclasses(  # type: ignore[arg-type]
        flags, return_remaining_strings=True
    )
    kind = _KINDS[args.kind]
    (base,) = HfArgumentParser(kind.ModelArguments).parse_args_into_dataclasses(flags)
    adapter = Path(args.adapter)
    rows: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(adapter.parent / EXPECTED, "pt") as file:
        for key in sorted(file.keys()):
            index, _, name = key.partition(".")
            rows.setdefault(index, {})[name] = file.get_tensor(key)
        device = file.metadata()["device"]
    model, processor = kind.load_saved(base, adapter)
    adapted = PeftModel.from_pretrained(model, adapter).to(device).eval()
    loaded = [kind.compute(adapted, processor, row) for row in rows.values()]
    plain, merged = adapted, []
    if not isinstance(adapted.base_model, peft_ext.VisualPromptModel):  # prompts are no weights
        plain = adapted.merge_and_unload()  # type: ignore[operator]
        merged = [kind.compute(plain, processor, row) for row in rows.values()]

    print(f"\nFresh process: loaded {adapter}")
    difference = max(float((logits - row["logits"]).abs().max()) for (logits, _), row in zip(loaded, rows.values()))
    same = all(torch.equal(output, row["output"]) for (_, output), row in zip(loaded, rows.values()))
    print(f"  logits: largest difference to the trained model {difference:.1e}; same {kind.OUTPUT}: {same}")
    if merged:
        difference = max(float((after - before).abs().max()) for (after, _), (before, _) in zip(merged, loaded))
        print(f"  merged into the base model: largest difference {difference:.1e}")
    for i, (row, (_, from_adapter)) in enumerate(zip(rows.values(), loaded)):
        print(f"  adapter: {kind.describe(plain, processor, row, from_adapter)}")
        if merged:
            print(f"  merged:  {kind.describe(plain, processor, row, merged[i][1])}")
    if not same:
        sys.exit(f"{adapter}: the loaded adapter does not give the {kind.OUTPUT} that the trained model gave")


if __name__ == "__main__":
    main()
