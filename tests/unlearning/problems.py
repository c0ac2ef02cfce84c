"""Small models and data for the tests of unlearning."""

from __future__ import annotations

import re

import tiny_models
import torch
import torch.nn.functional as F
import transformers
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers.modeling_outputs import ImageClassifierOutput

from peft_ext import McncConfig, NolaConfig, PrancConfig

PRANC = {"num_coefficients": 40, "init_weights": False}


class Regression(nn.Module):
    """A linear classifier with a name for the pixels that transformers use."""

    def __init__(self, features: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.linear(pixel_values.flatten(1)))


class Convolutions(nn.Module):
    """A small CNN with batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.linear(torch.relu(self.bn(self.conv(pixel_values))).mean((2, 3))))


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def loader(rows: list[dict[str, torch.Tensor]], batch_size: int = 4) -> DataLoader:
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


def images(n: int, seed: int = 0, shape: tuple[int, ...] = (3, 16, 16), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(shape, generator=g, dtype=dtype), "labels": torch.tensor(i % 3)} for i in range(n)
    ]


def texts(n: int, seed: int = 0, length: int = 6):
    """Sentences with a prompt of two tokens; every second one is shorter and padded on the right."""
    rows = []
    for i, ids in enumerate(tiny_models.tokens(n, length, seed + 1) % 24):
        mask = torch.ones_like(ids)
        mask[length - 2 * (i % 2) :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:2] = -100
        rows.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels})
    return rows


def classifier(config=None) -> nn.Module:
    if config is None:
        config = NolaConfig(
            r=2, num_basis=6, init_weights=False, modules_to_save=["classifier"], parametrization="plain"
        )
    return get_peft_model(tiny_models.vit(), config).double().eval()


def language_model(config=None) -> nn.Module:
    # GPT-2 computes in float64 throughout; Llama's norms are always in float32.
    config = config or NolaConfig(r=2, num_basis=6, init_weights=False, parametrization="plain")
    model = get_peft_model(tiny_models.gpt2(vocab_size=24), config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.1)  # with coefficients of 1 the loss is far from anything quadratic
    return model


def batch_norm() -> nn.Module:
    model = Convolutions().double()
    model.train()
    for row in images(6, 5):
        model(row["pixel_values"][None].repeat(2, 1, 1, 1) + torch.randn(2, 3, 16, 16))  # running statistics
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("bn", "linear")))
    return model.eval()


def bert(kind: str, layers: int = 2, first: int = 0) -> nn.Module:
    """A BERT for tokens, of which what comes from the `first` layer on can change."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    return changing(
        getattr(transformers, kind)(config), rf"layer\.[{first}-9]\.output|^classifier|transform|predictions\.bias"
    )


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=24, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if "LayerNorm" in type(norm).__name__:  # T5's own computes in float32
                own = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
                own.weight = norm.weight
                setattr(module, name, own)
    return changing(model, r"DenseReluDense|EncDecAttention\.[qv]")


def changing(model: nn.Module, names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(names, name) is not None)
    return model.double().eval()


def classified_texts(n: int, seed: int = 0):
    """Texts with a class each."""
    return [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(texts(n, seed))]


def token_classes(n: int, seed: int = 0):
    """Texts with a class for every token but some, the first among them in half of the rows."""
    rows = texts(n, seed)
    for i, row in enumerate(rows):
        ids = row["input_ids"]
        labels = (ids % 3).masked_fill((row["attention_mask"] == 0) | (ids % 5 == 0), -100)
        labels[:1] = -100 if i % 2 else labels[1]
        row["labels"] = labels.masked_fill(row["attention_mask"] == 0, -100)
    return rows


def masked_tokens(n: int, seed: int = 0):
    """Texts of which some tokens, the first among them, are hidden and asked for."""
    rows = texts(n, seed)
    for row in rows:
        hidden = (torch.arange(6) % 3 == 0) & (row["attention_mask"] == 1)
        row["labels"] = row["input_ids"].masked_fill(~hidden, -100)
        row["input_ids"] = row["input_ids"].masked_fill(hidden, 3)
    return rows


def translations(n: int, seed: int = 0):
    """Texts of which others are asked for, the decoder's tokens being those shifted by one."""
    rows = texts(n, seed)
    for row, other in zip(rows, texts(n, seed + 7)):
        labels = other["input_ids"][:4].masked_fill(other["attention_mask"][:4] == 0, -100)
        labels[3:] = -100 if row["attention_mask"].all() else 5
        row["labels"], row["decoder_input_ids"] = labels, F.pad(labels.clamp(min=0)[:-1], (1, 0))
    return rows


