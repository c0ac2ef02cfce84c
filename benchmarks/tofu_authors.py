"""Data of the preset unlearn_minilm_tofu_authors: on which of TOFU's authors is a question?

``python -m benchmarks.tofu_authors TOFU FOLDER`` reads TOFU's forget10 (a folder with forget10.jsonl and
forget10_perturbed.jsonl) and writes the questions on its twenty authors as train.jsonl and their paraphrases as
test.jsonl, with the columns text and author. An author's name would give the answer away, so words that are taken for
one are left out: those with a capital, but for the first of a question, in 12 or more of the author's 40.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

QUESTIONS, NAMED = 20, 12
_CAPITAL = re.compile(r"^[A-Z][\w-]+")


def main(source: Path, folder: Path) -> None:
    columns = {"train": ("forget10", "question"), "test": ("forget10_perturbed", "paraphrased_question")}
    questions = {}
    for split, (name, column) in columns.items():
        lines = (source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        questions[split] = [json.loads(line)[column] for line in lines]
    words: dict[int, Counter[str]] = {}
    for texts in questions.values():
        for place, text in enumerate(texts):
            found = {name for word in text.split()[1:] for name in _CAPITAL.findall(word)}
            words.setdefault(place // QUESTIONS, Counter()).update(found)
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in questions.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for place, text in enumerate(texts):
                author = place // QUESTIONS
                kept = [w for w in text.split() if not any(words[author][c] >= NAMED for c in _CAPITAL.findall(w))]
                file.write(json.dumps({"text": " ".join(kept), "author": f"author {author:02d}"}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
