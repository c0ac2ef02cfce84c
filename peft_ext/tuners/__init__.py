"""PEFT tuners: where generated weights go in a model."""
