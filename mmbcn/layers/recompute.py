"""Forward passes that activation checkpointing runs a second time, inside backward.

Both kinds of ``torch.utils.checkpoint`` (``use_reentrant=True`` and ``False``) repeat the forward
pass while the autograd engine runs. The repeat must not update statistics, and must see those that
the first pass saw, even where other passes have updated them in between.
"""

from collections import deque

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread: the pass is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class StatisticsMemory:
    """The statistics of the latest forward passes, found again by what the pass looked like.

    A recomputed pass has no identity that survives checkpointing, but it sees the same input, so
    the entry with the nearest key (its batch mean) is its own. Equal keys give the newest.

    Args:
        size: how many passes may lie between a pass and its recomputation.
    """

    def __init__(self, size: int = 16) -> None:
        self._entries: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=size)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def remember(self, key: Tensor, mean: Tensor, var: Tensor) -> None:
        """Keep the statistics that a pass with this key used; all (C,), not copied."""
        if not torch.compiler.is_compiling():
            self._entries.appendleft((key, mean, var))

    def recall(self, key: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of the pass whose key is nearest; None if there was none."""
        if not self._entries:
            return None
        keys, means, variances = (
            torch.stack(column) for column in zip(*self._entries, strict=True)
        )
        distance = (keys - key).abs().amax(1).nan_to_num(nan=torch.inf)  # NaN would be the minimum
        nearest = distance.argmin(0, keepdim=True)  # stays on the device
        return means.index_select(0, nearest)[0], variances.index_select(0, nearest)[0]
