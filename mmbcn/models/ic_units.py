"""Weight layers with an independent-component (IC) layer in front, in three orders.

Paper: Chen et al. 2019, https://arxiv.org/abs/1905.05928
"""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from torch import nn

from mmbcn.errors import UsageError

# the residual units that the paper compares -> orders, as mmcv's ConvModule takes them
UNITS = {
    "relu-ic-conv": ("act", "norm", "conv"),
    "ic-conv-relu": ("norm", "conv", "act"),
    "conv-relu-ic": ("conv", "act", "norm"),
}


def unit_order(unit: str) -> tuple[str, str, str]:
    """The order of a unit's layers.

    Raises:
        UsageError: there is no such unit.
    """
    if unit not in UNITS:
        raise UsageError(f"unknown unit {unit!r}; known are {', '.join(UNITS)}")
    return UNITS[unit]


def unit_norm(conv: nn.Module, order: Sequence[str], norm_cfg: dict[str, Any]) -> nn.Module:
    """A norm of the width that it has at its place."""
    before = order.index("norm") < order.index("conv")
    return build_norm_layer(norm_cfg, conv.in_channels if before else conv.out_channels)[1]


def unit_layers(
    conv: nn.Module, order: Sequence[str], norm_cfg: dict[str, Any], first: bool = False
) -> list[nn.Module]:
    """The layers of a unit; of the first in a network, nothing in front of its convolution."""
    layers = {
        "act": nn.ReLU,
        "norm": lambda: unit_norm(conv, order, norm_cfg),
        "conv": lambda: conv,
    }
    used = order[order.index("conv") :] if first else order
    return [layers[name]() for name in used]
