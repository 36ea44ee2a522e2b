"""The passes over x of the fused batch-channel norm, in ATen operations; any device.

A row is one (n, c) of x: its M positions share every coefficient. On CPUs the passes are kernels of
torch's BatchNorm on rows as channels; elsewhere, and where a compiler fuses, plain expressions.
Moments are centred where x^2 would lose digits: sums of squares only serve rows whose mean is at
most three times their spread, the rest is computed by torch's (robust) BatchNorm statistics.

Shapes: x, dy (N, C, ...); everything else (N, C), in the dtype of statistics.
"""

import torch
from torch import Tensor

from mmbcn.ops.reference import statistics_dtype

_CHUNK = 4096  # values summed in one go: float32 sums of squares keep 7 digits
_STEP = 1 << 20  # values of a half-precision tensor held in float32 at a time
_MEAN_OVER_STD = 32.0  # above it, scale * x + shift would cancel to 5 digits


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
    if _is_channels_last(x):
        parts = [_centred_moments(sample.to(dtype)) for sample in x.split(1)]
        mean, var = (torch.stack(column) for column in zip(*parts, strict=True))
        return mean, var
    rows = x.view(x.shape[0] * x.shape[1], -1)
    mean = rows.mean(1, dtype=dtype)
    square = _sum_of_squares(rows).div_(rows.shape[1])
    var = torch.addcmul(square, mean, mean, value=-1)
    # NaN and inf fail the comparison too, and are then computed as in BatchNorm
    unsure = (~(var * 10 > square)).nonzero().squeeze(1)
    if len(unsure) == len(rows) and x.dtype == dtype:
        mean, var = _centred_moments(rows.unsqueeze(0))
    elif len(unsure):
        for some in unsure.split(max(1, _STEP // rows.shape[1])):
            mean[some], var[some] = _centred_moments(rows[some].to(dtype).unsqueeze(0))
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def _centred_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.batch_norm_update_stats(x, None, None, 0.0)  # in x's dtype


def _sum_of_squares(rows: Tensor) -> Tensor:
    dtype = statistics_dtype(rows)
    length = rows.shape[1]
    if length <= _CHUNK:
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square_()
    whole = length - length % _CHUNK
    chunks = rows[:, :whole].unflatten(1, (-1, _CHUNK))
    total = torch.linalg.vector_norm(chunks, dim=2, dtype=dtype).square_().sum(1)
    if whole < length:
        total += torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype).square_()
    return total


def scale_shift(x: Tensor, center: Tensor, var: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale (x - center) + shift`` in x's dtype and layout; one read, one write.

    Args:
        x: the input.
        center: mean of each row.
        var: biased variance of each row.
        scale: factor of each row.
        shift: summand of each row.
    """
    if not _has_kernels(x):
        return (_over(scale, x) * (x - _over(center, x)) + _over(shift, x)).to(x.dtype)
    x = _dense(x)
    y = _affine(x, center, scale, shift)
    for at in _cancelling(center, var):
        _positions(y)[at] = _exact(x, at, center, scale, shift).to(x.dtype)
    return y


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
    sums = _batch_norm_dots(_as_channels(dy), _as_channels(x), center.flatten(), ones.flatten())
    return tuple(value.view_as(center) for value in sums)


def combine(
    dy: Tensor, x: Tensor, center: Tensor, var: Tensor, p: Tensor, q: Tensor, r: Tensor
) -> Tensor:
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
    for at in _cancelling(center, var):
        exact = _exact(x, at, center, q, r)
        _positions(dx)[at] = exact.addcmul_(_positions(dy)[at], p[at].unsqueeze(1))
    return dx


def _combine_half(dy: Tensor, x: Tensor, center: Tensor, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """`combine` with float32 arithmetic for half precision, a cached piece at a time."""
    dx = torch.empty_like(x)
    dim = 2 if _is_channels_last(x) else 1
    for n in range(x.shape[0]):
        views = [value[n].flatten(1) for value in (dx, dy, x)]
        size = max(1, _STEP * views[0].shape[dim - 1] // views[0].numel())
        rows = [value[n].unsqueeze(1) for value in (center, p, q, r)]
        if dim == 1:
            pieces = zip(*(v.split(size) for v in (*views, *rows)), strict=True)
        else:
            pieces = (
                (*piece, *rows) for piece in zip(*(v.split(size, 1) for v in views), strict=True)
            )
        for dx_, dy_, x_, center_, p_, q_, r_ in pieces:
            dx_.copy_((x_ - center_).mul_(q_).add_(r_).addcmul_(dy_.to(p.dtype), p_))
    return dx


def _affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if not _is_channels_last(x):
        ones = torch.ones_like(center).flatten()
        stats = (scale.flatten(), shift.flatten(), center.flatten(), ones)
        unused = (center.new_empty(0), center.new_empty(0))
        out = (_as_channels(y), *unused)
        torch.native_batch_norm(_as_channels(x), *stats, False, 0.0, 0.0, out=out)
        return y
    offset = (shift - scale * center).unsqueeze(1)
    rows, out, scale = _positions(x).mT, _positions(y).mT, scale.unsqueeze(1)
    if x.dtype == scale.dtype:
        torch.addcmul(offset, rows, scale, out=out)
    else:
        for start in range(0, rows.shape[1], size := max(1, _STEP // x[:, :, 0, 0].numel())):
            part = slice(start, start + size)
            out[:, part] = torch.addcmul(offset, rows[:, part].to(scale.dtype), scale)
    return y


def _cancelling(center: Tensor, var: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where a row's mean is so much larger than its spread that `_affine` loses digits."""
    at = (center.square() > _MEAN_OVER_STD**2 * var).nonzero(as_tuple=True)
    return [at] if len(at[0]) else []


def _exact(
    x: Tensor, at: tuple[Tensor, Tensor], center: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    rows = _positions(x)[at].to(center.dtype)
    rows.sub_(center[at].unsqueeze(1)).mul_(scale[at].unsqueeze(1))
    return rows.add_(shift[at].unsqueeze(1))


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
