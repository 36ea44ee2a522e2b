"""Batch-channel normalization in plain PyTorch: the readable ground truth.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Rethinking Normalization and Elimination Singularity in
Neural Networks", 2019, https://arxiv.org/abs/1911.09738
Torch's own batch normalization, then its own group normalization; where ranks share statistics, the
batch stage is written out in elementary operations. Autograd gives every gradient. Moments are
centred: nothing is lost where the mean is large against the spread.

Shapes: x (N, C, ...); rows, the positions of one (n, c): (N, C); batch statistics (C,).
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmbcn.ops.moments import batch_moments, share_moments, statistics_dtype


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and number of values of each channel; an empty batch gives zeros.

    Shape: (N, C, ...) -> (C,), (C,), int
    """
    count = x.numel() // x.shape[1]
    if not count:
        zeros = x.new_zeros(x.shape[1], dtype=statistics_dtype(x))
        return zeros, zeros.clone(), 0
    x = x.to(statistics_dtype(x))
    if x.is_cpu and not torch._C._are_functorch_transforms_active():
        return *torch.batch_norm_update_stats(x, None, None, 0.0), count  # a tenth of the time
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var, count


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row.

    Shape: (N, C, ...) -> (N, C), (N, C)
    """
    rows = x.to(statistics_dtype(x)).unsqueeze(-1).flatten(2)
    count = max(rows.shape[2], 1)  # no position at all: zeros
    mean = rows.sum(2) / count
    return mean, (rows - mean.unsqueeze(2)).square().sum(2) / count


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
    count: float | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`mmbcn.ops.batch_channel_norm`, step by step."""
    result_dtype, dtype = x.dtype, statistics_dtype(x)
    x = x.to(dtype)  # once: the gradients of its uses are added up before they are rounded
    bn_weight, bn_bias, mean, var = (v.to(dtype) for v in (bn_weight, bn_bias, mean, var))
    if isinstance(count, Tensor):
        z = _shared_batch_stage(x, mean, var, bn_weight, bn_bias, bn_eps, count, group)
    else:
        own = count is not None and count < math.inf
        statistics = (None, None) if own else (mean, var)
        cudnn = torch.backends.cudnn.enabled
        z = torch.batch_norm(x, bn_weight, bn_bias, *statistics, own, 0.0, bn_eps, cudnn)
    return channel_stage(z, weight, bias, num_groups, eps).to(result_dtype)


def gradients(
    needs: tuple[bool, ...], dy: Tensor, inputs: tuple[Tensor, ...], settings: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of `batch_channel_norm` for those of its tensors that need one."""
    y = batch_channel_norm(*inputs, *settings)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(grads) if need else None for need in needs)


def channel_stage(z: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """Group normalization with an affine of groups, in z's dtype.

    Shape: z (N, C, ...) -> same; weight, bias (num_groups,)
    """
    size = z.shape[1] // num_groups
    weight, bias = (v.to(z.dtype).unsqueeze(1).expand(-1, size).reshape(-1) for v in (weight, bias))
    return torch.group_norm(z, num_groups, weight, bias, eps)


def _shared_batch_stage(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    count: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    own = batch_moments(*row_moments(x), x[:1].numel() // x.shape[1])
    own = share_moments(*own, group) if group is not None else own
    usable = count.isfinite()  # else the statistics are constants
    mean, var = (torch.where(usable, a, b) for a, b in zip(own[:2], (mean, var), strict=True))
    scale = _per_channel(weight, x) * torch.rsqrt(_per_channel(var, x) + eps)
    return (x - _per_channel(mean, x)) * scale + _per_channel(bias, x)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (x.dim() - 2))
