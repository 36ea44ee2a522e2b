"""Gives all ranks the same buffers: running statistics above all."""

from itertools import chain
from typing import Any

import torch
from mmengine.dist import all_reduce_params, get_world_size
from mmengine.hooks import Hook

from mmbcn.registry import HOOKS


@HOOKS.register_module()
class SyncBuffersHook(Hook):
    """Before validation and before a checkpoint: floats become their mean, integers their maximum.

    DistributedDataParallel as mmengine builds it leaves each rank its own running statistics, of
    its own images. So ranks would validate with different networks, and a checkpoint, which rank 0
    writes, would hold the statistics of a part of the images. mmengine's hook of this name averages
    before validation only, and a run resumed from a checkpoint would go on with other statistics
    than the interrupted one had. Averaged weights (``EMAHook``) are included.

    `NormRunner` has this hook in any case.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.done = False  # since the latest training iteration

    def before_checkpoint(self, runner: Any) -> None:
        """Synchronize, if there was an iteration since the last time."""
        if self.done or get_world_size() == 1:
            return
        models = [runner.model, *(h.ema_model for h in runner.hooks if hasattr(h, "ema_model"))]
        buffers = list(chain.from_iterable(model.buffers() for model in models))
        floats = [b for b in buffers if b.is_floating_point()]
        integers = [b for b in buffers if not b.is_floating_point() and b.dtype != torch.bool]
        for tensors, op in ((floats, "mean"), (integers, "max")):
            if tensors:
                all_reduce_params(tensors, op=op)
        self.done = True

    before_val_epoch = before_checkpoint

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """The iteration will move the buffers."""
        self.done = False
