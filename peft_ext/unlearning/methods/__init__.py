"""Unlearning methods with one interface: what a report compares."""

from .base import Request, UnlearningMethod, UnlearningTrainer, trainable_parameters, trainable_state
from .finetune import Finetune
from .gradient_ascent import GradientAscent
from .random_labels import RandomLabels
from .retrain import Retrain
from .salun import SalUn

METHODS: dict[str, type[UnlearningMethod]] = {
    method.name: method for method in (Retrain, Finetune, GradientAscent, RandomLabels, SalUn)
}

__all__ = [
    "METHODS",
    "Finetune",
    "GradientAscent",
    "RandomLabels",
    "Request",
    "Retrain",
    "SalUn",
    "UnlearningMethod",
    "UnlearningTrainer",
    "trainable_parameters",
    "trainable_state",
]
