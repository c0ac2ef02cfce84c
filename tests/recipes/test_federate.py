"""The recipe of agents: who has which samples, what agents do, rounds on Flower where it is installed, bad input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes import federate
from recipes.federate import Federate, main
from recipes.federation.agents import AGREE, ALONE, AVERAGE, Federation, apart
from recipes.federation.results import FederatedResult, write_report
from recipes.federation.split import FederationArguments, split
from recipes.support.arguments import UserError
from recipes.support.runs import open_recipe

needs_flower = pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs Flower, the extra federated")
PRANC = "{name: pranc, num_coefficients: 60}"
LORA = "{name: lora, r: 2, target_modules: [q_proj]}"
CLASSES = np.repeat(np.arange(4), 50)


@pytest.fixture
def flags(vit_folder: Path, image_folder: Path, tmp_path: Path) -> list[str]:
    """Three agents that share 18 images of three colours."""
    text = (
        f"--model_name_or_path {vit_folder} --dataset_name {image_folder} --output_dir {tmp_path / 'out'} --seed 3 "
        "--eval_split test --agents 3 --rounds 2 --dirichlet 2 --shared_samples 6 --num_train_epochs 1 --use_cpu "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 12 --learning_rate 1e-2 --disable_tqdm true"
    )
    return [*text.split(), "--methods", PRANC]


@pytest.fixture
def recipe(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> Federate:
    monkeypatch.setattr(federate, "check_flower", lambda: None)
    found = open_recipe(Federate, [*flags, "--compare", "agree"])
    found.load()
    return found


def arguments(**options: Any) -> FederationArguments:
    return FederationArguments(**{"agents": 5, "dirichlet": 0.5, "shared_samples": 20, **options})


def test_every_sample_has_one_owner() -> None:
    found = split(CLASSES, arguments(), True, 0)
    assert sorted(sum(found.parts, found.shared)) == list(range(200)) and len(found.shared) == 20
    assert found == split(CLASSES, arguments(), True, 0) != split(CLASSES, arguments(), True, 1)
    assert split(CLASSES, arguments(), False, 0).shared == []


def test_a_small_parameter_makes_agents_differ() -> None:
    def largest(dirichlet: float) -> float:
        """Share of an agent's commonest class, in the mean."""
        parts = split(CLASSES, arguments(dirichlet=dirichlet), False, 0).parts
        return float(np.mean([np.bincount(CLASSES[part]).max() / len(part) for part in parts]))

    assert largest(0.5) > largest(5) > largest(500) and largest(500) < 0.3
    equal = split(CLASSES[:-3], arguments(dirichlet=0), False, 0).parts
    assert sorted(map(len, equal)) == [39, 39, 39, 40, 40]
    assert all(np.ptp(np.bincount(CLASSES[part])) <= 1 for part in equal)


