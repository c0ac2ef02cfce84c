"""Runnable programs: ``python -m recipes.<name> --help``."""
