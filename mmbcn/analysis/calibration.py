"""Calibrates the running statistics of a network to its weights, from unlabelled images.

After weights have changed without training (averaging, noise, quantization, surgery), running
statistics no longer describe what reaches the norms. `calibrate` measures them anew.

What is exact: each layer gets the moments over *all* values of all images, combined in float64
(averages of the batches' variances would miss the variance between batches). They depend on the
layers before it, so layers are measured one after the other, in the order of execution, while the
layers before normalize with their own new moments. The result is what a single training pass over
all images *in one batch* would find, however they are batched, in whatever order, and whatever the
statistics were before. Hence any positive scale and any shift of a channel in front of a norm is
undone (but for eps), and calibrating twice gives the same as once.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmbcn.analysis.borrowed import (
    Forward,
    Progress,
    default_forward,
    evaluating,
    hooked,
    kept_on_failure,
)
from mmbcn.analysis.changes import Calibration, LayerChange
from mmbcn.analysis.moments import ChannelMoments, is_distributed
from mmbcn.errors import UsageError
from mmbcn.layers import BatchChannelNorm, MicroBCN


class _Measured(BaseException):
    """Ends a forward pass: what follows is not needed."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    one_pass: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Set the running statistics of every batch-normalizing layer to those of the given images.

    For BatchNorm (1d, 2d, 3d), SyncBatchNorm, and the batch stage of BCN, SyncBCN and MicroBCN, in
    training or frozen. ``running_mean`` is the mean over all values of a channel; ``running_var``
    is the unbiased variance around it, as in ``nn.BatchNorm2d``. Of MicroBCN it is the biased one:
    where its update, which measures around the old mean, comes to rest on the whole set.

    The model runs in eval mode (no dropout) and without gradients, once for each layer, up to that
    layer: half as many whole passes as there are layers, on average. All else stays as it is:
    weights, affines, ``requires_grad``, the mode of each module. ``num_batches_tracked`` becomes
    the number of batches behind the statistics, as after ``torch.optim.swa_utils.update_bn``, so
    that cumulative averages and MicroBCN's warm-up go on from there. On any exception the model is
    as it was before.

    With a process group, every rank calls this with its own images, and all get the statistics of
    all of them. Layers that keep no running statistics, InstanceNorm and `FrozenBN` are left out.

    Args:
        model: any module; not compiled.
        batches: a list, a DataLoader, ...: the same images each time it is iterated. A batch is
            what ``forward`` takes. Images of different sizes count by their number of values.
        forward: runs the model on a batch; the default is ``model(batch)``, and ``model(batch[0])``
            where the batch is a tuple or list, as (images, labels).
        one_pass: measure all layers in a single pass; each normalizes with its moments *so far*.
            The first layer is exact as before. The others come close as the number of images
            grows, and depend on the batches. Takes an iterator, and layers that run several times.
        progress: called after each batch with the number of batches done and of all, if known.

    Raises:
        UsageError: there is nothing to calibrate, no image, an iterator that can be used once only,
            a layer that runs several times in a pass, that sees a single value, or non-finite ones.

    Reference: Tsai et al. 2020, the calibration of https://arxiv.org/abs/2007.03230; the sums of
    Chan, Golub, LeVeque 1983
    """
    layers = dict(_find_layers(model))
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has nothing to calibrate: no BatchNorm, BCN or MicroBCN with "
            "running statistics (GroupNorm and the like keep none)"
        )
    stages = {name: _stage(layer) for name, layer in layers.items()}
    run = _Run(forward or default_forward, model, batches, progress)
    with kept_on_failure(stages) as before, evaluating(model):
        measure = _measure_together if one_pass else _measure_in_turn
        moments = measure(layers, run)
        for name, found in moments.items():
            _check(name, found)
        changes = [_write(name, layers[name], moments[name], before[name]) for name in moments]
    return Calibration(changes, [name for name in layers if name not in moments])


def _find_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers to calibrate: of a batch-channel norm the whole, not its batch stage."""
    inside = {m.bn for m in model.modules() if isinstance(m, BatchChannelNorm)}
    for name, module in model.named_modules():
        if isinstance(module, BatchChannelNorm) or (
            isinstance(module, _BatchNorm)
            and module not in inside
            and isinstance(module.running_mean, Tensor)
        ):
            yield name or type(module).__name__, module


def _stage(layer: nn.Module) -> nn.Module:
    """The module that holds the running statistics."""
    return layer.bn if isinstance(layer, BatchChannelNorm) else layer


