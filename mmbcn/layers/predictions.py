"""From which statistics those of a norm's input are predicted: small expressions.

An expression stands for a tensor of the network: the output of a norm, what ReLU, additions,
concatenations and convolutions make of it. It gives the tensor's predicted statistics, and
synthetic maps with them. As in the authors' code:

- A norm's output counts with its filtered statistics from *before* the normalization.
- A convolution is fed with one synthetic map of independent normal values (or what ReLU makes of
  them), through its own weights; the moments of its output are the prediction.
- In an addition, means and variances add, whether or not a ReLU was applied to the terms.
- Channels of zeros have mean and variance zero.

A tensor of the network is one expression, whatever is made of it: expressions are equal if they are
the same object, and a prediction computes each one once.

Shapes: statistics (2, C), means and variances; maps (1, C, H, W).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbcn.errors import UsageError
from mmbcn.ops import channel_statistics

Size = tuple[int, int]


@dataclass
class Draw:
    """What a prediction is made with.

    Args:
        statistics: of a norm, in this pass.
        noise: independent standard normal values of a shape.

    Attributes:
        made: what was computed of each expression so far.
    """

    statistics: Callable[[nn.Module], Tensor]
    noise: Callable[[tuple[int, ...]], Tensor]
    made: dict[Any, Tensor] = field(default_factory=dict, init=False)


Method = Callable[["Expression", Draw, Size], Tensor]


def _once(method: Method) -> Method:
    """Computed once in a prediction: what sums share would be computed for each path to it."""

    @wraps(method)
    def call(self: "Expression", draw: Draw, size: Size) -> Tensor:
        key = self, method, size
        if key not in draw.made:
            draw.made[key] = method(self, draw, size)
        return draw.made[key]

    return call


class Expression:
    """A tensor of the network; ``parts`` are the expressions that it is made of."""

    parts: tuple["Expression", ...] = ()

    def statistics(self, draw: Draw, size: Size) -> Tensor:
        """Predicted statistics of the tensor, of this height and width."""
        raise NotImplementedError

    @_once
    def synthetic(self, draw: Draw, size: Size) -> Tensor:
        """A synthetic map of the tensor."""
        mean, var = (v.view(1, -1, 1, 1) for v in self.statistics(draw, size))
        positive = var > 0  # the slope of a root at 0 is infinite
        std = torch.where(positive, var, 1).sqrt() * positive
        return mean + std * draw.noise((1, mean.shape[1], *size))

    def norms(self) -> list[nn.Module]:
        """The norms whose statistics it needs."""
        found, todo = set(), [self]
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo.extend(one.parts)
        return [one.norm for one in found if isinstance(one, Normalized)]

    def text(self, names: Mapping[nn.Module, str]) -> str:
        """How the tensor is computed, with these names of the modules."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Normalized(Expression):
    """The output of a norm."""

    norm: nn.Module

    def statistics(self, draw: Draw, size: Size) -> Tensor:
        """Those from before the normalization."""
        return draw.statistics(self.norm)

    def text(self, names: Mapping[nn.Module, str]) -> str:
        """The norm's name."""
        return names[self.norm]


class _OfOne(Expression):
    of: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.of,)


@dataclass(frozen=True, eq=False)
class Rectified(_OfOne):
    """ReLU of a tensor."""

    of: Expression

    def statistics(self, draw: Draw, size: Size) -> Tensor:
        """Those from before the ReLU."""
        return self.of.statistics(draw, size)

    def synthetic(self, draw: Draw, size: Size) -> Tensor:
        """ReLU of a synthetic map."""
        return self.of.synthetic(draw, size).relu()

    def text(self, names: Mapping[nn.Module, str]) -> str:
        """As in code."""
        return f"relu({self.of.text(names)})"


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """The sum of tensors."""

    parts: tuple[Expression, ...]

    @_once
    def statistics(self, draw: Draw, size: Size) -> Tensor:
        """Means and variances add."""
        return sum(part.statistics(draw, size) for part in self.parts)

    def text(self, names: Mapping[nn.Module, str]) -> str:
        """As in code."""
        return " + ".join(part.text(names) for part in self.parts)


@dataclass(frozen=True, eq=False)
class Concatenated(Expression):
    """The channels of several tensors."""

    parts: tuple[Expression, ...]

    @_once
    def statistics(self, draw: Draw, size: Size) -> Tensor:
        """Side by side."""
        return torch.cat([part.statistics(draw, size) for part in self.parts], 1)

    @_once
    def synthetic(self, draw: Draw, size: Size) -> Tensor:
        """Side by side."""
        return torch.cat([part.synthetic(draw, size) for part in self.parts], 1)

    def text(self, names: Mapping[nn.Module, str]) -> str:
        """As in code."""
        return f"cat({', '.join(part.text(names) for part in self.parts)})"


@dataclass(frozen=True, eq=False)
class Padded(_OfOne):
    """A tensor with channels of zeros before and after its own."""

    of: Expression
    before: int
    after: int

    def statistics(self, draw: Draw, size: Size) -> Tensor:
        """Padded with zeros."""
        return F.pad(self.of.statistics(draw, size), (self.before, self.after))

    def synthetic(self, draw: Draw, size: Size) -> Tensor:
        """Padded with zeros."""
        return F.pad(self.of.synthetic(draw, size), (0, 0, 0, 0, self.before, self.after))

    def text(self, names: Mapping[nn.Module, str]) -> str:
        """As in code."""
        return f"pad({self.of.text(names)})"


@dataclass(frozen=True, eq=False)
class Convolved(_OfOne):
    """The output of the convolution that a module has by this name."""

    parent: nn.Module
    name: str
    of: Expression

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution, looked up anew: another one may have been put in its place."""
        conv = self.parent._modules.get(self.name)
        if not isinstance(conv, nn.Conv2d):
            raise UsageError(
                f"KN predicts statistics through the convolution {self.name!r} of a "
                f"{type(self.parent).__name__}, and now a {type(conv).__name__} is in its place; "
                "after such changes call mmbcn.layers.unlink_norms(model), then link_norms(model)"
            )
        return conv

    @_once
    def statistics(self, draw: Draw, size: Size) -> Tensor:
        """Moments of the convolution of a synthetic map; gradients reach the weights too."""
        conv = self.conv
        fed = self.of.synthetic(draw, _input_size(conv, size))
        # not a call: hooks are for the network's own pass
        return channel_statistics(conv.forward(fed.to(conv.weight.dtype)))

    def text(self, names: Mapping[nn.Module, str]) -> str:
        """As in code."""
        return f"{names[self.conv]}({self.of.text(names)})"


def _input_size(conv: nn.Conv2d, size: Size) -> Any:
    """The smallest map that the convolution takes and turns into one of this size, or larger."""
    padding = conv.padding
    if isinstance(padding, str):
        spans = zip(conv.dilation, conv.kernel_size, strict=True)
        padding = tuple(d * (k - 1) / 2 if padding == "same" else 0 for d, k in spans)
    sizes = zip(size, conv.stride, conv.dilation, conv.kernel_size, padding, strict=True)
    needed = (int((n - 1) * s + d * (k - 1) + 1 - 2 * p) for n, s, d, k, p in sizes)
    # a map has no more values to reflect or to go around than it is long
    wider = {"reflect": 1, "circular": 0}.get(conv.padding_mode)
    least = [1 if wider is None else max(1, ceil(p) + wider) for p in padding]
    return tuple(map(max, needed, least))
