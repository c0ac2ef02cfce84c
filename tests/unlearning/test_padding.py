"""Padding is no part of a sample: left or right, more or less of it, the same samples lead to the same step."""

from __future__ import annotations

from pathlib import Path

import problems
import pytest
import tiny_models
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_ext import NolaConfig
from peft_ext.training.batch import Batch
from peft_ext.unlearning import FastNTK, GaussNewton, UnlearningLedger
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import CrossEntropy

FILLING = {"input_ids": 0, "attention_mask": 0, "labels": -100, "position_ids": 0, "decoder_input_ids": 0}


def llama() -> nn.Module:
    """Rotary embeddings: its outputs do not depend on where a sample begins."""
    model = tiny_models.llama(3, vocab_size=24)
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__ == "LlamaRMSNorm":  # computes in float32
                own = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                own.weight = norm.weight
                setattr(module, name, own)
    config = NolaConfig(r=2, num_basis=6, init_weights=False, layers_to_transform=[2])
    model = get_peft_model(model, config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.1)
    return model


def gpt2_classifier() -> nn.Module:
    """A classifier that reads the last token, wherever the padding is."""
    torch.manual_seed(0)
    options = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "num_labels": 3, "pad_token_id": 0}
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(vocab_size=24, **options))
    return problems.changing(model, r"h\.1\.ln|score")


