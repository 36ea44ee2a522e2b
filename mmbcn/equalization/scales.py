"""Names for the scales of channels, and which of them have to be equal (a union-find)."""

import numpy as np

Scales = np.ndarray  # of a tensor: the name of each channel's scale, int64, (C,)

FIXED = 0  # the scale of inputs, outputs and constants: it is 1


class ScaleNames:
    """Scales that the channels of a network may be given, by name."""

    def __init__(self) -> None:
        self._parents = [FIXED]

    def new(self, channels: int) -> Scales:
        """Scales that are free."""
        start = len(self._parents)
        self._parents.extend(range(start, start + channels))
        return np.arange(start, start + channels)

    def find(self, scales: Scales) -> Scales:
        """The same name for scales that have to be equal."""
        return np.array([self._root(int(name)) for name in scales], dtype=np.int64)

    def join(self, one: Scales, other: Scales) -> None:
        """From now on, each scale equals the one at its place; single ones are repeated."""
        for pair in zip(*np.broadcast_arrays(one, other), strict=True):
            low, high = sorted(self._root(int(name)) for name in pair)
            self._parents[high] = low  # FIXED, the lowest, stays a root

    def fix(self, scales: Scales) -> None:
        """From now on, these scales are 1."""
        self.join(scales, fixed(1))

    def is_fixed(self, scales: Scales) -> np.ndarray:
        """Which of them are 1."""
        return self.find(scales) == FIXED

    def __len__(self) -> int:
        return len(self._parents)

    def _root(self, name: int) -> int:
        parents = self._parents
        while parents[name] != name:
            parents[name] = name = parents[parents[name]]
        return name


def fixed(channels: int) -> Scales:
    """Scales of 1."""
    return np.full(channels, FIXED, dtype=np.int64)
