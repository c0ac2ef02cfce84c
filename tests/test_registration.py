"""How the methods become known to PEFT: in new processes where the state of PEFT before the import matters."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_ext
from peft_ext import (
    McncConfig,
    McncModel,
    NolaConfig,
    NolaModel,
    PrancConfig,
    PrancModel,
    VisualPromptConfig,
    VisualPromptModel,
)

METHODS = {
    "NOLA": (NolaConfig, NolaModel),
    "PRANC": (PrancConfig, PrancModel),
    "MCNC": (McncConfig, McncModel),
    "VISUAL_PROMPT": (VisualPromptConfig, VisualPromptModel),
}
every_method = pytest.mark.parametrize("name", METHODS)


def run_python(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@every_method
def test_registered(name: str) -> None:
    config, model = METHODS[name]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[name] is model
    found = peft.get_peft_config({"peft_type": name, "seed": 3})
    assert type(found) is config and found.seed == 3
    assert config().peft_type is PeftType[name] and config.method_name == name


@every_method
def test_member_behaves_like_those_of_peft(name: str) -> None:
    member = PeftType[name]
    assert isinstance(member, PeftType) and isinstance(member, str) and type(member) is type(PeftType.LORA)
    assert member == name and member.name == name and member.value == name
    assert PeftType(name) is member and getattr(PeftType, name) is member
    assert member in PeftType and name in PeftType.__members__ and member in list(PeftType)
    assert list(PeftType).count(member) == 1 and len(list(PeftType)) == len(PeftType)
    assert hash(member) == hash(name) and {member: 1}[name] == 1 and {name: 1}[member] == 1
    assert member != PeftType.LORA and len({member, PeftType.LORA, name}) == 2
    assert json.dumps({"peft_type": member}) == f'{{"peft_type": "{name}"}}'
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is member and copy.deepcopy(member) is member
    assert repr(member) == f"<PeftType.{name}: '{name}'>"
    with pytest.raises(AttributeError):
        PeftType.NOT_A_METHOD  # noqa: B018
    with pytest.raises(ValueError):
        PeftType("NOT_A_METHOD")
    with pytest.raises(AttributeError):
        member.name = "OTHER"


@every_method
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_configurations_can_be_copied(duplicate, name: str) -> None:
    config = METHODS[name][0](seed=3, modules_to_save=["a"])
    again = duplicate(config)
    assert again == config and again.peft_type is PeftType[name]


# In a process of its own: other tests hold classes of the modules from before.
AGAIN = """
import sys, importlib
import peft_ext
from peft import PeftType, get_peft_model
members = list(PeftType)
importlib.reload(peft_ext)
assert list(PeftType) == members
for name in [n for n in sys.modules if n.partition(".")[0] == "peft_ext"]:
    del sys.modules[name]
import peft_ext
assert list(PeftType) == members
from torch import nn
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_ext.NolaConfig(target_modules=["0"]))
assert isinstance(model.base_model, peft_ext.NolaModel)
print("fine")
"""

USE = """
from torch import nn
model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_ext.NolaConfig(target_modules=["0"]))
assert isinstance(model.base_model, peft_ext.NolaModel)
assert peft.PeftType("NOLA") is peft.PeftType.NOLA
print("fine")
"""


@pytest.mark.parametrize(
    "code",
    [
        AGAIN,
        "import peft, peft_ext" + USE,
        "import peft_ext, peft" + USE,
    ],
    ids=["imported anew", "after peft", "before peft"],
)
def test_order_of_imports(code: str) -> None:
    assert run_python(code).strip() == "fine"


IMPORT = """
import random, sys, numpy, torch, peft
state = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist()
settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
before = set(sys.modules)
import peft_ext
assert state[0] == random.getstate() and torch.equal(state[1], torch.get_rng_state())
assert state[2] == numpy.random.get_state()[1].tolist()
assert settings == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("peft_ext")))
"""


def test_the_import_is_cheap_and_quiet() -> None:
    """It loads little beyond PEFT, no library of the recipes among it, changes no state and prints nothing."""
    (line,) = run_python(IMPORT, "-W", "error::UserWarning:peft_ext").splitlines()
    loaded = {name.partition(".")[0] for name in line.split()}
    heavy = "datasets evaluate matplotlib sklearn scipy pandas pyarrow sacrebleu rouge_score rich accelerate jinja2"
    assert loaded.isdisjoint(heavy.split())
    assert len(loaded) <= 5, loaded


# The module that extends the enum is loaded by itself: importing the package would register NOLA.
ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "peft_ext_registration", {str(Path(peft_ext.__file__).parent / "registration.py")!r}
)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
"""

