"""Batch-Channel Normalization: batch knowledge first, then a group normalization.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Rethinking Normalization and Elimination Singularity in
Neural Networks", 2019, https://arxiv.org/abs/1911.09738
Deviations: groups that do not divide the channels are refused (the authors' view would mix
samples); BCN falls back to its running estimates for one value per channel; MicroBCN warms up.

Shapes: x (N, C, ...), any number of positions M >= 1; batch stage (C,); group stage (G,).
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbcn.layers.checks import check_eps, check_input, check_momentum
from mmbcn.layers.foreign_state import adopt_state
from mmbcn.layers.groups import resolve_num_groups
from mmbcn.layers.init_guard import apply_keeping_alive
from mmbcn.layers.recompute import StatisticsMemory, in_backward
from mmbcn.ops import (
    batch_channel_norm,
    channel_moments,
    reference,
    share_moments,
    update_estimates,
)
from mmbcn.ops.backend import backend_for
from mmbcn.ops.moments import statistics_dtype
from mmbcn.registry import register_norm


@lru_cache
def _kernels() -> ModuleType:
    from mmbcn.ops import triton_bcn  # needs triton

    return triton_bcn


class BatchChannelNorm(nn.GroupNorm):
    """What the batch-channel norms share; use `BCN`, `MicroBCN` or `SyncBCN`.

    ``weight`` and ``bias`` (num_groups,) are the group stage's affine; ``bn`` holds the batch
    stage. It is a BatchNorm so that what mm code does to BatchNorms reaches it: ``norm_eval``,
    freezing, and ``convert_sync_batchnorm``, after which ranks share statistics. (With ``sync`` it
    is no SyncBatchNorm all the same: DistributedDataParallel refuses those on CPUs.) A GroupNorm
    outside, because what replaces or fuses BatchNorms must not drop the group stage.
    Subclasses name ``nn.GroupNorm`` among their bases again: mmengine's initializers look at the
    direct bases only.
    """

    _micro = warmup = False
    _abbr_ = "bn"  # attributes are bn1, bn2, ..., as in the checkpoints of BN networks

    def __init__(
        self,
        num_features: int,
        num_groups: int | str = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_eps(eps)
        check_momentum(momentum)
        num_groups = resolve_num_groups(num_groups, num_features)
        super().__init__(num_groups, num_features, eps, affine=False)
        self.affine = True
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_groups))
        self.bias = nn.Parameter(torch.zeros(num_groups))
        self.bn = nn.BatchNorm2d(num_features, eps, momentum)
        self.sync = sync
        self.process_group = process_group
        self._memory = StatisticsMemory()

    @property
    def momentum(self) -> float | None:
        """Weight of the new value in the running estimates; the batch stage's, schedulable."""
        return self.bn.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self.bn.momentum = value

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, C, ...); statistics in float32, the result in x's dtype."""
        check_input(self, x)
        backend = backend_for(x)
        if self.bn.training and (y := self._in_one(x, backend)) is not None:
            return y
        count = rows = None
        if self.bn.training:
            *own, rows = channel_moments(x)
            mean, var, count = self._statistics(*own)
        else:
            mean, var = self._estimates()
        return batch_channel_norm(
            x,
            mean,
            var,
            self.bn.weight,
            self.bn.bias,
            self.weight,
            self.bias,
            self.num_groups,
            self.bn.eps,
            self.eps,
            count,
            self._group() if self._is_sync() else None,
            rows,
        )

    def _in_one(self, x: Tensor, backend: str) -> Tensor | None:
        """A training step without its parts in between, where there is such a thing."""
        if (
            backend != "triton"
            or x.numel() <= (0 if self._micro else self.num_features)
            or in_backward()
            or self._is_sync()
        ):
            return None
        bn, kernels = self.bn, _kernels()
        if not kernels.fits(self.num_features, self.num_groups):
            return None
        buffers = bn.running_mean, bn.running_var, bn.num_batches_tracked
        estimates = kernels.Estimates(*buffers, bn.momentum, self._micro, self.warmup)
        affine = bn.weight, bn.bias, self.weight, self.bias
        settings = self.num_groups, bn.eps, self.eps
        y, statistics = kernels.training_step(x, estimates, affine, *settings)
        if self._micro:
            mean, var, key = statistics.unbind(0)
            self._memory.remember(key, mean, var)
        return y

    def _statistics(
        self, mean: Tensor, var: Tensor, count: int
    ) -> tuple[Tensor, Tensor, float | Tensor | None]:
        """Mean and variance for the batch stage, from this batch's own moments.

        Updates the running estimates. Third is the number of values behind the result if gradients
        flow through it; None where it is a constant.
        """
        raise NotImplementedError

    def _estimates(self) -> tuple[Tensor, Tensor]:
        return self.bn.running_mean, self.bn.running_var

    def _group(self) -> dist.ProcessGroup:
        return self.process_group or getattr(self.bn, "process_group", None) or dist.group.WORLD

    def _is_sync(self) -> bool:
        """Whether statistics are shared: ``bn`` may have been converted, to torch's or mmcv's."""
        return (
            (self.sync or type(self.bn).__name__ == "SyncBatchNorm")
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self._group()) > 1
        )

    def _as_first_seen(self, key: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """These estimates; in a recomputation, those that its first pass saw."""
        if in_backward():
            return self._memory.recall(key) or (mean, var)
        self._memory.remember(key, mean, var)
        return mean, var

    def _update(
        self, mean: Tensor, var: Tensor, count: int | Tensor, **micro: bool
    ) -> tuple[Tensor, Tensor]:
        tracked = self.bn.num_batches_tracked
        moments = mean, var, count
        return update_estimates(*self._estimates(), tracked, *moments, self.momentum, **micro)

    def apply(self, fn: Callable[[nn.Module], None]) -> "BatchChannelNorm":
        """Apply ``fn``; one that zeroes both stages' scales leaves the batch stage's at one."""
        apply_keeping_alive(super().apply, fn, lambda: [self.bn.weight, self.weight])
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchChannelNorm":
        self._memory.clear()  # it would stay behind on the old device or dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        adopt_state(state_dict, prefix, self.num_groups, self.bn)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Channels, groups and eps."""
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}"


