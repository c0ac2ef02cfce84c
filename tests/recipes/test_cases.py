"""Which samples are forgotten."""

from __future__ import annotations

import numpy as np
import torch

from recipes.unlearning.cases import CaseArguments, CaseSpec, Samples, choose, memorisation_scores, with_copies


def test_memorisation_is_what_a_sample_adds_to_its_own_probability() -> None:
    seen: list[tuple[list[int], int]] = []

    def probabilities(places: list[int], seed: int) -> np.ndarray:
        seen.append((places, seed))
        found = np.full(9, 0.9)  # known whether it is trained on or not
        found[4] = 0.8 if 4 in places else 0.1
        return found

    scores = memorisation_scores(9, 3, 0, probabilities)
    np.testing.assert_allclose(scores, [0.7 if i == 4 else 0 for i in range(9)], atol=1e-12)
    assert len(seen) == 6 and len({seed for _, seed in seen}) == 6
    for (first, _), (second, _) in zip(seen[::2], seen[1::2]):
        assert sorted(first + second) == list(range(9))
    assert seen[0][0] != seen[2][0]


def samples(kinds: list[str]) -> Samples:
    return Samples([{"x": torch.tensor(i), "labels": 0} for i in range(len(kinds))], kinds)  # type: ignore[arg-type]


def test_the_forget_set_is_drawn_by_its_own_seed() -> None:
    train = samples([""] * 50)

    def drawn(seed: int) -> list[int]:
        args = CaseArguments(forget_seed=seed)
        return choose(CaseSpec("random", 0.2), args, train, train, lambda: np.zeros(0)).forget

    assert len(drawn(0)) == 10 and drawn(0) == drawn(0) != drawn(1)


def test_memorised_are_the_highest_scores() -> None:
    train = samples([""] * 5)
    scores = np.array([0.1, 0.9, -0.5, 0.3, 0.2])
    case = choose(CaseSpec("memorised", 0.4), CaseArguments(), train, train, lambda: scores)
    assert case.forget == [1, 3] and case.test == list(range(5)) and case.heldout == []


def test_groups_are_forgotten_whole() -> None:
    kinds = [f"name[{name}], food[{i}]" for i, name in enumerate("aabbccddee")] + ["food[1]"]
    args = CaseArguments(group_pattern=r"name\[(.*?)\]")
    case = choose(CaseSpec("groups", 0.4), args, samples(kinds), samples(kinds[:6]), lambda: np.zeros(0))
    assert len(case.forget) == 4 and all(place ^ 1 in case.forget for place in case.forget)
    names = {kinds[place][5] for place in case.forget}
    assert case.heldout == [place for place in range(6) if kinds[place][5] in names]
    assert sorted(case.heldout + case.test) == list(range(6))


def test_copies_are_forgotten_too() -> None:
    rows = [{"x": torch.tensor([float(i % 4)]), "labels": [i % 4 + i // 8]} for i in range(10)]
    assert with_copies(rows, 10, [1]) == [1, 5]
    twice = Samples([*rows[:8], *rows[:8]], ["?"] * 16)  # type: ignore[arg-type]
    case = choose(CaseSpec("random", 0.1), CaseArguments(), twice, twice, lambda: np.zeros(0))
    assert len(case.forget) >= 4 and all((place + 8) % 16 in case.forget for place in case.forget)
