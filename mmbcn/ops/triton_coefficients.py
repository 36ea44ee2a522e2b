"""The arithmetic on rows between the passes, in Triton: one launch for each function.

The same functions as in `mmbcn.ops.coefficients`, whose notation is kept; there they are some ten
and some forty small operations, each of which would cost a launch. Both stages close within a group
of channels, so one program computes a group over all samples, in blocks of samples x channels.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from mmbcn.ops import coefficients
from mmbcn.ops.coefficients import Stages
from mmbcn.ops.triton_launch import block, launch

_BLOCK = 1024  # values of a block of samples x channels
_CHANNELS = 4096  # most of them in a group; more would not fit the registers


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
    """As `mmbcn.ops.coefficients.forward`."""
    inputs = row_mean, row_var, mean, var, bn_weight, bn_bias, weight, bias
    samples, channels = row_mean.shape
    size = channels // num_groups
    if not row_mean.numel() or size > _CHANNELS:
        return coefficients.forward(*inputs, num_groups, bn_eps, eps)
    like = dict(dtype=row_mean.dtype, device=row_mean.device)
    rstd = torch.empty((samples, num_groups, 1), **like)
    slope, centre = torch.empty((2, samples, channels), **like)
    scale, shift = torch.empty((2, samples, channels), **like)
    blocks = _blocks(samples, size)
    launch(
        _forward_kernel,
        num_groups * triton.cdiv(samples, blocks["BLOCK_N"]),
        row_mean,
        *(value.contiguous() for value in inputs),
        *(rstd, slope, centre, scale, shift),
        *(samples, num_groups, size),
        BN_EPS=bn_eps,
        EPS=eps,
        **blocks,
    )
    by_group = samples, num_groups, size
    return Stages(rstd, slope.view(by_group), centre.view(by_group)), scale, shift


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
    """As `mmbcn.ops.coefficients.gradients`, which also serves where ranks share statistics."""
    inputs = t1, t2, row_mean, row_var, mean, var, bn_weight, weight
    samples, num_groups, size = s.slope.shape
    one_rank = group is None and (count is None or isinstance(count, int))
    empty = not t1.numel() or not positions
    if not one_rank or empty or size > _CHANNELS:
        return coefficients.gradients(s, *inputs, positions, bn_eps, count, group)
    like = dict(dtype=t1.dtype, device=t1.device)
    d_bn_weight, d_bn_bias = torch.empty((2, num_groups * size), **like)
    d_weight, d_bias = torch.empty((2, num_groups), **like)
    p, q, r = torch.empty((3, *t1.shape), **like)
    launch(
        _gradients_kernel,
        num_groups,
        t1,
        *(value.contiguous() for value in (*s, *inputs)),
        *(d_bn_weight, d_bn_bias, d_weight, d_bias, p, q, r),
        *(samples, num_groups, size, positions, count or 1),
        BN_EPS=bn_eps,
        THROUGH_BATCH=count is not None,
        **_blocks(samples, size),
    )
    return (d_bn_weight, d_bn_bias, d_weight, d_bias), (p, q, r)


def _blocks(samples: int, size: int) -> dict[str, int]:
    block_k = block(size, _CHANNELS)
    most = max(1, _BLOCK // block_k)
    return dict(BLOCK_N=min(triton.next_power_of_2(samples), most), BLOCK_K=block_k)


@triton.jit
def _forward_kernel(
    row_mean_ptr,
    row_var_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    weight_ptr,
    bias_ptr,
    rstd_ptr,
    slope_ptr,
    centre_ptr,
    scale_ptr,
    shift_ptr,
    samples,
    groups,
    size,
    BN_EPS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = rstd_ptr.dtype.element_ty
    g = tl.program_id(0) % groups
    n = tl.program_id(0) // groups * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    c = g * size + k
    at = n * groups * size + c
    of_group = n * groups + g
    exists = (n < samples) & (k < size)
    mean = tl.load(mean_ptr + c, mask=k < size, other=0.0).to(dtype)
    var = tl.load(var_ptr + c, mask=k < size, other=1.0).to(dtype)
    bn_weight = tl.load(bn_weight_ptr + c, mask=k < size, other=0.0).to(dtype)
    bn_bias = tl.load(bn_bias_ptr + c, mask=k < size, other=0.0).to(dtype)
    weight = tl.load(weight_ptr + g).to(dtype)
    bias = tl.load(bias_ptr + g).to(dtype)
    row_mean = tl.load(row_mean_ptr + at, mask=exists, other=0.0)
    row_var = tl.load(row_var_ptr + at, mask=exists, other=0.0)

    slope = bn_weight * tl.rsqrt(var + BN_EPS)
    z = (row_mean - mean) * slope + bn_bias
    z = z - tl.sum(z, axis=1, keep_dims=True) / size
    spread = tl.where(k < size, z * z + slope * slope * row_var, 0.0)
    rstd = tl.rsqrt(tl.sum(spread, axis=1, keep_dims=True) / size + EPS)
    slope = rstd * slope
    centre = z * rstd
    tl.store(rstd_ptr + of_group, rstd, mask=n < samples)
    tl.store(slope_ptr + at, slope, mask=exists)
    tl.store(centre_ptr + at, centre, mask=exists)
    tl.store(scale_ptr + at, slope * weight, mask=exists)
    tl.store(shift_ptr + at, bias + centre * weight, mask=exists)


@triton.jit
def _gradients_kernel(
    rstd_ptr,
    slope_ptr,
    centre_ptr,
    t1_ptr,
    t2_ptr,
    row_mean_ptr,
    row_var_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    weight_ptr,
    d_bn_weight_ptr,
    d_bn_bias_ptr,
    d_weight_ptr,
    d_bias_ptr,
    p_ptr,
    q_ptr,
    r_ptr,
    samples,
    groups,
    size,
    positions,
    count,
    BN_EPS: tl.constexpr,
    THROUGH_BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = rstd_ptr.dtype.element_ty
    g = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    c = g * size + k
    mean = tl.load(mean_ptr + c, mask=k < size, other=0.0).to(dtype)
    var = tl.load(var_ptr + c, mask=k < size, other=1.0).to(dtype)
    bn_weight = tl.load(bn_weight_ptr + c, mask=k < size, other=0.0).to(dtype)
    bn_rstd = tl.rsqrt(var + BN_EPS)
    weight = tl.load(weight_ptr + g).to(dtype)
    # sums over the samples
    sum_dz = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    dot_dz = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    sum_d_weight = tl.zeros([BLOCK_N, 1], dtype)
    sum_d_bias = tl.zeros([BLOCK_N, 1], dtype)
    for first in range(0, samples, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        exists = (n < samples) & (k < size)
        at = n * groups * size + c
        t1 = tl.load(t1_ptr + at, mask=exists, other=0.0)
        t2 = tl.load(t2_ptr + at, mask=exists, other=0.0)
        slope = tl.load(slope_ptr + at, mask=exists, other=0.0)
        centre = tl.load(centre_ptr + at, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + n * groups + g, mask=n < samples, other=0.0)
        row_mean = tl.load(row_mean_ptr + at, mask=exists, other=0.0)
        row_var = tl.load(row_var_ptr + at, mask=exists, other=0.0)
        d_weight, d_bias, k1, k2 = _channel_stage(t1, t2, slope, centre, weight, positions, size)
        dz = (weight * t1 - k1 * positions) * rstd
        dot = (weight * t2 - k2 * row_var * positions) * rstd
        sum_dz += dz
        dot_dz += dot + (row_mean - mean) * dz
        sum_d_weight += d_weight
        sum_d_bias += d_bias
    d_bn_bias = tl.sum(sum_dz, axis=0, keep_dims=True)
    d_bn_weight = tl.sum(dot_dz, axis=0, keep_dims=True) * bn_rstd
    tl.store(d_bn_bias_ptr + c, d_bn_bias, mask=k < size)
    tl.store(d_bn_weight_ptr + c, d_bn_weight, mask=k < size)
    tl.store(d_weight_ptr + g, tl.sum(tl.sum(sum_d_weight, axis=1), axis=0))
    tl.store(d_bias_ptr + g, tl.sum(tl.sum(sum_d_bias, axis=1), axis=0))
    # coefficients of each row
    d_mean = tl.zeros([1, BLOCK_K], dtype)
    d_var = tl.zeros([1, BLOCK_K], dtype)
    if THROUGH_BATCH:
        d_mean = d_bn_bias * bn_weight * bn_rstd / count
        d_var = d_bn_weight * bn_weight * bn_rstd * bn_rstd / count
    for first in range(0, samples, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        exists = (n < samples) & (k < size)
        at = n * groups * size + c
        t1 = tl.load(t1_ptr + at, mask=exists, other=0.0)
        t2 = tl.load(t2_ptr + at, mask=exists, other=0.0)
        slope = tl.load(slope_ptr + at, mask=exists, other=0.0)
        centre = tl.load(centre_ptr + at, mask=exists, other=0.0)
        row_mean = tl.load(row_mean_ptr + at, mask=exists, other=0.0)
        _, _, k1, k2 = _channel_stage(t1, t2, slope, centre, weight, positions, size)
        tl.store(p_ptr + at, slope * weight, mask=exists)
        tl.store(q_ptr + at, -(k2 * slope) - d_var, mask=exists)
        tl.store(r_ptr + at, -(k1 * slope) - d_mean - d_var * (row_mean - mean), mask=exists)


@triton.jit
def _channel_stage(t1, t2, slope, centre, weight, positions, size):
    """Gradients of the group's affine for each sample; k1, k2 of each row.

    The gradient of z_hat is rstd (weight dy - k1 - k2 (x - row mean)).
    """
    d_bias = tl.sum(t1, axis=1, keep_dims=True)
    d_weight = tl.sum(centre * t1 + slope * t2, axis=1, keep_dims=True)
    per_value = weight / positions / size
    k2 = per_value * d_weight
    k1 = per_value * d_bias + k2 * centre
    return d_weight, d_bias, k1, k2 * slope
