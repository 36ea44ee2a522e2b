"""Noise on the weights of convolutions and linear layers, as of analog hardware.

Paper: Tsai et al. 2020, https://arxiv.org/abs/2007.03230, of which only the abstract is known to
us: the formulas below are the usual ones, not read in the authors' code.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmbcn.errors import UsageError

# (w, eta, e) with e of independent standard normal values -> the noisy weights
NOISES: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "additive": lambda w, eta, e: w + eta * (w.max() - w.min()) * e,
    "multiplicative": lambda w, eta, e: w * (1 + eta * e),
    "lognormal": lambda w, eta, e: w * torch.exp(eta * e),
}


class WeightNoise:
    """While it is entered, a model computes with noisy weights; afterwards they are as before.

    ============== ==========================================
    additive       w + eta (max(w) - min(w)) e, of each layer
    multiplicative w (1 + eta e)
    lognormal      w exp(eta e)
    ============== ==========================================

    with e standard normal, drawn for each weight. The weights are those of all convolutions and
    linear layers, as they are stored: `WSConv2d` standardizes the noisy ones. Biases and norms have
    no noise. The weights themselves are never written to, only put aside, so they come back bit for
    bit, after an exception too. For inference; what an optimizer does meanwhile would be lost. ::

        with WeightNoise(model, "additive", 0.02, seed=3):
            calibrate(model, images)

    Args:
        model: any module; not compiled.
        kind: of ``NOISES``.
        level: eta, >= 0.
        seed: of the noise: the same on every device. The e of a seed are the same for all kinds and
            levels.
        fresh: False: one noise, drawn now from the weights as they are now, as of one chip.
            True: drawn anew each time a layer runs.

    Raises:
        UsageError: an unknown kind, a level that is no noise, a model without such layers; on
            entering, twice, or after the weights have changed (a new `WeightNoise` is due).
    """

    def __init__(
        self, model: nn.Module, kind: str, level: float, seed: int = 0, fresh: bool = False
    ) -> None:
        if kind not in NOISES:
            raise UsageError(f"unknown noise {kind!r}; known: {', '.join(NOISES)}")
        if not (level >= 0 and math.isfinite(level)):
            raise UsageError(f"the noise level eta must be 0 or more, got {level}")
        self.kind, self.level, self.fresh = kind, level, fresh
        self._generator = torch.Generator().manual_seed(seed)
        self._layers = list(_layers(model))
        if not self._layers:
            raise UsageError(f"{type(model).__name__} has no convolution or linear layer")
        self._versions = [layer.weight._version for layer in self._layers]
        self._noisy = [] if fresh else [self._draw(layer.weight.data) for layer in self._layers]
        self._clean: list[Tensor] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "WeightNoise":
        if self._clean is not None:
            raise UsageError("this WeightNoise is entered already")
        if [layer.weight._version for layer in self._layers] != self._versions:
            raise UsageError("the weights have changed since the noise was drawn: draw it anew")
        self._clean = [layer.weight.data for layer in self._layers]
        if self.fresh:
            for layer, clean in zip(self._layers, self._clean, strict=True):
                self._watch(layer, clean)
        else:
            _set(self._layers, self._noisy)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._clean is not None:
            _set(self._layers, self._clean)
        self._clean = None

    def _watch(self, layer: nn.Module, clean: Tensor) -> None:
        def before(*_: Any) -> None:
            layer.weight.data = self._draw(clean)

        def after(*_: Any) -> None:
            layer.weight.data = clean

        self._hooks.append(layer.register_forward_pre_hook(before))
        self._hooks.append(layer.register_forward_hook(after, always_call=True))

    def _draw(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        e = torch.randn(weight.shape, generator=self._generator, dtype=dtype).to(weight.device)
        return NOISES[self.kind](weight.to(dtype), self.level, e).to(weight.dtype)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers that have a weight of their own; one of those that share it."""
    seen = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, (_ConvNd, nn.Linear)) and weight is not None and weight not in seen:
            seen.add(weight)
            yield module


def _set(layers: list[nn.Module], weights: list[Tensor]) -> None:
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight
