"""Removing the influence of training samples from a fine-tuned model."""
