"""The affine map of each channel that a norm layer's parameters make, so that it can be undone."""

import torch
from torch import Tensor, nn

from mmbcn.layers import BatchChannelNorm
from mmbcn.layers.foreign import eps_of


def channel_affine(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Scale and shift (C,) that a norm puts on values normalized as BatchNorm does, and its eps.

    ``y_c = scale_c x_c + shift_c``, with x_c of mean 0 and variance 1:

    - BatchNorm, GroupNorm, LayerNorm, InstanceNorm: ``weight`` and ``bias``; 1 and 0 without.
    - BCN, SyncBCN, MicroBCN: both affines, with the group normalization between them at what it
      does to such values. Channel c of group g has mean b_c and variance w_c^2 after the channel
      affine, hence the group the mean ``m = mean(b_c)`` and the variance
      ``v = mean(w_c^2 + b_c^2) - m^2``: ``y_c = g_g (w_c x_c + b_c - m) / sqrt(v + eps) + b_g``.
      What remains after undoing it is what the group stage does to a sample *beyond* that: the
      scatter of the samples' group statistics, and estimates that miss the batch (MicroBCN).

    Shape: (C,), (C,) float64, float; () and () without an affine
    """
    eps = float(eps_of(layer))
    if isinstance(layer, BatchChannelNorm):
        groups = (layer.num_groups, -1)
        weight, bias = layer.bn.weight.double().view(groups), layer.bn.bias.double().view(groups)
        mean = bias.mean(1, keepdim=True)
        var = (weight.square() + bias.square()).mean(1, keepdim=True) - mean.square()
        gain = layer.weight.double().unsqueeze(1) / (var + eps).sqrt()
        shift = layer.bias.double().unsqueeze(1) + gain * (bias - mean)
        return (gain * weight).flatten().detach(), shift.flatten().detach(), eps
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    scale = torch.ones((), dtype=torch.float64) if weight is None else weight.detach().double()
    shift = torch.zeros((), dtype=torch.float64) if bias is None else bias.detach().double()
    return scale, shift, eps
