"""The passes over x of the fused norms, in Triton; the same functions as in `aten`.

Each pass reads x (and dy) once, in tiles of rows x positions. Where rows are too few to fill the
device, the positions of each are split into parts, whose results are combined in a fixed order: no
atomics, the same bits in every run. Moments are Welford's, combined by Chan's rule, so that nothing
is lost where the mean is large against the spread.

Shapes: x, dy (N, C, ...), contiguous or channels-last without a copy, else copied; everything else
(N, C), in the dtype of statistics. Several of them are one tensor (k, N, C) for the kernels.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mmbcn.ops import triton_pass_kernels as kernels
from mmbcn.ops.aten import _dense, _is_channels_last
from mmbcn.ops.moments import statistics_dtype
from mmbcn.ops.triton_launch import Launch, blocks, power_of_2, programs_wanted

_TILE = 2048  # values in a tile: 16 for each thread of 4 warps
_CHANNELS = 128  # most of them in a channels-last tile
_LEAST = 16  # of either side of a tile
_PARTS = 512  # most of them for a row


class Passes:
    """How a dense x is cut into tiles, and the launches on such tensors.

    Args:
        shape: of x.
        device: of x.
        last: whether x is channels-last.
    """

    def __init__(self, shape: torch.Size, device: torch.device, last: bool) -> None:
        samples, channels = shape[:2]
        self.positions = shape[2:].numel()
        self.count = samples * self.positions
        self.last = last
        if last:
            rows, of = channels, samples  # of a sample
            self.block_r = max(_LEAST, power_of_2(rows, _CHANNELS))
            self.block_m = max(_LEAST, power_of_2(self.positions, _TILE // self.block_r))
        else:
            rows, of = samples * channels, 1
            self.block_m = max(_LEAST, power_of_2(self.positions, _TILE))
            self.block_r = _TILE // self.block_m
        self.blocks = of * blocks(rows, self.block_r)
        self.tiles = blocks(self.positions, self.block_m)
        # parts of each row, enough to fill the device and none of them empty; tiles in each
        most = min(_PARTS, blocks(programs_wanted(device), self.blocks))
        self.steps = blocks(self.tiles, min(self.tiles, most))
        self.parts = blocks(self.tiles, self.steps)
        self.part_size = self.steps * self.block_m
        self.part_shape = (2, samples, channels, self.parts)
        self.row_shape = (samples, channels)

        constants = dict(BLOCK_R=self.block_r, BLOCK_M=self.block_m, LAST=last)
        stride = samples * channels
        of_parts = rows, self.positions, self.parts, self.steps, stride
        of_tiles = rows, self.positions, self.tiles, stride
        programs = self.blocks * self.parts, self.blocks * self.tiles
        self.moments = Launch(kernels.moments_kernel, programs[0], of_parts, **constants)
        self.dots = Launch(kernels.dots_kernel, programs[0], of_parts, **constants)
        self.scale_shift = Launch(kernels.scale_shift_kernel, programs[1], of_tiles, **constants)
        self.combine = Launch(kernels.combine_kernel, programs[1], of_tiles, **constants)
        block_p = power_of_2(self.parts)
        block_r = max(1, _TILE // block_p)
        sizes = stride, self.positions, self.parts, self.part_size
        tile = dict(BLOCK_R=block_r, BLOCK_P=block_p)
        merge = kernels.merge_parts_kernel
        self.merge_parts = Launch(merge, blocks(stride, block_r), sizes, **tile)

    def moments_of_parts(self, x: Tensor) -> Tensor:
        """Mean and biased variance of each part of each row, (2, N, C, parts)."""
        moments = torch.empty(self.part_shape, dtype=statistics_dtype(x), device=x.device)
        self.moments(x, moments)
        return moments

    def moments_of_rows(self, parts: Tensor) -> Tensor:
        """Those of each row from those of its parts: -> (2, N, C)."""
        if self.parts == 1:
            return parts.squeeze(3)
        moments = torch.empty((2, *self.row_shape), dtype=parts.dtype, device=parts.device)
        self.merge_parts(parts, moments)
        return moments

    def dots_of_parts(self, dy: Tensor, x: Tensor, center: Tensor) -> Tensor:
        """Sums of dy and of ``dy (x - center)`` over each part of each row, (2, N, C, parts)."""
        sums = torch.empty(self.part_shape, dtype=center.dtype, device=x.device)
        self.dots(dy, x, center, sums)
        return sums


@lru_cache(maxsize=1024)
def _passes(shape: torch.Size, device: torch.device, last: bool) -> Passes:
    return Passes(shape, device, last)


def passes_over(x: Tensor) -> Passes:
    """The passes over a dense, non-empty x and tensors like it."""
    return _passes(x.shape, x.device, _is_channels_last(x))


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row; one read.

    Shape: (N, C, ...) -> (N, C), (N, C)
    """
    if not x.numel():
        zeros = x.new_zeros((2, *x.shape[:2]), dtype=statistics_dtype(x))
        return zeros[0], zeros[1]
    x = _dense(x)
    passes = passes_over(x)
    mean, var = passes.moments_of_rows(passes.moments_of_parts(x))
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
        passes_over(x).scale_shift(x, y, torch.stack((center, scale, shift)))
    return y


def row_dots(dy: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each row of ``dy`` and of ``dy (x - center)``; one read of both."""
    if not x.numel():
        return torch.zeros_like(center), torch.zeros_like(center)
    x = _dense(x)
    passes = passes_over(x)
    total, dot = passes.dots_of_parts(_dense(dy, like=x), x, center.contiguous()).sum(3)
    return total, dot


def combine(dy: Tensor, x: Tensor, center: Tensor, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """``p dy + q (x - center) + r`` in x's dtype and layout; one read of both, one write."""
    x = _dense(x)
    dx = torch.empty_like(x)
    if x.numel():
        passes_over(x).combine(_dense(dy, like=x), x, dx, torch.stack((center, p, q, r)))
    return dx
