"""The passes over x of the fused batch-channel norm, in ATen operations; any device.

A row is one (n, c) of x: its M positions share every coefficient. On CPUs the passes are kernels of
torch's BatchNorm on rows as channels; elsewhere, and where a compiler fuses, plain expressions.
Moments are centred where x^2 would lose digits: sums of squares only serve rows whose mean is at
most three times their spread, the rest is computed by torch's (robust) BatchNorm statistics.

Shapes: x, dy (N, C, ...); everything else (N, C), in the dtype of statistics.
"""

import torch
from torch import Tensor

from mmbcn.ops.memory import empty_like
from mmbcn.ops.moments import statistics_dtype

_CHUNK = 1 << 14  # values summed in one go, where a row can be cut into such
_STEP = 1 << 20  # values of a half-precision tensor held in float32 at a time


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row; one read.

    Shape: (N, C, ...) -> (N, C), (N, C)
    """
    dtype = statistics_dtype(x)
    if not _has_kernels(x):
        if not x.numel():
            return x.new_zeros(x.shape[:2], dtype=dtype), x.new_zeros(x.shape[:2], dtype=dtype)
        var, mean = torch.var_mean(_positions(x.to(dtype)), 2, correction=0)
        return mean, var
    x = _dense(x)
    total, square = row_dots(x, x, x.new_zeros(x.shape[:2], dtype=dtype))
    positions = x[0, 0].numel()
    mean, square = total.div_(positions), square.div_(positions)
    var = torch.addcmul(square, mean, mean, value=-1)
    # NaN and inf fail the comparison too, and are then computed as in BatchNorm
    unsure = ~(var * 10 > square)
    if not unsure.any():
        return mean, var
    if _is_channels_last(x):
        parts = [_centred_moments(sample.to(dtype)) for sample in x.split(1)]
        mean, var = (torch.stack(column) for column in zip(*parts, strict=True))
        return mean, var
    rows, mean, var = _as_channels(x)[0], mean.flatten(), var.flatten()
    for some in unsure.flatten().nonzero().squeeze(1).split(max(1, _STEP // positions)):
        mean[some], var[some] = _centred_moments(rows[some].to(dtype).unsqueeze(0))
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def _centred_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of one sample (1, C, ...), in x's dtype.

    Around its first value: torch's sums alone lose digits where the mean is large.
    """
    first = x.flatten(2)[0, :, 0].nan_to_num(posinf=0.0, neginf=0.0)
    mean, var = torch.batch_norm_update_stats(x - _over(first.unsqueeze(0), x), None, None, 0.0)
    return mean.add_(first), var


def scale_shift(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale (x - center) + shift`` in x's dtype and layout; one read, one write.

    Args:
        x: the input.
        center: mean of each row.
        scale: factor of each row.
        shift: summand of each row.
    """
    if not _has_kernels(x):
        y = _over(scale, x) * (x - _over(center, x)) + _over(shift, x)
        # torch 2.11 compiles an autograd.Function that ends in a cast of nothing to zero gradients
        return y if y.dtype == x.dtype else y.to(x.dtype)
    return _affine(_dense(x), center, scale, shift)


def row_dots(dy: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each row of ``dy`` and of ``dy (x - center)``; one read of both."""
    if not _has_kernels(x):
        dy = dy.to(center.dtype)
        product = dy * (x - _over(center, x))
        return _positions(dy).sum(2), _positions(product).sum(2)
    x = _dense(x)
    dy = _dense(dy, like=x)
    ones = torch.ones_like(center)
    if _is_channels_last(x):
        parts = [
            _batch_norm_dots(*sample)
            for sample in zip(*(dy.split(1), x.split(1), center, ones), strict=True)
        ]
        return tuple(torch.stack(column) for column in zip(*parts, strict=True))
    chunks = _chunks(x[0, 0].numel())
    rows = (1, x.shape[0] * x.shape[1] * chunks, -1)
    stats = (v.repeat_interleave(chunks) if chunks > 1 else v.flatten() for v in (center, ones))
    sums = _batch_norm_dots(dy.view(rows), x.view(rows), *stats)
    if chunks > 1:
        sums = (value.view(-1, chunks).sum(1) for value in sums)
    total, dot = (value.view_as(center) for value in sums)
    return total, dot


def _chunks(positions: int) -> int:
    """Into how many equal parts a long row is cut: float32 sums of short ones keep 7 digits."""
    chunks = 1
    while positions > _CHUNK * chunks and positions % (2 * chunks) == 0:
        chunks *= 2
    return chunks


def combine(dy: Tensor, x: Tensor, center: Tensor, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """``p dy + q (x - center) + r`` in x's dtype and layout; one read of both, one write."""
    if not _has_kernels(x):
        y = _over(p, x) * dy + _over(q, x) * (x - _over(center, x)) + _over(r, x)
        return y.to(x.dtype)
    x = _dense(x)
    dy = _dense(dy, like=x)
    if x.dtype != center.dtype:
        return _combine_half(dy, x, center, p, q, r)
    dx = _affine(x, center, q, r)
    if _is_channels_last(x):
        _positions(dx).mT.addcmul_(_positions(dy).mT, p.unsqueeze(1))
    else:
        _as_channels(dx).addcmul_(_as_channels(dy), p.view(1, -1, 1))
    return dx


def _combine_half(dy: Tensor, x: Tensor, *of_rows: Tensor) -> Tensor:
    """`combine` in float32 for half precision, a piece at a time that stays in the cache."""
    dx = empty_like(x)
    if _is_channels_last(x):
        size = max(1, _STEP // x.shape[1])  # positions
        for n in range(len(x)):
            of_sample = [value[n : n + 1] for value in of_rows]
            views = (_positions(v[n : n + 1]).unsqueeze(3).split(size, 2) for v in (dx, dy, x))
            for dx_, dy_, x_ in zip(*views, strict=True):
                dx_.copy_(combine(dy_.float(), x_.float(), *of_sample))
        return dx
    size = max(1, _STEP // x[0, 0].numel())  # rows
    views = [_as_channels(v).split(size, 1) for v in (dx, dy, x)]
    rows = [value.view(1, -1).split(size, 1) for value in of_rows]
    for dx_, dy_, x_, *of_piece in zip(*views, *rows, strict=True):
        dx_.copy_(combine(dy_.float(), x_.float(), *of_piece))
    return dx


def _affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`scale_shift` by BatchNorm's kernel for eval, which computes ``scale x + offset``.

    Where the mean is large, that loses no more digits than a rounded mean does.
    """
    y = empty_like(x)
    if _is_channels_last(x):
        samples = zip(x.split(1), y.split(1), center, scale, shift, strict=True)
    else:
        rows = (value.flatten() for value in (center, scale, shift))
        samples = [(_as_channels(x), _as_channels(y), *rows)]
    ones, unused = torch.ones_like(center).flatten(), center.new_empty(0)
    for x_, y_, center_, scale_, shift_ in samples:
        stats = scale_, shift_, center_, ones[: len(center_)]
        torch.native_batch_norm(x_, *stats, False, 0.0, 0.0, out=(y_, unused, unused))
    return y


def _batch_norm_dots(dy: Tensor, x: Tensor, center: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """BatchNorm's gradients of shift and scale, with the spread taken as one."""
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, ones, None, None, center, ones, True, 0.0, [False, True, True]
    )
    return total, dot


def _has_kernels(x: Tensor) -> bool:
    return x.is_cpu and x.numel() > 0 and not torch.compiler.is_compiling()


def _over(value: Tensor, x: Tensor) -> Tensor:
    return value.view(*value.shape, *[1] * (x.dim() - 2))


def _positions(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(2)


def _as_channels(x: Tensor) -> Tensor:
    return x.view(1, x.shape[0] * x.shape[1], -1)


def _format(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous():
        for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dim and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def _is_channels_last(x: Tensor) -> bool:
    return _format(x) != torch.contiguous_format


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    return x.contiguous(memory_format=_format(x if like is None else like))
