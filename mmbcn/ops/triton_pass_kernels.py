"""Triton kernels of the passes over x; `mmbcn.ops.triton_passes` launches them.

The kernels see x as (samples, rows, positions). Contiguous: all rows are of one sample, positions
are the fastest dimension. Channels last (`LAST`): rows, the channels, are the fastest. A program
computes on a part of the positions of a block of rows, in `steps` tiles of BLOCK_R x BLOCK_M.
Offsets are 64 bits wide at a tile's corner and 32 inside it. Values of rows lie in one tensor,
each kind `stride` values (all rows) after the one before.
"""

import triton
import triton.language as tl


@triton.jit
def _place(rows, parts, BLOCK_R: tl.constexpr, LAST: tl.constexpr):
    """Sample, first row and part of this program; programs run in the order of memory."""
    pid = tl.program_id(0)
    if LAST:
        blocks = (rows + BLOCK_R - 1) // BLOCK_R
        row = pid % blocks * BLOCK_R
        part = pid // blocks % parts
        sample = pid // (blocks * parts)
    else:
        row = pid // parts * BLOCK_R
        part = pid % parts
        sample = pid * 0
    return sample, row, part


@triton.jit
def _tile(
    sample,
    row,
    position,
    rows,
    positions,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LAST: tl.constexpr,
):
    """Offset of a tile's corner, offsets from there, and which of them exist."""
    r = tl.arange(0, BLOCK_R)[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    left = tl.minimum(positions - position, BLOCK_M).to(tl.int32)
    exists = (row + r < rows) & (m < left)
    if LAST:
        corner = (sample.to(tl.int64) * positions + position) * rows + row
        inside = m * rows + r
    else:
        corner = row.to(tl.int64) * positions + position
        inside = r * positions + m
    return corner, inside, exists


@triton.jit
def _merge(mean, m2, count):
    """Mean and biased variance over axis 1 of parts: their means, sums of squares, counts.

    Chan, Golub, LeVeque 1983. The means should be small against their spread.
    """
    total = tl.sum(count, axis=1, keep_dims=True)
    center = tl.sum(count * mean, axis=1, keep_dims=True) / total
    far = mean - center
    return center, tl.sum(m2 + count * far * far, axis=1, keep_dims=True) / total


@triton.jit(do_not_specialize=["parts", "steps"])
def moments_kernel(
    x_ptr,
    moments_ptr,
    rows,
    positions,
    parts,
    steps,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LAST: tl.constexpr,
):
    """Mean and biased variance of each part of each row: x -> (2, row, part)."""
    dtype: tl.constexpr = moments_ptr.dtype.element_ty
    sample, row, part = _place(rows, parts, BLOCK_R, LAST)
    start = part.to(tl.int64) * steps * BLOCK_M
    r = row + tl.arange(0, BLOCK_R)[:, None]
    # Welford's rule relative to the part's first value, which is near the mean or an outlier
    begin, of_row, _ = _tile(sample, row, start, rows, positions, BLOCK_R, 1, LAST)
    first = tl.load(x_ptr + begin + of_row, mask=r < rows, other=0.0).to(dtype)
    mean = tl.zeros([BLOCK_R, BLOCK_M], dtype)
    m2 = tl.zeros([BLOCK_R, BLOCK_M], dtype)
    done = tl.zeros([1, 1], dtype)
    for step in range(steps):
        position = start + step * BLOCK_M
        corner, inside, exists = _tile(
            sample, row, position, rows, positions, BLOCK_R, BLOCK_M, LAST
        )
        x = tl.load(x_ptr + corner + inside, mask=exists, other=0.0).to(dtype) - first
        done += 1.0
        delta = tl.where(exists, x - mean, 0.0)
        mean += delta * (1.0 / done)
        m2 += delta * (x - mean)
    left = positions - start - tl.arange(0, BLOCK_M)[None, :]
    count = tl.minimum((left + BLOCK_M - 1) // BLOCK_M, steps)
    center, var = _merge(mean, m2, count.to(dtype))
    at = (sample * rows + r) * parts + part
    tl.store(moments_ptr + at, first + center, mask=r < rows)
    tl.store(moments_ptr + stride * parts + at, var, mask=r < rows)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_parts_kernel(
    parts_ptr,
    moments_ptr,
    rows,
    positions,
    parts,
    part_size,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Moments of rows from those of their parts: (2, row, part) -> (2, row)."""
    dtype: tl.constexpr = moments_ptr.dtype.element_ty
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    part = tl.arange(0, BLOCK_P)[None, :]
    exists = (r < rows) & (part < parts)
    first = tl.load(parts_ptr + r * parts, mask=r < rows, other=0.0)
    mean = tl.load(parts_ptr + r * parts + part, mask=exists, other=0.0)
    mean = tl.where(exists, mean - first, 0.0)
    var = tl.load(parts_ptr + (rows + r) * parts + part, mask=exists, other=0.0)
    left = positions - part.to(tl.int64) * part_size
    count = tl.minimum(tl.maximum(left, 0), part_size).to(dtype)
    center, var = _merge(mean, count * var, count)
    tl.store(moments_ptr + r, first + center, mask=r < rows)
    tl.store(moments_ptr + rows + r, var, mask=r < rows)


@triton.jit(do_not_specialize=["parts"])
def scale_shift_kernel(
    x_ptr,
    y_ptr,
    rows_ptr,
    rows,
    positions,
    parts,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LAST: tl.constexpr,
):
    """One tile of ``y = scale (x - center) + shift``; rows: center, scale, shift."""
    sample, row, part = _place(rows, parts, BLOCK_R, LAST)
    position = part.to(tl.int64) * BLOCK_M
    corner, inside, exists = _tile(sample, row, position, rows, positions, BLOCK_R, BLOCK_M, LAST)
    r = row + tl.arange(0, BLOCK_R)[:, None]
    of_row = rows_ptr + sample * rows + r
    center = tl.load(of_row, mask=r < rows, other=0.0)
    scale = tl.load(of_row + stride, mask=r < rows, other=0.0)
    shift = tl.load(of_row + 2 * stride, mask=r < rows, other=0.0)
    x = tl.load(x_ptr + corner + inside, mask=exists, other=0.0).to(center.dtype)
    y = scale * (x - center) + shift
    tl.store(y_ptr + corner + inside, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["parts", "steps"])
def dots_kernel(
    dy_ptr,
    x_ptr,
    center_ptr,
    sums_ptr,
    rows,
    positions,
    parts,
    steps,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LAST: tl.constexpr,
):
    """Sums of dy and of dy (x - center) over each part of each row: -> (2, row, part)."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    sample, row, part = _place(rows, parts, BLOCK_R, LAST)
    start = part.to(tl.int64) * steps * BLOCK_M
    r = row + tl.arange(0, BLOCK_R)[:, None]
    center = tl.load(center_ptr + sample * rows + r, mask=r < rows, other=0.0)
    total = tl.zeros([BLOCK_R, BLOCK_M], dtype)
    dot = tl.zeros([BLOCK_R, BLOCK_M], dtype)
    for step in range(steps):
        position = start + step * BLOCK_M
        corner, inside, exists = _tile(
            sample, row, position, rows, positions, BLOCK_R, BLOCK_M, LAST
        )
        dy = tl.load(dy_ptr + corner + inside, mask=exists, other=0.0).to(dtype)
        x = tl.load(x_ptr + corner + inside, mask=exists, other=0.0).to(dtype)
        total += dy
        dot += dy * (x - center)
    at = (sample * rows + r) * parts + part
    tl.store(sums_ptr + at, tl.sum(total, axis=1, keep_dims=True), mask=r < rows)
    second = sums_ptr + stride * parts + at
    tl.store(second, tl.sum(dot, axis=1, keep_dims=True), mask=r < rows)


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    rows_ptr,
    rows,
    positions,
    parts,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LAST: tl.constexpr,
):
    """One tile of ``dx = p dy + q (x - center) + r``; rows: center, p, q, r."""
    sample, row, part = _place(rows, parts, BLOCK_R, LAST)
    position = part.to(tl.int64) * BLOCK_M
    corner, inside, exists = _tile(sample, row, position, rows, positions, BLOCK_R, BLOCK_M, LAST)
    index = row + tl.arange(0, BLOCK_R)[:, None]
    of_row = rows_ptr + sample * rows + index
    center = tl.load(of_row, mask=index < rows, other=0.0)
    p = tl.load(of_row + stride, mask=index < rows, other=0.0)
    q = tl.load(of_row + 2 * stride, mask=index < rows, other=0.0)
    r = tl.load(of_row + 3 * stride, mask=index < rows, other=0.0)
    dy = tl.load(dy_ptr + corner + inside, mask=exists, other=0.0).to(center.dtype)
    x = tl.load(x_ptr + corner + inside, mask=exists, other=0.0).to(center.dtype)
    dx = p * dy + q * (x - center) + r
    tl.store(dx_ptr + corner + inside, dx.to(dx_ptr.dtype.element_ty), mask=exists)
