"""What noise on the last task's images does to learners of tasks in turn, beside random noise of the same size.

    python -m benchmarks run brainwash           # needs no hub
    python -m benchmarks report brainwash

An evaluation of robustness. Learners of `recipes.learn_in_turn` learn all tasks but the last one. Then noise, at most a
share of the range of pixels, is put on the training images of the last task, whose labels stay right, and that is
learned as usual. An attacker makes the noise for each learner and seed with the weights at hand, so that a step on
these images raises the loss on earlier tasks as much as possible; see `poisoning.py`. Adds a line a training to
`brainwash.jsonl`; those that are there are not done again. Flags that are not listed go to the recipe, such as
--learners, --seeds and --tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import HfArgumentParser

from peft_ext.presentation import spread
from recipes.continual.learners import Learner
from recipes.learn_in_turn import LearnInTurn
from recipes.support.arguments import UserError, hint, run_main
from recipes.support.runs import open_recipe

from . import lines
from .poisoning import NOISES, AttackArguments, Row, Victim
from .sources import digest_of, source_entry

FILE = "brainwash.jsonl"
KNOWN_SOURCE = "2949175f01fd"  # of the lines that do not say theirs


@dataclass
class Arguments:
    """What is measured."""

    bounds: list[float] = field(
        default_factory=lambda: [0.1, 0.3],
        metadata={"help": "What the noise changes a pixel by at most, as a share of the range of pixels."},
    )
    noises: list[str] = field(
        default_factory=lambda: list(NOISES),
        metadata={"help": "; ".join(f"{name}: {text}" for name, text in NOISES.items()) + "."},
    )
    output: str = field(default=str(lines.RESULTS), metadata={"help": "Folder of the file with the results."})

    def check(self) -> None:
        """Raises a UserError for what cannot be."""
        for bound in self.bounds:
            if not 0 < bound <= 1:
                raise UserError(f"bounds: {bound:g}; noise is a share of the range of pixels, above 0 and at most 1")
        for name in self.noises:
            if name not in NOISES:
                raise UserError(f"noises: there is no {name!r}; there are {', '.join(NOISES)}{hint(name, NOISES)}")


def source_of(recipe: LearnInTurn) -> str:
    """Returns a digest of network and images."""
    weights: list[torch.Tensor] = []
    # The quickstart's network is trained on every machine anew, and its last digits differ.
    if not recipe.quickstart.digits:
        named = recipe.problem.fresh(0).named_parameters()
        # The head is drawn anew with every seed.
        weights = [each for name, each in named if not each.requires_grad and ".original_module." not in name]
    splits: Any = [*recipe.problem.train, *recipe.problem.test]
    return digest_of(weights, *splits)


def measure(
    recipe: LearnInTurn, learner: Learner, seed: int, args: Arguments, attack: AttackArguments, command: Sequence[str]
) -> None:
    """Adds the lines of a learner and a seed that are not in the file yet."""
    file, training, comparison = Path(args.output) / FILE, recipe.training, recipe.comparison
    setting = {
        "tasks": recipe.problem.names,
        "adapter": comparison.adapter,
        "memory_samples": comparison.memory_samples,
        "epochs": training.num_train_epochs,
        "max_steps": training.max_steps,
        "rate": training.learning_rate,
        "batch": training.per_device_train_batch_size,
        **source_entry(source_of(recipe), KNOWN_SOURCE),
    }
    options = {"kind": learner.kind, "winners": learner.winners, **learner.memory}
    protects = bool(learner.memory.get("energy") or learner.memory.get("elastic"))
    victim: Victim | None = None
    with ExitStack() as stack:
        for noise, bound in [("none", 0.0), *((noise, bound) for bound in args.bounds for noise in args.noises)]:
            if noise == "aware" and not protects:
                continue
            what = {"learner": learner.label, "noise": noise, "bound": bound, "attack": attack.settings(noise)}
            identity = {**what, "seed": seed, "options": options, "setting": setting}
            if lines.find(file, identity) is not None:
                continue
            victim = victim or Victim(recipe.turns, learner, seed, stack)
            row = {**identity, **victim.measure(noise, bound, attack), **lines.provenance(command)}
            lines.append(file, row)
            text = "{learner}, seed {seed}, {noise} {bound:g}: backward transfer {backward_transfer:.1f}"
            print(text.format(**row), flush=True)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Returns a table of lines for everything that was learned: means and deviations over seeds."""
    found = []
    for text, of_setting in lines.apart(rows, "setting").items():
        title = f"Noise on {of_setting[0]['setting']['tasks'][-1]}"
        caption = "Fall: backward transfer without noise, less that with it, from the same weights."
        table = Table(title=", ".join(filter(None, [title, text])), caption=caption, title_justify="left")
        for heading in (
            "learner",
            "noise",
            "bound",
            "attack",
            "runs",
            "size",
            "backward transfer",
            "fall",
            "last task",
        ):
            table.add_column(heading, justify="left" if heading in ("learner", "noise") else "right")
        groups: dict[tuple[Any, ...], dict[int, Row]] = {}
        for row in of_setting:
            attack = "{steps} x {inner_steps}".format(**row["attack"]) if row["attack"] else ""
            groups.setdefault((row["learner"], row["noise"], row["bound"], attack), {})[row["seed"]] = row
        for (learner, noise, bound, attack), seeds in groups.items():
            clean = groups.get((learner, "none", 0.0, ""), {})
            transfer = {seed: row["backward_transfer"] for seed, row in seeds.items()}
            falls = [clean[seed]["backward_transfer"] - value for seed, value in transfer.items() if seed in clean]
            table.add_row(
                learner,
                noise,
                f"{bound:g}" if bound else "",
                attack,
                str(len(seeds)),
                spread([row["noise_size"] for row in seeds.values()], 2) if bound else "",
                spread(list(transfer.values()), 1),
                spread(falls, 1) if bound else "",
                spread([row["last_task"] for row in seeds.values()], 1),
            )
        found.append(table)
    return found


def main(argv: Sequence[str]) -> None:
    """Measures what is not in the file yet."""
    types: Any = [Arguments, AttackArguments]
    parser = HfArgumentParser(types, prog="python -m benchmarks run brainwash", allow_abbrev=False)
    parsed: Any = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    args, attack, rest = parsed
    args.check()
    attack.check()
    flags = ["--output_dir", "outputs/brainwash", *rest]
    recipe = open_recipe(LearnInTurn, flags)
    if recipe.tasks.swiss_roll is not None:
        raise UserError("swiss_roll: the noise is put on images, and these are points; leave it out")
    recipe.make(Path(str(recipe.training.output_dir)))
    recipe.load()
    recipe.try_out()
    for seed in recipe.seeds:
        for learner in recipe.learners.values():
            if learner.kind == "together":
                print(f"{learner.label}: left out, it learns no task last", flush=True)
                continue
            measure(recipe, learner, seed, args, attack, lines.command("brainwash", argv))


if __name__ == "__main__":
    run_main(main)
