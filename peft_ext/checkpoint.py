"""What a checkpoint says beside its coefficients, how it is verified, and the model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from . import randomness

if TYPE_CHECKING:
    from peft import PeftModel

    from .tuners.config import SeededConfig

_CARD_START, _CARD_END = "<!-- peft_ext adapter -->", "<!-- end of peft_ext adapter -->"


def check_fingerprint(seed: int, version: Any, expected: str | None) -> None:
    """Verifies that a seed means the numbers that it meant when an adapter was saved.

    Raises:
        ValueError: an unknown `generator_version`, or other numbers.
    """
    version = randomness.check_version(version)
    if expected is None:
        return
    found = randomness.fingerprint(seed, version)
    if found != expected:
        raise ValueError(
            f"`fingerprint` must be {found!r} for seed {seed} and generator_version {version}, got {expected!r}. The "
            "checkpoint was made with other random numbers, so its coefficients would give other weights here: the "
            "seed or the fingerprint in adapter_config.json was edited, or this installation generates wrong numbers "
            "(its tests tell)."
        )


def check_target_shapes(saved: Mapping[str, int] | None, found: Mapping[str, int]) -> None:
    """Verifies that a model has the layers that an adapter was saved for; coefficients alone do not show it.

    Raises:
        ValueError: the numbers of adapted layers by shape (out x in) differ.
    """
    if saved is not None and dict(saved) != dict(found):
        raise ValueError(
            f"`target_shapes` of the saved adapter ({_shapes(saved)}) does not fit the model, where "
            f"`target_modules` matches {_shapes(found)}. Load the base model that the adapter was trained on (layer "
            "names can also differ between releases of transformers). To start a new adapter from a saved "
            "configuration, set its `target_shapes` to None."
        )


def _shapes(shapes: Mapping[str, int]) -> str:
    return ", ".join(f"{number} layers of {shape}" for shape, number in sorted(shapes.items())) or "no layers"


def check_coefficients(
    state_dict: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Size],
    marker: str,
    size_fields: tuple[str, ...],
) -> None:
    """Verifies the coefficients in a loaded state dict before any of them reaches the model.

    Args:
        state_dict: keys as in the model.
        expected: shapes of the coefficients that the model has for the adapter.
        marker: what the names of coefficients contain.
        size_fields: fields of the configuration that the shapes depend on.

    Raises:
        ValueError: missing or unknown coefficients, other shapes, or values that are not finite.
    """
    missing = sorted(expected.keys() - state_dict.keys())
    unknown = sorted(key for key in state_dict if marker in key and key not in expected)
    if missing or unknown:
        raise ValueError(
            f"The saved adapter does not fit the model: {len(missing)} adapted layers find no coefficients"
            + (f" (first: {missing[0]!r})" if missing else "")
            + f" and {len(unknown)} saved coefficients find no layer"
            + (f" (first: {unknown[0]!r})" if unknown else "")
            + ". Check the base model and `target_modules`; layer names can differ between releases of transformers."
        )
    for key, shape in expected.items():
        if state_dict[key].shape != shape:
            raise ValueError(
                f"The saved adapter does not fit its configuration: {key!r} must have shape {tuple(shape)}, got "
                f"{tuple(state_dict[key].shape)}. {' and '.join(f'`{field}`' for field in size_fields)} in "
                "adapter_config.json must be what it was trained with."
            )
        check_finite(state_dict[key], f" in {key!r}")


def check_finite(coefficients: torch.Tensor, where: str = "") -> None:
    """Raises a ValueError, which says `where`, if coefficients hold NaN or infinity."""
    if not torch.isfinite(coefficients).all():
        raise ValueError(
            f"The coefficients of an adapter must be finite, got NaN or infinity{where}. The checkpoint is damaged, or "
            "the training that wrote it diverged."
        )


def write_card(folder: str | os.PathLike[str], config: SeededConfig, base_model_class: str | None = None) -> None:
    """Describes an adapter in the model card `README.md` of its folder: method, paper, seed, base model, loading.

    A card that somebody wrote keeps its text; the description is put first, and replaced when saved again.

    Args:
        base_model_class: a class of transformers for the loading example, where the task does not tell.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else None
    data = card.data.to_dict() if card else {}
    base_model = config.base_model_name_or_path
    data["library_name"] = "peft"
    tags = {*(data.get("tags") or []), "peft_ext", config.method_name.lower()}
    if base_model and os.path.isdir(base_model):  # means nothing to others, and the hub refuses a local path
        data.pop("base_model", None)
        tags -= {f"base_model:adapter:{base_model}"}
    elif base_model:
        data.setdefault("base_model", base_model)
    data["tags"] = sorted(tags)

    fields = config.to_dict()
    shapes = fields["target_shapes"] or {}
    described = "\n".join(
        [
            _CARD_START,
            resources.files(__package__)
            .joinpath("model_card.md")
            .read_text(encoding="utf-8")
            .format(
                method=config.method_name,
                paper=config.paper,
                base_model=base_model or "(not recorded)",
                seed=config.seed,
                version=config.generator_version,
                fingerprint=fields["fingerprint"],
                shapes=_shapes(shapes),
                rows="".join(f"\n| {name} | {text} |" for name, text in config.card_rows(shapes).items()),
                notice=f"\n{config.notice}\n" if config.notice else "",
                auto_class=_AUTO_CLASSES.get(config.task_type or "", base_model_class or "AutoModel"),
            )
            .strip(),
            _CARD_END,
        ]
    )
    rest = card.text.strip() if card else ""
    if "Model Card for Model ID" in rest or "More Information Needed" in rest:
        rest = ""  # PEFT's empty template
    if _CARD_START in rest and _CARD_END in rest:
        before, _, tail = rest.partition(_CARD_START)
        text = before + described + tail.partition(_CARD_END)[2]
    else:
        text = f"{described}\n\n{rest}"
    header = ModelCardData(**data).to_yaml()
    ModelCard(f"---\n{header}\n---\n\n{text.strip()}\n", ignore_metadata_errors=True).save(path)


def push_to_hub(model: PeftModel, repo_id: str, **options: Any) -> str:
    """Saves an adapter and uploads it with its model card to the Hugging Face hub.

    `model.push_to_hub` uploads the same files, but puts an empty card in place of ours. The text of a card that is in
    the repository is kept.

    Args:
        options: `private` and `token`; `revision`, `commit_message` and `create_pr` of `HfApi.upload_folder`.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    token = options.pop("token", None)
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        try:
            ModelCard.load(repo_id, token=token).save(os.path.join(folder, "README.md"))
        except EntryNotFoundError:
            pass
        model.save_pretrained(folder)
        return hub.upload_folder(repo_id=repo_id, folder_path=folder, **{"commit_message": "Upload adapter", **options})


_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
