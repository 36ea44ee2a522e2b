"""Combines the moments of rows into those of a batch, and those of ranks into those of all.

A row is the positions of one (n, c). Within- and between-part sums of squares are combined (Chan,
Golub, LeVeque 1983), so that nothing is lost where the mean is large against the spread.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mmbcn.ops.backend import has_kernels


class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum) whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics are computed in: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def batch_moments(row_mean: Tensor, row_var: Tensor, positions: int) -> tuple[Tensor, Tensor, int]:
    """Biased mean and variance of each channel, and the number of values behind each of them.

    Args:
        row_mean: mean of each row.
        row_var: biased variance of each row.
        positions: number of values in a row.

    Shape: (N, C), (N, C) -> (C,), (C,), int; an empty batch gives zeros
    """
    if not len(row_mean):
        return row_mean.sum(0), row_var.sum(0), 0
    count = len(row_mean) * positions
    if has_kernels(row_mean) and not row_mean.requires_grad:
        from mmbcn.ops import triton_estimates

        return *triton_estimates.batch_moments(row_mean, row_var), count
    mean = row_mean.mean(0)
    between = row_mean - mean
    return mean, torch.addcmul(row_var, between, between).mean(0), count


def share_moments(
    mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the moments of all ranks; gradients flow back to every rank.

    Args:
        mean: this rank's mean of each channel.
        var: this rank's biased variance of each channel.
        count: the number of values behind this rank's moments; may differ, and may be 0.
        group: the ranks; None: all.

    Returns:
        Mean, biased variance, and the number of values as a 0-d tensor (nothing waits for it).

    Shape: (C,), (C,) -> (C,), (C,), ()

    Reference: Chan, Golub, LeVeque 1983, combining within-rank and between-rank sums of squares
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.cat([mean, var, mean.new_tensor([float(count)])])
    rows = torch.stack([mine if r == rank else torch.zeros_like(mine) for r in range(world)])
    sizes = [len(mean), len(var), 1]
    mean_r, var_r, count_r = _SumOverRanks.apply(rows, group).split(sizes, dim=1)
    total = count_r.sum()
    share = count_r / total.clamp(min=1)
    mean = (share * mean_r).sum(0)
    var = (share * (var_r + (mean_r - mean).square())).sum(0)
    return mean, var, total.detach()
