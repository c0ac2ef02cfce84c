"""Loads a saved adapter in a process of its own and compares it with the model it was saved from.

``--verify_adapters`` of the recipes writes what the trained model computes and starts this; it is also the shortest
example of loading an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import HfArgumentParser

import peft_ext  # PEFT must know the methods before it meets a saved one
from recipes.support.arguments import run_main
from recipes.tasks.verification import EXPECTED, KINDS, read_expected


@dataclass
class ReloadArguments:
    """What is loaded."""

    kind: Literal["causal_lm", "image_classification"] = field(metadata={"help": "What the base model does."})
    adapter: str = field(metadata={"help": f"Folder of the adapter; {EXPECTED} lies beside it."})


def main(argv: Sequence[str]) -> None:
    """Loads the adapter, compares it, merges it, and prints what it found."""
    args, flags = HfArgumentParser(ReloadArguments).parse_args_into_dataclasses(  # type: ignore[arg-type]
        list(argv), return_remaining_strings=True
    )
    kind, adapter = KINDS[args.kind], Path(args.adapter)
    (base,) = HfArgumentParser(kind.ModelArguments).parse_args_into_dataclasses(flags)
    rows, device = read_expected(adapter)
    model, processor = kind.load_saved(base, adapter)
    adapted = PeftModel.from_pretrained(model, adapter).to(device).eval()
    loaded = [kind.compute(adapted, processor, row) for row in rows]
    plain, merged = adapted, []
    visual = isinstance(adapted.base_model, peft_ext.VisualPromptModel)
    if not visual and not adapted.active_peft_config.is_prompt_learning:  # prompts are no weights
        plain = adapted.merge_and_unload()  # type: ignore[operator]
        merged = [kind.compute(plain, processor, row) for row in rows]

    print(f"\nFresh process: loaded {adapter}")
    difference = max(float((logits - row["logits"]).abs().max()) for (logits, _), row in zip(loaded, rows))
    same = all(torch.equal(output, row["output"]) for (_, output), row in zip(loaded, rows))
    print(f"  logits: largest difference to the trained model {difference:.1e}; same {kind.OUTPUT}: {same}")
    if merged:
        difference = max(float((after - before).abs().max()) for (after, _), (before, _) in zip(merged, loaded))
        print(f"  merged into the base model: largest difference {difference:.1e}")
    for i, (row, (_, from_adapter)) in enumerate(zip(rows, loaded)):
        print(f"  adapter: {kind.describe(plain, processor, row, from_adapter)}")
        if merged:
            print(f"  merged:  {kind.describe(plain, processor, row, merged[i][1])}")
    if not same:
        sys.exit(f"{adapter}: the loaded adapter does not give the {kind.OUTPUT} that the trained model gave")


if __name__ == "__main__":
    run_main(main)
