"""Data and scores."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate
import pytest
import sacrebleu
import torch
from rouge_score import rouge_scorer
from transformers import DataCollatorForSeq2Seq, EvalPrediction, GPT2LMHeadModel, PreTrainedTokenizerFast

from peft_ext.targets import Alignment
from recipes.support.arguments import CONFIGS, UserError
from recipes.tasks import restaurants
from recipes.tasks.causal_lm import (
    DataArguments,
    GenerationArguments,
    ModelArguments,
    encode,
    generate,
    group_references,
    load_model,
    load_text_data,
    mean_token_loss,
    score,
    token_losses,
)

PAIRS = DataArguments(source_column="mr", target_column="ref", prompt_template="{source} =>")


def test_labels_are_on_the_target_and_its_end_only(model_folder: Path) -> None:
    model, tokenizer = load_model(ModelArguments(str(model_folder)))
    assert tokenizer.pad_token == tokenizer.eos_token
    batch = {"mr": ["name[N0]", "name[N1], food[F2]"], "ref": ["N0 serves F0.", "N1."]}
    encoded = encode(batch, tokenizer, PAIRS)
    for row in range(2):
        ids, labels = encoded["input_ids"][row], encoded["labels"][row]
        head = labels.count(-100)
        assert labels[:head] == [-100] * head and labels[head:] == ids[head:]
        assert tokenizer.decode(ids[:head]) == batch["mr"][row] + " =>"
        assert tokenizer.decode(labels[head:]) == " " + batch["ref"][row] + tokenizer.eos_token

    # In a padded batch the end mark, which is the padding token too, keeps its loss and the padding has none.
    rows = [{key: values[row] for key, values in encoded.items()} for row in range(2)]
    padded = DataCollatorForSeq2Seq(tokenizer)(rows)
    alone = [DataCollatorForSeq2Seq(tokenizer)([row]) for row in rows]
    assert [int((labels == tokenizer.eos_token_id).sum()) for labels in padded["labels"]] == [1, 1]
    with torch.no_grad():
        together = float(model.eval()(**padded).loss)
        counts = [int((each["labels"] != -100).sum()) for each in alone]
        apart = sum(float(model(**each).loss) * n for each, n in zip(alone, counts)) / sum(counts)
        sums = token_losses(Alignment.of(model), model(**padded).logits, padded["labels"])
    assert together == pytest.approx(apart, rel=1e-5)
    assert mean_token_loss(EvalPrediction(sums.numpy(), None))["token_loss"] == pytest.approx(apart, rel=1e-5)


def test_lengths_and_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = {"mr": ["name[N0], food[F2]"], "ref": ["N0 serves F0 dishes."]}
    short = DataArguments(
        source_column="mr", target_column="ref", prompt_template="{source}\n", max_source_length=3, max_target_length=2
    )
    encoded = encode(batch, tokenizer, short)
    assert len(encoded["input_ids"][0]) == 5
    # The prompt keeps its end, where the template's cue is; a target that was cut has no end mark.
    assert tokenizer.decode(encoded["input_ids"][0][:3]).endswith("\n")
    assert tokenizer.eos_token_id not in encoded["labels"][0]
    text = encode({"ref": batch["ref"]}, tokenizer, DataArguments(text_column="ref"))
    assert text["labels"] == [[-100, *text["input_ids"][0][1:]]]
    assert tokenizer.decode(text["input_ids"][0]) == batch["ref"][0] + tokenizer.eos_token


def test_references_are_grouped_by_source(tokenizer: PreTrainedTokenizerFast, data_folder: Path) -> None:
    assert group_references(["b", "a", "b"], ["1", "2", "3"]) == {"b": ["1", "3"], "a": ["2"]}
    data = load_text_data(
        DataArguments(str(data_folder), source_column="mr", target_column="ref", max_eval_samples=2), tokenizer
    )
    assert len(data.prompts) == 6 and len(data.validation) == 2 and len(data.train) == 24
    assert data.prompts[0] == "name[N0], food[F0]\n"
    assert data.references[0] == ["N0 serves F0 dishes.", "F0 food at N0.", "N0: F0."]
    assert [len(texts) for texts in data.references[1:]] == [1] * 5
    few = load_text_data(
        DataArguments(str(data_folder), source_column="mr", target_column="ref", max_eval_prompts=2), tokenizer
    )
    assert set(few.prompts) < set(data.prompts) and len(few.prompts) == len(few.references) == 2


def test_a_single_file_with_slices(tokenizer: PreTrainedTokenizerFast, data_folder: Path) -> None:
    args = DataArguments(
        str(data_folder / "train.jsonl"), train_split="train[:75%]", eval_split="train[75%:]", text_column="ref"
    )
    data = load_text_data(args, tokenizer)
    assert (len(data.train), len(data.validation), data.prompts) == (18, 6, [])


def test_a_column_of_something_else(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DataArguments(str(tmp_path / "train.jsonl"), eval_split="train", text_column="text")
    with pytest.raises(UserError, match="'text' of split 'train'.*strings"):
        load_text_data(args, tokenizer)


OUTPUTS = ["The Otter serves Thai food.", "A cheap place by the river", "Nothing of the kind"]
REFERENCES = [
    ["The Otter has Thai food.", "Thai food is served at the Otter."],
    ["It is a cheap place by the river."],
    ["Children are welcome at the Plum.", "The Plum likes children.", "Bring the children to the Plum."],
]


def test_scores_are_those_of_the_libraries() -> None:
    streams = [[texts[min(i, len(texts) - 1)] for texts in REFERENCES] for i in range(3)]  # a repeat adds nothing
    bleu = sacrebleu.corpus_bleu(OUTPUTS, streams).score
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    best = [max(scorer.score(ref, out)["rougeL"].fmeasure for ref in refs) for out, refs in zip(OUTPUTS, REFERENCES)]
    scores = score(OUTPUTS, REFERENCES)
    assert scores == {"BLEU": pytest.approx(bleu), "ROUGE-L": pytest.approx(100 * sum(best) / 3)}
    assert bleu > 5
    # More references can only help.
    assert scores["BLEU"] > score(OUTPUTS, [texts[:1] for texts in REFERENCES])["BLEU"]
    # The modules work by their folder, without this package.
    folder = CONFIGS.parent / "metrics" / "corpus_bleu"
    result = evaluate.load(str(folder)).compute(predictions=OUTPUTS, references=REFERENCES)
    assert result == {"bleu": pytest.approx(bleu)}


def test_outputs_are_cut_at_a_line_break_unless_references_have_some() -> None:
    outputs = [f"{texts[0]}\nand on and on" for texts in REFERENCES]
    assert score(outputs, REFERENCES)["BLEU"] == pytest.approx(100)
    assert score(outputs, [[f"{texts[0]}\nand so on"] for texts in REFERENCES])["BLEU"] < 100


def test_batched_generation_equals_one_by_one(model_folder: Path) -> None:
    model, tokenizer = load_model(ModelArguments(str(model_folder)))
    assert isinstance(model, GPT2LMHeadModel)
    prompts = ["name[N0], food[F0]\n", "name\n", "name[N11], food[F2], food[F2]\n"]
    args = GenerationArguments(max_new_tokens=6)
    together = generate(model, tokenizer, prompts, args, max_source_length=60, batch_size=3)
    assert together == [generate(model, tokenizer, [each], args, 60, 1)[0] for each in prompts]
    ids = tokenizer(prompts[0], return_tensors="pt")
    plain = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    assert together[0] == tokenizer.decode(plain, skip_special_tokens=True).strip()


def test_restaurants_split_cleanly(tmp_path: Path) -> None:
    restaurants.write_pairs(tmp_path / "once")
    restaurants.write_pairs(tmp_path / "again")
    rows = {}
    for name in ("train", "validation"):
        text = (tmp_path / "once" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "again" / f"{name}.jsonl").read_text()
        rows[name] = [json.loads(line) for line in text.splitlines()]
    assert not {row["meaning"] for row in rows["train"]} & {row["meaning"] for row in rows["validation"]}
    for row in rows["validation"]:
        facts = dict(fact.split(": ") for fact in row["meaning"].split("; "))
        assert all(value in row["text"] for value in facts.values()), row
