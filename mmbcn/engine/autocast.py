"""Mixed precision where mmengine's ``AmpOptimWrapper`` refuses: on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner import autocast
from torch import nn

from mmbcn.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on any device; its range needs no loss scaling.

    Weights, their gradients and the norms' statistics stay in float32. Arguments are those of
    mmengine's ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The forward pass in mixed precision."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
