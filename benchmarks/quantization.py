"""What adapters lose when their coefficients are saved in fewer bits: loss and scores in float32, int8 and int4.

Run it after a recipe, with the recipe's name and the very arguments that the recipe had:

    python -m recipes.finetune_vit --preset dinov2_cifar10 --output_dir outputs/dinov2 ...
    python -m benchmarks.quantization finetune_vit --preset dinov2_cifar10 --output_dir outputs/dinov2 ...

Every adapter of ours in the output folder is saved again in each type, loaded into a fresh base model, and evaluated as
the recipe evaluates it. Prints a table of means and standard deviations over seeds, and appends a JSON line for every
adapter and type to `--results`, the last argument if it is given.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table

from peft_ext.presentation import spread
from recipes.finetune_gpt2 import FinetuneGPT2
from recipes.finetune_vit import FinetuneViT
from recipes.support.arguments import parse_arguments
from recipes.support.reporting import RunResult
from recipes.support.runs import argument_types
from recipes.tasks.base import Task
from recipes.tasks.training import make_trainer

from . import lines

RECIPES: dict[str, Any] = {recipe.name: recipe for recipe in (FinetuneGPT2, FinetuneViT)}
DTYPES = ("float32", "int8", "int4")


def tasks_of(recipe: Any) -> Mapping[str, Task]:
    """The tasks of a recipe by what tells their folders apart."""
    if isinstance(recipe, FinetuneViT):
        return {f"-data{task.data_seed}": task for task in recipe.tasks}
    return {"": recipe.task}


def evaluated(task: Task, adapter: Path, label: str, seed: int) -> Iterator[dict[str, Any]]:
    """A row for every type: what the adapter takes on disk, what saving changed, its loss and scores."""
    for dtype in DTYPES:
        model = PeftModel.from_pretrained(task.fresh_model(), str(adapter))  # type: ignore[arg-type]
        config: Any = model.peft_config["default"]
        config.coefficient_dtype = dtype
        with tempfile.TemporaryDirectory() as folder:
            task.save(model, Path(folder))
            model = PeftModel.from_pretrained(task.fresh_model(), folder).eval()  # type: ignore[arg-type]
            size = (Path(folder) / task.weights_file).stat().st_size
            loaded: Any = model.peft_config["default"]
        head = sum(value.nbytes for name, value in model.named_parameters() if ".modules_to_save." in name)
        evaluation = make_trainer(task, model, task.training).evaluate()
        result = RunResult(label, seed)
        task.score(model, evaluation, result)
        row = {
            "method": label,
            "seed": seed,
            "dtype": dtype,
            "bytes": size,
            "head_bytes": head,
            "change": loaded.coefficient_error or 0.0,
        }
        yield row | {"loss": evaluation[task.loss], **result.metrics}


def main(argv: list[str]) -> None:
    """Evaluates all adapters of a run."""
    name, *flags = argv
    results = Path(flags.pop(flags.index("--results") + 1)) if "--results" in flags else None
    flags = [flag for flag in flags if flag != "--results"]
    recipe_class = RECIPES[name]
    provenance = lines.provenance(lines.command("quantization", argv))
    recipe = recipe_class(*parse_arguments(name, argument_types(recipe_class), flags))
    recipe.check()
    recipe.load()
    recipe.training.label_names = ["labels"]  # hidden from the Trainer by PEFT's wrapper
    console, rows = Console(width=140), []
    for method in recipe.methods:
        for mark, task in tasks_of(recipe).items():
            for seed in recipe.seeds:
                adapter = Path(recipe.training.output_dir) / f"{method.folder}{mark}-seed{seed}" / "adapter"
                if not peft_ext_adapter(adapter):
                    continue
                for row in evaluated(task, adapter, method.label, seed):
                    rows.append({"task": Path(recipe.training.output_dir).name, "data": mark.removeprefix("-"), **row})
                    print(rows[-1], file=sys.stderr, flush=True)
                    if results is not None:
                        lines.append(results, {**rows[-1], **provenance})
    metrics = [key for key in rows[0] if key not in ("task", "data", "method", "seed", "dtype")]
    table = Table("method", "saved in", *metrics)
    for label in dict.fromkeys(row["method"] for row in rows):
        for dtype in DTYPES:
            chosen = [row for row in rows if row["method"] == label and row["dtype"] == dtype]
            digits = {"bytes": 0, "head_bytes": 0, "change": 4, "loss": 4}
            cells = [spread([row[key] for row in chosen], digits.get(key, 2)) for key in metrics]
            table.add_row(label, dtype, *cells)
    console.print(table)


def peft_ext_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter whose coefficients have a type."""
    file = folder / "adapter_config.json"
    return file.is_file() and "coefficient_dtype" in json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
