"""Transforms that mmcv and mmsegmentation lack."""

from mmbcn.datasets.transforms.random_scale import RandomScale

__all__ = ["RandomScale"]
