"""Functional API: torch only, no mm package, no modules."""

from mmbcn.ops.bcn import batch_channel_norm, channel_moments, row_moments
from mmbcn.ops.estimates import update_estimates
from mmbcn.ops.kalman import channel_statistics, kalman_norm
from mmbcn.ops.moments import batch_moments, share_moments
from mmbcn.ops.weight_standardization import standardize_weight

__all__ = [
    "batch_channel_norm",
    "batch_moments",
    "channel_moments",
    "channel_statistics",
    "kalman_norm",
    "row_moments",
    "share_moments",
    "standardize_weight",
    "update_estimates",
]
