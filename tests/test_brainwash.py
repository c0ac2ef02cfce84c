"""The attack on learners of tasks in turn: its gradient, what the noise leaves alone, and the benchmark's course."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks import __main__ as entry
from benchmarks import brainwash, lines, poisoning
from benchmarks.poisoning import PIXELS, AttackArguments, Victim, attack, loss_after
from peft_ext import NolaConfig
from peft_ext.adapters.continual import TaskMemory
from peft_ext.training.callbacks import trainable_parameters
from recipes import learn_in_turn
from recipes.continual.learners import Turns, parse_learners
from recipes.continual.problems import ByTask, Problem, split_classes
from recipes.support.arguments import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


class Pictures(nn.Module):
    """A classifier of six pixels, with four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.last(self.first(pixel_values.flatten(1)).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = NolaConfig(r=3, num_basis=10, target_modules=["first", "last"], seed=seed)
    return ByTask(get_peft_model(Pictures(), config), [[0, 1], [2, 3]], 4)  # type: ignore[arg-type]


def rows(task: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    pixels = torch.rand(count, 1, 2, 3, generator=torch.Generator().manual_seed(10 * seed + task))
    pixels[0].view(-1)[:2] = torch.tensor([0.0, 1.0])  # the range of pixels
    return [{PIXELS: each, "labels": 2 * task + int(each.sum() > 3), "task": task} for each in pixels]


def batch(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in found]) for name in found[0]}


def doubled(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: value.double() if name == PIXELS else value for name, value in batch(found).items()}


@pytest.fixture
def guarded() -> tuple[nn.Module, TaskMemory]:
    """A model that remembers a task, and has moved since."""
    model, memory = fresh().eval(), TaskMemory(energy=0.9, elastic=50.0)
    with torch.no_grad():  # as if it were trained: NOLA's B is no longer zero
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    memory.remember(model, [batch(rows(0, 6))])
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double(), memory


@pytest.mark.parametrize("aware", [False, True])
def test_the_loss_is_that_after_a_step_of_the_learner(guarded: tuple[nn.Module, TaskMemory], aware: bool) -> None:
    model, memory = guarded
    poisoned, proxies, parameters = doubled(rows(1, 5)), doubled(rows(0, 4, 1)), trainable_parameters(model)
    callbacks = memory.callbacks(model) if aware else []
    images = poisoned[PIXELS] + 0.1
    found = loss_after(model, poisoned, images, proxies, 0.05, 1, callbacks)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model(**{**poisoned, PIXELS: images}).loss.backward()
    if aware:
        memory.callbacks(model)[0].on_pre_optimizer_step(None, None, None)  # the pull of elastic weight consolidation
    step = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])  # type: ignore[union-attr]
    step = step / step.square().mean().sqrt()
    if aware:
        assert memory.projection is not None
        assert 0.01 < float(memory.projection(step).norm() / step.norm()) < 0.99
        step = memory.projection(step)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(before.values()) - 0.05 * step, parameters.values())
    torch.testing.assert_close(found, model(**proxies).loss)


@pytest.mark.parametrize("aware", [False, True])
def test_its_gradient_is_that_of_finite_differences(guarded: tuple[nn.Module, TaskMemory], aware: bool) -> None:
    model, memory = guarded
    poisoned, proxies = doubled(rows(1, 3)), doubled(rows(0, 4, 1))
    callbacks = memory.callbacks(model) if aware else []
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def loss(images: torch.Tensor) -> torch.Tensor:
        return loss_after(model, poisoned, images, proxies, 0.1, 2, callbacks)

    images = poisoned[PIXELS].requires_grad_()
    (found,) = torch.autograd.grad(loss(images), [images])
    assert float(found.abs().min()) > 0
    each = torch.eye(images.numel(), dtype=torch.float64).view(-1, *images.shape) * 1e-5
    slopes = torch.stack([(loss(images + e) - loss(images - e)).detach() / 2e-5 for e in each])
    torch.testing.assert_close(found.flatten(), slopes, rtol=1e-5, atol=1e-8)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))


def test_noise_stays_within_the_bound_and_the_range_of_pixels() -> None:
    images = batch(rows(1, 20))[PIXELS]
    direction = torch.randn_like(images)
    start, found = (attack(lambda x: (x * direction).sum(), images, 0.2, (0.0, 1.0), steps, 3) for steps in (0, 10))
    expected = (images + 0.2 * direction.sign()).clamp(0, 1)  # of a linear loss the best noise is known
    torch.testing.assert_close(found, expected)
    assert float((start - images).abs().max()) <= 0.2 + 1e-6 and 0 <= float(start.min()) and float(start.max()) <= 1
    assert 0.08 < float((start - images).square().mean().sqrt()) < 0.2 / 3**0.5 + 0.01
    again, other = (attack(lambda x: x.sum(), images, 0.2, (0.0, 1.0), 0, seed) for seed in (3, 4))
    assert torch.equal(start, again) and not torch.equal(start, other)


PROBLEM = Problem(["a, b", "c, d"], [rows(0, 8), rows(1, 8)], [rows(0, 5, 1), rows(1, 5, 1)], fresh, batch)  # type: ignore[list-item]


