"""The passes over x of the fused batch-channel norm, in Triton; the same functions as in `aten`.

Each pass reads x (and dy) once, in tiles of rows x positions. Where rows are too few to fill the
device, the positions of each are split into parts, whose results are combined in a fixed order: no
atomics, the same bits in every run. Moments are Welford's, combined by Chan's rule, so that nothing
is lost where the mean is large against the spread.

Shapes: x, dy (N, C, ...), contiguous or channels-last without a copy, else copied; everything else
(N, C), in the dtype of statistics.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmbcn.ops import triton_pass_kernels as kernels
from mmbcn.ops.aten import _dense, _is_channels_last
from mmbcn.ops.moments import statistics_dtype
from mmbcn.ops.triton_launch import block, launch, programs_wanted

_TILE = 2048  # values in a tile: 16 for each thread of 4 warps
_CHANNELS = 128  # most of them in a channels-last tile
_PARTS = 512  # most of them for a row


class _Cut(NamedTuple):
    """How a dense x is cut into tiles."""

    rows: int  # of a sample; of the whole batch where x is contiguous
    positions: int
    blocks: int  # of rows, over all samples
    tiles: int  # along the positions of each
    block_r: int
    block_m: int
    last: bool

    def parts(self, x: Tensor) -> tuple[int, int]:
        """Parts of each row, enough to fill the device and none of them empty; tiles in each."""
        most = min(_PARTS, triton.cdiv(programs_wanted(x), self.blocks))
        steps = triton.cdiv(self.tiles, min(self.tiles, most))
        return triton.cdiv(self.tiles, steps), steps

    def launch(self, kernel: Any, x: Tensor, parts: int, *arguments: Any) -> None:
        constants = dict(BLOCK_R=self.block_r, BLOCK_M=self.block_m, LAST=self.last)
        launch(kernel, self.blocks * parts, x, *arguments, **constants)


def _cut(x: Tensor) -> _Cut:
    samples, rows = x.shape[:2]
    positions = x.numel() // (samples * rows)
    last = _is_channels_last(x)
    if last:
        block_r = block(rows, _CHANNELS)
        block_m = block(positions, _TILE // block_r)
    else:
        samples, rows = 1, samples * rows
        block_m = block(positions, _TILE)
        block_r = _TILE // block_m
    blocks, tiles = samples * triton.cdiv(rows, block_r), triton.cdiv(positions, block_m)
    return _Cut(rows, positions, blocks, tiles, block_r, block_m, last)


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row; one read.

    Shape: (N, C, ...) -> (N, C), (N, C)
    """
    shape, dtype = x.shape[:2], statistics_dtype(x)
    if not x.numel():
        return x.new_zeros(shape, dtype=dtype), x.new_zeros(shape, dtype=dtype)
    x = _dense(x)
    cut = _cut(x)
    parts, steps = cut.parts(x)
    of_parts = torch.empty((2, *shape, parts), dtype=dtype, device=x.device)
    sizes = cut.rows, cut.positions, parts, steps
    cut.launch(kernels.moments_kernel, x, parts, x, *of_parts, *sizes)
    if parts == 1:
        mean, var = of_parts.squeeze(3)
        return mean, var
    mean, var = torch.empty((2, *shape), dtype=dtype, device=x.device)
    block_p = block(parts, _PARTS)
    block_r = max(1, _TILE // block_p)
    launch(
        kernels.merge_parts_kernel,
        triton.cdiv(mean.numel(), block_r),
        x,
        *of_parts,
        mean,
        var,
        mean.numel(),
        cut.positions,
        parts,
        steps * cut.block_m,
        BLOCK_R=block_r,
        BLOCK_P=block_p,
    )
    return mean, var


def scale_shift(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale (x - center) + shift`` in x's dtype and layout; one read, one write.

    Args:
        x: the input.
        center: mean of each row.
        scale: factor of each row.
        shift: summand of each row.
    """
    x = _dense(x)
    y = torch.empty_like(x)
    if x.numel():
        cut, rows = _cut(x), (value.contiguous() for value in (center, scale, shift))
        sizes = cut.rows, cut.positions, cut.tiles
        cut.launch(kernels.scale_shift_kernel, x, cut.tiles, x, y, *rows, *sizes)
    return y


def row_dots(dy: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each row of ``dy`` and of ``dy (x - center)``; one read of both."""
    if not x.numel():
        return torch.zeros_like(center), torch.zeros_like(center)
    x = _dense(x)
    dy = _dense(dy, like=x)
    cut = _cut(x)
    parts, steps = cut.parts(x)
    sums = torch.empty((2, *center.shape, parts), dtype=center.dtype, device=x.device)
    sizes = cut.rows, cut.positions, parts, steps
    cut.launch(kernels.dots_kernel, x, parts, dy, x, center.contiguous(), *sums, *sizes)
    total, dot = sums.sum(3) if parts > 1 else sums.squeeze(3)
    return total, dot


def combine(dy: Tensor, x: Tensor, center: Tensor, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """``p dy + q (x - center) + r`` in x's dtype and layout; one read of both, one write."""
    x = _dense(x)
    dx = torch.empty_like(x)
    if x.numel():
        dy = _dense(dy, like=x)
        cut, rows = _cut(x), (value.contiguous() for value in (center, p, q, r))
        sizes = cut.rows, cut.positions, cut.tiles
        cut.launch(kernels.combine_kernel, x, cut.tiles, dy, x, dx, *rows, *sizes)
    return dx