CLASH = """
import peft
from peft.utils import register_peft_method, PeftType
{prepare}
try:
    import peft_ext
except RuntimeError as error:
    print(error)
"""

# As if PEFT had a method of that name: a member of the enum alone, and a registered method.
MEMBER = """
from peft_ext_registration import _extend_peft_type
_extend_peft_type("NOLA")
"""
METHOD = (
    MEMBER
    + """
from dataclasses import dataclass
@dataclass
class Config(peft.PeftConfig): pass
class Model(peft.tuners.tuners_utils.BaseTuner): prefix = "nola_"
register_peft_method(name="nola", config_cls=Config, model_cls=Model)
"""
)


@pytest.mark.parametrize("prepare", [MEMBER, METHOD], ids=["name alone", "method"])
def test_a_method_of_the_same_name_in_peft(prepare: str) -> None:
    message = run_python(ALONE + CLASH.format(prepare=prepare))
    for part in ("method NOLA of its own", "peft_ext", "older release of peft"):
        assert part in message


# Stands in for PEFT where torch is not installed.
STUB = """
import enum, sys, types
class PeftType(str, enum.Enum):
    LORA = "LORA"
    IA3 = "IA3"
peft, mapping, utils = (types.ModuleType(name) for name in ("peft", "peft.mapping", "peft.utils"))
mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING = {}, {}
def register_peft_method(*, name, config_cls, model_cls):
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name.upper()]] = config_cls
utils.PeftType, utils.register_peft_method = PeftType, register_peft_method
sys.modules.update({"peft": peft, "peft.mapping": mapping, "peft.utils": utils})
"""

ENUM = """
import copy, json, pickle
registration = module
Config = type("Config", (), {"__module__": "peft_ext.config", "method_name": "NOLA"})
Other = type("Other", (), {"__module__": "peft_ext.config", "method_name": "OTHER"})
for _ in range(2):
    registration.register(Config, object)
    registration.register(Other, object)
member = PeftType.NOLA
assert PeftType("NOLA") is member and PeftType["NOLA"] is member and member.name == member.value == member == "NOLA"
assert [m.value for m in PeftType] == ["LORA", "IA3", "NOLA", "OTHER"] and len(PeftType) == 4
assert hash(member) == hash("NOLA") and "NOLA" in PeftType.__members__ and member in PeftType
assert json.dumps([member]) == '["NOLA"]' and isinstance(member, PeftType)
assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
assert repr(member) == "<PeftType.NOLA: 'NOLA'>" and mapping.PEFT_TYPE_TO_CONFIG_MAPPING["NOLA"] is Config
print("fine")
"""


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_other_releases_of_python(version: str) -> None:
    """Enums are built differently in every release: what extends that of PEFT is tried with a stub of PEFT."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"needs python{version} on the path")
    code = STUB + ALONE + ENUM
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr[-3000:]


@every_method
def test_the_prefix_does_not_occur_in_models(name: str) -> None:
    """transformers and PEFT tell our parameters from those of the model by it."""
    model = METHODS[name][1]
    assert model.prefix == f"{name.lower()}_"
    names = model.tuner_layer_cls.adapter_layer_names
    assert all(name.removeprefix("_").startswith(model.prefix) for name in names)  # a property holds no parameters


def test_typed() -> None:
    assert (Path(peft_ext.__file__).parent / "py.typed").exists()
    assert peft_ext.__version__ and set(peft_ext.__all__) <= set(dir(peft_ext))
    assert torch.utils  # the import has loaded torch whole
