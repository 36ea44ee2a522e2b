"""The arithmetic on rows between the passes of the fused batch-channel norm.

Forward: from the moments of the rows, y = scale (x - row mean) + shift. Backward: from the sums t1
of dy and t2 of dy (x - row mean), dx = p dy + q (x - row mean) + r, and the parameters' gradients.
Everything is centred: no difference of large numbers where the mean is large against the spread.
Few operations, as each costs microseconds; in place where a value is not needed any more.

Shapes: rows (N, C), or (N, G, K) with K channels in each of G groups; batch statistics and batch
stage (C,); channel stage (G,).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Stages(NamedTuple):
    """What both stages do to a row: z_hat, before the channel stage's affine."""

    rstd: Tensor  # 1 / std of each group (N, G, 1)
    slope: Tensor  # z_hat = slope (x - row mean) + z_hat of the row mean (N, G, K)
    centre: Tensor  # z_hat of the row mean (N, G, K)


def stages(
    row_mean: Tensor,
    row_var: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    num_groups: int,
    bn_eps: float,
    eps: float,
) -> Stages:
    """Arguments as in `mmbcn.ops.batch_channel_norm`."""
    dtype = row_mean.dtype
    slope = bn_weight.to(dtype) * torch.rsqrt(var.to(dtype) + bn_eps)
    z = torch.addcmul(bn_bias.to(dtype), row_mean - mean, slope).unflatten(1, (num_groups, -1))
    z = z - z.mean(2, keepdim=True)
    slope = slope.view(num_groups, -1)
    spread = torch.addcmul(z.square(), slope.square(), row_var.view_as(z))
    rstd = torch.rsqrt(spread.mean(2, keepdim=True) + eps)
    return Stages(rstd, rstd * slope, z * rstd)


def scale_and_shift(s: Stages, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each row, (N, C)."""
    weight, bias = (value.to(s.rstd.dtype).unsqueeze(1) for value in (weight, bias))
    return (s.slope * weight).flatten(1), torch.addcmul(bias, s.centre, weight).flatten(1)


def forward(
    row_mean: Tensor,
    row_var: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    bn_eps: float,
    eps: float,
) -> tuple[Stages, Tensor, Tensor]:
    """Both stages, and scale and shift of each row."""
    s = stages(row_mean, row_var, mean, var, bn_weight, bn_bias, num_groups, bn_eps, eps)
    return s, *scale_and_shift(s, weight, bias)


def gradients(
    s: Stages,
    t1: Tensor,
    t2: Tensor,
    row_mean: Tensor,
    row_var: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    weight: Tensor,
    positions: int,
    bn_eps: float,
    count: float | Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
    """Gradients of (bn_weight, bn_bias, weight, bias), and p, q, r of each row.

    ``positions`` is the number of values in a row; the rest as in `mmbcn.ops.batch_channel_norm`.
    """
    rstd, slope, centre = s
    weight = weight.to(rstd.dtype).unsqueeze(1)
    t1, t2, row_var = (value.view_as(slope) for value in (t1, t2, row_var))
    # the channel stage: z_hat's gradient is rstd (weight dy - k1 - k2 z_hat)
    d_bias = t1.sum(2, keepdim=True)
    d_weight = torch.addcmul(centre * t1, slope, t2).sum(2, keepdim=True)
    per_value = weight / (max(positions, 1) * slope.shape[2])
    k2 = per_value * d_weight
    k = torch.addcmul(per_value * d_bias, k2, centre)
    k2 = k2 * slope
    sum_dz = torch.sub(weight * t1, k, alpha=positions).mul_(rstd)
    dot_dz = torch.sub(weight * t2, k2 * row_var, alpha=positions).mul_(rstd)
    # the batch stage
    bn_rstd = torch.rsqrt(var.to(rstd.dtype) + bn_eps)
    from_mean = (row_mean - mean).view_as(slope)
    d_bn_bias = sum_dz.sum(0).flatten()
    d_bn_weight = torch.addcmul(dot_dz, from_mean, sum_dz).sum(0).flatten() * bn_rstd
    p, q, r = slope * weight, k2.mul_(slope).neg_(), k.mul_(slope).neg_()
    if count is not None:
        through = torch.stack([d_bn_bias, d_bn_weight])
        if group is not None:
            dist.all_reduce(through, group=group)
        through = through * (bn_weight.to(rstd.dtype) * bn_rstd / count)
        d_mean, d_std = through.view(2, *slope.shape[1:])
        d_var = d_std * bn_rstd.view_as(d_std)
        q.sub_(d_var)
        r.sub_(d_mean).addcmul_(d_var, from_mean, value=-1)
    of_parameters = d_bn_weight, d_bn_bias, d_weight.sum(0).flatten(), d_bias.sum(0).flatten()
    return of_parameters, (p.flatten(1), q.flatten(1), r.flatten(1))
