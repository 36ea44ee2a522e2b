"""What the forward passes of Kalman normalization leave to the layers behind, and to backward.

A layer's filtered statistics go to the layers behind it beside the network's own tensors, attached
to autograd's graph. Activation checkpointing cuts that graph: with ``use_reentrant=True`` (the
default, which mmseg's ``with_cp`` has) the first pass through a block records nothing, and inside
backward the block is repeated, after the layers behind it. There statistics go from layer to layer
by value, and their gradient comes back by hand: it is *owed* to the pass that made them, which adds
it when its own turn in backward comes. So the result is that of no checkpointing.

Attached statistics keep the graph, and with it the activations. So they are kept by the graph alone
that goes on from the layer's output: where that is dropped without backward, all of it goes.
"""

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmbcn.layers.recompute import in_backward


class Pass:
    """A forward pass of one layer.

    Args:
        key: what the pass is found by: the observed means (C,).
        seed: of the synthetic map; the repetition draws the same.
        sources: the passes of the layers whose statistics this one uses.

    Attributes:
        statistics: filtered means and variances (2, C), their values only.
    """

    def __init__(self, key: Tensor, seed: int, sources: Mapping[nn.Module, "Pass"]) -> None:
        self.key, self.seed, self.sources = key, seed, sources
        self._recorded = torch.is_grad_enabled()
        self._owed: Tensor | None = None
        self._attached: Callable[[], Tensor | None] = lambda: None

    def finish(self, statistics: Tensor, y: Tensor) -> Tensor:
        """These are the statistics, and the output, to be used as returned; not in a repetition."""
        self.statistics = statistics.detach()
        self._needs_grad = statistics.requires_grad or not self._recorded
        if not statistics.requires_grad:
            return y
        self._attached = weakref.ref(statistics)
        return _Keep.apply(y, [statistics])

    def give(self) -> Tensor:
        """The statistics, for a layer behind this one that runs now."""
        if self._recorded and not in_backward():
            attached = self._attached()
            return self.statistics if attached is None else attached
        value = self.statistics.detach()
        if self._needs_grad and torch.is_grad_enabled():
            value.requires_grad_().register_hook(self._owe)
        return value

    def _owe(self, grad: Tensor) -> None:
        self._owed = grad if self._owed is None else self._owed + grad

    def settler(self) -> Callable[[], Tensor | None]:
        """For backward to call: gives what is owed, and leaves the graph, which is now used up."""
        this = weakref.ref(self)  # the graph must not keep what keeps the graph

        def settle() -> Tensor | None:
            self = this()
            if self is None:
                return None
            owed, self._owed = self._owed, None
            self._attached = lambda: None
            return owed

        return settle


class _Keep(torch.autograd.Function):
    """The identity, in place; its part of the graph keeps the values of a list alive."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, values: list[Tensor]) -> Tensor:
        ctx.values = values
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Passes:
    """The latest passes of a layer; a copy of the layer starts without any.

    Args:
        size: how many passes may lie between a pass and its repetition.
    """

    def __init__(self, size: int = 16) -> None:
        self._entries: deque[Pass] = deque(maxlen=size)

    @property
    def latest(self) -> Pass | None:
        """The newest."""
        return self._entries[0] if self._entries else None

    def add(self, new: Pass) -> None:
        """Remember a pass."""
        self._entries.appendleft(new)

    def find(self, key: Tensor) -> Pass | None:
        """The pass that this one, in backward, repeats: the one whose key is nearest."""
        if not self._entries:
            return None
        keys = torch.stack([entry.key for entry in self._entries])
        distance = (keys - key).abs().amax(1).nan_to_num(nan=torch.inf)
        return self._entries[int(distance.argmin())]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __deepcopy__(self, memo: Any) -> "Passes":
        return Passes(self._entries.maxlen)

    def __reduce__(self) -> tuple[Any, ...]:
        return Passes, (self._entries.maxlen,)
