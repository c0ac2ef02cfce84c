"""Who takes part: PEFT's small methods and ours, each at several sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.support.arguments import UserError, hint
from recipes.support.methods import HEAD, Method, parse_methods

from .task import QualityTask

Shapes = Sequence[tuple[int, int]]
LENGTHS = (144, 576, 2304, 9216)
"""Coefficients of a whole adapter, as far as a method can have as many."""
_RANK, _INPUTS = 8, 5


@dataclass(frozen=True)
class Contestant:
    """A method at a size.

    Attributes:
        label: what it is called.
        method: PEFT's name of the method.
        options: makes the options from the shapes (outputs, inputs) of the adapted layers.
    """

    label: str
    method: str
    options: Callable[[Shapes], dict[str, Any]]

    def on(self, task: QualityTask) -> Method:
        """Returns the method as a task has it."""
        options = self.options(task.shapes)
        if self.method != HEAD:
            options = {"target_modules": list(task.targets), **options}
        return Method(self.method, self.label, options)


def _fixed(label: str, method: str, **options: Any) -> Contestant:
    return Contestant(label, method, lambda shapes: dict(options))


def _nola(length: int) -> Contestant:
    """As many bases for each of both factors of every layer as make the length."""
    return Contestant(
        f"NOLA {length}",
        "nola",
        lambda shapes: {"r": _RANK, "num_basis": max(1, round(length / (2 * len(shapes))))},
    )


def _mcnc(length: int, apply_to: str) -> Contestant:
    """Chunks of as many numbers as make the length with k + 1 coefficients each."""

    def options(shapes: Shapes) -> dict[str, Any]:
        factors = [_RANK * size for shape in shapes for size in shape]
        sizes = factors if apply_to == "factors" else [out * into for out, into in shapes]
        chunk = min(max(sizes), math.ceil(sum(sizes) * (_INPUTS + 1) / length))
        return {"k": _INPUTS, "d": chunk, "apply_to": apply_to}

    return Contestant(f"MCNC {apply_to} {length}", "mcnc", options)


# The random matrices of PEFT's methods come from a seed, so their files need not hold them; VB-LoRA's files hold the
# chosen vectors alone, as its paper counts them. Where PEFT has a default that suits these sizes, it is left.
CONTESTANTS = [
    _fixed("head alone", HEAD),
    *(_fixed(f"LoRA r={rank}", "lora", r=rank, lora_alpha=rank) for rank in (1, 2, 8)),
    _fixed("VeRA", "vera", r=256, save_projection=False),
    _fixed("VB-LoRA", "vblora", r=4, num_vectors=64, vector_length=64, save_only_topk_weights=True),
    *(_fixed(f"UniLoRA {length}", "unilora", r=_RANK, theta_d_length=length) for length in LENGTHS),
    _fixed("RandLoRA", "randlora", r=128, save_projection=False),
    *(_fixed(f"FourierFT {count}", "fourierft", n_frequency=count) for count in (64, 768)),
    *(_fixed(f"WaveFT {count}", "waveft", n_frequency=count) for count in (64, 768)),
    _fixed("TinyLoRA", "tinylora", save_projection=False),
    _fixed("TinyLoRA tied", "tinylora", weight_tying=1.0, save_projection=False),
    *(_nola(length) for length in LENGTHS),
    *(_fixed(f"PRANC {length}", "pranc", num_coefficients=length) for length in LENGTHS),
    *(
        _fixed(f"PRANC factors {length}", "pranc", num_coefficients=length, apply_to="factors", r=_RANK)
        for length in LENGTHS
    ),
    *(_mcnc(length, "factors") for length in LENGTHS),
    *(_mcnc(length, "weight") for length in LENGTHS),
]


def choose(methods: Sequence[str]) -> list[Contestant]:
    """Returns the contestants with some labels, all without one; a YAML mapping is a contestant of the user's own.

    Raises:
        UserError: there is no such label, or the mapping names no method.
    """
    known = {contestant.label: contestant for contestant in CONTESTANTS}
    chosen = []
    for text in methods or list(known):
        if text.lstrip().startswith("{"):
            (method,) = parse_methods([text], reserved=list(known))
            if method.learning_rate is not None:
                raise UserError(f"methods: {text!r} has a learning rate; the rates are given with --rates")
            chosen.append(_fixed(method.label, method.name, **method.options))
        elif text in known:
            chosen.append(known[text])
        else:
            raise UserError(f"methods: there is no {text!r}; there are {', '.join(known)}{hint(text, known)}")
    return chosen
