"""Layers as folding sees them: affine maps of each channel, and weights that take them in.

Weights are computed in float64 and rounded once, to the dtype that they had.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from mmbcn.layers import BCN, KN, AffineInstanceNorm, BatchChannelNorm, FrozenBN, NoNorm, WSConv2d
from mmbcn.layers.foreign import eps_of, is_frozen
from mmbcn.ops import standardize_weight

Affine = tuple[Tensor, Tensor]  # scale and shift of each channel, float64

# classes whose forward is what the name says; a subclass may inherit it, but not change it
_BATCH_NORMS = (_BatchNorm, nn.SyncBatchNorm, KN, FrozenBN, NoNorm)
_CONVS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_GROUP_NORMS = (nn.GroupNorm, AffineInstanceNorm)
_MMCV_WRAPPERS = "mmcv.cnn.bricks.wrappers"  # the same layers, for inputs without values too


def is_conv(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer, weight-standardized or not."""
    plain = _runs_as(module, _CONVS) or type(module).__module__ == _MMCV_WRAPPERS
    conv = isinstance(module, _CONVS) and (plain or is_standardized(module))
    conv = conv and not parametrize.is_parametrized(module)  # its class is that of its copies
    bases = (cls for cls in type(module).__mro__ if "_conv_forward" in vars(cls))
    return conv and next(bases, nn.Conv2d).__module__ == _ConvNd.__module__


def is_standardized(module: nn.Module) -> bool:
    """Whether it is a convolution with weight standardization, ours or mmcv's."""
    return _runs_as(module, (WSConv2d,)) or _is_named(module, "mmcv.", "ConvWS2d")


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is, in eval, affine for each channel and nothing else."""
    return _runs_as(module, _BATCH_NORMS) or is_frozen(module)


def is_batch_channel_norm(module: nn.Module) -> bool:
    """Whether it is a BCN of any kind."""
    return _runs_as(module, (BatchChannelNorm, BCN))


def is_norm(module: nn.Module) -> bool:
    """Whether it is any norm with a batch stage."""
    return is_batch_norm(module) or is_batch_channel_norm(module)


def is_group_norm(module: nn.Module) -> bool:
    """Whether it is a group normalization whose affine is of each channel."""
    return _runs_as(module, _GROUP_NORMS)


def has_output_affine(module: nn.Module) -> bool:
    """Whether `scale_outputs` can change what it gives."""
    if is_conv(module):
        return True
    norm = is_group_norm(module) or (is_batch_norm(module) and isinstance(module, _BatchNorm))
    return norm and module.weight is not None


def batch_affine(norm: nn.Module) -> Affine | None:
    """What a norm, or the batch stage of a BCN, does to each channel in eval; None: it depends."""
    stage = norm.bn if isinstance(norm, BatchChannelNorm) else norm
    weight, bias = _double(stage.weight), _double(stage.bias)
    if isinstance(stage, NoNorm):
        return weight.expand_as(bias), bias
    if stage.running_mean is None or (stage.training and isinstance(stage, _BatchNorm)):
        return None
    mean, var = _double(stage.running_mean), _double(stage.running_var)
    scale = (var + eps_of(stage)).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale


def group_stage(norm: BatchChannelNorm, dtype: torch.dtype) -> nn.GroupNorm:
    """The second stage of a BCN, its affine spread over the channels."""
    channels = norm.num_channels
    if norm.num_groups == channels:  # nn.GroupNorm refuses one value for each channel
        stage = AffineInstanceNorm(channels, norm.eps)
    else:
        stage = nn.GroupNorm(norm.num_groups, channels, norm.eps)
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        spread = value.detach().to(dtype).repeat_interleave(channels // norm.num_groups)
        setattr(stage, name, nn.Parameter(spread, value.requires_grad))
    return stage.eval()


def plain_conv(conv: nn.Module) -> nn.Conv2d:
    """A weight-standardized convolution as one on the standardized weights, in float32 at least."""
    formula = conv.eps, getattr(conv, "eps_inside", False), getattr(conv, "unbiased", True)
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    # not in float64: these are the filters that the layer has
    weight = standardize_weight(conv.weight.detach().to(dtype), *formula)
    shape = conv.in_channels, conv.out_channels, conv.kernel_size
    how = conv.stride, conv.padding, conv.dilation, conv.groups, False, conv.padding_mode
    plain = nn.Conv2d(*shape, *how, device="meta")
    plain.weight = nn.Parameter(weight, conv.weight.requires_grad)
    plain.bias = conv.bias
    return plain.eval()


def output_channels(layer: nn.Module) -> tuple[int, int | None]:
    """Channels of a layer that `has_output_affine`, and the dimensions it needs (None: any)."""
    if is_conv(layer):
        linear = isinstance(layer, nn.Linear)
        return layer.out_features if linear else layer.out_channels, input_dim(layer)
    return layer.weight.numel(), None


def input_dim(conv: nn.Module) -> int:
    """The dimensions of inputs whose second one are the channels."""
    return 2 if isinstance(conv, nn.Linear) else len(conv.kernel_size) + 2


@torch.no_grad()
def scale_outputs(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Let a layer that `has_output_affine` give ``scale y + shift`` for y.

    Shape: scale and shift (C_out,)
    """
    weight, bias = _double(layer.weight), _double(layer.bias)
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    if isinstance(layer, _ConvTransposeNd):  # (C_in, C_out / groups, ...)
        kernels = weight.unflatten(0, (layer.groups, -1))
        spread = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (kernels * spread).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    _set(layer, weight, shift if bias is None else scale * bias + shift)


@torch.no_grad()
def scale_inputs(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Let a convolution or linear layer that pads no zeros take x for ``scale x + shift``.

    Shape: scale and shift (C_in,)
    """
    weight, bias = _double(layer.weight), _double(layer.bias)
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    groups = getattr(layer, "groups", 1)
    kernels = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    kernels = kernels.unflatten(0, (groups, -1))  # (G, C_out / G, C_in / G, rest)
    from_shift = torch.einsum("goik,gi->go", kernels, shift.view(groups, -1)).flatten()
    weight = (kernels * scale.view(groups, 1, -1, 1)).reshape(weight.shape)
    _set(layer, weight, from_shift if bias is None else bias + from_shift)


def pads_zeros(layer: nn.Module) -> bool:
    """Whether a convolution sees other values than its input's, so that no shift may pass it."""
    if isinstance(layer, nn.Linear):
        return False
    padded = any(layer._reversed_padding_repeated_twice)
    return isinstance(layer, _ConvTransposeNd) or (padded and layer.padding_mode == "zeros")


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.bias = _parameter(bias, layer.weight if layer.bias is None else layer.bias)
    layer.weight = _parameter(weight, layer.weight)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    # of its own: the old one may belong to other layers too
    kept = value.detach().to(like.dtype).contiguous()
    return nn.Parameter(kept, requires_grad=like.requires_grad)


def _double(value: Tensor | None) -> Any:
    return None if value is None else value.detach().double()


def _runs_as(module: nn.Module, classes: tuple[type, ...]) -> bool:
    return isinstance(module, classes) and type(module).forward in {c.forward for c in classes}


def _is_named(module: nn.Module, package: str, name: str) -> bool:
    return type(module).__module__.startswith(package) and type(module).__name__ == name
