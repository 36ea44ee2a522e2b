"""Transforms that mmcv and mmsegmentation lack."""

from mmbcn.datasets.transforms.apr_single import APRSingle
from mmbcn.datasets.transforms.corrupt import Corrupt
from mmbcn.datasets.transforms.random_scale import RandomScale

__all__ = ["APRSingle", "Corrupt", "RandomScale"]
