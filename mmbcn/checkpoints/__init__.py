"""Checkpoints: what norm they are of."""
