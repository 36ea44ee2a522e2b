"""Weight standardization in Triton: one launch forward, one backward; a program for each filter."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmbcn.ops.aten import _dense
from mmbcn.ops.moments import statistics_dtype
from mmbcn.ops.triton_launch import Launch, power_of_2

_BLOCK = 2048  # weights at a time
_TINY = 2.0**-126  # keeps a constant filter from 0 / 0


def standardize(
    weight: Tensor, eps: float, eps_inside: bool, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Standardized filters, and what backward needs of each (2, C_out): `gradient`'s factors.

    Args as in `mmbcn.ops.standardize_weight`; ``weight`` is not empty.
    """
    weight = _dense(weight)
    y = torch.empty_like(weight)
    factors = torch.empty((2, len(weight)), dtype=statistics_dtype(weight), device=weight.device)
    _launches(weight.shape, eps, eps_inside, unbiased)[0](weight, y, factors)
    return y, factors


def gradient(
    dy: Tensor, y: Tensor, factors: Tensor, eps: float, eps_inside: bool, unbiased: bool
) -> Tensor:
    """``factor (dy - mean(dy) - second factor * sum(dy y) * y)`` of each filter."""
    dw = torch.empty_like(y)
    _launches(y.shape, eps, eps_inside, unbiased)[1](_dense(dy, like=y), y, factors, dw)
    return dw


@lru_cache(maxsize=1024)
def _launches(
    shape: torch.Size, eps: float, eps_inside: bool, unbiased: bool
) -> tuple[Launch, Launch]:
    filters, size = shape[0], shape[1:].numel()
    block = dict(BLOCK=power_of_2(size, _BLOCK))
    constants = dict(EPS=eps, TINY=_TINY, INSIDE=eps_inside, DEGREES=size - unbiased)
    forward = Launch(_standardize_kernel, filters, (filters, size), **constants, **block)
    return forward, Launch(_gradient_kernel, filters, (filters, size), **block)


@triton.jit
def _standardize_kernel(
    weight_ptr,
    y_ptr,
    factors_ptr,
    filters,
    size,
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    INSIDE: tl.constexpr,
    DEGREES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = factors_ptr.dtype.element_ty
    f = tl.program_id(0)
    weight_ptr += f.to(tl.int64) * size
    y_ptr += f.to(tl.int64) * size
    i = tl.arange(0, BLOCK)
    origin = tl.load(weight_ptr).to(dtype)
    total = tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        exists = start + i < size
        w = tl.load(weight_ptr + start + i, mask=exists, other=0.0).to(dtype)
        total += tl.where(exists, w - origin, 0.0)
    mean = tl.sum(total, axis=0) / size
    square = tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        exists = start + i < size
        w = tl.load(weight_ptr + start + i, mask=exists, other=0.0).to(dtype)
        centred = tl.where(exists, w - origin - mean, 0.0)
        square += centred * centred
    var = tl.sum(square, axis=0) / DEGREES
    if INSIDE:
        spread = tl.sqrt(var + (EPS + TINY))
        second = 1.0 / DEGREES + 0.0 * spread
    else:
        std = tl.sqrt(var + TINY)
        spread = std + EPS
        second = spread / std / DEGREES
    factor = 1.0 / spread
    for start in range(0, size, BLOCK):
        exists = start + i < size
        w = tl.load(weight_ptr + start + i, mask=exists, other=0.0).to(dtype)
        y = (w - origin - mean) * factor
        tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), mask=exists)
    tl.store(factors_ptr + f, factor)
    tl.store(factors_ptr + filters + f, second)


@triton.jit
def _gradient_kernel(dy_ptr, y_ptr, factors_ptr, dw_ptr, filters, size, BLOCK: tl.constexpr):
    dtype: tl.constexpr = factors_ptr.dtype.element_ty
    f = tl.program_id(0)
    first = f.to(tl.int64) * size
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype)
    dot = tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        exists = start + i < size
        dy = tl.load(dy_ptr + first + start + i, mask=exists, other=0.0).to(dtype)
        y = tl.load(y_ptr + first + start + i, mask=exists, other=0.0).to(dtype)
        total += dy
        dot += dy * y
    mean = tl.sum(total, axis=0) / size
    slope = tl.sum(dot, axis=0) * tl.load(factors_ptr + filters + f)
    factor = tl.load(factors_ptr + f)
    for start in range(0, size, BLOCK):
        exists = start + i < size
        dy = tl.load(dy_ptr + first + start + i, mask=exists, other=0.0).to(dtype)
        y = tl.load(y_ptr + first + start + i, mask=exists, other=0.0).to(dtype)
        dw = factor * (dy - mean - slope * y)
        tl.store(dw_ptr + first + start + i, dw.to(dw_ptr.dtype.element_ty), mask=exists)
