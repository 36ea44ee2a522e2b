"""Moments of a batch and the update of the running estimates, in Triton: one launch for each.

Nothing waits for the device: the number of steps so far is read there.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmbcn.ops.triton_launch import Launch, blocks

_CHANNELS = 256  # of a program


def batch_moments(row_mean: Tensor, row_var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    Shape: (N, C), (N, C) -> (C,), (C,), for N >= 1
    """
    samples, channels = row_mean.shape
    mean, var = torch.empty((2, channels), dtype=row_mean.dtype, device=row_mean.device)
    run = _batch_moments_launch(samples, channels)
    run(row_mean.contiguous(), row_var.contiguous(), mean, var)
    return mean, var


def update_estimates(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    micro: bool = False,
    warmup: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `mmbcn.ops.estimates.update_estimates`, for a count of at least 2, with ``micro`` 1."""
    assert running_mean.is_contiguous()
    assert running_var.is_contiguous()
    new_mean, new_var = torch.empty_like(running_mean), torch.empty_like(running_var)
    run = _update_launch(len(mean), count, micro, warmup or momentum is None)
    tensors = running_mean, running_var, num_batches_tracked, mean.contiguous(), var.contiguous()
    run(*tensors, new_mean, new_var, numbers=(float(momentum or 0),))
    num_batches_tracked += 1  # a launch of its own: every program of the kernel reads the old value
    return new_mean, new_var


@lru_cache(maxsize=1024)
def _batch_moments_launch(samples: int, channels: int) -> Launch:
    programs = blocks(channels, _CHANNELS)
    return Launch(_batch_moments_kernel, programs, (samples, channels), BLOCK=_CHANNELS)


@lru_cache(maxsize=1024)
def _update_launch(channels: int, count: int, micro: bool, warmup: bool) -> Launch:
    sizes = channels, count, 2 if micro and count == 1 else 1
    constants = dict(MICRO=micro, WARMUP=warmup, BLOCK=_CHANNELS)
    return Launch(_update_kernel, blocks(channels, _CHANNELS), sizes, **constants)


@triton.jit
def _batch_moments_kernel(
    row_mean_ptr, row_var_ptr, mean_ptr, var_ptr, samples, channels, BLOCK: tl.constexpr
):
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(row_mean_ptr + c, mask=c < channels, other=0.0)
    from_first = tl.zeros([BLOCK], dtype)
    for n in range(samples):
        row_mean = tl.load(row_mean_ptr + n * channels + c, mask=c < channels, other=0.0)
        from_first += row_mean - first
    mean = first + from_first / samples
    var = tl.zeros([BLOCK], dtype)
    for n in range(samples):
        at = n * channels + c
        between = tl.load(row_mean_ptr + at, mask=c < channels, other=0.0) - mean
        var += tl.load(row_var_ptr + at, mask=c < channels, other=0.0) + between * between
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(var_ptr + c, var / samples, mask=c < channels)


@triton.jit
def _update_kernel(
    running_mean_ptr,
    running_var_ptr,
    steps_ptr,
    mean_ptr,
    var_ptr,
    new_mean_ptr,
    new_var_ptr,
    momentum: tl.float64,
    channels,
    count,
    batches,
    MICRO: tl.constexpr,
    WARMUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    old_mean = tl.load(running_mean_ptr + c, mask=c < channels, other=0.0).to(dtype)
    old_var = tl.load(running_var_ptr + c, mask=c < channels, other=0.0).to(dtype)
    mean = tl.load(mean_ptr + c, mask=c < channels, other=0.0)
    var = tl.load(var_ptr + c, mask=c < channels, other=0.0)
    rate = tl.full([1], momentum, dtype)
    if WARMUP:
        rate = tl.maximum(rate, 1.0 / (tl.load(steps_ptr).to(dtype) + batches))
    if MICRO:
        var += (mean - old_mean) * (mean - old_mean)
    else:
        var += var / (count - 1)
    new_mean = move(old_mean, mean, rate).to(new_mean_ptr.dtype.element_ty)
    new_var = move(old_var, var, rate).to(new_var_ptr.dtype.element_ty)
    tl.store(running_mean_ptr + c, new_mean, mask=c < channels)
    tl.store(running_var_ptr + c, new_var, mask=c < channels)
    tl.store(new_mean_ptr + c, new_mean, mask=c < channels)
    tl.store(new_var_ptr + c, new_var, mask=c < channels)


@triton.jit
def move(old, new, rate):
    """``old + rate (new - old)``, exactly new at rate 1."""
    return tl.where(rate < 0.5, old + rate * (new - old), new - (1.0 - rate) * (new - old))
