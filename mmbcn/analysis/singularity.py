"""How far the ReLUs behind norm layers are from elimination singularities.

A ReLU unit is eliminated where its input is never positive: nothing passes, no gradient comes back.
BatchNorm keeps every channel away from that, with mean 0 and variance 1 before its affine;
normalization per sample (GroupNorm, LayerNorm) leaves single channels wherever the weights put
them. `measure_singularity` tells it of a trained model, `mmbcn.SingularityHook` during training.

Of each channel of a ReLU's input, over all values of all images: mean, std and P(active), the share
of positive values. Of each layer, over its channels: ``sigma_mu``, the std of the means;
``sigma_sigma``, the std of the stds; ``dead``, the share with P(active) < 1 %; and ``kl``, the mean
of KL(N(mean, std^2) || N(0, 1)) after undoing the norm's affine (see `channel_affine`). Every std
is the biased one. The first two are the axes of the paper's figures; the last two are ours. Layers
that saw fewer than 32 values of each channel tell of chance: they are left out of the means over
the layers. So is, in training, what follows DeepLabV3's image pooling: one value for each image.

Reference: Qiao et al. 2019, section 3, https://arxiv.org/abs/1911.09738
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmbcn.analysis.borrowed import Forward, Progress, default_forward, evaluating
from mmbcn.analysis.channel_affine import channel_affine
from mmbcn.analysis.moments import ChannelMoments
from mmbcn.analysis.relu_inputs import ReluInputs, find_norms
from mmbcn.analysis.tables import import_pandas
from mmbcn.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

DEAD = 0.01  # a channel with a smaller share of positive values counts as dead
FEW = 32  # values of each channel; below, a layer does not count in the means over layers
MEASURES = ("sigma_mu", "sigma_sigma", "dead", "kl")


@dataclass(frozen=True, eq=False)
class LayerSingularity:
    """The statistics of the ReLU behind one norm.

    Attributes:
        name: of the norm in the model.
        kind: its class.
        values: number of values of each channel.
        mean: of each channel.
        std: of each channel, biased.
        active: share of positive values of each channel.
        kl_of_channel: of each channel, NaN where the norm's scale is 0. A variance counts as the
            norm's eps at least, below which the norm does not resolve it.
    """

    name: str
    kind: str
    values: int
    mean: Tensor
    std: Tensor
    active: Tensor
    kl_of_channel: Tensor

    @property
    def sigma_mu(self) -> float:
        """Std over the channels of their means."""
        return float(self.mean.std(correction=0))

    @property
    def sigma_sigma(self) -> float:
        """Std over the channels of their stds."""
        return float(self.std.std(correction=0))

    @property
    def dead(self) -> float:
        """Share of the channels whose P(active) is below 1 %."""
        return float((self.active < DEAD).double().mean())

    @property
    def kl(self) -> float:
        """Mean over the channels of the KL divergence from N(0, 1); NaN where none has one."""
        return float(self.kl_of_channel.nanmean())

    def measures(self) -> dict[str, float]:
        """The four numbers, by name."""
        return {key: getattr(self, key) for key in MEASURES}


@dataclass(frozen=True, eq=False)
class Singularity:
    """The statistics of a model.

    Attributes:
        layers: norms that a ReLU follows, in the order of execution.
        others: norms that ran and that no ReLU follows, with what does: the names of operations.
        unreached: norms that did not run.
    """

    layers: list[LayerSingularity]
    others: dict[str, list[str]]
    unreached: list[str]

    def table(self) -> "pd.DataFrame":
        """A row for each layer: layer, norm, channels, values, and the measures."""
        return import_pandas().DataFrame(self._rows())

    def channels(self) -> "pd.DataFrame":
        """A row for each channel: layer, channel, mean, std, active, kl."""
        rows = []
        for layer in self.layers:
            columns = layer.mean, layer.std, layer.active, layer.kl_of_channel
            for channel, values in enumerate(torch.stack(columns, 1).tolist()):
                row = dict(zip(("mean", "std", "active", "kl"), values, strict=True))
                rows.append(dict(layer=layer.name, channel=channel, **row))
        return import_pandas().DataFrame(rows)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON; what is not finite is None."""
        rows = self._rows()
        for row, layer in zip(rows, self.layers, strict=True):
            row["of_channels"] = dict(
                mean=layer.mean.tolist(),
                std=layer.std.tolist(),
                active=layer.active.tolist(),
                kl=layer.kl_of_channel.tolist(),
            )
        found = dict(layers=rows, means=mean_measures(self.layers))
        return _finite(dict(**found, others=self.others, unreached=self.unreached))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Singularity":
        """What `as_dict` was made of."""
        layers = [
            LayerSingularity(
                row["layer"], row["norm"], row["values"], *map(_column, row["of_channels"].values())
            )
            for row in content["layers"]
        ]
        return cls(layers, content["others"], content["unreached"])

    def _rows(self) -> list[dict[str, Any]]:
        return [
            dict(layer=v.name, norm=v.kind, channels=len(v.mean), values=v.values, **v.measures())
            for v in self.layers
        ]