@pytest.mark.parametrize(
    ("classes", "options", "shared", "message"),
    [
        (CLASSES[:4], {}, False, r"agents: there are 5, more than the training samples \(4\)"),
        (CLASSES[:24], {}, True, r"agents: there are 5, .* \(24, 20 of which are put aside"),
        (CLASSES, {"dirichlet": 0.01, "agents": 50}, False, "with 0.01 and seed 0 agent .* of 50 has no samples"),
    ],
)
def test_samples_that_do_not_suffice(classes: Any, options: Any, shared: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split(classes, arguments(**options), shared, 0)


def test_an_agent_trains_on_its_part(recipe: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, (method,) = recipe.problem, recipe.methods
    read: list[float] = []
    rows = type(problem.train).__getitem__
    monkeypatch.setattr(type(problem.train), "__getitem__", lambda self, i: read.append(i) or rows(self, i))
    starts, vectors = [], []
    for number in (0, 1, 0):
        agent = problem.agent(method, AVERAGE, 3, number)
        starts.append(agent.exchange.vector)
        read.clear()
        agent.learn(1)
        assert set(read) == set(problem.split(3).parts[number])
        vectors.append(agent.exchange.vector)
    assert torch.equal(vectors[0], vectors[2]) and not torch.equal(vectors[0], vectors[1])
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[1], starts[2])
    assert not torch.equal(vectors[0], starts[0])


def test_agents_that_agree_have_seeds_of_their_own(recipe: Federate) -> None:
    problem, (method,) = recipe.problem, recipe.methods
    first, second = (problem.agent(method, AGREE, 3, number) for number in (0, 1))
    assert first.exchange.description["seed"] != second.exchange.description["seed"]
    assert first.outputs().shape == (6, 3) and torch.allclose(first.outputs().sum(1), torch.ones(6))
    wanted = torch.eye(3)[[0, 0, 1, 1, 2, 2]]

    def distance() -> float:
        return float(-(wanted * first.outputs().log()).sum(1).mean())

    before = distance()
    problem.args.agree_epochs = 15
    first.agree(1, wanted)
    assert distance() < 0.8 * before


def test_what_is_shared_has_no_labels(recipe: Federate) -> None:
    problem, (method,) = recipe.problem, recipe.methods
    found = []
    for labels in (problem.train.labels, [2 - label for label in problem.train.labels]):
        split_before = problem.split(3)
        problem.train.labels = labels
        assert problem.split(3) is split_before
        agent = problem.agent(method, AGREE, 3, 0)
        agent.agree(1, torch.full((6, 3), 1 / 3))
        found.append(agent.exchange.vector)
    assert torch.equal(*found)


def test_trainings_without_exchange(recipe: Federate) -> None:
    found = [apart(recipe.problem, recipe.methods[0], way, 3) for way in (ALONE, "pooled")]
    assert all(len(each.accuracy) == 1 and not each.sent for each in found)
    assert found[0].parameters == found[1].parameters == 60 + 3 * 33


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [FederatedResult("a", seed, 9, 164, 164, [10.0, 20.0 + seed], 5.0, 1.0) for seed in (0, 1)]
    results.append(FederatedResult("b", 0, 9, accuracy=[30.0]))
    assert write_report(results, tmp_path, "Notes.\n") == ["results.json", "results.md", "bytes.png"]
    text = (tmp_path / "results.md").read_text()
    assert "| a" in text and "20.5 ± 0.7" in text and "Notes." in text and "Notes." in capsys.readouterr().out
    assert [line.split("|")[6].strip() for line in text.splitlines() if "| b " in line] == ["-"]
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")
    results[0].save(tmp_path / "run")
    assert FederatedResult.load(tmp_path / "run") == results[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--agents", "1"], "agents is 1; at least two"),
        (["--rounds", "0"], "rounds is 0"),
        (["--dirichlet", "-1"], "dirichlet is -1.0"),
        (["--agree_epochs", "0"], "agree_epochs is 0.0"),
        (["--compare", "vote"], "compare: 'vote' is none of agree, alone, pooled"),
        (["--shots", "2"], "--shots and --data_seeds are for other recipes"),
        (["--max_steps", "5"], "max_steps: a round is counted in passes"),
        (["--dataloader_drop_last", "true"], "dataloader_drop_last: an agent's samples may be less than a batch"),
        (["--methods", "{name: lora, lora_dropout: 0.1}"], "lora_dropout is 0.1, but this recipe trains in evaluation"),
        (["--data_seeds", "5"], r"data_seeds: without --shots nothing is drawn with \[5\]"),
        (["--digits", "true"], "digits makes its own model and data"),
        (["--agents", "19"], r"agents: there are 19, more than the training samples \(18\)"),
        (["--methods", "{name: mcnc, r: 2, k: 3, d: 10}"], "method 'mcnc .*Coefficients of MCNC cannot be combined"),
        (["--methods", "{name: pranc, num_coefficients: 999999}"], "num_coefficients"),
    ],
)
def test_bad_input(flags: list[str], more: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federate, "check_flower", lambda: None)
    with pytest.raises(UserError, match=message):
        main([*flags, *more])


