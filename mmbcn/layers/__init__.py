"""Normalization and convolution layers, registered with mmengine where it is installed."""

from mmbcn.layers.bcn import BCN, BatchChannelNorm, MicroBCN, SyncBCN
from mmbcn.layers.conv_ws import WSConv2d
from mmbcn.layers.ic import IC
from mmbcn.layers.relatives import AffineInstanceNorm, AutoGroupNorm, FrozenBN, NoNorm

__all__ = [
    "BCN",
    "IC",
    "AffineInstanceNorm",
    "AutoGroupNorm",
    "BatchChannelNorm",
    "FrozenBN",
    "MicroBCN",
    "NoNorm",
    "SyncBCN",
    "WSConv2d",
]
