"""The benchmark TOFU from end to end, on a tiny model and four authors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ext.unlearning.evaluation.language import UTILITY
from peft_ext.unlearning.evaluation.results import UnlearningResult
from recipes.support.arguments import UserError
from recipes.tasks.causal_lm import DataArguments
from recipes.unlearn import main
from recipes.unlearning import experiment
from recipes.unlearning.tofu import TofuArguments, load_tofu


def author(name: str, answers: int = 0) -> list[dict[str, Any]]:
    """Twenty questions on an author; with paraphrases and as many wrong answers, if there are some."""
    rows: list[dict[str, Any]] = [{"question": f"What {i} of {name}?", "answer": f"{name} {i}."} for i in range(20)]
    for place, row in enumerate(rows if answers else ()):
        row["paraphrased_answer"] = f"{place}, {name}."
        row["perturbed_answer"] = [f"N{k} {place}." for k in range(answers)]
    return rows


def facts(number: int) -> list[dict[str, Any]]:
    return [{"question": f"F{i}?", "answer": f"F{i}", "perturbed_answer": ["F7", "F8", "F9"]} for i in range(number)]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def tofu(tmp_path: Path) -> Path:
    """A folder as the benchmark's: authors A, B and C to retain, Y, Z and W to forget; the order of files decides."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    write(folder, "retain90.jsonl", [*author("A"), *author("B"), *author("C")])
    write(folder, "retain_perturbed.jsonl", author("B", 5))
    write(folder, "forget10.jsonl", [*author("Y"), *author("Z"), *author("W")])
    for split, names in (("forget01", "Y"), ("forget05", "YZ")):
        write(folder, f"{split}.jsonl", [row for name in names for row in author(name)])
        write(folder, f"{split}_perturbed.jsonl", [row for name in names for row in author(name, 5)])
    write(folder, "real_authors_perturbed.jsonl", facts(4))
    write(folder, "world_facts_perturbed.json", facts(5))
    return folder


@pytest.fixture
def flags(model_folder: Path, tofu: Path, tmp_path: Path) -> list[str]:
    text = (
        f"--task tofu --model_name_or_path {model_folder} --dataset_name {tofu} --output_dir {tmp_path / 'out'} "
        "--cases forget01 --authors 3 --questions_per_author 4 --max_eval_samples 3 --max_eval_prompts 2 "
        "--max_source_length 40 --max_target_length 12 --num_train_epochs 3 --per_device_train_batch_size 4 "
        "--per_device_eval_batch_size 8 --learning_rate 2e-2 --relearn_limit 0 --use_cpu --disable_tqdm true"
    )
    return [
        *text.split(),
        "--adapter",
        "{name: nola, r: 2, num_basis: 8}",
        "--methods",
        "{name: finetune, max_steps: 1}",
    ]


