"""The model card beside a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import write_whole
from .markdown import code, python_string, table

CARD_NAME = "README.md"

_START, _END = "<!-- peft_ext adapter -->", "<!-- end of peft_ext adapter -->"
_DESCRIPTION = re.compile(rf"^{_START}$.*?^{_END}$\n*", re.MULTILINE | re.DOTALL)
_BASE_TAG = "base_model:adapter:"


@dataclass(frozen=True)
class About:
    """What a card says of a checkpoint that the checkpoint itself does not tell.

    Attributes:
        repository: Its id on the hub, `"user/name"`.
        revision: The branch there, if it is not main.
        subfolder: Where it lies in the repository, if not at the top.
        license: An identifier of the hub, such as `"mit"`; by default what the card has already.
        datasets: What it was trained on: ids on the hub, or other names.
        metrics: What was measured on which data.
        tags: Further tags of the hub.
    """

    repository: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    metrics: Sequence[EvalResult] = ()
    tags: Sequence[str] = ()

    def place(self, *arguments: str) -> str:
        """Where to load from, as arguments in Python, with others after the first."""
        place = python_string(self.repository) if self.repository else '"<this folder or repository>"'
        options = {"revision": self.revision, "subfolder": self.subfolder}
        named = [f"{name}={python_string(value)}" for name, value in options.items() if value]
        return ", ".join([place, *arguments, *named])


@dataclass
class CardFacts:
    """What a card says of a checkpoint. All text is Markdown; what comes from outside was escaped.

    Attributes:
        title: The heading.
        method: Name of the method, such as `"NOLA"`.
        library: The hub's name of the library that loads it.
        summary: What is in the checkpoint, in a sentence or two.
        rows: The table, by its first cells.
        options: Rows of three cells: an option of the method, its value and its default.
        hint: A sentence on loading.
        example: Python code that loads it, not Markdown.
        notice: A sentence that users of the method must know.
        install: The command that installs what loads it.
        base_model: Hub id or folder of the base model, if it is known; not Markdown.
        about: What the checkpoint does not tell.
    """

    title: str
    method: str
    library: str
    summary: str
    rows: Mapping[str, str]
    options: Sequence[tuple[str, str, str]]
    hint: str
    example: str
    notice: str = ""
    install: str = "pip install peft-ext"
    base_model: str | None = None
    about: About = field(default_factory=About)

    def describe(self, license: str | None = None) -> str:
        """The facts as Markdown.

        Args:
            license: that in the metadata of the card.
        """
        template = resources.files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
        rows = {**self.rows, **({"licence": code(license)} if license else {})}
        return template.format(
            title=self.title,
            summary=self.summary,
            notice=f"\n{self.notice}\n" if self.notice else "",
            rows=table(rows.items()),
            options=table(self.options),
            install=self.install,
            hint=self.hint,
            example=self.example,
            results=self._results(),
        ).strip()

    def _results(self) -> str:
        datasets, metrics = self.about.datasets, self.about.metrics
        lines = ["", "## Data and results"] if datasets or metrics else []
        if datasets:
            lines += ["", f"Trained on {', '.join(map(code, datasets))}."]
        if metrics:
            rows = [
                (_data(each), code(each.metric_name or each.metric_type), code(each.metric_value)) for each in metrics
            ]
            lines += ["", "| data | metric | value |", "| --- | --- | --- |", table(rows)]
        return "\n".join(lines)


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> None:
    """Describes a checkpoint in the model card `README.md` of its folder, which is made if it is not there.

    A card that somebody wrote keeps its text and its metadata; the description is put first, and replaced when
    described again.

    Raises:
        ValueError: the metadata of the card that is there is broken.
    """
    path = os.path.join(folder, CARD_NAME)
    card = ModelCard.load(path) if os.path.exists(path) else None
    data = _metadata(card.data.to_dict() if card else {}, facts)
    license = data.license if isinstance(data.license, str) else None

    described = "\n".join([_START, facts.describe(license), _END])
    rest = card.text.replace("\r\n", "\n").strip() if card else ""
    if _is_empty_template(rest):
        rest = ""
    if found := _DESCRIPTION.search(rest):
        before, after = rest[: found.start()], _DESCRIPTION.sub("", rest[found.end() :])
        text = f"{before}{described}\n\n{after}"
    else:
        text = f"{described}\n\n{rest}"
    write_whole(path, f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def is_repository(name: Any) -> bool:
    """Whether a text can be the id of a repository on the hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not os.path.isdir(name)


def _metadata(data: dict[str, Any], facts: CardFacts) -> ModelCardData:
    """The metadata of a card with what the facts say; what the hub refuses is left out."""
    about = facts.about
    data["library_name"] = facts.library
    if facts.base_model:
        data.setdefault("base_model", facts.base_model)
    if isinstance(data.get("base_model"), str) and not is_repository(data["base_model"]):
        del data["base_model"]  # a folder means nothing to others, and the hub refuses it
    bases = data.get("base_model") or []
    base_tags = [_BASE_TAG + base for base in ([bases] if isinstance(bases, str) else bases)]
    tags = {*(data.get("tags") or []), *about.tags, "peft_ext", facts.method.lower()}
    data["tags"] = sorted(tag for tag in tags if not tag.startswith(_BASE_TAG) or tag in base_tags)
    if about.license:
        data["license"] = about.license
    _extend(data, "datasets", [name for name in about.datasets if is_repository(name)])
    _extend(data, "metrics", [each.metric_type for each in about.metrics])
    header = ModelCardData(**data)
    if about.metrics:
        kept = [
            old for old in header.eval_results or [] if not any(old.is_equal_except_value(new) for new in about.metrics)
        ]
        header.eval_results = [*kept, *about.metrics]
        header.model_name = header.model_name or about.repository or facts.title
    return header


def _extend(data: dict[str, Any], key: str, values: list[str]) -> None:
    """Adds values to a field that is nothing, one text or a list."""
    before = data.get(key) or []
    merged = list(dict.fromkeys([*([before] if isinstance(before, str) else before), *values]))
    if merged:
        data[key] = merged


def _data(metric: EvalResult) -> str:
    return code(" ".join(part for part in (metric.dataset_name, metric.dataset_config, metric.dataset_split) if part))


def _is_empty_template(text: str) -> bool:
    """Whether a card is the hub's template, as PEFT and transformers write it, without a word of anybody."""
    empty = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    added = re.compile(r"- PEFT \S+|### Framework versions|This is the model card of a \S* transformers model .*")
    lines = [line.strip() for line in text.splitlines()]
    return "Model Card for Model ID" in text and all(line in empty or added.fullmatch(line) for line in lines)
