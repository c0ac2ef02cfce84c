"""Writes a golden checkpoint: python tests/golden/make.py CASE DTYPE. See tests/test_specification.py."""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from specification_cases import CASES, exact, loaded_weights, save
from test_specification import GOLDEN, configuration, load, summary


def make(case: str, dtype: str) -> None:
    path = GOLDEN / f"{case}-{dtype}.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(case, dtype, folder)
        model = CASES[case][0]
        weights = loaded_weights(load(model, folder))
        content = {
            "model": model,
            "json": {each.name: json.loads(each.read_text()) for each in sorted(folder.glob("*.json"))},
            "base64": {
                each.name: base64.b64encode(each.read_bytes()).decode() for each in sorted(folder.glob("*.safetensors"))
            },
            "weights": summary(weights, exact(configuration(folder))),
        }
    with path.open("x", encoding="utf-8") as file:  # never overwrites
        file.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    make(*sys.argv[1:])
