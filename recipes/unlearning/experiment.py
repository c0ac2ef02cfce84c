"""The trainings and the forgetting of an unlearning experiment, and what is measured of them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from peft_ext.files import write_whole
from peft_ext.training.callbacks import Ridge, StopAfter, restore, trainable_parameters, trainable_state
from peft_ext.training.trainer import fit
from peft_ext.unlearning.evaluation.language import truth_ratio
from peft_ext.unlearning.evaluation.metrics import Outcome, observe
from peft_ext.unlearning.evaluation.results import GOLD, ORIGINAL, UnlearningResult
from peft_ext.unlearning.methods import Request, UnlearningMethod
from peft_ext.unlearning.methods.relabelling import OthersTargets
from peft_ext.unlearning.methods.rows import some_of
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.support.methods import folder_name
from recipes.support.runs import reading
from recipes.support.usage import Usage
from recipes.unlearning.cases import Case, memorisation_scores
from recipes.unlearning.same_time import SameTime
from recipes.unlearning.settings import TEXT_TASKS, Setting, UnlearnArguments

FILES = (f"{ORIGINAL}-seed*.safetensors", "memorisation.npy")
"""What all runs of an experiment share on disk, as patterns below the output folder."""

Method = UnlearningMethod | SameTime | None
"""What makes a model of the original; None leaves it as it is."""

_TIMES = ("seconds", "processor_seconds")
_WRONG_ANSWERS = 3
# The accuracy counts as back this close below the original's; texts, which have none, by their loss in nats.
_POINT, _NATS = 0.01, 0.05


class _StopWhen(TrainerCallback):
    """Ends a training after the first step after which something is true, and remembers the step."""

    def __init__(self, reached: Callable[[], bool]) -> None:
        self.reached = reached
        self.step: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reached():
            self.step = state.global_step
            control.should_training_stop = True


@dataclass
class Experiment:
    """All models of an experiment, made when they are asked for.

    Attributes:
        setting: model and data.
        training: the Trainer's arguments.
        args: what is trained and compared.
        max_retain: at most as many samples of the retain set are measured.
        states: the originals that were made so far, by their seeds.
    """

    setting: Setting
    training: TrainingArguments
    args: UnlearnArguments
    max_retain: int | None
    states: dict[int, tuple[dict[str, torch.Tensor], dict[str, float]]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(str(self.training.output_dir))

    def arguments(self, seed: int) -> TrainingArguments:
        """Returns the Trainer's arguments with a seed."""
        training = copy.copy(self.training)
        training.seed = seed
        return training

    def train(self, model: nn.Module, rows: Any, seed: int) -> None:
        """Trains a model on some rows, pulled to where it starts, as far as is asked for."""
        ridge = Ridge(model, trainable_state(model), self.args.ridge)
        callbacks = [StopAfter(self.args.stop_training_after)] if self.args.stop_training_after < 1 else []
        fit(model, rows, self.setting.collator, self.arguments(seed), ridge=ridge, callbacks=callbacks)

    def request(self, seed: int, forget: Sequence[int]) -> Request:
        """Returns a model as it is before the training, with the samples that are to go and those that stay."""
        model = self.setting.fresh(seed)
        gone = set(forget)
        retain = [place for place in range(len(self.setting.train)) if place not in gone]
        rows = self.setting.train.rows
        return Request(
            model,
            Subset(rows, retain),
            Subset(rows, list(forget)),
            self.setting.collator,
            self.arguments(seed),
            trainable_state(model),
            self.args.ridge,
            stopped_after=self.args.stop_training_after,
        )

    def original(self, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Returns what the training on all samples made of the trainable parameters, and `seconds` that it took."""
        if seed in self.states:
            return self.states[seed]
        path = self.folder / f"{ORIGINAL}-seed{seed}.safetensors"
        if self.training.resume_from_checkpoint and path.is_file():
            with reading(path):
                with safe_open(path, "pt") as file:
                    times = {name: float(value) for name, value in file.metadata().items() if name in _TIMES}
                self.states[seed] = load_file(path), times
            return self.states[seed]
        model = self.setting.fresh(seed)
        with Usage(self.training.device) as usage:
            self.train(model, self.setting.train.rows, seed)
        state = {name: value.cpu() for name, value in trainable_state(model).items()}
        measured = {name: getattr(usage, name) for name in _TIMES}
        times = {name: value for name, value in measured.items() if value is not None}
        PartialState().wait_for_everyone()  # no process may find the file before all have looked for it
        if PartialState().is_main_process:
            write_whole(path, save(state, metadata={name: str(value) for name, value in times.items()}))
        self.states[seed] = state, times
        return self.states[seed]

    def loader(self, rows: Any) -> Any:
        """Returns a loader of rows in order; in several processes each reads a share."""
        loader = DataLoader(rows, self.training.per_device_eval_batch_size, collate_fn=self.setting.collator)
        return Accelerator().prepare_data_loader(loader) if PartialState().num_processes > 1 else loader

    def outcomes(self, model: nn.Module, request: Request, case: Case) -> dict[str, Outcome]:
        """Returns what a model says of all sets."""
        retain: Any = request.retain
        if self.max_retain is not None:
            retain = some_of(retain, self.max_retain, np.random.default_rng(inputs.SUBSET_SEED))
        test = self.setting.test.rows
        sets: dict[str, Any] = {"forget": request.forget, "retain": retain, "test": Subset(test, case.test)}
        if case.heldout:
            sets["heldout"] = Subset(test, case.heldout)
        benchmark = self.setting.benchmark
        found = {name: observe(model, self.loader(rows), benchmark is None) for name, rows in sets.items()}
        if benchmark is not None:
            found = benchmark.measure(model, found, case, self.loader)
        if self.setting.wrong_answers:
            rng = np.random.default_rng(inputs.SUBSET_SEED)
            answers = [OthersTargets(request.forget, request.retain, rng) for _ in range(_WRONG_ANSWERS)]
            wrong = [rows[place] for place in range(len(case.forget)) for rows in answers]
            found["forget"].truth_ratio = truth_ratio(model, self.loader(request.forget), self.loader(wrong))
        return found

    def relearn(self, request: Request, outcome: Outcome, before: Outcome) -> int | None:
        """Returns after how many steps of fine-tuning on the forget set the model is back where the original was.

        Args:
            request: the model, after it was made to forget, and the forget set.
            outcome: what it says of the forget set.
            before: what the original said of it.

        Returns:
            None if it is not back within the limit.
        """

        def is_back(found: Outcome) -> bool:
            if found.log_probs is None:
                return float(found.losses.mean()) <= float(before.losses.mean()) + _NATS
            return float(found.correct.mean()) >= float(before.correct.mean()) - _POINT

        if is_back(outcome):
            return 0
        training = copy.copy(request.training)
        training.max_steps = self.args.relearn_limit
        training.warmup_steps = 0
        training.lr_scheduler_type = SchedulerType.CONSTANT
        stop = _StopWhen(lambda: is_back(observe(request.model, self.loader(request.forget))))
        request.fit(request.forget, training, callbacks=[stop])
        return stop.step

    def run(self, case: Case, label: str, method: Method, seed: int, folder: Path) -> UnlearningResult:
        """Makes a model forget with one method, measures it and prints a line.

        Args:
            case: what is forgotten.
            label: the method's label.
            method: None measures the original.
            seed: the run's seed.
            folder: of this run's result.
        """
        state, times = self.original(seed)
        request = self.request(seed, case.forget)
        restore(request.model, state)
        request.model.to(self.training.device)  # type: ignore[arg-type]
        before = observe(request.model, self.loader(request.forget))
        result = self._measured(case, label, method, request, folder)
        if method is None:
            result.seconds, result.processor_seconds = (times.get(name) for name in _TIMES)
        elif self.args.relearn_limit:
            result.relearn_steps = self.relearn(request, result.outcomes["forget"], before)
            result.relearn_limit = self.args.relearn_limit
        PartialState().print(_line(result), flush=True)
        return result

    def reference(self, case: Case, method: Method, seed: int, folder: Path) -> UnlearningResult:
        """Returns a gold of a seed with which nothing else is done, so that no original is trained."""
        request = self.request(seed, case.forget)
        request.model.to(self.training.device)  # type: ignore[arg-type]
        result = self._measured(case, GOLD, method, request, folder)
        PartialState().print(_line(result), flush=True)
        return result

    def _measured(self, case: Case, label: str, method: Method, request: Request, folder: Path) -> UnlearningResult:
        """Makes the model of a request forget, and measures it."""
        parameters = sum(parameter.numel() for parameter in trainable_parameters(request.model).values())
        result = UnlearningResult(case.name, label, request.training.seed, {}, parameters=parameters)
        if method is not None:
            asked = request
            if isinstance(method, SameTime):
                asked, method = method.plan(request, folder)
            try:
                method.prepare(asked)
                with Usage(self.training.device) as usage:
                    result.report = method.unlearn(asked).to_dict()
            except ValueError as error:
                raise UserError(f"method {label!r}, {case.name}: {error}") from error
            result.seconds, result.processor_seconds = usage.seconds, usage.processor_seconds
            result.peak_memory = usage.peak_memory
        result.outcomes = self.outcomes(request.model, request, case)
        return result

    def runs(
        self, cases: Sequence[Case], methods: Mapping[str, Method], seeds: Sequence[int]
    ) -> dict[str, Callable[[Path], UnlearningResult]]:
        """Returns a run of every method with every seed in every case, by the names of their folders.

        Behind them come those of golds with further seeds, as many as are asked for.
        """
        found: dict[str, Callable[[Path], UnlearningResult]] = {
            f"{case.folder}/{folder_name(label)}-seed{seed}": partial(self.run, case, label, method, seed)
            for case in cases
            for seed in seeds
            for label, method in methods.items()
        }
        further = range(max(seeds) + 1, max(seeds) + 1 + self.args.further_golds)
        return found | {
            f"{case.folder}/{folder_name(GOLD)}-seed{seed}": partial(self.reference, case, methods[GOLD], seed)
            for case in cases
            for seed in further
        }

    def memorisation(self, pairs: int, seed: int) -> np.ndarray:
        """Returns the scores of all training samples; a resumed recipe reads those that it has."""
        path = self.folder / "memorisation.npy"
        if self.training.resume_from_checkpoint and path.is_file():
            with reading(path):
                return np.load(path)
        PartialState().print(f"Training {2 * pairs} models on halves of the samples", flush=True)

        def probabilities(places: list[int], training_seed: int) -> np.ndarray:
            model = self.setting.fresh(training_seed)
            self.train(model, Subset(self.setting.train.rows, places), training_seed)
            return np.exp(-observe(model, self.loader(self.setting.train.rows)).losses)

        scores = memorisation_scores(len(self.setting.train), pairs, seed, probabilities)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            array = io.BytesIO()
            np.save(array, scores)
            write_whole(path, array.getvalue())
        return scores


def _line(result: UnlearningResult) -> str:
    parts = [
        f"{name} {100 * outcome.correct.mean():.1f} % (loss {outcome.losses.mean():.3f})"
        for name, outcome in result.outcomes.items()
    ]
    return f"{result.case}, {result.method}, seed {result.seed}: {', '.join(parts)}; {result.seconds:.1f} s"


def notes(
    setting: Setting, cases: Sequence[Case], args: UnlearnArguments, seeds: Sequence[int], baselines: Sequence[str]
) -> str:
    """Returns Markdown that says what was run, with a sentence for each of the baselines."""
    trained = args.adapter if args.trainable_parameters is None else f"parameters named {args.trainable_parameters!r}"
    lines = [
        f"Trained: {trained}; {len(setting.train):,} training samples, {len(setting.test):,} test samples; seeds "
        f"{', '.join(map(str, seeds))}. The same samples are forgotten with every seed.",
        "Seconds of the original are those of its training. Peak memory is what a method added to what was in use.",
    ]
    if args.stop_training_after < 1:
        lines.append(
            f"Original and gold were stopped after {100 * args.stop_training_after:g} % of the planned steps, with the "
            "learning rate that the schedule has there."
        )
    lines += [*setting.notes, *baselines]
    if any(case.name.startswith("class ") for case in cases):
        lines.append("Where a class is forgotten, the test set is that of the other classes.")
    if any(case.name.startswith("memorised ") for case in cases):
        lines.append(
            "Memorised samples: those whose label's probability falls most when they are left out, estimated from "
            "trainings on random halves (Feldman & Zhang 2020)."
        )
    if args.relearn_limit:
        what = (
            "forget accuracy is within a point"
            if args.task not in TEXT_TASKS
            else f"forget loss is within {_NATS} nats"
        )
        lines.append(f"Relearn steps: fine-tuning on the forget set until the {what} of the original's.")
    return "\n".join(f"- {line}" for line in lines)
