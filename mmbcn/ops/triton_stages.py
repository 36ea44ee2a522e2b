"""The arithmetic on rows between the passes, in Triton: one launch forward, one backward.

The same as in `mmbcn.ops.coefficients`, whose notation is kept, with the moments of the batch and
the update of the running estimates before it; in single operations those are some sixty. Both
stages close within a group of channels, so one program computes a group over all samples, in blocks
of samples x channels.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbcn.ops import triton_stage_kernels as kernels
from mmbcn.ops.coefficients import Stages
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
        run = Launch(kernels.forward_kernel, self.num_groups * split, sizes, **constants, **tile)
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
        run = Launch(kernels.gradients_kernel, self.num_groups, sizes, **constants, **self.tile)
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
