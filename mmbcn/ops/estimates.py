"""The running estimates of the batch stage.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Rethinking Normalization and Elimination Singularity in
Neural Networks", 2019, https://arxiv.org/abs/1911.09738

An operator of its own, opaque to ``torch.compile``: a compiler that recomputes values in backward
would otherwise recompute the update too, from estimates that have moved, and use the result.
"""

import torch
from torch import Tensor

from mmbcn.ops.backend import has_kernels


def update_estimates(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float | None,
    micro: bool = False,
    warmup: bool = False,
) -> tuple[Tensor, Tensor]:
    """Move the running estimates, in place, towards a batch's moments; returns copies of them.

    ``running += rate (new - running)``, where new is the mean and the unbiased variance as in
    ``nn.BatchNorm2d``, or, with ``micro``, the mean and the biased variance *around the old*
    running mean. The rate is ``momentum``; with ``warmup`` at least ``1 / (t + 1)`` at step t; with
    momentum None just that. With ``micro`` and one value per channel, it is ``1 / (t + 2)``: what
    the estimates start with counts as a batch. Else the first value would be its own mean, nothing
    of it would be left, and the channel stage would multiply gradients by ``1 / sqrt(eps)``. A
    batch of too few values (2; with ``micro`` 1) changes nothing.

    Args:
        running_mean: running mean of each channel; moved.
        running_var: running variance of each channel; moved.
        num_batches_tracked: steps t so far, a 0-d integer tensor; counted up.
        mean: the batch's mean of each channel.
        var: its biased variance.
        count: the number of values behind them; a 0-d tensor where ranks have been combined.
        momentum: weight of the new value, in [0, 1]; None: the mean of all batches.
        micro: the estimates of micro-batch BCN.
        warmup: begin with larger rates.

    Shape: all (C,) but num_batches_tracked and count
    """
    estimates = running_mean, running_var, num_batches_tracked
    if isinstance(count, int) and count > (0 if micro else 1) and has_kernels(mean):
        from mmbcn.ops import triton_estimates

        return triton_estimates.update_estimates(
            *estimates, mean, var, count, momentum, micro, warmup
        )
    if not torch.compiler.is_compiling():
        return _update(*estimates, mean, var, count, momentum, micro, warmup)
    if not isinstance(count, Tensor):
        count = mean.new_full((), count)
    return _opaque_update(*estimates, mean, var, count, momentum, micro, warmup)


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float | None,
    micro: bool,
    warmup: bool,
) -> tuple[Tensor, Tensor]:
    if micro:
        enough = count > 0
        from_old = mean - running_mean.to(mean.dtype)
        var = torch.addcmul(var, from_old, from_old)
    else:
        enough = count > 1
        degrees = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
        var = var * (count / degrees)
    if momentum is None or warmup:
        batches = num_batches_tracked.to(mean.dtype) + 1
        if micro:
            batches = batches + (count <= 1)
        rate = (1 / batches).clamp(min=momentum or 0.0)
    else:
        rate = momentum
    if isinstance(enough, Tensor):
        rate = rate * enough.to(mean.dtype)
    elif not enough:
        rate = 0.0
    for running, new in ((running_mean, mean), (running_var, var)):
        weight = rate.to(new) if isinstance(rate, Tensor) else rate
        if running.dtype == new.dtype:
            running.lerp_(new, weight)
        else:
            running.copy_(torch.lerp(running.to(new.dtype), new, weight))
    num_batches_tracked += enough
    return running_mean.clone(), running_var.clone()


@torch.library.custom_op(
    "mmbcn::update_estimates",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def _opaque_update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    micro: bool,
    warmup: bool,
) -> tuple[Tensor, Tensor]:
    return _update(
        running_mean, running_var, num_batches_tracked, mean, var, count, momentum, micro, warmup
    )


@_opaque_update.register_fake
def _(running_mean: Tensor, running_var: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(running_mean), torch.empty_like(running_var)
