"""Model cards: what they say, that names from outside stay text, and that what others wrote stays."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import hub_server
import pytest
import tiny_models
import torch
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt
from methods import METHODS, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_ext
from peft_ext.adapters.trainer import DescribingTrainer

RESULT = EvalResult("text-generation", "e2e_nlg", "E2E", "bleu", 0.66)


def saved(folder: Path, method: str = "NOLA", name: str = "", **options: Any) -> str:
    """Saves an adapter of a base model with a name, and returns its card."""
    base = tiny_models.llama()
    base.config._name_or_path = base.name_or_path = name
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    get_peft_model(base, config_of(method, **options)).save_pretrained(str(folder))
    return (folder / "README.md").read_text()


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The cells of the table below a heading as a reader sees them, by the first cell."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text[re.match(r"---\n.*?\n---\n", text, re.S).end() :])
    found, here, row = {}, False, []
    for token, following in zip(tokens, tokens[1:]):
        if token.type == "heading_open":
            here = following.content == heading
        elif token.type == "tr_open":
            row = []
        elif token.type == "inline" and here:
            shown = "".join(child.content for child in token.children if child.type in ("text", "code_inline"))
            row.append(shown)
        elif token.type == "tr_close" and here:
            found[row[0]] = row[1:]
    return found


def code_of(text: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return code


@pytest.mark.parametrize("method", METHODS)
def test_every_option_with_its_default(method: str, tmp_path: Path) -> None:
    options = rows(saved(tmp_path, method), "Options")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    default = METHODS[method][0]()
    own = {name for name in vars(default) if name in config} - set(vars(LoraConfig())) | {"target_modules", "bias"}
    told = {field.name for field in fields(default) if field.metadata["help"].endswith("Leave it alone.")}
    assert {"fingerprint", "target_shapes", "generator_version", "identity"} <= told
    for name in own - {"seed"} - told:
        expected = sorted(config[name]) if name == "target_modules" else config[name]  # a set has no order
        assert ast.literal_eval(options[name][0]) == expected, name
    for name in METHODS[method][1]:
        value = getattr(default, name)
        assert ast.literal_eval(options[name][1]) == (list(value) if isinstance(value, tuple) else value), name
    assert not {*told, "peft_type", "inference_mode"} & options.keys()
    assert ast.literal_eval(options["target_modules"][0]) == ["q_proj", "v_proj"]


def test_counts_and_bytes(tmp_path: Path) -> None:
    text = saved(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert rows(text, "NOLA adapter")["saved"] == [f"48 coefficients in float32, {size:,} bytes"]
    text = saved(tmp_path / "small", coefficient_dtype="int4")
    size = (tmp_path / "small" / "adapter_model.safetensors").stat().st_size
    (found,) = rows(text, "NOLA adapter")["saved"]
    assert re.fullmatch(rf"48 coefficients in int4 \(changed by \d[\d.]* %\), {size:,} bytes", found)
    (tmp_path / "config").mkdir()
    config_of("NOLA").save_pretrained(str(tmp_path / "config"))
    assert "| saved |" not in (tmp_path / "config" / "README.md").read_text()


def test_a_base_model_without_a_name_is_left_out(tmp_path: Path) -> None:
    text = saved(tmp_path)
    assert "base model" not in rows(text, "NOLA adapter") and "A [NOLA](" in text
    assert "not recorded" not in text and "None" not in code_of(text) and "from_pretrained()" not in text
    assert "model = ...  # the base model that the adapter was trained on" in code_of(text)
    assert ModelCard(text).data.base_model is None
    assert hub_server.metadata_errors(text) == []


def test_the_revision_of_the_base_model(tmp_path: Path) -> None:
    text = saved(tmp_path, name="somebody/tiny", revision="v2")
    assert 'from_pretrained("somebody/tiny", revision="v2")' in code_of(text)


HOSTILE = [
    "a|b",
    "`code` and ``more``",
    "a\nb\n\n# Heading\n```\n",
    "<!-- end of peft_ext adapter -->",
    "\n<!-- end of peft_ext adapter -->\n",
    "<script>alert(1)</script> & <img src=x>",
    '"); import os; os.system("x"); ("',
    "back\\slash\\",
    "[link](http://evil.example) ![image](x) **bold** _under_ ~~s~~",
    "{rows} {0} {method.__class__}",
    "snow\u2603 \u202e\u200b\x00\x7f\x85\u2028 \U0001f600 end",
    "---\nlicense: evil\n---",
    "  spaces  ",
    "\ud800 alone",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_from_outside_stays_text(name: str, tmp_path: Path) -> None:
    """Every name of an adapter_config.json, as a stranger can write it, in a card that is written twice."""
    harmless = saved(tmp_path, name="harmless")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": name, "revision": name, "target_modules": [name], "task_type": None}
    config |= {"auto_mapping": {"base_model_class": name, "parent_library": "transformers.x"}}
    config["target_shapes"] = {name: 2}
    path.write_text(json.dumps(config))
    about = {"repository": name, "license": name, "datasets": [name]}
    about["metrics"] = [EvalResult("text", "e2e", name, "bleu", name, metric_name=name)]
    (tmp_path / "README.md").unlink()
    for _ in range(2):
        if "\ud800" in name:  # which no file can hold: only what is escaped can be written
            about = {"repository": name, "datasets": [name]}
        peft_ext.describe(tmp_path, **about)
    text = (tmp_path / "README.md").read_text()
    body, data = ModelCard(text).text, ModelCard(text).data
    assert data.license == about.get("license") and data.base_model is None
    assert body.count("<!-- end of peft_ext adapter -->") == body.count("<!-- peft_ext adapter -->") == 1
    assert body.count("\n```") == 2 and "<script" not in body and "<img" not in body
    links = re.findall(r'(?:href|src)="([^"]*)"', MarkdownIt("commonmark").enable("table").render(body))
    assert links == [peft_ext.NolaConfig.paper]

    def seen(value: str) -> str:
        return re.sub(r"\s+", " ", value.replace("\x00", "\ufffd")).strip()

    table = rows(text, "NOLA adapter")
    assert table.keys() - {"licence"} == rows(harmless, "NOLA adapter").keys()
    assert all(len(cells) == 1 for cells in table.values())
    options = rows(text, "Options")
    assert options.keys() == rows(harmless, "Options").keys() and all(len(cells) == 2 for cells in options.values())
    if not re.search(r"[\ud800\x00\x7f\x85]", name):  # which HTML has no character for
        assert seen(table["base model"][0]) == seen(name)
        assert seen(table["licence"][0]) == seen(name)
    tree = ast.parse(code_of(text))
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert literals == [name] * 3  # base model, its revision, and the repository
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls == ["AutoModel.from_pretrained", "PeftModel.from_pretrained"]


def test_what_the_hub_refuses_stays_out_of_the_metadata(tmp_path: Path) -> None:
    saved(tmp_path, name="no/such/place")
    peft_ext.describe(tmp_path, datasets=["e2e_nlg", "my own data"], metrics=[RESULT], license="mit")
    text = (tmp_path / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets == ["e2e_nlg"] and data.license == "mit"
    assert not any("no/such/place" in tag for tag in data.tags)
    assert "`my own data`" in text and "`no/such/place`" in text
    assert hub_server.metadata_errors(text) == []
    assert ModelCard(str(ModelCard(text))).data.to_dict() == data.to_dict()


def test_results_replace_those_of_the_same_measurement(tmp_path: Path) -> None:
    saved(tmp_path)
    other = EvalResult("text-generation", "e2e_nlg", "E2E", "rouge", 0.5)
    peft_ext.describe(tmp_path, metrics=[RESULT, other], repository="ann/nola")
    peft_ext.describe(tmp_path, metrics=[EvalResult("text-generation", "e2e_nlg", "E2E", "bleu", 0.7)])
    card = ModelCard.load(tmp_path / "README.md")
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found == {"bleu": 0.7, "rouge": 0.5} and card.data.model_name == "ann/nola"
    assert card.data.metrics == ["bleu", "rouge"]
    assert rows(str(card), "Data and results") == {"data": ["metric", "value"], "E2E": ["bleu", "0.7"]}


def test_a_licence_stays_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nMy words.\n")
    text = saved(tmp_path)
    assert ModelCard(text).data.license == "apache-2.0" and rows(text, "NOLA adapter")["licence"] == ["apache-2.0"]
    peft_ext.describe(tmp_path, license="mit")
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.license == "mit" and "apache" not in text and "My words." in text


def test_a_template_that_somebody_filled_in_is_kept(tmp_path: Path) -> None:
    text = saved(tmp_path)
    assert "More Information Needed" not in text
    template = ModelCard.from_template(ModelCard("---\n{}\n---\n").data).content
    (tmp_path / "README.md").write_text(template.replace("### Model Description", "### Model Description\n\nFor soup."))
    text = saved(tmp_path)
    assert "For soup." in text and text.count("import peft_ext") == 2
    (tmp_path / "README.md").write_text(template)
    assert "More Information Needed" not in saved(tmp_path)


def test_line_ends_of_windows(tmp_path: Path) -> None:
    text = saved(tmp_path) + "\nWords at the end.\n"
    (tmp_path / "README.md").write_bytes(text.replace("\n", "\r\n").encode())
    text = saved(tmp_path, seed=5)
    assert text.count("## Loading") == 1 and "| seed | 5 |" in text and "Words at the end." in text


def test_two_descriptions_become_one(tmp_path: Path) -> None:
    text = saved(tmp_path)
    body = text[text.index("<!--") :]
    (tmp_path / "README.md").write_text(f"{text}\nBetween.\n\n{body}\nAfter.\n")
    text = saved(tmp_path)
    assert text.count("## Loading") == 1 and text.index("## Loading") < text.index("Between.") < text.index("After.")


def test_visual_prompts(tmp_path: Path) -> None:
    base = tiny_models.vit()
    base.config._name_or_path = base.name_or_path = "somebody/vit"
    model = get_peft_model(base, peft_ext.VisualPromptConfig(num_prompts=3, deep=True, seed=4))
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    table = rows(text, "VISUAL_PROMPT adapter")
    assert table["seed"] == ["4"] and table["saved"][0].startswith("192 coefficients in ")
    assert rows(text, "Options")["deep"] == ["True", "False"]
    assert 'ViTForImageClassification.from_pretrained("somebody/vit")' in code_of(text)
    data = ModelCard(text).data
    assert data.base_model == "somebody/vit" and {"visual_prompt", "peft_ext"} <= set(data.tags)
    assert "More Information Needed" not in text and hub_server.metadata_errors(text) == []


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.parametrize("build", [tiny_models.vit, Small])
def test_code_of_the_card_of_a_network_runs(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = peft_ext.SeededNetwork(build(), peft_ext.PrancConfig(num_coefficients=10, seed=8)).eval()
    network.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    table = rows(text, "PRANC network")
    assert table["network"][0].startswith(f"{build().__class__.__name__}, ") and table["seed"] == ["8"]
    options = ["num_coefficients", "basis", "nnz", "adapt_bias", "apply_to", "r", "alpha"]
    assert list(rows(text, "Options")) == ["option", *options]
    code = code_of(text).replace("<this folder or repository>", "saved").replace("network = ...", "network = Small()")
    assert ("Small()" in code) == (build is Small)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"Small": Small}
    exec(code, names)
    for name, weight in network.weights().items():
        assert torch.equal(names["network"].state_dict()[name], weight)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            peft_ext.McncConfig(r=3, k=2, d=10, widths=(4,)),
            "1 matrices by factors of rank 3 (A: 12 numbers from 6 coefficients; B: 12 numbers from 6 coefficients); "
            "vectors: 4 numbers from 3 coefficients",
        ),
        (
            peft_ext.NolaConfig(r=2, num_basis=(3, 4)),
            "1 matrices by factors of rank 2 (A: 8 numbers from 3 coefficients; B: 8 numbers from 4 coefficients); "
            "vectors: 4 numbers from 4 coefficients",
        ),
    ],
)
def test_the_card_of_a_network_tells_what_its_factors_are(config: Any, expected: str, tmp_path: Path) -> None:
    peft_ext.SeededNetwork(Small(), config).save_pretrained(tmp_path)
    table = rows((tmp_path / "README.md").read_text(), f"{config.method_name} network")
    assert table["updates of"] == [expected]


def test_only_our_checkpoints_are_described(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`folder` must hold an adapter or a network from a seed"):
        peft_ext.describe(tmp_path)
    get_peft_model(tiny_models.llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="`folder` must hold an adapter of peft_ext, got one of LoraConfig"):
        peft_ext.describe(tmp_path)


@pytest.mark.parametrize("method", ["NOLA", "LoRA"])
def test_the_card_of_the_trainer(method: str, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**options) if method == "LoRA" else config_of(method, **options)
    model = get_peft_model(tiny_models.llama(), config)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = DescribingTrainer(model=model, args=arguments)
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text()
        assert "Training hyperparameters" in text
        assert text.count("## Loading") == (method == "NOLA")
    assert isinstance(PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path)), PeftModel)
