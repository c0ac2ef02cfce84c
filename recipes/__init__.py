"""Runnable programs, each with ``python -m recipes.<name> --help``, and the rooms that they share."""