@register_norm
class BCN(BatchChannelNorm, nn.GroupNorm):
    """Batch-Channel Normalization for batches that estimate their own statistics well.

    ``z = g_b (x - mu) / sqrt(var + eps) + b_b`` per channel, with the batch's biased mean and
    variance over (N, positions) in training, through which gradients flow, and the running
    estimates in eval. Then ``y = g (z - m) / sqrt(v + eps) + b`` per sample and group of channels,
    on the sample's own biased statistics, in eval too. Statistics are computed in float32
    (float64 for float64 inputs). ``running_var`` follows the unbiased variance, as in
    ``nn.BatchNorm2d``. Each rank uses its own batch; `SyncBCN` shares.

    One value per channel (N M = 1: DeepLabV3's image pooling at batch size 1) has no variance:
    such a call uses the running estimates, and leaves them as they are, instead of raising.

    A recomputed pass (activation checkpointing) updates nothing.

    Args:
        num_features: channels C.
        num_groups: groups G; an int must divide C. ``'auto'`` takes 32 where that leaves two
            channels a group, else the largest divisor of C below that does.
        eps: added to the variance in both stages.
        momentum: weight of the *new* value in the running estimates; None: the mean of all.

    Shape: (N, C, ...) -> same

    Raises:
        ValueError: the groups do not divide the channels, or the input has another shape.

    Reference: Qiao et al. 2019, https://arxiv.org/abs/1911.09738
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | str = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(num_features, num_groups, eps, momentum)

    def _in_one(self, x: Tensor, backend: str) -> Tensor | None:
        return self._two_norms(x) if self._is_two_norms(x, backend) else super()._in_one(x, backend)

    def _is_two_norms(self, x: Tensor, backend: str) -> bool:
        """Whether torch's two norms do all there is to do, on a tensor too small for the rest."""
        bn = self.bn
        return (
            backend == "reference"
            and x.dtype == bn.running_mean.dtype == bn.weight.dtype == statistics_dtype(x)
            and x.numel() > self.num_features
            and bn.momentum is not None
            and not torch._C._are_functorch_transforms_active()
            and not self._is_sync()
        )

    def _two_norms(self, x: Tensor) -> Tensor:
        bn = self.bn
        estimates = bn.running_mean, bn.running_var
        if in_backward():
            estimates = [value.clone() for value in estimates]
        else:
            bn.num_batches_tracked.add_(1)
        cudnn = torch.backends.cudnn.enabled
        z = torch.batch_norm(x, bn.weight, bn.bias, *estimates, True, bn.momentum, bn.eps, cudnn)
        return reference.channel_stage(z, self.weight, self.bias, self.num_groups, self.eps)

    @torch.no_grad()
    def _statistics(
        self, mean: Tensor, var: Tensor, count: int
    ) -> tuple[Tensor, Tensor, float | Tensor | None]:
        if self._is_sync():
            mean, var, count = share_moments(mean, var, count, self._group())
        elif count <= 1:
            return *self._as_first_seen(mean, *(v.clone() for v in self._estimates())), None
        if not in_backward():
            self._update(mean, var, count)
        if isinstance(count, Tensor):
            usable = count > 1
            running = self._estimates()
            mean = torch.where(usable, mean, running[0].to(mean))
            var = torch.where(usable, var, running[1].to(var))
            count = torch.where(usable, count, torch.inf)  # no gradient through the estimates
        return mean, var, count