class _Run:
    """Runs the model over the batches, again and again."""

    def __init__(
        self, forward: Forward, model: nn.Module, batches: Iterable[Any], progress: Progress | None
    ) -> None:
        self.forward, self.model, self.batches, self.progress = forward, model, batches, progress
        self.passes = 1
        self.done = 0
        try:
            self.length = len(batches)
        except TypeError:
            self.length = None

    def first(self) -> None:
        """Run on the first batch."""
        for batch in islice(self.batches, 1):
            self.forward(self.model, batch)

    def all(self) -> None:
        """Run on all batches; a pass may end early by `_Measured`."""
        before = self.done
        for batch in islice(self.batches, self.length):  # an infinite sampler's loader ends too
            with suppress(_Measured):
                self.forward(self.model, batch)
            self.done += 1
            if self.progress:
                self.progress(self.done, self.length and self.length * self.passes)
        self.length = self.done - before  # known by now


def _measure_together(layers: dict[str, nn.Module], run: _Run) -> dict[str, ChannelMoments]:
    """All layers in one pass, each normalizing with what it has seen so far."""
    moments: dict[str, ChannelMoments] = {}

    def measure(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = moments.setdefault(name, _start(layer))
        found.add(inputs[0])
        _use(layer, found)

    with hooked(layers, measure):
        run.all()
    order = _agree(list(moments))
    for name in order:
        moments.setdefault(name, _start(layers[name])).gather()
    return {name: moments[name] for name in order}


def _measure_in_turn(layers: dict[str, nn.Module], run: _Run) -> dict[str, ChannelMoments]:
    """One layer after the other, all before it normalizing with their moments of all images."""
    if iter(run.batches) is run.batches:
        raise UsageError(
            "calibrate runs over the batches once for each layer and needs a list or a DataLoader, "
            f"got a {type(run.batches).__name__}, which can be used once; or set one_pass=True"
        )
    calls: list[str] = []
    with hooked(layers, lambda name, *_: calls.append(name)):
        run.first()
    calls = _agree(calls)
    order = list(dict.fromkeys(calls))
    repeated = [name for name in order if calls.count(name) > 1]
    if repeated:
        raise UsageError(
            f"{repeated[0]} runs {calls.count(repeated[0])} times in a forward pass, so that its "
            "statistics depend on themselves: set one_pass=True (--one-pass)"
        )
    run.passes = len(order)
    moments: dict[str, ChannelMoments] = {}

    def measure(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments[name].add(inputs[0])
        raise _Measured

    for name in order:
        moments[name] = _start(layers[name])
        with hooked({name: layers[name]}, measure):
            run.all()
        moments[name].gather()
        _check(name, moments[name])
        _use(layers[name], moments[name])
    return moments


def _start(layer: nn.Module) -> ChannelMoments:
    mean = _stage(layer).running_mean
    return ChannelMoments(len(mean), mean.device)


def _use(layer: nn.Module, moments: ChannelMoments) -> None:
    """Let a layer in eval mode normalize as a training pass on these values would."""
    stage = _stage(layer)
    stage.running_mean.copy_(moments.mean)
    stage.running_var.copy_(moments.biased())


def _agree(order: list[str]) -> list[str]:
    """The first rank's order: another rank may have no images."""
    if is_distributed():
        shared = [order]
        dist.broadcast_object_list(shared)
        order = shared[0]
    if not order:
        raise UsageError("calibrate got no batch that reaches a norm (on the first rank)")
    return order


def _check(name: str, moments: ChannelMoments) -> None:
    bad = (~(moments.mean + moments.squares).isfinite()).sum()
    if bad:
        raise UsageError(
            f"non-finite values reach {name} ({int(bad)} of {len(moments.mean)} channels): the "
            "images or the weights before it are broken; tools/checkpoints/inspect.py finds the "
            "latter"
        )
    if moments.count < 2:
        raise UsageError(
            f"{name} sees {moments.count} value per channel, which has no variance: give more "
            "images"
        )


def _write(
    name: str, layer: nn.Module, moments: ChannelMoments, before: dict[str, Tensor]
) -> LayerChange:
    stage = _stage(layer)
    var = moments.biased() if isinstance(layer, MicroBCN) else moments.unbiased()
    shift = (moments.mean - before["running_mean"].to(var)).abs() / (var + stage.eps).sqrt()
    factor = (var + stage.eps) / (before["running_var"].to(var) + stage.eps)
    most = factor.log().abs().nan_to_num(nan=torch.inf).argmax()
    stage.running_mean.copy_(moments.mean)
    stage.running_var.copy_(var)
    if stage.num_batches_tracked is not None:
        stage.num_batches_tracked.fill_(moments.batches)
    kind = type(layer).__name__
    return LayerChange(name, kind, moments.count, float(shift.max()), float(factor[most]))