def test_the_benchmark_from_end_to_end(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main([*flags, "--seeds", "0", "1"])
    assert "has no padding token" in capsys.readouterr().out
    out = tmp_path / "out"
    found = UnlearningResult.load(out / "forget01" / "original-seed0").outcomes
    assert {name: len(outcome) for name, outcome in found.items()} == {
        **{"forget": 4, "retain": 8, "test": 3},
        **{"retain_questions": 3, "real_authors": 3, "world_facts": 3},
    }
    for name in ("forget", *UTILITY):
        outcome = found[name]
        assert outcome.wrong is not None and outcome.rouge is not None
        assert outcome.wrong.shape == (len(outcome), 3 if outcome.paraphrase is None else 5)
        assert np.isfinite(outcome.rouge).tolist() == [True, True] + [False] * (len(outcome) - 2)
    assert found["forget"].paraphrase is not None and found["real_authors"].paraphrase is None
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["original", "retrain", "finetune max_steps=1"]
    assert all(len(row["model_utility"]["values"]) == 2 for row in rows)
    assert len(rows[1]["forget_quality"]["values"]) == 1 and len(rows[2]["forget_quality"]["values"]) == 2
    text = (out / "report.md").read_text()
    assert "TOFU: 3 authors with 4 questions each, at most 1 of them to forget" in text

    def untouched(*_: Any, **__: Any) -> None:
        raise AssertionError("a resumed run must not train again")

    monkeypatch.setattr(experiment, "fit", untouched)
    main([*flags, "--seeds", "0", "1", "--resume_from_checkpoint", "true"])
    assert json.loads((out / "report.json").read_text())["rows"] == rows


def load(tofu: Path, cases: list[str], **part: Any) -> Any:
    return load_tofu(DataArguments(dataset_name=str(tofu)), TofuArguments(**part), cases)


def names(rows: list[dict[str, Any]]) -> str:
    """The authors of rows, in their order."""
    return "".join(dict.fromkeys(row["answer"].split()[0] for row in rows))


def test_authors_with_wrong_answers_are_retained_first(tofu: Path) -> None:
    data = load(tofu, ["forget01"], authors=2, questions_per_author=5)
    assert names(data.train) == "BY" and names(data.held_out) == "A"
    assert data.kinds == [""] * 5 + ["forget01"] * 5
    assert data.forget["forget01"] == author("Y", 5)[:5]
    assert data.utility["retain_questions"] == author("B", 5)[:5]


@pytest.mark.parametrize("authors", [2, None])
def test_fewer_questions_on_those_who_stay(tofu: Path, authors: int | None) -> None:
    write(tofu, "holdout01.jsonl", author("H"))
    data = load(tofu, ["forget01"], authors=authors, questions_per_author=5, retain_questions_per_author=2)
    staying = 1 if authors else 5
    assert data.kinds == [""] * 2 * staying + ["forget01"] * 5
    assert len(data.held_out) == 5 and data.utility["retain_questions"][:2] == author("B", 5)[:2]
    assert f"TOFU: {staying + 1} authors with 5 questions each, 2 on those who stay, at most 1" in data.notes[0]


def test_splits_share_one_original(tofu: Path) -> None:
    data = load(tofu, ["forget05", "forget01"], authors=4)
    assert names(data.train) == "BAYZ" and names(data.held_out) == "CW"
    assert data.kinds == [""] * 40 + ["forget05 forget01"] * 20 + ["forget05"] * 20
    assert names(data.forget["forget05"]) == "YZ" and names(data.forget["forget01"]) == "Y"


def test_the_whole_benchmark_needs_authors_never_seen(tofu: Path) -> None:
    with pytest.raises(UserError, match=r"has no holdout01.jsonl; .*where --authors leaves no author out"):
        load(tofu, ["forget01"])
    write(tofu, "holdout01.jsonl", author("H"))
    for part in ({}, {"authors": 6}):
        data = load(tofu, ["forget01"], **part)
        assert sorted(names(data.train)) == list("ABCWYZ") and names(data.held_out) == "H"
        assert [kind for kind in data.kinds if kind] == ["forget01"] * 20


@pytest.mark.parametrize(
    "flags_added, said",
    [
        (["--authors", "1"], ["authors is 1", "forget01 forgets 1", "must be 2 to 6"]),
        (["--authors", "9"], ["authors is 9", "must be 2 to 6"]),
        (["--questions_per_author", "21"], ["questions_per_author is 21", "1 to 20"]),
        (["--retain_questions_per_author", "5"], ["retain_questions_per_author is 5", "1 to 4"]),
        (["--cases", "forget02"], ["unknown case 'forget02'", "forget01, forget05, forget10", "did you mean"]),
        (["--cases", "random:0.1"], ["unknown case 'random'", "forget01"]),
        (["--cases", "forget01:0.5"], ["nothing stands behind 'forget01'", "'forget01:0.5'"]),
        (["--cases", "forget10"], ["authors is 3", "forget10 forgets 3", "must be 4 to 6"]),
        (["--eval_split", "test"], ["eval_split is for --task image or text", "--task tofu"]),
        (["--source_column", "question"], ["source_column is for --task text", "--task tofu"]),
        (["--max_train_samples", "9"], ["max_train_samples is for", "--task tofu"]),
        (["--prompt_template", "Q:"], ["prompt_template", "{source}"]),
        (["--task", "text"], ["authors is for --task tofu, this is --task text"]),
        (["--dataset_name", "nowhere"], ["there is no folder 'nowhere'", "hf download locuslab/TOFU"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input(
    flags: list[str], refused: Callable[..., str], tmp_path: Path, flags_added: list[str], said: list[str]
) -> None:
    message = refused([*flags, *flags_added], main=main)
    assert all(part in message for part in said), message
    assert not (tmp_path / "out").exists()


def test_a_folder_without_wrong_answers_is_refused(flags: list[str], tofu: Path, refused: Callable[..., str]) -> None:
    (tofu / "forget01_perturbed.jsonl").unlink()
    message = refused(flags, main=main)
    assert "has no forget01_perturbed.jsonl; TOFU is needed whole" in message and "retain_perturbed" in message
    write(tofu, "forget01_perturbed.jsonl", author("Y"))
    assert "has no column 'paraphrased_answer'" in refused(flags, main=main)
    rows = author("Y", 5)
    rows[3]["perturbed_answer"] = []
    write(tofu, "forget01_perturbed.jsonl", rows)
    assert "as many perturbed answers of every question" in refused(flags, main=main)
    write(tofu, "forget01_perturbed.jsonl", author("Z", 5))
    assert "has 0 of the 4 questions of forget01" in refused(flags, main=main)