@register_norm
class SyncBCN(BCN, nn.GroupNorm):
    """BCN whose batch statistics are those of all ranks' samples together.

    In training, moments are combined over the process group (each rank counts with its own number
    of values, which may differ) and gradients flow back to every rank, as in
    ``nn.SyncBatchNorm``: the ranks together compute what one `BCN` computes on the whole batch.
    The group stage is per sample and needs no exchange. Works on any backend, gloo on CPUs too;
    without a process group of more than one rank it is `BCN`.

    Args:
        num_features: channels C.
        num_groups: groups G; an int must divide C; or ``'auto'``, see `BCN`.
        eps: added to the variance in both stages.
        momentum: weight of the *new* value in the running estimates; None: the mean of all.
        process_group: the ranks that share statistics; None: all.

    Shape: (N, C, ...) -> same; N may differ between ranks, and be 0

    Reference: Qiao et al. 2019, https://arxiv.org/abs/1911.09738
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | str = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        BatchChannelNorm.__init__(
            self, num_features, num_groups, eps, momentum, sync=True, process_group=process_group
        )


@register_norm
class MicroBCN(BatchChannelNorm, nn.GroupNorm):
    """Batch-Channel Normalization for micro batches: running estimates in training too.

    A training step first moves the estimates, without gradient and in this order:
    ``v = mean((x - running_mean)^2)`` around the *old* estimate, biased;
    ``running_mean += r (batch mean - running_mean)``; ``running_var += r (v - running_var)``. It
    then normalizes with the *updated* estimates, which are constants in backward: gradients reach
    x and both affines. Eval uses the estimates as they are. They start at 0 and 1. The second
    stage is `BCN`'s. One sample is no special case.

    A recomputed pass (activation checkpointing) updates nothing and sees the estimates that its
    first pass saw, found by its batch mean among the latest 16 passes.

    Args:
        num_features: channels C.
        num_groups: groups G; an int must divide C; or ``'auto'``, see `BCN`.
        eps: added to the variance in both stages.
        momentum: the update rate r, the weight of the *new* value; may be changed while training.
        warmup: at step t = 0, 1, ... use ``max(momentum, 1 / (t + 1))``, so that the estimates
            are of use from the first step on. With one value per channel (DeepLabV3's image pooling
            at batch size 1), ``max(momentum, 1 / (t + 2))``: no value may be its own mean.
        sync: share each step's moments over all ranks.

    Shape: (N, C, ...) -> same

    Raises:
        ValueError: the groups do not divide the channels, or the input has another shape.

    Reference: Qiao et al. 2019, "Micro-Batch BCN", https://arxiv.org/abs/1911.09738
    """

    _micro = True

    def __init__(
        self,
        num_features: int,
        num_groups: int | str = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        warmup: bool = True,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features, num_groups, eps, momentum, sync)
        self.warmup = warmup

    @torch.no_grad()
    def _statistics(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, None]:
        key, estimates = mean, self._estimates()
        if not in_backward():
            if self._is_sync():
                mean, var, count = share_moments(mean, var, count, self._group())
            estimates = self._update(mean, var, count, micro=True, warmup=self.warmup)
        return *self._as_first_seen(key, *estimates), None

    def extra_repr(self) -> str:
        """The base's, and the warm-up."""
        return f"{super().extra_repr()}, warmup={self.warmup}"
