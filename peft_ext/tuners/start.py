"""The factor A of an update: the random numbers that it starts at, and how far steps move it from them."""

from __future__ import annotations

import math

SMALL_START = 0.1
"""The random start of A, relative to LoRA's, beside which the little that few coefficients add has to count."""


def beside_a_start(shared: float) -> float:
    """The factor of coefficients that are added to the random start of A, which B waits for.

    LoRA's step asks for the root of `shared`, with which the random part of the steps soon drowns the start; 1 leaves A
    where it started. Half of the way, in the logarithm, is better than both.

    Args:
        shared: numbers of A for a coefficient.
    """
    return math.sqrt(math.sqrt(shared))  # roots are rounded alike on every machine, powers are not
