"""Kalman normalization: a batch's statistics, filtered with a prediction of them.

Paper: Wang, Peng, Luo, Wang, Lin, "Kalman Normalization: Normalizing Internal Representations
Across Network Layers", NeurIPS 2018, https://arxiv.org/abs/1802.03133
As in the authors' code, statistics are diagonal and the gain is a fixed scalar.

The fused form costs what one BatchNorm does, 3 passes over x forward and 5 backward, and keeps x
alone: what is between the sums over x and the coefficients of x is (C,)-sized.

Shapes: x (N, C, ...); statistics (2, C), the means and the biased variances.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmbcn.ops.backend import autocast_off, implementation
from mmbcn.ops.bcn import channel_moments
from mmbcn.ops.moments import statistics_dtype

_TRUST = 100  # the authors': a prediction with variances this many times larger is not used

Settle = Callable[[], Tensor | None]


def kalman_norm(
    x: Tensor,
    observed: Tensor,
    predicted: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    q: float,
    eps: float,
    settle: Settle,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize with the batch's statistics, filtered with their prediction.

    ``m = (1 - q) m_pre + q m_obs``; ``v = (1 - q) v_pre + q v_obs + q (1 - q) (m_obs - m_pre)^2``,
    the mean and variance of the mixture; ``y = weight (x - m) / sqrt(v + eps) + bias``. Where the
    mean over the channels of ``v_pre / v_obs`` is 100 or more, the observed statistics are used.
    Gradients reach x (through its statistics too), ``predicted`` and the affine.

    Args:
        x: the input; computed in float32 (float64 for float64), returned in its own dtype.
        observed: the statistics of x.
        predicted: the predicted statistics; None: the observed ones are used.
        weight: scale of each channel.
        bias: shift of each channel.
        q: the gain, the weight of what was observed.
        eps: added to the variance inside the root.
        settle: called in backward; gives a further gradient of the filtered statistics, or None.

    Returns:
        y; the filtered statistics, for the layers behind; the gain that was used, a 0-d tensor.

    Shape: x (N, C, ...) -> same, (2, C), ()

    Reference: Wang et al. 2018, with a scalar gain, https://arxiv.org/abs/1802.03133
    """
    if implementation(x) is None:
        return _reference(x, predicted, weight, bias, q, eps, settle)
    return _KalmanNorm.apply(x, predicted, weight, bias, observed, q, eps, settle)


def channel_statistics(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel, with gradients.

    Shape: (N, C, ...) -> (2, C)
    """
    return _plain_statistics(x) if implementation(x) is None else _ChannelStatistics.apply(x)


def _plain_statistics(x: Tensor) -> Tensor:
    x = x.to(statistics_dtype(x))
    over = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(over, keepdim=True)
    return torch.stack([mean.flatten(), (x - mean).square().mean(over)])


class _ChannelStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with autocast_off(x):
            mean, var, ctx.count, _ = channel_moments(x)
        ctx.save_for_backward(x, mean)
        return torch.stack([mean, var])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        passes = implementation(x)
        shift, scale = grad[0] / ctx.count, grad[1] * (2 / ctx.count)
        with autocast_off(x):
            return passes.scale_shift(x, *_for_rows(x, mean, scale, shift))


def _filter(observed: Tensor, predicted: Tensor | None, q: float) -> tuple[Tensor, ...]:
    """Filtered statistics, the gain in use, and the prediction in use (the observed for none)."""
    if predicted is None:
        return observed, observed.new_ones(()), observed
    trusted = (predicted[1] / observed[1]).mean() < _TRUST  # NaN is not
    prior = torch.where(trusted, predicted, observed)
    between = q * (1 - q) * (observed[0] - prior[0]).square()
    filtered = (1 - q) * prior + q * observed
    filtered = filtered + torch.stack([torch.zeros_like(between), between])
    return filtered, 1 - (1 - q) * trusted.to(observed.dtype), prior


def _reference(
    x: Tensor,
    predicted: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    q: float,
    eps: float,
    settle: Settle,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same step by step, in plain PyTorch: the readable ground truth."""
    filtered, gain, _ = _filter(_plain_statistics(x), predicted, q)
    filtered = _Settle.apply(filtered, settle)
    mean, var, weight, bias = (
        v.view(1, -1, *[1] * (x.dim() - 2)) for v in (*filtered, weight, bias)
    )
    y = (x.to(statistics_dtype(x)) - mean) * torch.rsqrt(var + eps) * weight + bias
    return y.to(x.dtype), filtered, gain


class _Settle(torch.autograd.Function):
    """The identity; its gradient is what comes and what ``settle`` gives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, settle: Settle) -> Tensor:
        ctx.settle = settle
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        owed = ctx.settle()
        return grad if owed is None else grad + owed, None


class _KalmanNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        predicted, weight, bias, observed, q, ctx.eps, ctx.settle = inputs
        passes = implementation(x)
        filtered, gain, prior = _filter(observed, predicted, q)
        with autocast_off(x):
            scale = weight * torch.rsqrt(filtered[1] + ctx.eps)
            shift = bias + scale * (observed[0] - filtered[0])
            y = passes.scale_shift(x, *_for_rows(x, observed[0], scale, shift))
        ctx.save_for_backward(x, weight, bias, observed, prior, filtered, gain)
        ctx.mark_non_differentiable(gain)
        return y, filtered.clone(), gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfiltered: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, observed, prior, filtered, gain = ctx.saved_tensors
        passes = implementation(x)
        with autocast_off(x):
            (center,) = _for_rows(x, observed[0])
            total, dot = (v.sum(0) for v in passes.row_dots(dy, x, center))
            dot = dot + total * (observed[0] - filtered[0])  # of dy and x - m
            rstd = torch.rsqrt(filtered[1] + ctx.eps)
            scale = weight * rstd
            grad = dfiltered - torch.stack([scale * total, 0.5 * scale * rstd.square() * dot])
            owed = ctx.settle()
            grad = grad if owed is None else grad + owed
            cross = 2 * gain * (1 - gain) * (observed[0] - prior[0]) * grad[1]
            to_mean, to_var = gain * grad[0] + cross, gain * grad[1]
            count = x.numel() // x.shape[1]
            slopes = _for_rows(x, scale, to_var * (2 / count), to_mean / count)
            needs = ctx.needs_input_grad
            dx = passes.combine(dy, x, center, *slopes) if needs[0] else None
        dpredicted = torch.stack([(1 - gain) * grad[0] - cross, (1 - gain) * grad[1]])
        dweight, dbias = (rstd * dot).to(weight.dtype), total.to(bias.dtype)
        return dx, dpredicted if needs[1] else None, dweight, dbias, None, None, None, None


def _for_rows(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Values of channels, for each row (n, c)."""
    return tuple(value.to(statistics_dtype(x)).repeat(len(x), 1) for value in values)
