"""Adapts a causal language model to a text task with NOLA, beside any other PEFT method.

``python -m recipes.finetune_gpt2`` runs the quickstart, which needs no hub, and flags such as ``--output_dir`` change
it; with ``--model_name_or_path`` or ``--dataset_name`` it is a task of your own. ``--help`` lists the arguments. It
runs under ``accelerate launch -m`` unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import TrainingArguments

from recipes.support.arguments import run_main
from recipes.support.methods import Method, MethodArguments, parse_methods
from recipes.support.reporting import RunResult, by_label, plot_losses, write_report
from recipes.support.runs import Recipe, RunArguments, run_recipe
from recipes.tasks import causal_lm, restaurants
from recipes.tasks.causal_lm import TextTask
from recipes.tasks.toys import refuse_other_inputs
from recipes.tasks.training import UNTRAINED, evaluate_untrained, trainings, try_out


@dataclass
class FinetuneGPT2(Recipe[RunResult]):
    """Writing targets after prompts, with one method after the other."""

    model: causal_lm.ModelArguments
    data: causal_lm.DataArguments
    generation: causal_lm.GenerationArguments
    comparison: MethodArguments
    run: RunArguments
    quickstart: restaurants.QuickstartArguments
    training: TrainingArguments
    methods: list[Method] = field(init=False)
    task: TextTask = field(init=False)

    name = "finetune_gpt2"
    result = RunResult

    def check(self) -> None:
        self.methods = parse_methods(self.comparison.methods, reserved=[UNTRAINED])
        for method in self.methods:
            causal_lm.check_method(method, self.seeds[0], self.training.label_smoothing_factor)
        if self.quickstart.restaurants:
            refuse_other_inputs("restaurants", self.model, self.data)

    def make(self, folder: Path) -> None:
        if self.quickstart.restaurants:
            restaurants.prepare(folder, self.model, self.data, self.training.use_cpu)

    def load(self) -> None:
        base, tokenizer = causal_lm.load_model(self.model)
        data = causal_lm.load_text_data(self.data, tokenizer)
        longest = self.data.max_source_length
        self.task = TextTask(self.model, tokenizer, self.training, base, data, self.generation, longest)

    def try_out(self) -> None:
        new_tokens = self.generation.max_new_tokens if self.task.data.prompts else 0
        causal_lm.check_lengths(self.task.base, self.data, self.methods, new_tokens)
        for method in self.methods:
            try_out(self.task, method, self.seeds[0], self.comparison.flat_sigma)

    def runs(self) -> dict[str, Callable[[Path], RunResult]]:
        untrained = partial(evaluate_untrained, self.task, self.methods[0])
        options = self.comparison
        trained = trainings({"": self.task}, self.methods, self.seeds, options.verify_adapters, options.flat_sigma)
        return {UNTRAINED: untrained, **trained}

    def report(self, results: list[RunResult], folder: Path) -> list[str]:
        plots = {"loss.png": partial(plot_losses, results, unit="target token")}
        return write_report(results, folder, samples(self.task, results), plots)


def samples(task: TextTask, results: Sequence[RunResult], count: int = 3) -> str:
    """Returns Markdown with the first outputs of every method's first seed below a reference."""
    lines = []
    for index, (prompt, references) in enumerate(zip(task.data.prompts[:count], task.data.references)):
        lines.append(f"Prompt: {prompt!r}\n\n- reference: {references[0]}")
        for label, runs in by_label(results).items():
            text = runs[0].outputs[index].replace("\n", " ")
            lines.append(f"- {label}: {text}")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Runs the recipe."""
    run_recipe(FinetuneGPT2, argv)


if __name__ == "__main__":
    run_main(main)
