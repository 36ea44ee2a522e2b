"""Noise on the weights of convolutions and linear layers, as of analog hardware.

Paper: Tsai et al. 2020, https://arxiv.org/abs/2007.03230, of which only the abstract is known to
us: the formulas below are the usual ones, not read in the authors' code.
"""

import math
from collections.abc import Callable
from numbers import Real
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
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class WeightNoise:
    """While it is entered, a model computes with noisy weights; afterwards they are as before.

    ============== ==========================================
    additive       w + eta (max(w) - min(w)) e, of each layer
    multiplicative w (1 + eta e)
    lognormal      w exp(eta e)
    ============== ==========================================

    with e standard normal, drawn for each weight. The weights are those of all convolutions, linear
    layers and ``nn.MultiheadAttention``, as they are stored: `WSConv2d` standardizes the noisy
    ones. Biases and norms have no noise. The weights themselves are never written to, only put
    aside, so they come back bit for bit, after an exception too. For inference; what an optimizer
    does meanwhile would be lost. ::

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
        UsageError: an unknown kind, a level or seed that is none, a model without such layers, a
            parametrized layer; on entering, twice, or after the weights have changed (a new
            `WeightNoise` is due).
    """

    def __init__(
        self, model: nn.Module, kind: str, level: float, seed: int = 0, fresh: bool = False
    ) -> None:
        check_noise(kind, level, seed)
        self.kind, self.level, self.fresh = kind, level, fresh
        self._generator = torch.Generator().manual_seed(seed)
        self._layers = _layers(model)
        self._weights = list(dict.fromkeys(w for used in self._layers.values() for w in used))
        if not self._weights:
            raise UsageError(f"{type(model).__name__} has no convolution or linear layer")
        self._versions = [weight._version for weight in self._weights]
        self._noisy = [] if fresh else [self._draw(weight.data) for weight in self._weights]
        self._clean: dict[nn.Parameter, Tensor] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "WeightNoise":
        if self._clean is not None:
            raise UsageError("this WeightNoise is entered already")
        if [weight._version for weight in self._weights] != self._versions:
            raise UsageError("the weights have changed since the noise was drawn: draw it anew")
        self._clean = {weight: weight.data for weight in self._weights}
        if self.fresh:
            for layer, used in self._layers.items():
                self._watch(layer, {weight: weight.data for weight in used})
        else:
            _set(dict(zip(self._weights, self._noisy, strict=True)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._clean is not None:
            _set(self._clean)
        self._clean = None

    def _watch(self, layer: nn.Module, clean: dict[nn.Parameter, Tensor]) -> None:
        def before(*_: Any) -> None:
            _set({weight: self._draw(data) for weight, data in clean.items()})

        def after(*_: Any) -> None:
            _set(clean)

        self._hooks.append(layer.register_forward_pre_hook(before))
        self._hooks.append(layer.register_forward_hook(after, always_call=True))

    def _draw(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        e = torch.randn(weight.shape, generator=self._generator, dtype=dtype).to(weight.device)
        return NOISES[self.kind](weight.to(dtype), self.level, e).to(weight.dtype)


def check_noise(kind: str, level: float, seed: int) -> None:
    """Check the settings of a `WeightNoise`.

    Raises:
        UsageError: an unknown kind, a level or seed that is none.
    """
    if kind not in NOISES:
        raise UsageError(f"unknown noise {kind!r}; known: {', '.join(NOISES)}")
    if not isinstance(level, Real) or not 0 <= level < math.inf:
        raise UsageError(f"the noise level eta must be 0 or more, and finite, got {level!r}")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise UsageError(f"the seed must be a whole number from 0 to 2^64 - 1, got {seed!r}")


def _layers(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """The layers that compute with weights, and these; several layers may share one."""
    layers: dict[nn.Module, list[nn.Parameter]] = {}
    of_attention = set()  # their output projections, which never run themselves
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            of_attention.add(module.out_proj)
            places = [(module.out_proj, "weight"), *((module, key) for key in _PROJECTIONS)]
        elif isinstance(module, (_ConvNd, nn.Linear)) and module not in of_attention:
            places = [(module, "weight")]
        else:
            continue
        weights = {getattr(owner, key): owner._parameters.get(key) for owner, key in places}
        weights.pop(None, None)
        if None in weights.values():
            raise UsageError(
                f"{name or type(module).__name__} computes its weight from others (weight or "
                "spectral normalization), and noise goes on stored ones: store it, by "
                "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm"
            )
        layers[module] = list(weights.values())
    return layers


def _set(weights: dict[nn.Parameter, Tensor]) -> None:
    for weight, data in weights.items():
        weight.data = data
