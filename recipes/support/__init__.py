"""What the programs share and that knows no model: arguments, methods by name, the course of a run, reports."""
