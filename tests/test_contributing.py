"""What CONTRIBUTING.md builds works: a seeded method, an unlearning method and a recipe, as they stand there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import contributing
import pytest

SEEDED = """
import sys, torch
sys.path.insert(0, {tests!r})
import tiny_models
from peft import PeftModel, get_peft_model
torch.manual_seed(0)
base, x = tiny_models.llama(), tiny_models.tokens()
assert "Number of random matrices." in TileConfig.__doc__ and TileModel.prefix == "tile_"
model = get_peft_model(base, TileConfig(seed=3, num_basis=5, init_weights=False))
before = float(model(input_ids=x, labels=x).loss)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
for _ in range(5):
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
assert float(model(input_ids=x, labels=x).loss) < before
for dtype in ("float32", "int4"):
    model.peft_config["default"].coefficient_dtype = dtype
    model.save_pretrained(dtype)
    loaded = PeftModel.from_pretrained(tiny_models.llama(), dtype).eval()
    same = torch.equal(loaded(x).logits, model(x).logits)
    assert same == (dtype == "float32")
merged = loaded(x).logits, loaded.merge_and_unload()(x).logits
torch.testing.assert_close(*merged, rtol=1e-4, atol=1e-5)
for config in (TileConfig(seed=4, num_basis=5), TileConfig(seed=3, num_basis=6)):
    try:
        PeftModel.from_pretrained(tiny_models.llama(), "float32", config=config)
    except ValueError as error:
        assert "of the saved adapter was" in str(error), error
    else:
        raise AssertionError("an adapter made with other numbers was loaded")
print("fine")
"""


def test_a_fourth_seeded_method(tmp_path: Path) -> None:
    """In a process of its own: it becomes known to PEFT."""
    program = tmp_path / "tile.py"  # a file, since its classes are looked up by the module that they are in
    program.write_text(contributing.code("A seeded method") + SEEDED.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith("fine"), done.stderr[-3000:]


@pytest.fixture
def count_words() -> Callable[[list[str]], None]:
    return contributing.defined("A recipe", "main")


def test_a_recipe(count_words: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "out"
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"text: three small words\nseeds: [1, 2]\noutput_dir: {folder}\n")
    count_words([str(settings)])
    assert (folder / "words.txt").read_text() == "6\n"
    assert "words.txt" in capsys.readouterr().out
