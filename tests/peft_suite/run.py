"""Runs PEFT's own tests of custom models on the methods of this package.

    python tests/peft_suite/run.py [arguments for pytest]

PEFT's tests are parametrised by tables of (model, configuration class, arguments). They come with its source
distribution, which is downloaded at the version of the installed PEFT into a cache outside of version control; nothing
of it is copied. A module written beside them replaces the rows of the tables by those of the files `*_cases.py` in this
folder: a further method is a further file. Only tests that a row or configuration class of ours is a parameter of are
run; the others are about PEFT's own methods.

PEFT's tests of language, vision and compiled models (test_decoder_models.py, test_vision_models.py,
test_torch_compile.py and others) are not run: they load models from the Hugging Face hub, which these tests do without.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".ci" / "cache"

# Classes of PEFT's test_custom_models.py with tests that are parametrised by the tables.
CLASSES = ("TestPeftCustomModel", "TestMultipleActiveAdapters", "TestRequiresGrad", "TestPeftFsdpStateDict")

# Skips that PEFT's tests decide on, by a part of their reason, and why they are right. Any other skip is a failure.
EXPECTED_SKIPS: dict[str, str] = {
    "Testing bias warnings only for": "the test knows by name which of PEFT's configurations train biases",
    "Multiple active adapters with modules_to_save": "PEFT does not allow it: two adapters cannot replace one module",
}

# Tests of what our methods refuse, by a part of their names, and why.
REFUSED: dict[str, str] = {
    "test_save_pretrained_pickle": "weights are never saved as a pickle",
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": "it loads trained biases into an adapter whose "
    "configuration says that it has none. tests/test_identity.py loads them with FSDP into one that has them.",
}

BRIDGE = '''"""Written by tests/peft_suite/run.py."""

from . import test_custom_models as suite
from .test_custom_models import {classes}  # noqa: F401
import {modules}

MODULES = [{modules}]
suite.TEST_CASES[:] = [row for m in MODULES for row in m.TEST_CASES]
suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [row for m in MODULES for row in m.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES]
suite.ALL_PEFT_CONFIG_CLASSES[:] = list(dict.fromkeys(row[2] for row in suite.TEST_CASES))
'''


def download() -> Path:
    """The unpacked source distribution of the installed PEFT."""
    version = importlib.metadata.version("peft")
    folder = CACHE / f"peft-{version}"
    if not (folder / "tests" / "test_custom_models.py").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "--dest", str(CACHE), f"peft=={version}"], check=True)
        with tarfile.open(CACHE / f"peft-{version}.tar.gz") as archive:
            prefix = f"peft-{version}/tests/"
            archive.extractall(CACHE, [m for m in archive if m.name.startswith(prefix) and m.isfile()], filter="data")
    return folder


class OurTests:
    """Keeps the tests of our configurations, and watches what is skipped."""

    def __init__(self, modules: list[ModuleType]) -> None:
        self.classes = {row[2] for module in modules for row in module.TEST_CASES}
        self.deselected = REFUSED | {part: reason for module in modules for part, reason in module.DESELECTED.items()}
        self.unexpected: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ours, others = [], []
        for item in items:
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            reasons = [reason for part, reason in self.deselected.items() if part in item.name]
            mine = any(value in self.classes for value in parameters if isinstance(value, type)) and not reasons
            (ours if mine else others).append(item)
        items[:] = ours
        config.hook.pytest_deselected(items=others)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            if not any(part in reason for part in EXPECTED_SKIPS):
                self.unexpected.append(f"{report.nodeid}: {reason}")


def main(arguments: list[str]) -> int:
    names = sorted(path.stem for path in HERE.glob("*_cases.py"))
    sys.path.insert(0, str(HERE))
    modules = [importlib.import_module(name) for name in names]
    folder = download()
    (folder / "tests" / "__init__.py").touch()
    bridge = folder / "tests" / "test_peft_ext.py"
    bridge.write_text(BRIDGE.format(classes=", ".join(CLASSES), modules=", ".join(names)))
    ours = OurTests(modules)
    options = ["-q", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", "-W", "ignore"]
    code = pytest.main([*options, *arguments, str(bridge)], plugins=[ours])
    for line in ours.unexpected:
        print(f"skipped without a reason in {Path(__file__).name}: {line}", file=sys.stderr)
    return int(code) or int(bool(ours.unexpected))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
