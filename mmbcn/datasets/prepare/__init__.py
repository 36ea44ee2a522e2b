"""Turns published datasets into what mmsegmentation reads."""
