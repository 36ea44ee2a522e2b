"""The arithmetic on rows between the passes, in Triton: one launch forward, one backward.

The same as in `mmbcn.ops.coefficients`, whose notation is kept, with the moments of the batch and
the update of the running estimates before it; in single operations those are some sixty. Both
stages close within a group of channels, so one program computes a group over all samples, in blocks
of samples x channels.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmbcn.ops.coefficients import Stages
from mmbcn.ops.triton_estimates import _move
from mmbcn.ops.triton_launch import Launch, blocks, power_of_2
from mmbcn.ops.triton_passes import Passes

_BLOCK = 2048  # values of a block of samples x channels x parts
_MOST = 8192  # of channels x parts in a group; more would not fit the registers


class Rows(NamedTuple):
    """What a forward pass knows of its rows, and backward needs."""

    # (6, N, C): mean, scale, shift, variance, slope, centre of rows; then (N, G): 1 / std of groups
    values: Tensor
    statistics: Tensor  # (3, C): mean and variance in the batch stage; the batch's own mean


class Estimates(NamedTuple):
    """Running estimates, and how a training step moves them: see `mmbcn.ops.update_estimates`."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None
    micro: bool
    warmup: bool


class Arithmetic:
    """The launches between passes, for one norm's settings.

    Args:
        passes: over x.
        num_groups: number of channel groups.
        bn_eps: of the batch stage.
        eps: of the channel stage.
    """

    def __init__(self, passes: Passes, num_groups: int, bn_eps: float, eps: float) -> None:
        self.passes, self.num_groups, self.bn_eps, self.eps = passes, num_groups, bn_eps, eps
        samples, channels = passes.row_shape
        size = channels // num_groups
        self.shape = samples, num_groups, size
        block_k, block_p = power_of_2(size), power_of_2(passes.parts)
        self.takes_parts = block_k * block_p <= _MOST
        self.parts = passes.parts if self.takes_parts else 1
        block_p = block_p if self.takes_parts else 1
        block_n = power_of_2(samples, max(1, _BLOCK // (block_k * block_p)))
        self.tile = dict(BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_P=block_p)
        self.num_values = 6 * samples * channels + samples * num_groups
        self.statistics_shape = 3, channels
        self.pqr_shape = 4, samples, channels
        self.of_parameters = [channels, channels, num_groups, num_groups]
        self.num_parameters = sum(self.of_parameters)
        self.launches: dict[Any, Launch] = {}

    def forward(
        self,
        parts: Tensor,
        mean: Tensor,
        var: Tensor,
        affine: tuple[Tensor, ...],
    ) -> Rows:
        """Both stages, with given statistics of the batch.

        Args:
            parts: moments of the rows of x, or of parts of them.
            mean: mean of each channel.
            var: variance of each channel.
            affine: scale and shift of the batch stage, then of the channel stage.
        """
        of_batch = mean.contiguous(), var.contiguous(), mean
        return self._forward((False, False, False), parts, of_batch, affine, 0.0)

    def training_step(
        self, parts: Tensor, estimates: Estimates, affine: tuple[Tensor, ...]
    ) -> Rows:
        """Both stages, with this batch's statistics or micro-batch BCN's; moves the estimates.

        Args:
            parts: moments of the rows of x, or of parts of them.
            estimates: the running ones; moved.
            affine: scale and shift of the batch stage, then of the channel stage.
        """
        mean, var, tracked, momentum, micro, warmup = estimates
        update = True, micro, warmup or momentum is None
        rows = self._forward(update, parts, (mean, var, tracked), affine, momentum or 0.0)
        tracked.add_(1)  # a launch of its own: every program of the kernel reads the old value
        return rows

    def _forward(
        self,
        update: tuple[bool, bool, bool],
        parts: Tensor,
        of_batch: tuple[Tensor, Tensor, Tensor],
        affine: tuple[Tensor, ...],
        momentum: float,
    ) -> Rows:
        if not self.takes_parts and parts.dim() == 4:
            parts = self.passes.moments_of_rows(parts)
        merged = parts.dim() == 3
        run = self.launches.get((update, merged)) or self._forward_launch(update, merged)
        values = torch.empty(self.num_values, dtype=parts.dtype, device=parts.device)
        statistics = torch.empty(self.statistics_shape, dtype=parts.dtype, device=parts.device)
        a, b, c, d = affine
        affine = a.contiguous(), b.contiguous(), c.contiguous(), d.contiguous()
        run(parts, values, statistics, *of_batch, *affine, numbers=(float(momentum),))
        return Rows(values, statistics)

    def _forward_launch(self, update: tuple[bool, bool, bool], merged: bool) -> Launch:
        passes, constants = (
            self.passes,
            dict(zip(("UPDATE", "MICRO", "WARMUP"), update, strict=True)),
        )
        tile = self.tile | (dict(BLOCK_P=1) if merged else {})
        # where nothing is computed over all samples, each block of them is a program
        split = 1 if update[0] else blocks(self.shape[0], tile["BLOCK_N"])
        of_parts = passes.positions, 1 if merged else self.parts, passes.part_size
        batches = 2 if update[1] and passes.count == 1 else 1
        sizes = *self.shape, *of_parts, passes.count, batches
        constants |= dict(BN_EPS=self.bn_eps, EPS=self.eps)
        run = Launch(_forward_kernel, self.num_groups * split, sizes, **constants, **tile)
        return self.launches.setdefault((update, merged), run)

    def gradients(
        self, sums: Tensor, rows: Rows, bn_weight: Tensor, weight: Tensor, through_batch: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of (bn_weight, bn_bias, weight, bias), and of each row: mean, p, q, r.

        As `mmbcn.ops.coefficients.gradients`, for one rank.

        Shape: sums (2, N, C, parts) -> (C,), (C,), (G,), (G,), and (4, N, C)
        """
        if not self.takes_parts:
            sums = sums.sum(3)
        run = self.launches.get(through_batch) or self._gradients_launch(through_batch)
        of_parameters = torch.empty(self.num_parameters, dtype=sums.dtype, device=sums.device)
        pqr = torch.empty(self.pqr_shape, dtype=sums.dtype, device=sums.device)
        run(sums, *rows, bn_weight.contiguous(), weight.contiguous(), of_parameters, pqr)
        return of_parameters.split_with_sizes(self.of_parameters), pqr

    def _gradients_launch(self, through_batch: bool) -> Launch:
        sizes = *self.shape, self.passes.positions, self.parts, self.passes.count
        constants = dict(BN_EPS=self.bn_eps, THROUGH_BATCH=through_batch)
        run = Launch(_gradients_kernel, self.num_groups, sizes, **constants, **self.tile)
        return self.launches.setdefault(through_batch, run)

    def stages(self, rows: Rows) -> tuple[Tensor, Tensor, Stages]:
        """Mean and variance of each row, and both stages as in `mmbcn.ops.coefficients`."""
        samples, groups, _ = self.shape
        rstd = rows.values[-samples * groups :].view(samples, groups, 1)
        values = rows.values[: -samples * groups].view(6, *self.passes.row_shape)
        mean, _, _, var, slope, centre = values
        return mean, var, Stages(rstd, slope.view(self.shape), centre.view(self.shape))


arithmetic_of = lru_cache(maxsize=1024)(Arithmetic)


def fits(channels: int, num_groups: int) -> bool:
    """Whether a group of channels fits a program."""
    return channels // num_groups <= _MOST


@triton.jit
def _moments_of_rows(
    parts_ptr, at, exists, stride, positions, parts, part_size, BLOCK_P: tl.constexpr
):
    """Mean and biased variance of the rows at `at`, (n, k), from those of their parts."""
    if BLOCK_P == 1:
        mean = tl.load(parts_ptr + at, mask=exists, other=0.0)
        var = tl.load(parts_ptr + stride + at, mask=exists, other=0.0)
    else:
        dtype: tl.constexpr = parts_ptr.dtype.element_ty
        part = tl.arange(0, BLOCK_P)[None, None, :]
        place = (at * parts)[:, :, None] + part
        there = exists[:, :, None] & (part < parts)
        first = tl.load(parts_ptr + at * parts, mask=exists, other=0.0)
        mean = tl.load(parts_ptr + place, mask=there, other=0.0)
        mean = tl.where(there, mean - first[:, :, None], 0.0)
        var = tl.load(parts_ptr + stride * parts + place, mask=there, other=0.0)
        left = positions - part * part_size
        count = tl.where(part < parts, tl.minimum(left, part_size), 0).to(dtype)
        center = tl.sum(count * mean, axis=2) / positions
        far = mean - center[:, :, None]
        var = tl.sum(count * (var + far * far), axis=2) / positions
        mean = first + center
    return mean, var


@triton.jit
def _sum_of_parts(sums_ptr, at, exists, parts, BLOCK_P: tl.constexpr):
    if BLOCK_P == 1:
        total = tl.load(sums_ptr + at, mask=exists, other=0.0)
    else:
        part = tl.arange(0, BLOCK_P)[None, None, :]
        there = exists[:, :, None] & (part < parts)
        values = tl.load(sums_ptr + (at * parts)[:, :, None] + part, mask=there, other=0.0)
        total = tl.sum(values, axis=2)
    return total


@triton.jit
def _forward_kernel(
    parts_ptr,
    values_ptr,
    statistics_ptr,
    mean_ptr,
    var_ptr,
    steps_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    weight_ptr,
    bias_ptr,
    momentum: tl.float64,
    samples,
    groups,
    size,
    positions,
    parts,
    part_size,
    count,
    batches,
    UPDATE: tl.constexpr,
    MICRO: tl.constexpr,
    WARMUP: tl.constexpr,
    BN_EPS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Statistics of the batch stage (given, or the batch's; with an update), then both stages."""
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    g = tl.program_id(0) % groups
    start = tl.program_id(0) // groups * BLOCK_N
    end = samples if UPDATE else tl.minimum(start + BLOCK_N, samples)
    channels = groups * size
    stride = samples * channels
    rstd_ptr = values_ptr + 6 * stride
    in_block = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    c = g * size + k
    in_group = k < size

    mean = tl.load(mean_ptr + c, mask=in_group, other=0.0).to(dtype)
    var = tl.load(var_ptr + c, mask=in_group, other=1.0).to(dtype)
    if UPDATE:
        old_mean, old_var = mean, var
        origin, _var = _moments_of_rows(
            parts_ptr, c, in_group, stride, positions, parts, part_size, BLOCK_P
        )
        from_origin = tl.zeros([BLOCK_N, BLOCK_K], dtype)
        for first in range(0, samples, BLOCK_N):
            n = first + in_block
            exists = (n < samples) & in_group
            row_mean, row_var = _moments_of_rows(
                parts_ptr, n * channels + c, exists, stride, positions, parts, part_size, BLOCK_P
            )
            from_origin += tl.where(exists, row_mean - origin, 0.0)
        mean = origin + tl.sum(from_origin, axis=0, keep_dims=True) / samples
        spread = tl.zeros([BLOCK_N, BLOCK_K], dtype)
        for first in range(0, samples, BLOCK_N):
            n = first + in_block
            exists = (n < samples) & in_group
            row_mean, row_var = _moments_of_rows(
                parts_ptr, n * channels + c, exists, stride, positions, parts, part_size, BLOCK_P
            )
            between = row_mean - mean
            spread += tl.where(exists, row_var + between * between, 0.0)
        var = tl.sum(spread, axis=0, keep_dims=True) / samples
        tl.store(statistics_ptr + 2 * channels + c, mean, mask=in_group)
        rate = tl.full([1, 1], momentum, dtype)
        if WARMUP:
            rate = tl.maximum(rate, 1.0 / (tl.load(steps_ptr).to(dtype) + batches))
        wide = (mean - old_mean) * (mean - old_mean) if MICRO else var / (count - 1)
        new_mean = _move(old_mean, mean, rate).to(mean_ptr.dtype.element_ty)
        new_var = _move(old_var, var + wide, rate).to(var_ptr.dtype.element_ty)
        tl.store(mean_ptr + c, new_mean, mask=in_group)
        tl.store(var_ptr + c, new_var, mask=in_group)
        if MICRO:
            mean = new_mean.to(dtype)
            var = new_var.to(dtype)
    if start == 0:
        tl.store(statistics_ptr + c, mean, mask=in_group)
        tl.store(statistics_ptr + channels + c, var, mask=in_group)

    bn_weight = tl.load(bn_weight_ptr + c, mask=in_group, other=0.0).to(dtype)
    bn_bias = tl.load(bn_bias_ptr + c, mask=in_group, other=0.0).to(dtype)
    weight = tl.load(weight_ptr + g).to(dtype)
    bias = tl.load(bias_ptr + g).to(dtype)
    bn_slope = bn_weight * tl.rsqrt(var + BN_EPS)
    for first in range(start, end, BLOCK_N):
        n = first + in_block
        exists = (n < samples) & in_group
        at = n * channels + c
        row_mean, row_var = _moments_of_rows(
            parts_ptr, at, exists, stride, positions, parts, part_size, BLOCK_P
        )
        z = (row_mean - mean) * bn_slope + bn_bias
        z = z - tl.sum(z, axis=1, keep_dims=True) / size
        square = tl.where(in_group, z * z + bn_slope * bn_slope * row_var, 0.0)
        rstd = tl.rsqrt(tl.sum(square, axis=1, keep_dims=True) / size + EPS)
        slope = rstd * bn_slope
        centre = z * rstd
        tl.store(rstd_ptr + n * groups + g, rstd, mask=n < samples)
        tl.store(values_ptr + at, row_mean, mask=exists)
        tl.store(values_ptr + stride + at, slope * weight, mask=exists)
        tl.store(values_ptr + 2 * stride + at, bias + centre * weight, mask=exists)
        tl.store(values_ptr + 3 * stride + at, row_var, mask=exists)
        tl.store(values_ptr + 4 * stride + at, slope, mask=exists)
        tl.store(values_ptr + 5 * stride + at, centre, mask=exists)


@triton.jit
def _gradients_kernel(
    sums_ptr,
    values_ptr,
    statistics_ptr,
    bn_weight_ptr,
    weight_ptr,
    of_parameters_ptr,
    pqr_ptr,
    samples,
    groups,
    size,
    positions,
    parts,
    count,
    BN_EPS: tl.constexpr,
    THROUGH_BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradients of the affines; mean, p, q, r of each row."""
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    g = tl.program_id(0)
    channels = groups * size
    stride = samples * channels
    rstd_ptr = values_ptr + 6 * stride
    in_block = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    c = g * size + k
    in_group = k < size
    mean = tl.load(statistics_ptr + c, mask=in_group, other=0.0)
    var = tl.load(statistics_ptr + channels + c, mask=in_group, other=1.0)
    bn_weight = tl.load(bn_weight_ptr + c, mask=in_group, other=0.0).to(dtype)
    bn_rstd = tl.rsqrt(var + BN_EPS)
    weight = tl.load(weight_ptr + g).to(dtype)
    # sums over the samples
    sum_dz = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    dot_dz = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    sum_d_weight = tl.zeros([BLOCK_N, 1], dtype)
    sum_d_bias = tl.zeros([BLOCK_N, 1], dtype)
    for first in range(0, samples, BLOCK_N):
        n = first + in_block
        exists = (n < samples) & in_group
        at = n * channels + c
        t1 = _sum_of_parts(sums_ptr, at, exists, parts, BLOCK_P)
        t2 = _sum_of_parts(sums_ptr + stride * parts, at, exists, parts, BLOCK_P)
        row_mean = tl.load(values_ptr + at, mask=exists, other=0.0)
        row_var = tl.load(values_ptr + 3 * stride + at, mask=exists, other=0.0)
        slope = tl.load(values_ptr + 4 * stride + at, mask=exists, other=0.0)
        centre = tl.load(values_ptr + 5 * stride + at, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + n * groups + g, mask=n < samples, other=0.0)
        d_weight, d_bias, k1, k2 = _channel_stage(t1, t2, slope, centre, weight, positions, size)
        dz = (weight * t1 - k1 * positions) * rstd
        dot = (weight * t2 - k2 * row_var * positions) * rstd
        sum_dz += dz
        dot_dz += dot + (row_mean - mean) * dz
        sum_d_weight += d_weight
        sum_d_bias += d_bias
    d_bn_bias = tl.sum(sum_dz, axis=0, keep_dims=True)
    d_bn_weight = tl.sum(dot_dz, axis=0, keep_dims=True) * bn_rstd
    tl.store(of_parameters_ptr + c, d_bn_weight, mask=in_group)
    tl.store(of_parameters_ptr + channels + c, d_bn_bias, mask=in_group)
    of_group = of_parameters_ptr + 2 * channels + g
    tl.store(of_group, tl.sum(tl.sum(sum_d_weight, axis=1), axis=0))
    tl.store(of_group + groups, tl.sum(tl.sum(sum_d_bias, axis=1), axis=0))
    # coefficients of each row
    d_mean = tl.zeros([1, BLOCK_K], dtype)
    d_var = tl.zeros([1, BLOCK_K], dtype)
    if THROUGH_BATCH:
        d_mean = d_bn_bias * bn_weight * bn_rstd / count
        d_var = d_bn_weight * bn_weight * bn_rstd * bn_rstd / count
    for first in range(0, samples, BLOCK_N):
        n = first + in_block
        exists = (n < samples) & in_group
        at = n * channels + c
        t1 = _sum_of_parts(sums_ptr, at, exists, parts, BLOCK_P)
        t2 = _sum_of_parts(sums_ptr + stride * parts, at, exists, parts, BLOCK_P)
        row_mean = tl.load(values_ptr + at, mask=exists, other=0.0)
        slope = tl.load(values_ptr + 4 * stride + at, mask=exists, other=0.0)
        centre = tl.load(values_ptr + 5 * stride + at, mask=exists, other=0.0)
        d_weight, d_bias, k1, k2 = _channel_stage(t1, t2, slope, centre, weight, positions, size)
        r = -(k1 * slope) - d_mean - d_var * (row_mean - mean)
        tl.store(pqr_ptr + at, row_mean, mask=exists)
        tl.store(pqr_ptr + stride + at, slope * weight, mask=exists)
        tl.store(pqr_ptr + 2 * stride + at, -(k2 * slope) - d_var, mask=exists)
        tl.store(pqr_ptr + 3 * stride + at, r, mask=exists)


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
