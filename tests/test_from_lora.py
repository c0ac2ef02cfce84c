"""The LoRA user's program of docs/from-lora.md, with LoRA and, with one line changed, with every method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

pytest.importorskip("trl", reason="needs trl")

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "from-lora.md"
LINE = 'adapter = LoraConfig(r=8, task_type="CAUSAL_LM")\n'
LINES = {
    "LoRA": LINE,
    "NOLA": LINE.replace("LoraConfig", "NolaConfig"),
    "PRANC": LINE.replace("LoraConfig(r=8", "PrancConfig(num_coefficients=1000"),
    "MCNC": LINE.replace("LoraConfig", "McncConfig"),
}


def program() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert code.count(LINE) == 1
    return code


def test_the_document_shows_the_line_that_changes():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"```diff\n-{LINES['LoRA']}+{LINES['NOLA']}```" in text


@pytest.mark.parametrize("method", LINES)
def test_program(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(program().replace(LINE, LINES[method]), "<program>", "exec"), names)
    assert "loss falls: True" in capsys.readouterr().out
    assert type(names["trainer"].model.peft_config["default"]).__name__ == LINES[method].split("(")[0].split()[-1]
    x = torch.arange(2, 12).view(2, 5)
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained("adapter")(x).logits
        with names["trainer"].model.disable_adapter():
            base = names["trainer"].model.eval()(x).logits
        assert not torch.allclose(adapted, base, atol=1e-2)
        torch.testing.assert_close(names["trainer"].model.eval()(x).logits, adapted)
        torch.testing.assert_close(names["served"](x).logits, adapted, rtol=1e-4, atol=1e-4)
