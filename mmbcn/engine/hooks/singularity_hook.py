"""Logs how far the ReLUs behind norms are from elimination singularities, while training."""

from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmbcn.analysis.relu_inputs import ReluInputs
from mmbcn.analysis.singularity import (
    LayerSingularity,
    SingularityMeter,
    mean_measures,
)
from mmbcn.registry import HOOKS


@HOOKS.register_module()
class SingularityHook(Hook):
    """Log the measures of `mmbcn.analysis.singularity` of every n-th training iteration's batch.

    The training's own forward pass is watched, in training mode, with its own batch (of rank 0): no
    image is read or run for it, and nothing in the run is changed. Scalars, for all backends of the
    visualizer: ``singularity/<norm layer>/<measure>`` for each norm that a ReLU follows, and
    ``singularity/<measure>``, the mean over the layers; the measures are ``sigma_mu``,
    ``sigma_sigma``, ``dead`` and ``kl``. Off by default. One line switches it on, in a config or
    on the command line::

        default_hooks = dict(singularity=dict(type='mmbcn.SingularityHook'))
        --cfg-options default_hooks.singularity.type=mmbcn.SingularityHook

    Args:
        interval: iterations from one logging to the next.
    """

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Watch the forward passes of this iteration, if it is one to log."""
        self._layers: list[LayerSingularity] = []
        self._handles: list[Any] = []
        if not self.every_n_train_iters(runner, self.interval) or not is_main_process():
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        meter = SingularityMeter()
        watch = ReluInputs(model, meter.add)

        def begin(*_: Any) -> None:
            watch.__enter__()

        def end(*_: Any) -> None:
            watch.__exit__(None, None, None)
            self._layers = meter.layers()  # now: the step will change the affines

        # around the model, not the iteration: its backward pass may run parts of the model again
        self._handles = [
            model.register_forward_pre_hook(begin),
            model.register_forward_hook(end, always_call=True),
        ]

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Log what was seen."""
        for handle in self._handles:
            handle.remove()
        if not self._layers:
            return
        found = {layer.name: layer.measures() for layer in self._layers}
        scalars = {f"singularity/{k}": v for k, v in mean_measures(self._layers).items()}
        for name, measures in found.items():
            scalars |= {f"singularity/{name}/{k}": v for k, v in measures.items()}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
