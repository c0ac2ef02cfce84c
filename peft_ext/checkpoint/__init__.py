"""Checkpoints: what identifies the weights that they stand for, and the card that describes them."""
