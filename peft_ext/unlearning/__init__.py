"""Removing training data from adapted models, and measuring how well that worked."""
