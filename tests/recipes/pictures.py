"""Small pictures of a colour, for the tests of image classification."""

from __future__ import annotations

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}


def picture(colour: str, seed: int) -> Image.Image:
    """A noisy square of a colour."""
    noise = np.random.default_rng(seed).normal(0, 30, (20, 20, 3))
    return Image.fromarray(np.uint8(np.clip(np.array(COLOURS[colour]) + noise, 0, 255)))