def test_without_flower(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Flower, .*pip install -e '.\[federated\]'"):
        main(flags)


@needs_flower
def test_all_ways_on_flower(flags: list[str], tmp_path: Path) -> None:
    main([*flags, "--methods", PRANC, LORA, "full", "--compare", "agree", "alone", "pooled"])
    found = [FederatedResult(**row) for row in json.loads((tmp_path / "out/results.json").read_text())]
    assert len(found) == 6 and len({each.label for each in found}) == 6
    pranc, lora, full, agree, alone, pooled = found
    header = 128  # of an array of NumPy
    for each in (pranc, lora, full):
        assert each.sent == each.received == 4 * each.parameters + header and len(each.accuracy) == 2
    assert pranc.parameters < lora.parameters < full.parameters
    assert agree.sent == agree.received == 4 * 6 * 3 + header and len(agree.accuracy) == 2
    assert alone.sent == pooled.sent == 0
    main([*flags, "--resume_from_checkpoint", "true", "--methods", PRANC, LORA, "full",
          "--compare", "agree", "alone", "pooled"])  # fmt: skip
    assert [FederatedResult(**row) for row in json.loads((tmp_path / "out/results.json").read_text())] == found


def flower() -> Any:
    from recipes.federation import flower

    return flower


@needs_flower
def test_a_round_is_the_mean_by_samples(recipe: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, (method,) = recipe.problem, recipe.methods
    problem.args.rounds = 1
    expected, accuracy = torch.zeros(()), []
    for number, part in enumerate(problem.split(3).parts):
        agent = problem.agent(method, AVERAGE, 3, number)
        agent.learn(1)
        expected = expected + agent.exchange.vector * len(part) / 12
    measured = flower().Agent.accuracy
    monkeypatch.setattr(
        flower().Agent, "accuracy", lambda self: accuracy.append(self.exchange.vector) or measured(self)
    )
    grid = flower().InProcess(flower().make_client(lambda context: (problem, [method])), 3)
    result = flower().exchange(grid, problem, method, AVERAGE, 3)
    assert len({len(part) for part in problem.split(3).parts}) > 1
    torch.testing.assert_close(accuracy[-1], expected)
    assert result.start is not None and len(result.accuracy) == 1


@needs_flower
def test_agents_keep_what_they_have_learned_in_a_round(recipe: Federate) -> None:
    problem, (method,) = recipe.problem, recipe.methods
    grid = flower().InProcess(flower().make_client(lambda context: (problem, [method])), 3)
    result = flower().exchange(grid, problem, method, AGREE, 3)
    agents = [problem.agent(method, AGREE, 3, number) for number in range(3)]
    for number in (1, 2):
        for agent in agents:
            agent.learn(number)
        mean = sum(agent.samples / 12 * agent.outputs() for agent in agents)
        for agent in agents:
            agent.agree(number, mean)  # type: ignore[arg-type]
    for agent, context in zip(agents, grid.contexts.values()):
        kept = flower().unpacked(context.state.array_records["numbers"])
        torch.testing.assert_close(kept, agent.exchange.vector, atol=1e-5, rtol=1e-4)
    assert result.accuracy[-1] == pytest.approx(sum(agent.accuracy() for agent in agents) / 3)
    # What the agents have kept is of that run, and a run with another seed does not begin with it.
    again = flower().exchange(grid, problem, method, AGREE, 4)
    fresh = flower().InProcess(flower().make_client(lambda context: (problem, [method])), 3)
    assert again.accuracy == flower().exchange(fresh, problem, method, AGREE, 4).accuracy


@needs_flower
def test_an_agent_that_does_not_answer(recipe: Federate) -> None:
    problem, (method,) = recipe.problem, recipe.methods
    grid = flower().InProcess(flower().make_client(lambda context: (problem, [method])), 3)
    everyone = grid.send_and_receive
    grid.send_and_receive = lambda messages, **options: everyone(messages)[1:]
    with pytest.raises(UserError, match="only 2 of 3 agents have answered"):
        flower().exchange(grid, problem, method, AVERAGE, 3)


@needs_flower
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", "Agents that average .* `seed` is 3 for agent 0 and 9 for agent 1"),
        ("shape", "Agents that average .* `num_coefficients` is 60 for agent 0 and 61 for agent 1"),
        ("samples", "agent 1 has no samples"),
        ("number", "the nodes have the partition-ids 0, 0, 2, and 3 agents need 0 to 2"),
        ("count", "the node has num-partitions=4, and agents is 3"),
    ],
)
def test_agents_that_do_not_fit(recipe: Federate, change: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, (method,) = recipe.problem, recipe.methods
    options = {"seed": {"seed": 9}, "shape": {"num_coefficients": 61}}.get(change, {})
    strange = type(method)(method.name, method.label, {**method.options, **options}, method.learning_rate)
    if change == "samples":
        problem.split(3).parts[1].clear()
    other = Federation(problem.classifier, problem.train, problem.test, problem.args, problem.training, True)
    other._splits = problem._splits

    def known(context: Any) -> Any:
        return (other, [strange]) if context.node_id == 2 else (problem, [method])

    grid = flower().InProcess(flower().make_client(known), 3)
    if change == "number":
        grid.contexts[2].node_config["partition-id"] = 0
    if change == "count":
        grid.contexts[2].node_config["num-partitions"] = 4
    monkeypatch.setattr(flower().Agent, "learn", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match=message):
        flower().exchange(grid, problem, method, AVERAGE, 3)
