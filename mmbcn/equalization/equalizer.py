"""ENorm: scales channels so that the weights into each and out of it have equal norms.

Paper: Stock, Graham, Gribonval, Jegou, "Equi-normalization of Neural Networks", ICLR 2019,
https://arxiv.org/abs/1902.10416

Deviations: biases are scaled too, which the authors' code leaves out and which keeps the function;
one scale for all layers that an addition joins (residual streams), where the paper learns the skip
connections; the input of the last layer is balanced as well, which their code leaves out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmbcn.analysis.borrowed import evaluating
from mmbcn.equalization.memory import with_memory
from mmbcn.equalization.scales import FIXED
from mmbcn.equalization.trace import Trace
from mmbcn.errors import UsageError

_SHOWN = 8


@dataclass(frozen=True)
class Equalization:
    """What `equalize` did.

    Attributes:
        squares: layer -> its sum of squared weights before and after.
        cycles: how many cycles it took.
        largest: the largest change of a scale in the last cycle, as a share.
    """

    squares: dict[str, tuple[float, float]]
    cycles: int
    largest: float

    def text(self) -> str:
        """A table of one line for each layer, and the sums."""
        rows = {**self.squares, "all": tuple(map(sum, zip(*self.squares.values(), strict=True)))}
        width = max(map(len, rows))
        lines = [f"{'sum of squared weights':{width}} {'before':>12} {'after':>12}"]
        lines += [f"{name:{width}} {old:12.6g} {new:12.6g}" for name, (old, new) in rows.items()]
        end = f"{self.cycles} cycles; the last one changed no scale by more than {self.largest:.1e}"
        return "\n".join([*lines, end])


class Equalizer:
    """Balances the layers of a network, cycle after cycle; the function stays the same.

    For each channel that layers share, with L the norm of all weights that write to it and R of all
    that read it: D = sqrt(R / (c L)); what is written is multiplied by D (biases too), what is read
    divided. All D of a cycle come from the weights before it. At c = 1 the sum of all squared
    weights never grows. A channel without weights on one side keeps its scale.

    Args:
        model: the network; frozen weights are left alone.
        run: runs all its layers on some input, and returns its outputs.
        c: R / L to be reached; slightly above 1, later layers are made smaller.
        ignore_norms: balance through normalization layers as if they were not there, as the
            authors' code does. The function is *not* kept.

    Raises:
        UsageError: normalization layers are in the way, parameters are not used, or there is
            nothing to balance.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[], Any], c: float = 1.0, ignore_norms: bool = False
    ) -> None:
        if not 0 < c < float("inf"):
            raise UsageError(
                f"c must be a positive number, got {c}; 1 balances, 1.1 penalizes depth"
            )
        self.c = c
        trace = Trace(model, ignore_norms)
        with evaluating(model):
            trace.follow(run)
        if trace.norms:
            raise UsageError(
                f"normalization layers are in the way of equalization, {len(trace.norms)} of them: "
                f"{_cut(trace.norms)}. Train without (norm 'none'), or let ENormHook ignore them "
                "(ignore_norms=True), which changes the function at every step"
            )
        if trace.idle:
            raise UsageError(
                f"parameters are not used in eval, {len(trace.idle)} of them: "
                f"{_cut(trace.idle)}. Their layers may read what equalization scales: run these "
                "too, or take them out of the model"
            )
        names = {parameter: name for name, parameter in model.named_parameters()}
        layers = {**trace.rules.layers, **trace.rules.biases}
        self._layers = {names[p]: x for p, x in layers.items() if x.ins.any() or x.outs.any()}
        self._weights = [name for name, x in self._layers.items() if x.weight in trace.rules.layers]
        self.balanced = self._number_scales()
        if not self.balanced:
            walls = f" In the way: {_cut(trace.walls)}." if trace.walls else ""
            raise UsageError(
                "there is nothing to equalize: no two layers with trained weights are joined by "
                "ReLU, pooling and the like alone, with their channels in dimension 1 (so linear "
                f"layers need inputs of (N, F)).{walls}"
            )

    def _number_scales(self) -> int:
        """Number the scales that occur, the fixed one 0; how many of them can be balanced."""
        sides = [(x.ins, x.outs) for x in self._layers.values()]
        occurring = np.unique(np.concatenate([[FIXED], *chain.from_iterable(sides)]))
        self._count = len(occurring)

        def numbers(side: str) -> dict[str, Tensor]:
            return {
                name: torch.from_numpy(np.searchsorted(occurring, getattr(layer, side)))
                for name, layer in self._layers.items()
            }

        self._ins, self._outs = numbers("ins"), numbers("outs")
        read, written = (
            {number for name in self._weights for number in side[name].tolist()}
            for side in (self._ins, self._outs)
        )
        for name, layer in self._layers.items():
            self._ins[name] = self._ins[name].to(layer.weight.device)
            self._outs[name] = self._outs[name].to(layer.weight.device)
        return len(read & written - {FIXED})

    @torch.no_grad()
    def cycle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Balance once, and keep what the optimizer remembers in step.

        Gradients go with 1/D where weights go with D: momentum is multiplied by 1/D, averages of
        squared gradients by 1/D^2. Where weight decay is added to gradients (SGD, Adam), they hold
        a share of the weights, for which this is not exact.

        Raises:
            UsageError: the optimizer is none of those whose state is known; nothing has changed.
        """
        self._apply(self._scales(self._squares()), optimizer)

    @torch.no_grad()
    def converge(
        self,
        tolerance: float = 1e-4,
        max_cycles: int = 5000,
        progress: Callable[[int, float], None] | None = None,
    ) -> Equalization:
        """Balance until nothing moves; weights change once, at the end.

        Args:
            tolerance: ends when no scale changes by more than this share.
            max_cycles: ends at the latest after so many.
            progress: called with the cycles done and the largest change.
        """
        squares = {name: value.double() for name, value in self._squares().items()}
        before = {name: value.sum().item() for name, value in squares.items()}
        total = torch.ones(self._count, dtype=torch.float64, device=_first(squares).device)
        for cycle in range(1, max_cycles + 1):
            scales = self._scales(squares)
            total *= scales
            for name, value in squares.items():
                value.mul_(self._factor(name, scales.square()))
            largest = (scales - 1).abs().max().item()
            if progress:
                progress(cycle, largest)
            if largest <= tolerance:
                break
        self._apply(total, None)
        after = {name: value.sum().item() for name, value in squares.items()}
        return Equalization({n: (before[n], after[n]) for n in before}, cycle, largest)

    def _squares(self) -> dict[str, Tensor]:
        """The sum of squares of each kernel: (G, C_out / G, C_in / G)."""
        squares = {}
        for name in self._weights:
            layer = self._layers[name]
            weight = layer.grouped(layer.weight)
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            squares[name] = weight.square().sum(3)
        return squares

    def _scales(self, squares: dict[str, Tensor]) -> Tensor:
        """D of every scale."""
        written = _first(squares).new_zeros(self._count)
        read = torch.zeros_like(written)
        for name, value in squares.items():
            written.index_add_(0, self._outs[name], value.sum(2).flatten())
            read.index_add_(0, self._ins[name], value.sum(1).flatten())
        scales = (read / written).pow(0.25) / self.c**0.5
        free = scales.isfinite() & (scales > 0)
        free[FIXED] = False
        return torch.where(free, scales, 1.0)

    def _factor(self, name: str, scales: Tensor) -> Tensor:
        """What each kernel is multiplied by."""
        groups = self._layers[name].groups
        outs, ins = scales[self._outs[name]], scales[self._ins[name]]
        return outs.view(groups, -1, 1) / ins.view(groups, 1, -1)

    def _apply(self, scales: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        # all are collected first: an unknown memory stops before any weight has changed
        tensors = {n: [*with_memory(x.weight, optimizer)] for n, x in self._layers.items()}
        for name, layer in self._layers.items():
            factor = self._factor(name, scales)[..., None]
            for tensor, power in tensors[name]:
                layer.grouped(tensor).mul_(factor.pow(power).to(tensor.dtype))


def equalize(model: nn.Module, inputs: Tensor | tuple[Any, ...], c: float = 1.0) -> Equalization:
    """Give the layers of a built model equal norms; what it computes in eval stays the same.

    Among all the weights that differ by scales of channels between layers, the result (at c = 1)
    are those of the smallest sum of squares, whichever one starts from.

    Args:
        model: a PyTorch model without normalization layers, changed in place.
        inputs: an input, or several, to run it on once, in eval mode; all its layers have to run.
        c: see `Equalizer`.

    Returns:
        The sums of squares before and after.

    Raises:
        UsageError: normalization layers are in the way, parameters are not used, or there is
            nothing to equalize.

    Reference: Stock et al. 2019, https://arxiv.org/abs/1902.10416
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    return Equalizer(model, lambda: model(*arguments), c).converge()


def _first(tensors: dict[str, Tensor]) -> Tensor:
    return next(iter(tensors.values()))


def _cut(places: list[str]) -> str:
    return ", ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