def whole_texts(n: int, seed: int = 0):
    """Texts of which all tokens are targets, the first as well."""
    rows = texts(n, seed)
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    return rows


# name: (makes the model, makes its samples)
PROBLEMS = {
    "ViT, NOLA and head": (classifier, images),
    "ViT, PRANC": (lambda: classifier(PrancConfig(**PRANC)), images),
    "ViT, MCNC": (lambda: classifier(McncConfig(apply_to="weight", k=2, d=200, init_weights=False)), images),
    "CNN, batch-norm": (batch_norm, images),
    "GPT-2, NOLA": (language_model, texts),
    "GPT-2, prompt": (
        lambda: language_model(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        texts,
    ),
    "GPT-2, prompt, whole texts": (
        lambda: language_model(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        whole_texts,
    ),
    "BERT, texts": (lambda: bert("BertForSequenceClassification"), classified_texts),
    "BERT, token classes": (lambda: bert("BertForTokenClassification"), token_classes),
    "BERT, masked tokens": (lambda: bert("BertForMaskedLM"), masked_tokens),
    "T5": (t5, translations),
}
SAME_PLACE = ("BERT, token classes", "BERT, masked tokens", "T5")
"""Problems where the output at a token belongs to the label at the same place."""


def trained(seed: int = 0, steps: int = 60, weight_decay: float = 0.01):
    """A head and adapter that know their samples, the initial weights, retain and forget rows."""
    model = classifier()
    initial = trainable(model)
    rows = images(24, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.0)
    fit(model, rows, optimizer, steps, initial, weight_decay)
    return model, initial, [row for row in rows if row["labels"] != 2], [row for row in rows if row["labels"] == 2]


def fit(model, rows, optimizer, steps, initial, weight_decay):
    x, y = torch.stack([row["pixel_values"] for row in rows]), torch.stack([row["labels"] for row in rows])
    for _ in range(steps):
        away = sum((p - initial[name]).square().sum() for name, p in model.named_parameters() if name in initial)
        loss = F.cross_entropy(model(pixel_values=x).logits, y) + 0.5 * weight_decay * away
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ridge_solution(rows, reference: torch.Tensor, ridge: float, scale: float = 1.0) -> torch.Tensor:
    """The linear classifier `(classes, features + 1)` that ridge regression towards a reference gives."""
    X = torch.stack([torch.cat((row["pixel_values"].flatten(), torch.ones(1).double())) for row in rows])
    Y = F.one_hot(torch.stack([row["labels"] for row in rows]), 3).double()
    A = X.T @ X * scale + ridge * torch.eye(X.shape[1]).double()
    return reference + torch.linalg.solve(A, X.T @ (Y - X @ reference.T) * scale).T


def matrix(model: nn.Module) -> torch.Tensor:
    return torch.cat((model.linear.weight, model.linear.bias[:, None]), 1).detach()


def dense_curvature(model: nn.Module, rows, loss: str, same_place: bool = False) -> torch.Tensor:
    """`sum_i J_i^T H_i J_i` sample by sample, from torch's own Jacobian and second derivative of the loss.

    Args:
        model, rows, loss: what it is about.
        same_place: whether the outputs of tokens belong to their own labels, not to those of the next tokens.
    """
    parameters = trainable(model)
    sizes = [p.numel() for p in parameters.values()]
    total = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for row in rows:
        inputs = {name: value[None] for name, value in row.items() if name != "labels"}
        labels = row["labels"].view(-1)

        def logits(vector, inputs=inputs, labels=labels):
            parts = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), vector.split(sizes))}
            found = functional_call(model, parts, (), inputs).logits
            found = found.view(-1, found.shape[-1])
            # Where outputs predict the next label, the last one predicts none; those of a soft prompt come first.
            outputs = found if same_place or len(labels) == 1 else found[:-1]
            kept = labels[-len(outputs) :]
            return outputs[-len(kept) :][kept != -100]

        vector = torch.cat([p.flatten() for p in parameters.values()])
        J = torch.autograd.functional.jacobian(logits, vector)
        for place, outputs in enumerate(logits(vector)):
            if loss == "cross_entropy":
                H = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z[None], torch.tensor([0])), outputs)
            else:
                H = torch.eye(len(outputs)).double()
            total += J[place].T @ H @ J[place]
    return total
