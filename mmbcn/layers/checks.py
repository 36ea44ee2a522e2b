"""Checks of constructor arguments: what was expected, what came, what to do."""

import math
from numbers import Real

from torch import Tensor, nn


def check_eps(eps: float, zero: bool = False) -> None:
    """Check a small constant that a variance is kept away from zero with.

    Args:
        eps: the constant.
        zero: whether 0 will do.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, not finite, or zero where that divides by zero.
    """
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {eps!r}; the usual one is 1e-5")
    if not math.isfinite(eps) or eps < 0 or (eps == 0 and not zero):
        bound = "at least 0" if zero else "greater than 0"
        raise ValueError(
            f"eps must be finite and {bound}, got {eps!r}: it keeps the root of a variance from "
            "being zero; the usual one is 1e-5"
        )


def check_momentum(momentum: float | None) -> None:
    """Check the weight of the new value in a running estimate; None: the mean of all.

    Raises:
        TypeError: it is no number.
        ValueError: it lies outside [0, 1].
    """
    text = "momentum is the weight of the new value, in [0, 1] (None: the mean of all batches)"
    if momentum is not None and (isinstance(momentum, bool) or not isinstance(momentum, Real)):
        raise TypeError(f"{text}, got {momentum!r}; the usual one is 0.1")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"{text}, got {momentum}; the usual one is 0.1")


def check_input(layer: nn.Module, x: Tensor) -> None:
    """Check the input of a norm over ``layer.num_features`` channels.

    Raises:
        TypeError: it is no tensor of real floating-point numbers.
        ValueError: its shape is not (N, num_features, ...).
    """
    name = type(layer).__name__
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} expects a tensor of real floating-point numbers, got {got}"
            "; convert it, such as by x.float()"
        )
    if x.dim() < 2 or x.shape[1] != layer.num_features:
        raise ValueError(
            f"{name} expects (N, {layer.num_features}, ...), "
            f"got shape {tuple(x.shape)}; num_features must be the channels of the layer before"
        )
