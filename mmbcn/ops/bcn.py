"""Batch-channel normalization in one pass: what a BatchNorm costs, and only x kept for backward.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Rethinking Normalization and Elimination Singularity in
Neural Networks", 2019, https://arxiv.org/abs/1911.09738
Both stages are affine within a row, the positions of one (n, c). So the rows' moments give those
of the batch and of the groups, and ``y = scale (x - row mean) + shift`` with a scale and a shift
for each row: one read for the moments, one read and one write for y. Backward likewise: the sums
of dy and of ``dy (x - row mean)`` over each row, then ``dx = p dy + q (x - row mean) + r``.

Shapes: x (N, C, ...); rows (N, C); batch statistics (C,); group statistics (N, G).
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmbcn.ops import aten, coefficients, reference
from mmbcn.ops.backend import autocast_off, backend_for, implementation
from mmbcn.ops.coefficients import Stages
from mmbcn.ops.moments import batch_moments

_MANY_POSITIONS = 512  # above, the values that backward keeps per row are less than 1 % of x


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row of ``x``, without gradient, in float32 (or float64).

    Shape: (N, C, ...) -> (N, C), (N, C)
    """
    with torch.no_grad():
        fused = implementation(x)
        if fused is None:
            return reference.row_moments(x)
        with autocast_off(x):
            return fused.row_moments(x)


def channel_moments(
    x: Tensor,
) -> tuple[Tensor, Tensor, int, tuple[Tensor, Tensor] | None]:
    """Mean, biased variance and number of values of each channel of ``x``, without gradient.

    Fourth are the moments of the rows, for `batch_channel_norm`, where they were computed.

    Shape: (N, C, ...) -> (C,), (C,), int, (N, C) twice; an empty batch gives zeros
    """
    with torch.no_grad():
        if implementation(x) is None:
            return *reference.channel_moments(x), None
    rows = row_moments(x)
    return *batch_moments(*rows, math.prod(x.shape[2:])), rows


def batch_channel_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    bn_eps: float = 1e-5,
    eps: float = 1e-5,
    count: int | float | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalize with the given batch statistics, then over each sample's channel groups.

    ``z = bn_weight (x - mean) / sqrt(var + bn_eps) + bn_bias`` per channel, then
    ``y = weight (z - m) / sqrt(v + eps) + bias`` with the biased mean m and variance v of z over
    each sample's groups. Gradients reach x and the four affine parameters; through ``mean`` and
    ``var`` they reach x where ``count`` is given.

    Args:
        x: the input; computed in float32 (float64 for float64), returned in its own dtype.
        mean: batch mean of each channel.
        var: batch variance of each channel.
        bn_weight: scale of the batch stage, per channel.
        bn_bias: shift of the batch stage, per channel.
        weight: scale of the channel stage, per group.
        bias: shift of the channel stage, per group.
        num_groups: number of channel groups; divides C.
        bn_eps: added to ``var`` inside the root.
        eps: added to the group variance inside the root.
        count: the number of values behind ``mean`` and ``var``, if they are the statistics of
            this very batch; None or infinity: they are constants.
        group: the ranks whose values ``mean`` and ``var`` are of; None: this one's alone.
        rows: the moments of x's rows, where they are known already.

    Shape: x (N, C, ...) -> same; mean, var, bn_weight, bn_bias (C,); weight, bias (num_groups,)

    Reference: Qiao et al. 2019, Batch-Channel Normalization, https://arxiv.org/abs/1911.09738
    """
    settings = num_groups, bn_eps, eps, count, group
    affine = bn_weight, bn_bias, weight, bias
    backend = backend_for(x)
    if backend == "triton" and x.numel():
        from mmbcn.ops import triton_bcn

        if triton_bcn.fits(x.shape[1], num_groups):
            return triton_bcn.batch_channel_norm(x, mean, var, affine, settings, rows)
    if backend == "reference":
        return reference.batch_channel_norm(x, mean, var, *affine, *settings)
    return _BatchChannelNorm.apply(x, mean, var, *affine, *(rows or row_moments(x)), settings)


class _BatchChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors_and_settings: Any) -> Tensor:
        *inputs, row_mean, row_var, settings = tensors_and_settings
        with autocast_off(x):
            s, scale, shift = coefficients.forward(row_mean, row_var, *inputs, *settings[:3])
            y = aten.scale_shift(x, row_mean, scale, shift)
        many = math.prod(x.shape[2:]) >= _MANY_POSITIONS
        ctx.save_for_backward(x, *inputs, *((row_mean, row_var, *s) if many else ()))
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        inputs, kept = saved[:6], saved[6:]
        mean, var, bn_weight, _, weight, _ = inputs
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradient will be differentiated
            grads = reference.gradients(needs[:7], dy, (x, *inputs), ctx.settings)
            return *grads, None, None, None
        num_groups, bn_eps, eps, count, group = ctx.settings
        with autocast_off(x):
            row_mean, row_var = kept[:2] or aten.row_moments(x)
            if kept:
                s = Stages(*kept[2:])
            else:
                s = coefficients.forward(row_mean, row_var, *inputs, num_groups, bn_eps, eps)[0]
            t1, t2 = aten.row_dots(dy, x, row_mean)
            positions = math.prod(x.shape[2:])
            rows = t1, t2, row_mean, row_var, mean, var, bn_weight, weight
            grads, pqr = coefficients.gradients(s, *rows, positions, bn_eps, count, group)
            dx = aten.combine(dy, x, row_mean, *pqr) if needs[0] else None
        grads = (grad.to(t.dtype) for grad, t in zip(grads, inputs[2:], strict=True))
        return dx, None, None, *grads, None, None, None
