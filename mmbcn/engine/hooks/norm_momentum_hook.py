"""Lowers the update rate of running statistics in the course of a training."""

from typing import Any

from mmengine.hooks import Hook
from torch.nn.modules.batchnorm import _NormBase

from mmbcn.errors import UsageError
from mmbcn.registry import HOOKS


@HOOKS.register_module()
class NormMomentumHook(Hook):
    """Set the momentum of all running statistics before each iteration, polynomially decaying.

    Iteration t of T has ``end + (start - end) (1 - t / T) ** power``, where ``start`` is the
    layer's own momentum (the weight of the *new* value; 0.1 by default). While the learning rate
    is high, weights move, and running statistics must follow them; at its end they hardly move,
    and a low momentum averages over more images. With one or two images per step, statistics at a
    momentum of 0.1 are those of the last 20 images or so. Norms that train with their running
    estimates (`MicroBCN`) also train with these.

    Reaches every layer with running statistics: BatchNorm, SyncBatchNorm, `KN`, `IC`, and the batch
    stage of `BCN`, `SyncBCN` and `MicroBCN`. Layers whose momentum is None (the mean of all
    batches) are left alone, and so are norms that keep no statistics (GroupNorm). Depends on the
    iteration alone, so that a resumed run goes on as if it had not been interrupted. After the
    training, layers have their own momentum again::

        default_hooks = dict(norm_momentum=dict(type='mmbcn.NormMomentumHook'))
        --cfg-options default_hooks.norm_momentum.type=mmbcn.NormMomentumHook

    Args:
        end: momentum at the end of the training, in (0, 1].
        power: of the decay; 1: linear, 0: ``start`` until the end.

    Raises:
        UsageError: ``end`` or ``power`` is out of range.
    """

    def __init__(self, end: float = 0.01, power: float = 1.0) -> None:
        if not 0 < end <= 1:
            raise UsageError(f"NormMomentumHook: end must be above 0 and at most 1, got {end}")
        if not power >= 0:
            raise UsageError(f"NormMomentumHook: power must be 0 or more, got {power}")
        self.end, self.power = end, power
        self.starts: dict[_NormBase, float] = {}

    def before_train(self, runner: Any) -> None:
        """Find the layers."""
        layers = [m for m in runner.model.modules() if isinstance(m, _NormBase)]
        layers = [m for m in layers if m.track_running_stats and m.momentum is not None]
        self.starts = {layer: layer.momentum for layer in layers}

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Set this iteration's momentum."""
        left = (1 - runner.iter / runner.max_iters) ** self.power
        for layer, start in self.starts.items():
            layer.momentum = self.end + (start - self.end) * left

    def after_train(self, runner: Any) -> None:
        """Give the layers their own momentum back."""
        for layer, start in self.starts.items():
            layer.momentum = start
