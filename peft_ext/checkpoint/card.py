"""The model card beside a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from huggingface_hub import ModelCard, ModelCardData

from .identity import describe_shapes

_START, _END = "<!-- peft_ext adapter -->", "<!-- end of peft_ext adapter -->"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass
class CardFacts:
    """What a card says of an adapter.

    Attributes:
        method: Name of the method, such as `"NOLA"`.
        paper: Address of its paper.
        base_model: Hub id or folder of the base model, if it is known.
        seed: The seed of the frozen numbers.
        generator_version: Version of the random number specification.
        fingerprint: What the seed's numbers are recognised by.
        target_shapes: `{"out x in": number of adapted layers}`.
        rows: Further rows of the table, by their first cell.
        notice: A sentence that users of the method must know.
        task_type: PEFT's task type, which decides the class in the loading example.
        base_model_class: That class where the task does not tell; `AutoModel` if neither does.
    """

    method: str
    paper: str
    base_model: str | None
    seed: int
    generator_version: int
    fingerprint: str
    target_shapes: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    notice: str = ""
    task_type: str | None = None
    base_model_class: str | None = None

    def describe(self) -> str:
        """The facts as Markdown."""
        template = resources.files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
        return template.format(
            method=self.method,
            paper=self.paper,
            base_model=self.base_model or "(not recorded)",
            seed=self.seed,
            version=self.generator_version,
            fingerprint=self.fingerprint,
            shapes=describe_shapes(self.target_shapes),
            rows="".join(f"\n| {name} | {text} |" for name, text in self.rows.items()),
            notice=f"\n{self.notice}\n" if self.notice else "",
            auto_class=_AUTO_CLASSES.get(self.task_type or "", self.base_model_class or "AutoModel"),
        ).strip()


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> None:
    """Describes an adapter in the model card `README.md` of its folder: method, paper, seed, base model, loading.

    A card that somebody wrote keeps its text; the description is put first, and replaced when saved again.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else None
    data = card.data.to_dict() if card else {}
    base_model = facts.base_model
    data["library_name"] = "peft"
    tags = {*(data.get("tags") or []), "peft_ext", facts.method.lower()}
    if base_model and os.path.isdir(base_model):  # means nothing to others, and the hub refuses a local path
        data.pop("base_model", None)
        tags -= {f"base_model:adapter:{base_model}"}
    elif base_model:
        data.setdefault("base_model", base_model)
    data["tags"] = sorted(tags)

    described = "\n".join([_START, facts.describe(), _END])
    rest = card.text.strip() if card else ""
    if "Model Card for Model ID" in rest or "More Information Needed" in rest:
        rest = ""  # PEFT's empty template
    if _START in rest and _END in rest:
        before, _, tail = rest.partition(_START)
        text = before + described + tail.partition(_END)[2]
    else:
        text = f"{described}\n\n{rest}"
    header = ModelCardData(**data).to_yaml()
    ModelCard(f"---\n{header}\n---\n\n{text.strip()}\n", ignore_metadata_errors=True).save(path)
