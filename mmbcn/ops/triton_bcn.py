"""Batch-channel normalization in Triton: three launches forward, three backward.

Moments of parts of rows; all that is (N, C) or smaller, in one program for each group; then y. So
is backward. Between the launches the host has little to do: a network of small tensors waits for
it, not for the device.

Shapes: x (N, C, ...) not empty; batch statistics and batch stage (C,); channel stage (G,).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmbcn.ops import coefficients, reference
from mmbcn.ops.aten import _dense
from mmbcn.ops.triton_passes import passes_over
from mmbcn.ops.triton_stages import Arithmetic, Estimates, Rows, arithmetic_of, fits

__all__ = ["Estimates", "batch_channel_norm", "fits", "training_step"]


def batch_channel_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    affine: tuple[Tensor, ...],
    settings: tuple[Any, ...],
    moments: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`mmbcn.ops.batch_channel_norm`."""
    x = _dense(x)
    num_groups, bn_eps, eps, count, group = settings
    passes = passes_over(x)
    arithmetic = arithmetic_of(passes, num_groups, bn_eps, eps)
    with torch.no_grad():
        parts = passes.moments_of_parts(x) if moments is None else torch.stack(moments)
        rows = arithmetic.forward(parts, mean, var, affine)
    return _Normalize.apply(x, *affine, rows, arithmetic, count, group)


def training_step(
    x: Tensor,
    estimates: Estimates,
    affine: tuple[Tensor, ...],
    num_groups: int,
    bn_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalize with the statistics of this batch, or micro-batch BCN's; moves the estimates.

    Args:
        x: the input, of one rank that shares nothing.
        estimates: the running ones; with ``micro`` they are used, moved, and constants in backward.
        affine: scale and shift of the batch stage, then of the channel stage.
        num_groups: number of channel groups.
        bn_eps: of the batch stage.
        eps: of the channel stage.

    Returns:
        y; mean and variance that the batch stage used, and the batch's own mean.

    Shape: x (N, C, ...) -> same, (3, C)
    """
    x = _dense(x)
    passes = passes_over(x)
    arithmetic = arithmetic_of(passes, num_groups, bn_eps, eps)
    rows = arithmetic.training_step(passes.moments_of_parts(x), estimates, affine)
    count = None if estimates.micro else passes.count
    return _Normalize.apply(x, *affine, rows, arithmetic, count, None), rows.statistics


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bn_weight: Tensor,
        bn_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Rows,
        arithmetic: Arithmetic,
        count: int | float | Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        y = torch.empty_like(x)
        arithmetic.passes.scale_shift(x, y, rows.values)
        ctx.save_for_backward(x, bn_weight, bn_bias, weight, bias, *rows)
        ctx.arithmetic, ctx.count, ctx.group = arithmetic, count, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bn_weight, bn_bias, weight, bias, values, statistics = ctx.saved_tensors
        affine, rows = (bn_weight, bn_bias, weight, bias), Rows(values, statistics)
        arithmetic, count, group = ctx.arithmetic, ctx.count, ctx.group
        passes = arithmetic.passes
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradient will be differentiated
            inputs = x, statistics[0], statistics[1], *affine
            needs = needs[0], False, False, *needs[1:5]
            settings = arithmetic.num_groups, arithmetic.bn_eps, arithmetic.eps, count, group
            dx, _, _, *grads = reference.gradients(needs, dy, inputs, settings)
            return dx, *grads, None, None, None, None
        dy = _dense(dy, like=x)
        sums = passes.dots_of_parts(dy, x, values)
        if group is None and (count is None or isinstance(count, int)):
            through = count is not None
            grads, pqr = arithmetic.gradients(sums, rows, bn_weight, weight, through)
        else:
            row_mean, row_var, stages = arithmetic.stages(rows)
            of_batch = statistics[0], statistics[1], bn_weight, weight
            last = passes.positions, arithmetic.bn_eps, count, group
            arguments = *sums.sum(3), row_mean, row_var, *of_batch, *last
            grads, pqr = coefficients.gradients(stages, *arguments)
            pqr = torch.stack((row_mean, *pqr))
        dx = None
        if needs[0]:
            dx = torch.empty_like(x)
            passes.combine(dy, x, dx, pqr)
        grads = [
            g if g.dtype == t.dtype else g.to(t.dtype) for g, t in zip(grads, affine, strict=True)
        ]
        return dx, *grads, None, None, None, None