def sentences(kind: str, n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts of 2 to 8 tokens and any number of targets, none as well; `position_ids` count from the first token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = torch.randint(3, 24, (2 + i % 7,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(len(ids))}
        if kind == "class":
            row["labels"] = torch.tensor(i % 3)
        elif kind == "classes":
            row["labels"] = (ids % 3).masked_fill(ids % 5 == 0, -100)
        else:
            row["labels"] = ids.clone()
            row["labels"][: i % 3] = -100
        rows.append(row)
    return rows


def batches(rows: list[dict[str, torch.Tensor]], size: int, side: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        length = max(len(row["input_ids"]) for row in part)
        batch = {}
        for name in part[0]:
            filled = []
            for row in part:
                missing = length - len(row["input_ids"])
                ends = (missing, 0) if side == "left" else (0, missing)
                value = row[name]
                filled.append(nn.functional.pad(value, ends, value=FILLING[name]) if value.dim() else value)
            batch[name] = torch.stack(filled)
        found.append(batch)
    return found


# name: (makes the model, the kind of its labels, whether it is given positions)
CASES = {
    "Llama": (llama, "next token", False),
    "GPT-2": (problems.language_model, "next token", True),
    "GPT-2, classes": (gpt2_classifier, "class", True),
    "BERT, token classes": (lambda: problems.bert("BertForTokenClassification"), "classes", True),
}
SHAPES = [("right", 1), ("right", 4), ("left", 4), ("left", 16)]


def samples(case: str, n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    _, kind, positions = CASES[case]
    rows = sentences(kind, n, seed)
    return rows if positions else [{k: v for k, v in row.items() if k != "position_ids"} for row in rows]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def steps(method, case: str, folder: Path) -> list[torch.Tensor]:
    """The steps of a method with batches of every shape, the last of them with the samples in another order."""
    retain, forget = samples(case, 12, 0), samples(case, 4, 1)
    found = []
    for i, (side, size) in enumerate([*SHAPES, ("left", 4)]):
        model = CASES[case][0]()
        start = weights(model)
        order = slice(None, None, -1 if i == len(SHAPES) else 1)
        method(model, batches(retain[order], size, side), batches(forget[order], size, side), folder / str(i))
        found.append(weights(model) - start)
    return found


def gauss_newton(model, retain, forget, folder) -> None:
    GaussNewton(max_steps=1).fit(model, retain, forget)


def gauss_newton_by_labels(model, retain, forget, folder) -> None:
    GaussNewton(max_steps=1, estimator="labels", form="parameter").fit(model, retain, forget)


def fast_ntk(model, retain, forget, folder) -> None:
    FastNTK(form="kernel").fit(model, retain, forget)


def ledger(model, retain, forget, folder) -> None:
    """The request comes in batches of one, unlike the training data."""
    UnlearningLedger.create(folder, model, [*retain, *forget], damping=0.3)
    one_by_one = [batch.tensors for whole in forget for batch in cut(Batch(whole, {}))]
    UnlearningLedger(folder).forget(model, one_by_one)


def exact_ledger(model, retain, forget, folder) -> None:
    """All rows, of which samples have different numbers, in the form that keeps them."""
    found = UnlearningLedger.create(folder, model, [*retain, *forget], damping=0.3, draws=None)
    found.forget(model, forget)


def cut(batch: Batch) -> list[Batch]:
    return [batch.select([i]) for i in range(len(batch))]


@pytest.mark.parametrize(
    ("method", "case"),
    [
        *((method, case) for method in (gauss_newton, ledger) for case in CASES),
        (gauss_newton_by_labels, "Llama"),
        (fast_ntk, "BERT, token classes"),
        (exact_ledger, "BERT, token classes"),
        (exact_ledger, "GPT-2"),
    ],
)
def test_the_shape_of_batches_does_not_change_the_step(method, case: str, tmp_path: Path) -> None:
    found = steps(method, case, tmp_path)
    assert float(found[0].norm()) > 1e-3
    for step in found[1:]:
        assert float((step - found[0]).norm()) <= 1e-6 * float(found[0].norm())


@pytest.mark.parametrize("case", CASES)
def test_hashes_and_kept_features_belong_to_the_sample(case: str) -> None:
    rows = samples(case, 8, 0)
    function = AdapterFunction(CASES[case][0](), CrossEntropy())
    keys, losses = set(), []
    for side, size in SHAPES:
        with function.prefix.remembering():
            data = batches(rows, size, side)
            first = function.loss_and_gradient(data)[0]
            losses += [first, function.loss_and_gradient(data)[0]]  # the second time by what is kept
        keys.add(tuple(key for batch in data for key in Batch(batch, {}).keys()))
    assert len(keys) == 1 and len(set(*keys)) == 8
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_targets_of_a_decoder_have_padding_of_their_own() -> None:
    """As many places for the source as for the target must not make the one's padding the other's."""
    rows = problems.translations(2)
    short = {name: value[None, :4] for name, value in rows[1].items()}
    assert short["attention_mask"].shape == short["labels"].shape
    (expected,) = Batch(short, {}).keys()
    longer = {
        name: nn.functional.pad(value, (0, 3 if name in ("labels", "decoder_input_ids") else 1), value=FILLING[name])
        for name, value in short.items()
    }
    assert Batch(longer, {}).keys() == [expected]
    masked = {**longer, "decoder_attention_mask": (longer["labels"] != -100).long()}
    assert Batch(masked, {}).keys() == [expected]
    other = {**short, "labels": short["labels"].roll(1, 1)}
    assert Batch(other, {}).keys() != [expected]


def pairs(n: int, seed: int, size: int, given: bool) -> list[dict[str, torch.Tensor]]:
    """Texts and others that are asked for, of 1 to 7 tokens each, longer and shorter than the former."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (
        [torch.randint(3, 24, (1 + (i * step) % 7,), generator=generator) for i in range(n)] for step in (3, 2)
    )
    pad, found = nn.utils.rnn.pad_sequence, []
    for start in range(0, n, size):
        part = slice(start, start + size)
        batch = {"input_ids": pad(ids[part], True), "labels": pad(labels[part], True, padding_value=-100)}
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
        if given:
            batch["decoder_input_ids"] = nn.functional.pad(batch["labels"][:, :-1].clamp(min=0), (1, 0))
        found.append(batch)
    return found


def test_derived_inputs_of_a_decoder_lead_to_the_same_step_in_every_batch(tmp_path: Path) -> None:
    """Some batches have as many places for one text as for the other; requests come one by one."""
    found, keys = [], []
    for size, given in ((1, False), (5, False), (12, False), (5, True)):
        model = problems.t5()
        start, data = weights(model), pairs(12, 0, size, given)
        keys.append([key for batch in data for key in Batch(batch, {}).keys()])
        folder = tmp_path / f"{size}-{given}"
        UnlearningLedger.create(folder, model, data, damping=0.3, draws=None)
        UnlearningLedger(folder).forget(model, pairs(12, 0, 1, given)[:3])
        found.append(weights(model) - start)
    assert keys[0] == keys[1] == keys[2] and len(set(keys[0])) == 12
    assert float(found[0].norm()) > 1e-3
    for step in found[1:]:
        assert float((step - found[0]).norm()) <= 1e-6 * float(found[0].norm())