def test_an_attacker_and_what_stands_in_for_earlier_tasks(tmp_path: Path) -> None:
    training = TrainingArguments(str(tmp_path), max_steps=30, learning_rate=0.05, use_cpu=True, report_to=[])
    with ExitStack() as stack:
        victim = Victim(Turns(PROBLEM, training, 10), parse_learners(["finetune"])["finetune"], 0, stack)
        found = victim.proxies(True, AttackArguments(proxies=6, inversion_steps=40))
        real = victim.proxies(False, AttackArguments(proxies=6))
    assert found["labels"].tolist() == [0, 1] * 3 and found["task"].tolist() == [0] * 6
    assert {each.sum().item() for each in real[PIXELS]} < {row[PIXELS].sum().item() for row in rows(0, 8)}
    with torch.no_grad():
        noise = {**found, PIXELS: torch.randn_like(found[PIXELS])}
        assert float(victim.model(**found).loss) < 0.3 < float(victim.model(**noise).loss)
    few = AttackArguments(steps=2, proxies=6)
    before = victim.images("real", 0.2, few)
    assert victim.measure("none", 0.0, few)["noise_size"] == 0
    assert torch.equal(before, victim.images("real", 0.2, few))  # made from the weights before the last task


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(trainable_parameters(model).values()).detach().clone()


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[dict[str, Any]], torch.Tensor]]:
    """What is learned: learners, tasks, their rows and what is trained from where. The recipe's data are few pixels."""

    def few_pixels(model: Any, data: Any, args: Any, method: Any) -> Problem:
        split_classes(args.tasks, ["a", "b", "c", "d"])
        return PROBLEM

    found, learn = [], Turns.learn

    def recorded(self: Turns, model: Any, learner: Any, memory: Any, task: int, training: Any, rows: Any) -> Any:
        found.append((learner.label, task, rows, vector(model)))
        return learn(self, model, learner, memory, task, training, rows)

    monkeypatch.setattr(learn_in_turn, "split_images", few_pixels)
    monkeypatch.setattr(learn_in_turn.digits, "prepare", lambda *_: None)
    monkeypatch.setattr(Turns, "learn", recorded)
    return found


FLAGS = "--bounds 0.25 --steps 3 --proxies 4 --inversion_steps 2 --seeds 0 --max_steps 3 --use_cpu".split()
LEARNERS = ["--learners", "{name: projection, energy: 0.5, label: safe}", "finetune", "separate", "together"]


def test_from_learners_to_a_table(learned: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*FLAGS, "--output_dir", str(tmp_path / "out"), "--output", str(tmp_path), *LEARNERS]
    brainwash.main(given)
    found = {(row["learner"], row["noise"]): row for row in lines.read(tmp_path / "brainwash.jsonl")}
    kinds = ["none", *poisoning.NOISES]
    unprotected = [(label, noise) for label in ("finetune", "separate") for noise in kinds if noise != "aware"]
    assert list(found) == [*(("safe", noise) for noise in kinds), *unprotected]
    clean, last, starts = rows(1, 8), {}, {}
    for label, task, used, start in learned:
        if task == 1:
            assert torch.equal(start, starts.setdefault(label, start))  # all from the same weights
            assert [{**row, PIXELS: 0} for row in used] == [{**row, PIXELS: 0} for row in clean]  # labels stay right
            last.setdefault(label, []).append(batch(used)[PIXELS])
    pixels = batch(clean)[PIXELS]
    for label, images in last.items():
        noise = [float((each - pixels).abs().max()) for each in images]
        assert noise[0] == 0 and all(0.1 < size <= 0.25 + 1e-6 for size in noise[1:])
        assert len({each.sum().item() for each in images}) == len(images) == (5 if label == "safe" else 4)
    for label, start in starts.items():
        assert torch.equal(start, vector(fresh())) == (label == "separate")
    assert torch.equal(last["safe"][1], last["finetune"][1])  # random noise is alike for all
    sizes = {noise: found["safe", noise]["noise_size"] for noise in kinds}
    assert sizes["none"] == 0 and all(0.5 < sizes[noise] / sizes["random"] < 1.8 for noise in kinds[1:])
    for (label, _), row in found.items():
        assert label == "separate" or row["backward_transfer"] == row["after"][0] - row["before"][0]
        assert label != "separate" or row["backward_transfer"] == 0
    assert "together: left out" in capsys.readouterr().out

    count = len(learned)
    brainwash.main(given)
    assert len(learned) == count  # all lines are there
    brainwash.main([*given, "--noises", "real", "--steps", "2"])
    assert [(label, task) for label, task, *_ in learned[count:]] == [
        (label, task) for label in ("safe", "finetune", "separate") for task in (0, 1)
    ]
    entry.main(["report", "brainwash", "--results", str(tmp_path), "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "Noise on c, d" in shown and shown.count("aware") == 1 and shown.count("2 x 1") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bounds", "-0.1"], "bounds: -0.1; noise is a share of the range of pixels, above 0 and at most 1"),
        (["--bounds", "0.1", "1.5"], "bounds: 1.5"),
        (["--noises", "reel"], "noises: there is no 'reel'; .* did you mean 'real'"),
        (["--steps", "0"], "steps is 0; it must be above 0"),
        (["--inner_rate", "-1"], "inner_rate is -1"),
        (["--learners", "finetuned"], "learners: .*'finetuned'"),
        (["--tasks", "a,b"], "tasks: there is 1; at least two are learned in turn"),
        (["--preset", "swiss_roll"], "swiss_roll: the noise is put on images"),
        (["--bound", "0.1"], "unknown argument '--bound'"),
    ],
)
def test_bad_input(learned: list[Any], tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        brainwash.main(["--use_cpu", "--output", str(tmp_path), "--output_dir", str(tmp_path / "out"), *flags])
    assert not learned and not list(tmp_path.glob("*.jsonl"))
