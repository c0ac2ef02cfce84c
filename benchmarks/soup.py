"""Soups of few-shot adapters: the best single one, the mean, the greedy and the learned soup; again without the best.

    python -m benchmarks run soup --model_name_or_path <DINOv2 ViT-S> --dataset_name <CIFAR-10>
    python -m benchmarks report soup

Nine adapters of a method, three seeds at three rates, are trained on ten images of every class, and mixed on ten
others; again without the half of them that is best on those (the test of robustness of Li et al., arXiv 2407.03641).
All that with three draws of images. Adds a line a soup to `soup.jsonl`; what is there, and adapters that are in
`--adapters`, are not made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table
from transformers import HfArgumentParser, TrainingArguments

from peft_ext.adapters.soup import best_adapter
from peft_ext.presentation import spread
from recipes.support.arguments import UserError, run_main
from recipes.support.methods import HEAD, Method, folder_name, parse_methods
from recipes.support.reporting import RunResult
from recipes.tasks import image_classification
from recipes.tasks.image_classification import ImageTask
from recipes.tasks.soups import KINDS, SoupArguments, Soups, held_out, mix
from recipes.tasks.training import trainings

from . import lines
from .quality.runs import config_digest
from .sources import source_entry, source_of

FILE = "soup.jsonl"
KNOWN_SOURCE = "fbedbc0a8076"  # of the lines that do not say theirs
SINGLES = "mean of the single ones"
POOLS: dict[str, Callable[[list[str]], list[str]]] = {
    "all": lambda names: names,
    "worse half": lambda names: names[len(names) // 2 :],
}
"""What is chosen of the adapters, which come in the order of their losses on the held-out images."""


@dataclass
class Arguments:
    """What is measured."""

    model_name_or_path: str = field(metadata={"help": "DINOv2 ViT-S, or another backbone or image classifier."})
    dataset_name: str = field(metadata={"help": "CIFAR-10, or other images with the splits train and test."})
    methods: list[str] = field(
        default_factory=lambda: [
            "{name: nola, label: NOLA, r: 8, num_basis: 384, alpha: 8, target_modules: [q_proj, v_proj]}",
            "{name: pranc, label: PRANC, num_coefficients: 18432, target_modules: [q_proj, v_proj]}",
        ],
        metadata={"help": "YAML mappings, as in the recipes."},
    )
    rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 5e-3], metadata={"help": "Learning rates."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the trainings."})
    data_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds that images are drawn with."}
    )
    shots: int = field(default=10, metadata={"help": "Images of a class to train on."})
    held_out: int = field(default=10, metadata={"help": "Images of a class to mix and choose on."})
    eval_samples: int = field(default=1000, metadata={"help": "Images of the test split that are scored."})
    epochs: int = field(default=10, metadata={"help": "Passes of a training."})
    image_size: int = field(default=84, metadata={"help": "Pixels of an edge."})
    adapters: str = field(default="outputs/soup", metadata={"help": "Folder of the adapters."})
    output: str = field(default=str(lines.RESULTS), metadata={"help": "Folder of the file with the results."})

    @property
    def budget(self) -> dict[str, Any]:
        """What tells lines apart beside method, images, kind, and where they are others, model and data."""
        names = ("rates", "seeds", "shots", "held_out", "eval_samples", "epochs", "image_size")
        return {name: getattr(self, name) for name in names}


def load(args: Arguments) -> list[ImageTask]:
    """Returns the task with every draw of images."""
    training = TrainingArguments(
        output_dir=args.adapters,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=50,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],  # PEFT's wrapper hides them from the Trainer
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    source = image_classification.ModelArguments(args.model_name_or_path, image_size=args.image_size)
    data_args = image_classification.DataArguments(
        args.dataset_name, eval_split="test", shots=args.shots, max_eval_samples=args.eval_samples
    )
    data = image_classification.load_image_data(data_args)
    classifier = image_classification.load_classifier(source, data.labels)
    return [
        ImageTask(source, classifier.processor, training, classifier, data, data_seed) for data_seed in args.data_seeds
    ]


def trained(task: ImageTask, methods: Sequence[Method], seeds: Sequence[int], folder: Path) -> dict[str, RunResult]:
    """Returns what the trainings gave, by the names of their folders; those that are there are not done again."""
    found = {}
    for name, run in trainings({f"-data{task.data_seed}": task}, methods, seeds).items():
        try:
            found[name] = RunResult.load(folder / name)
        except FileNotFoundError:
            found[name] = run(folder / name)
            found[name].save(folder / name)
    return found


def adapters_folder(args: Arguments, task: ImageTask, method: Method, source: str) -> Path:
    """Returns the folder of the adapters of a method, which no other training or score shares.

    Names of methods, draws of images and seeds are those of the folders in it.

    Args:
        args: what is measured.
        task: what the adapters are trained on.
        method: at any of its rates.
        source: tells base model and data from others.
    """
    budget = f"shots{args.shots}-epochs{args.epochs}-size{args.image_size}-scored{args.eval_samples}"
    return Path(args.adapters) / f"{budget}-{source}-{config_digest(task, method)}"


def measure(
    args: Arguments, task: ImageTask, label: str, methods: Sequence[Method], source: str, command: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yields the lines of a method and a draw of images, after measuring those that are not in the file.

    Args:
        args: what is measured.
        task: has the draw.
        label: of the method.
        methods: the method at each of its rates.
        source: tells base model and data from others, whatever is drawn of the data.
        command: what is run, for the lines.
    """
    file, folder = Path(args.output) / FILE, adapters_folder(args, task, methods[0], source)

    def line(pool: str, kind: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        identity = {"method": label, "options": methods[0].options, "data_seed": task.data_seed, "pool": pool}
        identity |= {"kind": kind, "budget": {**args.budget, **source_entry(source, KNOWN_SOURCE)}}
        if (row := lines.find(file, identity)) is None:
            row = {**identity, **work(), **lines.provenance(command)}
            lines.append(file, row)
        return row

    def singles() -> dict[str, Any]:
        runs = trained(task, methods, args.seeds, folder)
        places = [folder / name / "adapter" for name in runs]
        losses = best_adapter(task.fresh_model(), places, held_out(task, args.held_out)).losses
        each: dict[str, dict[str, Any]] = {
            name: {"held_out_loss": loss, "loss": run.validation_loss, **run.metrics}
            for (name, run), loss in zip(runs.items(), losses)
        }
        means = {key: mean(values[key] for values in each.values()) for key in ("loss", "accuracy")}
        return {"adapters": len(each), **means, "singles": each}

    first = line("all", SINGLES, singles)
    yield first
    names = sorted(first["singles"], key=lambda name: first["singles"][name]["held_out_loss"])

    def soup(pool: str, kind: str, chosen: list[str]) -> dict[str, Any]:
        trained(task, methods, args.seeds, folder)
        place = folder / (folder_name(f"{label} {pool} {kind}") + f"-data{task.data_seed}")
        found = mix(task, label, kind, chosen, args.held_out, args.seeds[0], place)
        scores = {"loss": found.validation_loss, **found.metrics, "seconds": found.seconds}
        return {"adapters": len(chosen), **scores}

    for pool, choose in POOLS.items():
        for kind in KINDS:
            yield line(pool, kind, partial(soup, pool, kind, choose(names)))


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Returns a table of the lines of every budget."""
    return [_table(group, budget) for budget, group in lines.apart(rows, "budget").items()]


def _table(rows: Sequence[dict[str, Any]], budget: str) -> Table:
    """Returns a table of means and deviations over the draws of images, and of the gain in each draw."""
    title = "Soups of few-shot adapters, scored on the test images"
    last = {row["method"]: row["options"] for row in rows}
    kept = [row for row in rows if row["options"] == last[row["method"]]]
    note = f"{len(rows) - len(kept)} lines of other options are left out" if len(kept) < len(rows) else None
    found = Table(title=", ".join(filter(None, [title, budget])), caption=note, title_justify="left")
    for heading in ("method", "of", "what", "adapters", "draws", "accuracy", "more than the best single one", "loss"):
        found.add_column(heading, justify="left" if heading in ("method", "of", "what") else "right")
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in kept:
        groups.setdefault((row["method"], row["pool"], row["kind"]), {})[str(row["data_seed"])] = row
    for (method, pool, kind), draws in groups.items():
        best = groups.get((method, pool, "best single"), {})
        gains = [row["accuracy"] - best[draw]["accuracy"] for draw, row in draws.items() if draw in best]
        values = list(draws.values())
        scores = [spread([row[name] for row in values], digits) for name, digits in (("accuracy", 2), ("loss", 3))]
        found.add_row(
            method, pool, kind, str(values[-1]["adapters"]), str(len(values)), scores[0], spread(gains, 2), scores[1]
        )
    return found


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the file yet."""
    parser = HfArgumentParser([Arguments], prog="python -m benchmarks run soup")  # type: ignore[list-item]
    (args,) = parser.parse_args_into_dataclasses(list(argv))
    soups = Soups(SoupArguments(True, args.rates, args.held_out), args.seeds, parse_methods(args.methods, [HEAD]))
    for label, reason in soups.refused.items():
        raise UserError(f"methods: {label} cannot be mixed: {reason}")
    tasks = load(args)
    source = source_of(dataclasses.replace(tasks[0], data_seed=0))  # of one draw, whichever are asked for
    for task in tasks:
        soups.check(task)
        for label, methods in soups.methods.items():
            for row in measure(args, task, label, methods, source, lines.command("soup", argv)):
                print("{method}, images {data_seed}, {pool}, {kind}: {accuracy:.1f}".format(**row), flush=True)


if __name__ == "__main__":
    run_main(main)
