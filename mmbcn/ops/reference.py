"""Batch-channel normalization in plain PyTorch: the readable ground truth.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Rethinking Normalization and Elimination Singularity in
Neural Networks", 2019, https://arxiv.org/abs/1911.09738
The batch stage is written out in elementary differentiable operations, the channel stage is torch's
own group normalization; autograd gives every gradient. Moments are centred (two passes): nothing
is lost where the mean is large against the spread.

Shapes: x (N, C, ...); rows, the positions of one (n, c): (N, C); batch statistics (C,).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mmbcn.ops.moments import batch_moments, share_moments, statistics_dtype


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
    count: int | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`mmbcn.ops.batch_channel_norm`, step by step."""
    result_dtype, dtype = x.dtype, statistics_dtype(x)
    x = x.to(dtype)  # once: the gradients of its uses are added up before they are rounded
    if count is not None:
        own = batch_moments(*row_moments(x), x[:1].numel() // x.shape[1])
        if group is not None:
            own = share_moments(*own, group)
        usable = torch.as_tensor(count, device=x.device).isfinite()
        mean, var = (torch.where(usable, a, b) for a, b in zip(own[:2], (mean, var), strict=True))
    scale = _per_channel(bn_weight, x) * torch.rsqrt(_per_channel(var, x) + bn_eps)
    z = (x - _per_channel(mean, x)) * scale + _per_channel(bn_bias, x)
    size = x.shape[1] // num_groups
    weight, bias = (v.to(dtype).repeat_interleave(size) for v in (weight, bias))
    return torch.group_norm(z, num_groups, weight, bias, eps).to(result_dtype)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.to(statistics_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))
