"""ENorm: gives the layers of a network equal norms, without changing what it computes."""

from mmbcn.equalization.equalizer import Equalization, Equalizer, equalize

__all__ = ["Equalization", "Equalizer", "equalize"]
