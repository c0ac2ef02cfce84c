"""Unlearning methods with one interface: what a report compares."""

from .base import Request, Solution, Step, UnlearningMethod, UnlearningReport
from .covarnav import CovarNav
from .fast_ntk import FastNTK
from .finetune import Finetune
from .gauss_newton import GaussNewton
from .grad_diff import GradDiff
from .gradient_ascent import GradientAscent
from .idk_dpo import IdkDPO
from .ledger import Ledger
from .muso import MUSO
from .natmu import NatMU
from .npo import NPO
from .random_labels import RandomLabels
from .retrain import Retrain
from .rewind import Rewind
from .salun import SalUn
from .sfr_on import SFRon
from .simnpo import SimNPO

_ALL = (
    Retrain,
    Rewind,
    Finetune,
    GradientAscent,
    GradDiff,
    NPO,
    SimNPO,
    IdkDPO,
    RandomLabels,
    SalUn,
    NatMU,
    MUSO,
    CovarNav,
    SFRon,
    FastNTK,
    GaussNewton,
    Ledger,
)
METHODS: dict[str, type[UnlearningMethod]] = {method.name: method for method in _ALL}

__all__ = [
    "METHODS",
    "MUSO",
    "NPO",
    "CovarNav",
    "FastNTK",
    "Finetune",
    "GaussNewton",
    "GradDiff",
    "GradientAscent",
    "IdkDPO",
    "Ledger",
    "NatMU",
    "RandomLabels",
    "Request",
    "Retrain",
    "Rewind",
    "SFRon",
    "SalUn",
    "SimNPO",
    "Solution",
    "Step",
    "UnlearningMethod",
    "UnlearningReport",
]
