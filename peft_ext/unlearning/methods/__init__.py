"""Unlearning methods with one interface: what a report compares."""

from .base import Request, Solution, Step, UnlearningMethod, UnlearningReport
from .fast_ntk import FastNTK
from .finetune import Finetune
from .gauss_newton import GaussNewton
from .gradient_ascent import GradientAscent
from .ledger import Ledger
from .random_labels import RandomLabels
from .retrain import Retrain
from .rewind import Rewind
from .salun import SalUn

_ALL = (Retrain, Rewind, Finetune, GradientAscent, RandomLabels, SalUn, FastNTK, GaussNewton, Ledger)
METHODS: dict[str, type[UnlearningMethod]] = {method.name: method for method in _ALL}

__all__ = [
    "METHODS",
    "FastNTK",
    "Finetune",
    "GaussNewton",
    "GradientAscent",
    "Ledger",
    "RandomLabels",
    "Request",
    "Retrain",
    "Rewind",
    "SalUn",
    "Solution",
    "Step",
    "UnlearningMethod",
    "UnlearningReport",
]
