"""Equalizes weights after each step of the optimizer: ENorm."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from torch.optim import Optimizer

from mmbcn.analysis.equalize import segmentor_equalizer
from mmbcn.equalization.memory import check_optimizer
from mmbcn.errors import UsageError
from mmbcn.registry import HOOKS


@HOOKS.register_module()
class ENormHook(Hook):
    """One cycle of equalization after every step that the optimizer takes.

    Steps, not iterations: nothing happens where gradients are only accumulated, or where the loss
    scaling of AMP skips a step. It is done before any hook sees the weights, so averaged weights
    and checkpoints are of balanced networks. Momentum (SGD) and moments (Adam, AdamW) are rescaled
    with the weights. All ranks do the same to the same weights.

    Args:
        c: see `mmbcn.equalization.Equalizer`; 1, or slightly above.
        ignore_norms: balance through normalization layers as if they were not there, as the
            authors' code does; the function then changes with each step.

    Raises:
        UsageError: before training; normalization layers are in the way, parameters are not used,
            there is nothing to balance, or the optimizer is another one.

    Reference: Stock et al. 2019, https://arxiv.org/abs/1902.10416
    """

    def __init__(self, c: float = 1.0, ignore_norms: bool = False) -> None:
        self.c = c
        self.ignore_norms = ignore_norms

    def before_train(self, runner: Any) -> None:
        """Trace the network, and follow its optimizer from now on."""
        if isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise UsageError("ENormHook follows one optimizer, and the config has several")
        optimizer = runner.optim_wrapper.optimizer
        check_optimizer(optimizer)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._equalizer = segmentor_equalizer(model, self.c, self.ignore_norms)
        runner.logger.info(f"ENorm balances {self._equalizer.balanced} channels after each step")
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # fused ones skip the step inside
        if found_inf is None or not found_inf:
            self._equalizer.cycle(optimizer)

    def after_train(self, runner: Any) -> None:
        """Follow no longer."""
        self._handle.remove()
