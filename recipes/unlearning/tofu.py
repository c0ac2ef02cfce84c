"""TOFU: questions and answers about authors who do not exist, some of whom are to be forgotten (Maini et al. 2024)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from rouge_score import rouge_scorer
from transformers import PreTrainedTokenizerBase

from peft_ext.unlearning.evaluation.language import UTILITY
from peft_ext.unlearning.evaluation.metrics import Outcome, observe
from recipes.support import inputs
from recipes.support.arguments import UserError
from recipes.tasks import causal_lm
from recipes.unlearning.cases import Case

_QUESTIONS = 20  # of every author, one after the other in the files
_PLAIN = ("question", "answer")
_PERTURBED = ("question", "answer", "paraphrased_answer", "perturbed_answer")
# Those of the utility whose answers have no paraphrase.
_FACTS = {name: f"{name}_perturbed" for name in ("real_authors", "world_facts")}

Row = dict[str, Any]


@dataclass
class TofuArguments:
    """Which part of TOFU is trained on."""

    authors: int | None = field(
        default=None,
        metadata={
            "help": "For --task tofu: train on as many authors, those to forget among them, in place of all 200; as "
            "many further ones as are forgotten are held out for the attacks."
        },
    )
    questions_per_author: int = field(
        default=_QUESTIONS, metadata={"help": f"Take the first so many of the {_QUESTIONS} questions on each author."}
    )
    retain_questions_per_author: int | None = field(
        default=None,
        metadata={"help": "Take fewer of them on authors who stay: those to forget decide how sharp the tests are."},
    )

    @property
    def retain_questions(self) -> int:
        return self.retain_questions_per_author or self.questions_per_author


@dataclass
class Questions:
    """Questions with answers, encoded, n of them.

    Attributes:
        rows: the answers.
        paraphrases: other wordings of them, n or none.
        wrong: wrong answers: all those of the first question, then those of the second.
        prompts: the questions, as they are put.
        answers: the answers as texts.
    """

    rows: list[Row]
    paraphrases: list[Row]
    wrong: list[Row]
    prompts: list[str]
    answers: list[str]


@dataclass
class Benchmark:
    """What TOFU measures, beside losses.

    Attributes:
        forget: the questions to forget, by the case.
        utility: the sets of the model utility, by their names in outcomes.
        tokenizer: the model's tokenizer.
        max_prompts: at most so many answers of each set are written; None writes all.
        max_source_length: longest prompt in tokens.
        max_new_tokens: longest written answer in tokens.
        batch_size: how many are written at once.
    """

    forget: dict[str, Questions]
    utility: dict[str, Questions]
    tokenizer: PreTrainedTokenizerBase
    max_prompts: int | None
    max_source_length: int
    max_new_tokens: int
    batch_size: int

    def measure(
        self, model: Any, found: Mapping[str, Outcome], case: Case, loader: Callable[[Any], Any]
    ) -> dict[str, Outcome]:
        """Returns outcomes with what TOFU measures.

        Args:
            model: the model.
            found: its outcomes so far, that on the forget set among them.
            case: what is forgotten.
            loader: makes a loader of rows.
        """
        sets = {"forget": self.forget[case.name], **self.utility}
        measured = {}
        for name, questions in sets.items():
            outcome = found[name] if name in found else observe(model, loader(questions.rows), last_target=False)
            paraphrase = observe(model, loader(questions.paraphrases)).losses if questions.paraphrases else None
            wrong = observe(model, loader(questions.wrong)).losses.reshape(len(outcome), -1)
            rouge = self._rouge(model, questions)
            measured[name] = replace(outcome, paraphrase=paraphrase, wrong=wrong, rouge=rouge)
        return {**found, **measured}

    def _rouge(self, model: Any, questions: Questions) -> np.ndarray:
        """Returns the ROUGE-L recall of what is written, NaN where nothing is, shape `(n,)`."""
        prompts = questions.prompts[: self.max_prompts]
        generation = causal_lm.GenerationArguments(max_new_tokens=self.max_new_tokens)
        written = causal_lm.generate(
            model,
            self.tokenizer,
            prompts,
            generation,
            self.max_source_length,
            self.batch_size,
        )
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)  # with stems, as in the benchmark
        found = np.full(len(questions.prompts), np.nan)
        for place, (answer, text) in enumerate(zip(questions.answers, written)):
            found[place] = scorer.score(answer, text)["rougeL"].recall
        return found


@dataclass
class Tofu:
    """The part of TOFU that is used.

    Attributes:
        train: the rows that are trained on, those to retain first.
        kinds: for each, the cases that forget it, separated by spaces.
        held_out: rows on authors that are not trained on.
        forget: for every case its rows with their paraphrases and wrong answers, in the order of `train`.
        utility: the same of what the utility is measured on.
        notes: sentences that say what was taken.
    """

    train: list[Row]
    kinds: list[str]
    held_out: list[Row]
    forget: dict[str, list[Row]]
    utility: dict[str, list[Row]]
    notes: list[str]

    def benchmark(
        self, tokenizer: PreTrainedTokenizerBase, args: causal_lm.DataArguments, batch_size: int
    ) -> Benchmark:
        """Returns what is to be measured, encoded."""

        def encoded(rows: list[Row]) -> Questions:
            def answers(key: str) -> list[Row]:
                return [{"question": row["question"], "answer": row[key]} for row in rows if key in row]

            wrong = [{"question": row["question"], "answer": text} for row in rows for text in row["perturbed_answer"]]
            return Questions(
                encode(rows, tokenizer, args),
                encode(answers("paraphrased_answer"), tokenizer, args),
                encode(wrong, tokenizer, args),
                causal_lm.render_prompts([row["question"] for row in rows], args),
                [row["answer"] for row in rows],
            )

        return Benchmark(
            {case: encoded(rows) for case, rows in self.forget.items()},
            {name: encoded(rows) for name, rows in self.utility.items()},
            tokenizer,
            args.max_eval_prompts,
            args.max_source_length,
            args.max_target_length,
            batch_size,
        )


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, args: causal_lm.DataArguments) -> list[Row]:
    """Returns questions and answers as token ids and labels."""
    if not rows:
        return []
    columns = {key: [row[key] for row in rows] for key in ("question", "answer")}
    found = causal_lm.encode(columns, tokenizer, replace(args, source_column="question", target_column="answer"))
    return [dict(zip(found, values)) for values in zip(*found.values())]


def load_tofu(args: causal_lm.DataArguments, part: TofuArguments, cases: Sequence[str]) -> Tofu:
    """Reads TOFU from a folder, with its rows in the benchmark's order.

    Args:
        args: the folder, and how many rows of each set are measured.
        part: which authors and questions are used.
        cases: which splits are to be forgotten.
    """
    if args.dataset_name is None or not Path(args.dataset_name).is_dir():
        given = "is not given" if args.dataset_name is None else f"there is no folder {args.dataset_name!r}"
        raise UserError(
            f"dataset_name: {given}; --task tofu reads a folder with the files of TOFU, which 'hf download "
            "locuslab/TOFU --repo-type dataset --local-dir FOLDER' makes"
        )
    if not 1 <= part.questions_per_author <= _QUESTIONS:
        raise UserError(f"questions_per_author is {part.questions_per_author}; it must be 1 to {_QUESTIONS}")
    kept = part.retain_questions_per_author
    if kept is not None and not 1 <= kept <= part.questions_per_author:
        raise UserError(
            f"retain_questions_per_author is {kept}; it must be 1 to {part.questions_per_author}, questions_per_author"
        )
    folder = Path(args.dataset_name)

    def read(name: str, columns: Sequence[str] = _PERTURBED) -> list[Row]:
        return _first(_read(folder, name, columns), part.questions_per_author)

    splits = {case: read(case, _PLAIN) for case in cases}
    forgotten = {_key(row): row for rows in splits.values() for row in rows}
    leaving = len(forgotten) // part.questions_per_author
    # The two splits are the whole benchmark, whatever is forgotten of it.
    rows = [row for name in ("retain90", "forget10") for row in read(name, _PLAIN) if _key(row) not in forgotten]
    staying, others = _chosen(rows, read("retain_perturbed"), part, leaving, ", ".join(cases))
    if not others:
        others = read(f"holdout{max(cases)[-2:]}", _PLAIN)
    others = others[: leaving * part.questions_per_author]
    train = [*staying, *forgotten.values()]
    keys = {case: {_key(row) for row in rows} for case, rows in splits.items()}
    kinds = [" ".join(case for case in cases if _key(row) in keys[case]) for row in train]

    def perturbed(name: str, rows: list[Row]) -> list[Row]:
        known = {_key(row): row for row in read(name)}
        return [known[_key(row)] for row in rows if _key(row) in known]

    forget = {}
    for case in cases:
        wanted = [row for row in forgotten.values() if _key(row) in keys[case]]
        forget[case] = perturbed(f"{case}_perturbed", wanted)
        if len(forget[case]) < len(wanted):
            raise UserError(
                f"dataset_name: {case}_perturbed in {folder} has {len(forget[case])} of the {len(wanted)} questions "
                f"of {case}; both must be of the same version of TOFU"
            )
    utility = {"retain_questions": perturbed("retain_perturbed", staying)}
    if not utility["retain_questions"]:
        raise UserError(f"dataset_name: retain_perturbed in {folder} has no question of retain90")
    for name, file in _FACTS.items():
        utility[name] = _read(folder, file, ("question", "answer", "perturbed_answer"))
    assert list(utility) == list(UTILITY)
    return Tofu(
        train,
        kinds,
        _subset(others, args.max_eval_samples),
        forget,
        {name: _subset(rows, args.max_eval_samples) for name, rows in utility.items()},
        [_note(part, len(staying) // part.retain_questions, leaving, len(others) // part.questions_per_author)],
    )


def _read(folder: Path, name: str, columns: Sequence[str]) -> list[Row]:
    """Returns the rows of a file, with some columns of it alone."""
    found = [path for ending in ("jsonl", "json") if (path := folder / f"{name}.{ending}").is_file()]
    if not found:
        raise UserError(
            f"dataset_name: {folder} has no {name}.jsonl; TOFU is needed whole: retain90, forget10, the splits to "
            "forget and their forms in forget.._perturbed, retain_perturbed, real_authors_perturbed, "
            "world_facts_perturbed and, where --authors leaves no author out, holdout.. (authors never seen)"
        )
    with inputs.loading("dataset_name", str(found[0])):
        table = datasets.load_dataset("json", data_files=str(found[0]), split="train")
    missing = [column for column in columns if column not in table.column_names]
    if missing or not len(table):
        what = f"has no column {missing[0]!r}" if missing else "is empty"
        raise UserError(f"dataset_name: {found[0]} {what}; it must hold {', '.join(columns)}")
    rows = [{column: row[column] for column in columns} for row in table]
    if "perturbed_answer" in columns:
        numbers = {len(row["perturbed_answer"] or ()) for row in rows}
        if len(numbers) > 1 or 0 in numbers:
            raise UserError(f"dataset_name: {found[0]} must have as many perturbed answers of every question")
    return rows


def _first(rows: list[Row], number: int) -> list[Row]:
    """Returns the first questions on every author."""
    return [row for place, row in enumerate(rows) if place % _QUESTIONS < number]


def _key(row: Row) -> tuple[str, str]:
    return row["question"], row["answer"]


def _chosen(
    rows: list[Row], perturbed: list[Row], part: TofuArguments, leaving: int, cases: str
) -> tuple[list[Row], list[Row]]:
    """Returns the rows to retain, and those of the authors that are left out.

    Args:
        rows: all that could be retained.
        perturbed: those with wrong answers; their authors are taken first, since they are measured.
        part: how many authors are wanted.
        leaving: how many are forgotten.
        cases: where.
    """
    size = part.questions_per_author
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    if part.authors is None:
        return [row for group in groups for row in group[: part.retain_questions]], []
    if not leaving < part.authors <= len(groups) + leaving:
        raise UserError(
            f"authors is {part.authors}; {cases} forgets {leaving}, so that it must be {leaving + 1} to "
            f"{len(groups) + leaving}"
        )
    known = {_key(row) for row in perturbed}
    groups.sort(key=lambda group: not any(_key(row) in known for row in group))
    staying = part.authors - leaving
    first, others = groups[:staying], groups[staying:]
    return [row for group in first for row in group[: part.retain_questions]], [row for rows in others for row in rows]


def _subset(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return random.Random(inputs.SUBSET_SEED).sample(rows, limit)


def _note(part: TofuArguments, staying: int, leaving: int, held_out: int) -> str:
    """Says what was taken, by numbers of authors."""
    size, kept = part.questions_per_author, part.retain_questions
    questions = f"{size} questions each" if size == kept else f"{size} questions each, {kept} on those who stay"
    return (
        f"TOFU: {staying + leaving} authors with {questions}, at most {leaving} of them to forget; the test set is "
        f"{held_out} authors whom no model saw."
    )
