"""Removing the influence of training data by changing an adapter, a prompt or other small parts of a model."""

from .ledger import Deletion, UnlearningLedger
from .methods.solver import NTKUnlearner, UnlearningReport

__all__ = ["Deletion", "NTKUnlearner", "UnlearningLedger", "UnlearningReport"]
