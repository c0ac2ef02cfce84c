"""Removing the influence of training data by changing an adapter, a prompt or other small parts of a model."""

from .ledger import Deletion, UnlearningLedger
from .methods import (
    METHODS,
    FastNTK,
    Finetune,
    GaussNewton,
    GradientAscent,
    Ledger,
    RandomLabels,
    Request,
    Retrain,
    Rewind,
    SalUn,
    UnlearningMethod,
    UnlearningReport,
)

__all__ = [
    "METHODS",
    "Deletion",
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
    "UnlearningLedger",
    "UnlearningMethod",
    "UnlearningReport",
]
