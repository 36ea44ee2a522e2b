import functools

import pytest
import torch
from published import (
    BatchThenGroup,
    ConvInside,
    ConvOutside,
    DeepLab,
    ResNet,
    group_norm,
    randomize,
)

pytest.importorskip("mmseg")


@functools.cache
def _published(kind):
    return randomize(
        {
            "bn_18": lambda: ResNet(18),
            "bn_deep_18": lambda: ResNet(18, deep=True),
            "gn_18": lambda: ResNet(18, norm=group_norm),
            "gn_ws_18": lambda: ResNet(18, ConvOutside, group_norm),
            "gn_ws_50": lambda: ResNet(50, ConvOutside, group_norm),
            "bcn_18": lambda: ResNet(18, ConvInside, BatchThenGroup),
            "bcn_50": lambda: ResNet(50, ConvInside, BatchThenGroup),
            "deeplab_50": lambda: DeepLab(50, ConvOutside, BatchThenGroup, classes=21),
        }[kind]()
    )


@pytest.fixture
def published():
    """A published network by its name, with random weights; do not change it."""
    return _published


@pytest.fixture
def save(tmp_path):
    """Write a state dict, or any content, and return the path as text."""

    def write(content, name="checkpoint.pth"):
        path = tmp_path / name
        torch.save(content, path)
        return str(path)

    return write
