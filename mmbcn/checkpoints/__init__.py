"""Checkpoints: reading them safely, fitting foreign ones to a model, saying what did not fit."""
