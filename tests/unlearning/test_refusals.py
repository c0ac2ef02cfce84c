"""What cannot be unlearned is refused by every method and by the ledger, with words that help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
import transformers
from method_cases import arguments
from problems import classified_texts, images, loader, translations
from torch import nn
from transformers import TrainingArguments

from peft_ext import NolaConfig
from peft_ext.training.callbacks import trainable_state
from peft_ext.unlearning import METHODS, GaussNewton, Request, UnlearningLedger

ADAPTER = {"r": 2, "num_basis": 6, "init_weights": False}
ANY_LOSS = ("retrain", "finetune", "rewind")  # these take whatever loss the model has


def classifier(changed: Callable[[Any], None], head: bool = True) -> nn.Module:
    model = problems.classifier(NolaConfig(**ADAPTER, modules_to_save=["classifier"] if head else None))
    changed(model)
    return model.double()


def another_is_active(model: Any) -> None:
    model.add_adapter("other", NolaConfig(**ADAPTER))
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default" in name)


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **options
    )
    return problems.changing(transformers.BertForSequenceClassification(config), "^classifier")


def labelled(label: Callable[[int], Any]) -> Callable[..., list[dict[str, torch.Tensor]]]:
    def rows(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
        texts = classified_texts(n, seed)
        return [{**row, "labels": torch.tensor(label(i)).double()} for i, row in enumerate(texts)]

    return rows


def underivable() -> nn.Module:
    model = problems.t5()
    next(m for m in model.modules() if isinstance(m, transformers.T5PreTrainedModel)).config.pad_token_id = None
    return model


def no_decoder_inputs(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    return [{k: v for k, v in row.items() if k != "decoder_input_ids"} for row in translations(n, seed)]


def nothing_to_forget(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    return images(n, seed) if seed == 1 else []


# name: (makes the model, makes the samples to retain (seed 1) and to forget (seed 2), the message)
BAD = {
    "merged": (lambda: classifier(lambda m: m.merge_adapter()), images, "is merged into .* `model.unmerge_adapter"),
    "disabled": (
        lambda: classifier(lambda m: m.base_model.disable_adapter_layers()),
        images,
        "is disabled in .*enable_adapter_layers",
    ),
    "another adapter": (
        lambda: classifier(another_is_active, False),
        images,
        "has an effect on the outputs.*set_adapt",
    ),
    "nothing to forget": (lambda: classifier(lambda m: None), nothing_to_forget, "he forget set is empty"),
    "numbers": (lambda: bert(num_labels=1), labelled(float), "configuration has num_labels=1.*Retrain and Finetune"),
    "whole numbers": (
        lambda: bert(num_labels=1, problem_type="regression"),
        classified_texts,
        "configuration has problem_type='regression'",
    ),
    "several labels": (
        lambda: bert(num_labels=3, problem_type="multi_label_classification"),
        labelled(lambda i: [1.0, 0.0, i % 2]),
        "configuration has problem_type='multi_label_classification'",
    ),
    "no inputs of the decoder": (
        underivable,
        no_decoder_inputs,
        "must have 'decoder_input_ids'|labels for tokens|has to be defined",
    ),
}


def training(folder: Path) -> TrainingArguments:
    return arguments(folder, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-3)


@pytest.mark.parametrize("method", [*METHODS, "UnlearningLedger"])
@pytest.mark.parametrize("case", BAD)
def test_bad_models_and_data(method: str, case: str, tmp_path: Path) -> None:
    make, samples, message = BAD[case]
    model, sets = make(), (loader(samples(4, 1)), loader(samples(2, 2)))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def serve() -> None:
        if method == "UnlearningLedger":
            ledger = UnlearningLedger.create(tmp_path / "ledger", model, [*sets[0], *sets[1]])
            ledger.forget(model, sets[1])
        else:
            trains = hasattr(METHODS[method], "train")
            options: dict[str, Any] = {"training": training(tmp_path)} if trains else {}
            METHODS[method]().fit(model, *sets, reference=trainable_state(model), **options)

    if method in ANY_LOSS and case in ("numbers", "whole numbers", "several labels"):
        serve()
        assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        return
    if method == "idk_dpo":  # it says first that it is for language models
        message = f"{message}|makes a causal language model say"
    if method == "natmu":  # likewise for images
        message = f"{message}|NatMU needs images"
    with pytest.raises(ValueError, match=message):
        serve()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("case", ["merged", "disabled", "nothing to forget"])
def test_requests_refuse_them_too(case: str, tmp_path: Path) -> None:
    make, samples, message = BAD[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        collator = transformers.default_data_collator
        Request(model, samples(4, 1), samples(2, 2), collator, training(tmp_path), trainable_state(model))


def test_retraining_in_training_mode_says_that_nothing_depends_on_the_parameters(tmp_path: Path) -> None:
    model = classifier(another_is_active, False)
    sets = images(4, 1, dtype=torch.float64), images(2, 2)
    request = Request(
        model, *sets, transformers.default_data_collator, training(tmp_path), trainable_state(model), eval_mode=False
    )
    with pytest.raises(ValueError, match="has an effect on the outputs"):
        METHODS["retrain"]().unlearn(request)


def test_a_loader_that_can_be_read_once_is_refused() -> None:
    model = problems.classifier()
    with pytest.raises(ValueError, match="can be read several times.*got a generator"):
        GaussNewton().fit(model, loader(images(4, 1)), (batch for batch in loader(images(2, 2))))
