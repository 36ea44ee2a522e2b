"""Normalization and convolution layers, registered with mmengine where it is installed."""

from mmbcn.layers.bcn import BCN, BatchChannelNorm, MicroBCN, SyncBCN
from mmbcn.layers.conv_ws import WSConv2d
from mmbcn.layers.ic import IC
from mmbcn.layers.kn import KN
from mmbcn.layers.kn_links import describe_links, link_norms, unlink_norms
from mmbcn.layers.relatives import AffineInstanceNorm, AutoGroupNorm, FrozenBN, NoNorm

__all__ = [
    "BCN",
    "IC",
    "KN",
    "AffineInstanceNorm",
    "AutoGroupNorm",
    "BatchChannelNorm",
    "FrozenBN",
    "MicroBCN",
    "NoNorm",
    "SyncBCN",
    "WSConv2d",
    "describe_links",
    "link_norms",
    "unlink_norms",
]
