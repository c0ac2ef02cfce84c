"""Outputs meet the targets that the model itself compares them with: the losses are equal."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from peft_ext import NolaConfig, PrancConfig, SeededNetwork
from peft_ext.targets import IGNORED, Alignment

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 24}


def bert(name: str, **options) -> nn.Module:
    return getattr(transformers, name)(transformers.BertConfig(**BERT, **options))


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))


BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 24}
WIDTHS = {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16}
WHISPER = {**BART, **WIDTHS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ENCODER_DECODERS = {
    "T5": t5,
    "BART": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, **WIDTHS)),
    "mBART": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART, **WIDTHS)),
}


def soft_prompt(kind) -> nn.Module:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(tiny_models.gpt2(vocab_size=24), config)


def tokens(labels: str = "tokens") -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 24, (3, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if labels == "classes":
        return batch | {"labels": torch.tensor([0, 1, 1])}
    return batch | {"labels": torch.randint(0, 2 if labels == "few" else 24, (3, 6)).masked_fill(ids % 4 == 0, IGNORED)}


def seq2seq() -> dict[str, torch.Tensor]:
    batch = tokens()
    labels = torch.randint(1, 24, (3, 4))
    labels[0, 2:] = IGNORED
    return batch | {"labels": labels, "decoder_input_ids": F.pad(labels.clamp(min=0)[:, :-1], (1, 0))}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 2, 1])}


# name: (model, batch, kind)
CASES = {
    "causal": (lambda: tiny_models.gpt2(vocab_size=24), tokens, "next token"),
    "causal, adapted": (
        lambda: get_peft_model(tiny_models.gpt2(vocab_size=24), NolaConfig(num_basis=4)),
        tokens,
        "next token",
    ),
    "causal, BERT": (lambda: bert("BertLMHeadModel", is_decoder=True), tokens, "next token"),
    "causal, prompt": (lambda: soft_prompt(PromptTuningConfig), tokens, "next token"),
    "causal, prefix": (lambda: soft_prompt(PrefixTuningConfig), tokens, "next token"),
    "masked": (lambda: bert("BertForMaskedLM"), tokens, "token"),
    "token classes": (lambda: bert("BertForTokenClassification"), lambda: tokens("few"), "token"),
    "token classes, adapted": (
        lambda: get_peft_model(bert("BertForTokenClassification"), LoraConfig(task_type="TOKEN_CLS")),
        lambda: tokens("few"),
        "token",
    ),
    "encoder-decoder": (t5, seq2seq, "token"),
    "encoder-decoder, adapted": (
        lambda: get_peft_model(t5(), LoraConfig(task_type="SEQ_2_SEQ_LM")),
        seq2seq,
        "token",
    ),
    "texts": (lambda: bert("BertForSequenceClassification"), lambda: tokens("classes"), "sample"),
    "images": (tiny_models.vit, images, "sample"),
    "images, from a seed": (
        lambda: SeededNetwork(tiny_models.vit(), PrancConfig(num_coefficients=50)),
        images,
        "sample",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_models_own(name):
    make, batch, kind = CASES[name]
    model, batch = make().eval(), batch()
    alignment = Alignment.of(model)
    assert alignment.kind == kind
    arguments, labels = alignment.split(batch)
    with torch.no_grad():
        outputs, targets = alignment.pair(model(**arguments), labels)
        expected = model(**batch).loss
    assert outputs.shape[:2] == targets.shape and torch.equal(targets, alignment.targets(labels, targets.shape[1]))
    found = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_wrapped_models_are_what_they_wrap():
    wrapped = nn.Sequential(bert("BertForMaskedLM"))
    assert Alignment.of(wrapped).kind == "token"
    assert Alignment.of(nn.Linear(2, 2)).kind is None


def test_a_task_type_speaks_for_a_model_of_the_users():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.PreTrainedConfig()
            self.linear = nn.Linear(2, 2)

    adapted = get_peft_model(Tagger(), LoraConfig(task_type="TOKEN_CLS", target_modules=["linear"]))
    assert Alignment.of(adapted).kind == "token"


@pytest.mark.parametrize(
    ("model", "labels", "logits", "message"),
    [
        (lambda: nn.Linear(2, 2), torch.zeros(3, 6).long(), (3, 6, 2), "task_type`; got Linear"),
        (lambda: bert("BertForSequenceClassification"), torch.zeros(3, 6).long(), (3, 2), r"must have shape \(n,\)"),
        (lambda: bert("BertForSequenceClassification"), torch.zeros(3), (3, 1), "regression"),
        (lambda: bert("BertForMaskedLM"), torch.zeros(3).long(), (3, 6, 24), r"must have shape \(n, length\)"),
        (lambda: bert("BertForMaskedLM"), torch.zeros(3, 6).long(), (3, 5, 24), r"got \(3, 5, 24\) for \(3, 6\)"),
        (lambda: bert("BertForMaskedLM"), torch.zeros(3, 6, 2).long(), (3, 6, 24), "several labels"),
        (lambda: bert("BertForPreTraining"), torch.zeros(3, 6).long(), (3, 6, 24), "got BertForPreTraining"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(model, labels, logits, message):
    with pytest.raises(ValueError, match=message):
        Alignment.of(model()).pair(torch.zeros(logits), labels)


def test_outputs_without_logits_are_refused():
    model = bert("BertForQuestionAnswering")
    with pytest.raises(ValueError, match="BertForQuestionAnswering must give logits"):
        Alignment.of(model).pair(model(torch.zeros(1, 4).long()), torch.tensor([0]))


def test_a_batch_without_what_it_needs_is_refused():
    with pytest.raises(ValueError, match="must have a tensor 'labels', got 'input_ids'"):
        Alignment.of(t5()).split({"input_ids": torch.zeros(1, 2)})


def no_start() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (no_start, "decoder_start_token_id"),
        (lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)), "has no way"),
    ],
)
def test_inputs_of_a_decoder_that_cannot_be_derived_are_asked_for(model, why):
    batch = {name: value for name, value in seq2seq().items() if name != "decoder_input_ids"}
    with pytest.raises(ValueError, match=rf"must have 'decoder_input_ids'.*{why}.*Add them to the batches"):
        Alignment.of(model()).split(batch)


@pytest.mark.parametrize("model", ENCODER_DECODERS)
def test_inputs_of_a_decoder_are_derived_as_by_the_model_itself(model):
    """The target loss is the one that the model computes of a batch without `decoder_input_ids`."""
    torch.manual_seed(0)
    model = ENCODER_DECODERS[model]().eval()
    batch = {name: value for name, value in seq2seq().items() if name != "decoder_input_ids"}
    alignment = Alignment.of(get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear")))
    arguments, labels = alignment.split(batch)
    assert "decoder_input_ids" not in batch
    with torch.no_grad():
        outputs, targets = alignment.pair(model(**arguments), labels)
        expected = model(**batch).loss
    assert F.cross_entropy(outputs.flatten(0, 1), targets.flatten()).item() == pytest.approx(expected.item(), rel=1e-6)
    given = {**batch, "decoder_input_ids": torch.ones_like(batch["labels"])}
    assert torch.equal(alignment.split(given)[0]["decoder_input_ids"], given["decoder_input_ids"])


def test_the_first_token_behind_padding_is_no_target():
    batch = {
        "input_ids": torch.ones(3, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [5, 6, 7, -100], [-100, 5, 6, 7]]),
    }
    _, labels = Alignment.of(tiny_models.gpt2(vocab_size=24)).split(batch)
    assert labels.tolist() == [[-100, -100, -100, 6], [5, 6, 7, -100], [-100, -100, 6, 7]]
    _, labels = Alignment.of(bert("BertForMaskedLM")).split(batch)
    assert torch.equal(labels, batch["labels"])
