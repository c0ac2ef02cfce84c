"""Load a saved adapter in a process of its own and compare it with the model it was saved from.

``finetune_gpt2 --verify_adapters`` writes what the trained model computes and starts this; it is also the shortest
example of loading an adapter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

import peft_ext  # noqa: F401  (PEFT must know the methods before it meets a saved one)
from recipes.causal_lm import ModelArguments, load_model

EXPECTED = "expected.safetensors"
_NEW_TOKENS = 60


@dataclass
class ReloadArguments:
    """What is loaded."""

    adapter: str = field(metadata={"help": f"Folder of the adapter; {EXPECTED} lies beside it."})


@torch.no_grad()
def _compute(
    model: PreTrainedModel | PeftModel, ids: torch.Tensor, head: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Logits of a whole row, and the tokens written after its first ones."""
    ids = ids[None].to(model.device)
    start = ids[:, :head]
    written = model.generate(  # type: ignore[operator]
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad_token_id,
    )
    return {
        "logits": model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].cpu(),
        "written": written[0].cpu(),
    }


def verify_in_fresh_process(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, adapter: Path, base: ModelArguments
) -> None:
    """Have a fresh process load a saved adapter and compare; it prints what it finds.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        rows: Encoded examples to compare on.
        adapter: Folder the adapter was saved in.
        base: How the base model is loaded.

    Raises:
        subprocess.CalledProcessError: The loaded adapter computes something else.
    """
    model.eval()
    tensors = {}
    for index, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        head = max(1, row["labels"].count(-100))
        computed = _compute(model, ids, head, int(tokenizer.pad_token_id))
        for name, tensor in {"ids": ids, "head": torch.tensor(head), **computed}.items():
            tensors[f"{name}.{index}"] = tensor.contiguous()
    save_file(tensors, adapter.parent / EXPECTED, metadata={"device": model.device.type})
    command = [sys.executable, "-m", "recipes.reload_adapter", "--adapter", str(adapter)]
    for name, value in vars(base).items():
        command += [f"--{name}", value] if value is not None else []
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    # Equal to the bit only with as many threads as here.
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    sys.stdout.flush()
    subprocess.run(command, check=True, env={**os.environ, **environment})


def main() -> None:
    """Load, compare, merge, print."""
    parser = HfArgumentParser([ReloadArguments, ModelArguments])  # type: ignore[list-item]
    args, base = parser.parse_args_into_dataclasses()
    adapter = Path(args.adapter)
    with safe_open(adapter.parent / EXPECTED, "pt") as file:
        expected = {key: file.get_tensor(key) for key in file.keys()}
        device = file.metadata()["device"]
    model, tokenizer = load_model(base)
    adapted = PeftModel.from_pretrained(model, adapter).to(device).eval()
    rows = range(sum(key.startswith("ids.") for key in expected))
    inputs = [(expected[f"ids.{i}"], int(expected[f"head.{i}"]), int(tokenizer.pad_token_id)) for i in rows]
    loaded = [_compute(adapted, *each) for each in inputs]
    plain = adapted.merge_and_unload()  # type: ignore[operator]
    merged = [_compute(plain, *each) for each in inputs]

    print(f"\nFresh process: loaded {adapter}")
    differences = [float((loaded[i]["logits"] - expected[f"logits.{i}"]).abs().max()) for i in rows]
    same_text = all(torch.equal(loaded[i]["written"], expected[f"written.{i}"]) for i in rows)
    print(f"  logits: largest difference to the trained model {max(differences):.1e}; same text: {same_text}")
    differences = [float((merged[i]["logits"] - loaded[i]["logits"]).abs().max()) for i in rows]
    print(f"  merged into the base model: largest difference {max(differences):.1e}")
    for i in rows:
        _, head, _ = inputs[i]
        print(f"  prompt:  {tokenizer.decode(expected[f'written.{i}'][:head])!r}")
        for name, computed in (("adapter", loaded), ("merged", merged)):
            print(f"  {name + ':':8} {tokenizer.decode(computed[i]['written'][head:], skip_special_tokens=True)!r}")
    if not same_text:
        sys.exit(f"{adapter}: the loaded adapter does not write what the trained model wrote")


if __name__ == "__main__":
    main()
