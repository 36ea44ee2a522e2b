"""Convolution with weight standardization.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization", 2019, https://arxiv.org/abs/1903.10520
Deviation: filters of a single weight are refused, since standardizing would make them zero.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmbcn.layers.checks import check_eps
from mmbcn.ops import standardize_weight
from mmbcn.registry import register_layer

torch.fx.wrap("standardize_weight")  # one node of a traced graph

_SHOWS_NO_VALUES = {
    getattr(Tensor, name).__get__ for name in ("device", "dtype", "shape", "requires_grad")
}


class _SealedWeight(nn.Parameter):
    """A weight that carries its standardized form until anything touches it.

    Version counters miss what is written through ``weight.data``, and comparing all values takes
    as long as standardizing them. So `_seal` changes the class of a weight whose memory nobody
    else holds. The first function or method of torch that meets it, reading or writing, makes it
    an ``nn.Parameter`` again and drops the standardized form. While the seal is whole, nothing in
    Python can have changed the values.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _SHOWS_NO_VALUES or torch.compiler.is_compiling():  # no values there either
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        for value in tree_flatten((args, kwargs))[0]:
            _unseal(value)
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        _unseal(self)
        return deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _unseal(self)
        return self.__reduce_ex__(protocol)


def _unseal(value: Any) -> None:
    """Make a sealed weight an ordinary parameter again; anything else stays as it is."""
    if type(value) is _SealedWeight:
        value.__dict__.pop("_standardized", None)
        value.__class__ = nn.Parameter


def _seal(weight: Tensor, variant: tuple, standardized: Tensor) -> None:
    """Let ``weight`` carry ``standardized``, if every later access to its values can be seen."""
    if type(weight) is not nn.Parameter or type(standardized) is not Tensor:
        return  # of a parametrization, of a replica, or a tracer's stand-in
    storage = weight.untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) > 2:  # more than weight and storage themselves
        return  # somebody holds weight.data, a view, an array or a state dict
    if not weight.is_cuda and (weight.device.type != "cpu" or storage.is_shared()):
        return  # a device that has not been tried, or memory that other processes may write to
    weight._standardized = (variant, _stream(standardized), standardized)
    weight.__class__ = _SealedWeight


def _is_recorded(weight: Tensor) -> bool:
    """Whether this pass is recorded, to be repeated when the weights may be others."""
    if torch.compiler.is_compiling():
        return True
    if torch.jit.is_tracing():
        _unseal(weight)  # breaking the seal would be recorded too
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _stream(tensor: Tensor) -> torch.cuda.Stream | None:
    """The queue in which a CUDA tensor is ready when its turn comes."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


@register_layer
class WSConv2d(nn.Conv2d):
    """2-d convolution on standardized weights: ``conv(x, (W - mean) / sqrt(var + eps))``.

    The parameters are the raw weights, under ``nn.Conv2d``'s names. The default is the formula of
    the authors' released ImageNet backbones.

    Args:
        *args: as in ``nn.Conv2d``.
        eps: small constant of the formula.
        eps_inside: add ``eps`` to the variance (True) or to the standard deviation (False).
        unbiased: unbiased (True) or biased variance.
        **kwargs: as in ``nn.Conv2d``.

    ============================================  ==========  ========
    checkpoint of                                 eps_inside  unbiased
    ============================================  ==========  ========
    the authors' ImageNet backbones (default)     True        True
    the authors' DeepLabV3, mmcv's ``ConvWS``     False       True
    the paper, version 2, eq. 5-7                 True        False
    ============================================  ==========  ========

    Shape: (N, C_in, H, W) -> (N, C_out, H_out, W_out)

    Without gradients in eval, the standardized weights are kept until the weights are touched in
    any way (an optimizer's step, ``load_state_dict``, ``to``, ``weight.data``, ...) or the mode is
    set: as much memory again as the weights take. They are neither copied nor saved with the layer.
    Call ``eval()`` again after writing to the weights where PyTorch does not see it, such as
    through a raw pointer or by replaying a CUDA graph.

    Raises:
        ValueError: a filter has one weight only.

    Reference: Qiao et al. 2019, https://arxiv.org/abs/1903.10520
    """

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        eps_inside: bool = True,
        unbiased: bool = True,
        **kwargs: Any,
    ) -> None:
        check_eps(eps, zero=True)
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < 2:
            raise ValueError(
                f"WSConv2d needs filters of at least 2 weights, got shape "
                f"{tuple(self.weight.shape)}: standardizing a single weight makes it zero; "
                "use nn.Conv2d for this layer"
            )
        self.eps = eps
        self.eps_inside = eps_inside
        self.unbiased = unbiased

    def standardized_weight(self) -> Tensor:
        """The weights that the convolution uses."""
        return standardize_weight(self.weight, self.eps, self.eps_inside, self.unbiased)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardized weights."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.standardized_weight(), self.bias)
        else:
            return self._conv_forward(x, self._weight_in_use(), self.bias)

    def train(self, mode: bool = True) -> "WSConv2d":
        """Set the mode, and forget what eval kept."""
        _unseal(self._parameters.get("weight"))
        return super().train(mode)

    def _weight_in_use(self) -> Tensor:
        weight = self.weight
        if self.training or _is_recorded(weight) or torch.is_grad_enabled():
            return self.standardized_weight()
        variant = (self.eps, self.eps_inside, self.unbiased)
        known = weight.__dict__.get("_standardized") if type(weight) is _SealedWeight else None
        if known and known[:2] == (variant, _stream(known[2])):
            return known[2]
        standardized = self.standardized_weight()
        _seal(weight, variant, standardized)
        return standardized

    def extra_repr(self) -> str:
        """nn.Conv2d's, and the formula."""
        formula = f"eps={self.eps}, eps_inside={self.eps_inside}, unbiased={self.unbiased}"
        return f"{super().extra_repr()}, {formula}"
