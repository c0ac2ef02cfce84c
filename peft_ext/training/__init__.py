"""Training loops and callbacks, for unlearning and for programs."""
