"""The parts of the unlearning program: its settings, the cases of what is forgotten, and the experiment."""