def mean_measures(layers: list[LayerSingularity]) -> dict[str, float]:
    """Each measure's mean over the layers with enough values, of ``kl`` over those that have one.

    Layers that saw fewer than 32 values of each channel count only where all are such.
    """
    counted = [layer for layer in layers if layer.values >= FEW] or layers
    rows = torch.tensor([list(layer.measures().values()) for layer in counted], dtype=torch.float64)
    return dict(zip(MEASURES, rows.nanmean(0).tolist(), strict=True))


def measure_singularity(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Singularity:
    """The statistics of every ReLU that follows a norm, over all images, in one pass.

    The model runs in eval mode and without gradients, and is as before afterwards. The result is
    what the float64 moments of all values in one batch are; it depends on how images are batched
    only where the model's own rounding does. Which norms a ReLU follows is seen while the model
    runs (`ReluInputs`).

    Args:
        model: any module.
        batches: a list, a DataLoader, ...; a batch is what ``forward`` takes. Images of different
            sizes count by their number of values.
        forward: runs the model on a batch; the default is ``model(batch)``, and ``model(batch[0])``
            where the batch is a tuple or list, as (images, labels).
        progress: called after each batch with the number of batches done and of all, if known.

    Raises:
        UsageError: there is no norm, no batch, no norm that a ReLU follows, or a ReLU's input is
            not finite.
    """
    names = [name for name, _ in find_norms(model)]
    if not names:
        raise UsageError(f"{type(model).__name__} has no norm layer")
    total = len(batches) if hasattr(batches, "__len__") else None
    meter = SingularityMeter()
    watch = ReluInputs(model, meter.add)
    run = forward or default_forward
    with evaluating(model), watch:
        for done, batch in enumerate(batches, 1):
            run(model, batch)
            if progress:
                progress(done, total)
    layers = meter.layers()
    others = {k: sorted(v) for k, v in watch.followers.items() if "relu" not in v}
    if not watch.followers or (not layers and len(others) < len(watch.followers)):
        raise UsageError("measure_singularity got no batch that reaches a norm")
    if not layers:
        text = "; ".join(f"{k} -> {', '.join(v) or 'nothing'}" for k, v in others.items())
        raise UsageError(f"no ReLU follows a norm in {type(model).__name__}: {text}")
    for layer in layers:
        bad = int((~(layer.mean + layer.std).isfinite()).sum())
        if bad:
            raise UsageError(
                f"non-finite values leave {layer.name} ({bad} of {len(layer.mean)} channels): the "
                "images or the weights before it are broken; tools/checkpoints/inspect.py finds "
                "the latter"
            )
    return Singularity(layers, others, [name for name in names if name not in watch.followers])


class SingularityMeter:
    """Collects the statistics while a model runs: pass `add` to `ReluInputs`.

    Values are merged in float64 (`ChannelMoments`), however they are batched.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[nn.Module, ChannelMoments, Tensor]] = {}

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Add the input (N, C, ...) of the ReLU behind a norm."""
        if not x.numel():
            return
        if isinstance(layer, nn.LayerNorm) and _channels_last(layer, x):
            x = x.flatten(x.dim() - len(layer.normalized_shape))
            x = x.reshape(-1, x.shape[-1])
        if name not in self._seen:
            moments = ChannelMoments(x.shape[1], x.device)
            self._seen[name] = layer, moments, torch.zeros_like(moments.mean)
        _, moments, active = self._seen[name]
        moments.add(x)
        active += (x > 0).sum([d for d in range(x.dim()) if d != 1])

    def layers(self) -> list[LayerSingularity]:
        """The statistics of what was added so far, in the order of execution."""
        return [_statistics(name, *seen) for name, seen in self._seen.items()]


def _channels_last(layer: nn.LayerNorm, x: Tensor) -> bool:
    """Whether the channels are the last dimensions, as PyTorch has it.

    Subclasses may take images (N, C, H, W), as ConvNeXt's does; where both fit, four dimensions are
    an image.
    """
    if type(layer).forward is nn.LayerNorm.forward:
        return True
    shape = tuple(layer.normalized_shape)
    first = x.dim() > 1 and shape == (x.shape[1],)
    return tuple(x.shape[x.dim() - len(shape) :]) == shape and not (first and x.dim() == 4)


def _statistics(
    name: str, layer: nn.Module, moments: ChannelMoments, active: Tensor
) -> LayerSingularity:
    scale, shift, eps = channel_affine(layer)
    scale, shift = (v.flatten().to(moments.mean) for v in (scale, shift))
    var = moments.biased()
    kl = _kl((moments.mean - shift) / scale, (var / scale.square()).clamp(min=eps))
    kl = torch.where(scale == 0, torch.nan, kl)
    columns = moments.mean, var.sqrt(), active / moments.count, kl
    return LayerSingularity(
        name, type(layer).__name__, moments.count, *torch.stack(columns).cpu().unbind()
    )


def _kl(mean: Tensor, var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1))."""
    return (var + mean.square() - 1 - var.log()) / 2


def _column(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
