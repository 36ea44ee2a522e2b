"""Batch-Channel Normalization and its relatives for OpenMMLab.

``import mmbcn`` needs torch only. What needs mmengine, mmcv or mmseg is imported on first use.
"""

from importlib import import_module
from typing import Any

from mmbcn import deploy
from mmbcn.checkpoints.allowed import allow_globals
from mmbcn.equalization import equalize
from mmbcn.layers import BCN, KN, MicroBCN, SyncBCN, WSConv2d
from mmbcn.norms import convert_norm, norm_names, set_norm

__version__ = "0.1.0"

_NEEDS_MM = {
    "NormRunner": "mmbcn.engine",
    "CamVidDataset": "mmbcn.datasets",
    "ShapesDataset": "mmbcn.datasets",
}

__all__ = [
    "BCN",
    "KN",
    "MicroBCN",
    "SyncBCN",
    "WSConv2d",
    "convert_norm",
    "deploy",
    "equalize",
    "norm_names",
    "set_norm",
]

allow_globals()  # so that whoever loads our checkpoints with mmengine 0.10.7 can read them


def __getattr__(name: str) -> Any:
    if name in _NEEDS_MM:
        return getattr(import_module(_NEEDS_MM[name]), name)
    raise AttributeError(f"module 'mmbcn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEEDS_MM})
