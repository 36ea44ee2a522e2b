"""Running statistics that follow what a network sees while it is tested."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmbcn.analysis.borrowed import hooked
from mmbcn.analysis.calibration import find_layers, stage_of
from mmbcn.analysis.moments import ChannelMoments
from mmbcn.errors import UsageError


def check_momentum(momentum: float) -> None:
    """Check the momentum of `track`.

    Raises:
        UsageError: it is not above 0 and at most 1.
    """
    if not 0 < momentum <= 1:
        raise UsageError(f"momentum must be above 0 and at most 1, got {momentum}")


@contextmanager
def track(model: nn.Module, momentum: float = 0.1) -> Iterator[None]:
    """While it lasts, batch-normalizing layers in eval mode move their running statistics.

    Each batch that reaches a layer counts with weight ``momentum`` and all before it with the rest;
    then the layer normalizes with the result. Mean and variance are those of the mixture, with the
    variance between batches: m <- (1-a) m + a m_b; v <- (1-a) v + a v_b + a (1-a) (m_b - m)^2, with
    the biased variance v_b, in float64. So images and labels of a calibration set are not needed;
    the first batches are normalized with little more than the old statistics, and the results
    depend on the order of the images. The layers are those that `calibrate` sets, and the
    statistics stay as they are at the end. Each rank follows its own images.

    Args:
        model: any module; not compiled.
        momentum: a, above 0, at most 1.

    Raises:
        UsageError: another momentum, or nothing that keeps running statistics.
    """
    check_momentum(momentum)
    layers = dict(find_layers(model))
    if not layers:
        raise UsageError(f"{type(model).__name__} has no layer with running statistics to track")

    def update(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], *_: Any) -> None:
        if layer.training or not inputs[0].numel():
            return
        stage = stage_of(layer)
        seen = ChannelMoments(len(stage.running_mean), stage.running_mean.device)
        seen.add(inputs[0])
        with torch.no_grad():
            mean, var = stage.running_mean.double(), stage.running_var.double()
            moved = seen.mean - mean
            stage.running_mean.copy_(mean + momentum * moved)
            mixed = var + momentum * (seen.biased() - var)
            stage.running_var.copy_(mixed + momentum * (1 - momentum) * moved.square())

    with hooked(layers, update):
        yield
