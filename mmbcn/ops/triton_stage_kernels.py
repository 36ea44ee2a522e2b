"""Triton kernels of the arithmetic on rows; `mmbcn.ops.triton_stages` launches them.

A program computes a group of channels, in blocks of samples x channels (x parts of rows). Values of
rows lie in one tensor, each kind `stride` values (all rows) after the one before.
"""

import triton
import triton.language as tl

from mmbcn.ops.triton_estimates import move


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
def forward_kernel(
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
        new_mean = move(old_mean, mean, rate).to(mean_ptr.dtype.element_ty)
        new_var = move(old_var, var + wide, rate).to(var_ptr.dtype.element_ty)
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
def gradients_kernel(
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
