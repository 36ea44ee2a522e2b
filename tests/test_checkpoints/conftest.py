import functools
import runpy
import sys
from pathlib import Path

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
ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool of tools/checkpoints with arguments; returns its exit code and what it printed."""

    def call(name, *args):
        path = ROOT / "tools/checkpoints" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code
        out = capsys.readouterr()
        text = out.out + out.err
        return (1, text + code) if isinstance(code, str) else (int(code or 0), text)

    return call
