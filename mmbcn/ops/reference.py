"""Batch-Channel Normalization in plain PyTorch: the readable ground truth.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Rethinking Normalization and Elimination Singularity in
Neural Networks", 2019, https://arxiv.org/abs/1911.09738
The batch stage is written out in elementary differentiable operations, the channel stage is torch's
own group normalization; autograd gives every gradient. Moments are centred (two passes): nothing
is lost where the mean is large against the spread.

Shapes: x (N, C, ...); batch statistics (C,); group statistics (N, G), G groups of C / G channels.
"""

import torch
import torch.distributed as dist
from torch import Tensor


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


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.to(statistics_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))


def _channel_mean(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).mean(1)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Biased mean and variance of each channel, and the number of values behind each of them.

    Shape: x (N, C, ...) -> (C,), (C,), int; an empty batch gives zeros that depend on x
    """
    x = x.to(statistics_dtype(x))
    count = x.numel() // x.shape[1]
    if not count:
        zero = x.sum(dim=[0, *range(2, x.dim())])
        return zero, zero, 0
    mean = _channel_mean(x)
    return mean, _channel_mean((x - _per_channel(mean, x)).square()), count


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
) -> Tensor:
    """Normalize with the given batch statistics, then over each sample's channel groups.

    ``z = bn_weight (x - mean) / sqrt(var + bn_eps) + bn_bias`` per channel, then
    ``y = weight (z - m) / sqrt(v + eps) + bias`` with the biased mean m and variance v of z over
    each sample's groups. Gradients flow into ``mean`` and ``var`` where they require it.

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

    Shape: x (N, C, ...) -> same; mean, var, bn_weight, bn_bias (C,); weight, bias (num_groups,)

    Reference: Qiao et al. 2019, Batch-Channel Normalization, https://arxiv.org/abs/1911.09738
    """
    dtype = statistics_dtype(x)
    scale = _per_channel(bn_weight, x) * torch.rsqrt(_per_channel(var, x) + bn_eps)
    z = (x.to(dtype) - _per_channel(mean, x)) * scale + _per_channel(bn_bias, x)
    size = x.shape[1] // num_groups
    weight, bias = (v.to(dtype).repeat_interleave(size) for v in (weight, bias))
    return torch.group_norm(z, num_groups, weight, bias, eps).to(x.dtype)
