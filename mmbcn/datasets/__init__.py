"""Datasets and transforms that mmsegmentation lacks."""

from importlib.util import find_spec

from mmbcn.errors import missing_package

for _package in ("mmengine", "mmcv", "mmseg"):
    if find_spec(_package) is None:
        raise missing_package("mmbcn.datasets", _package)

from mmbcn.datasets.camvid import CamVidDataset  # noqa: E402
from mmbcn.datasets.shapes import ShapesDataset  # noqa: E402
from mmbcn.datasets.shapes_writer import write_shapes  # noqa: E402
from mmbcn.datasets.transforms import APRSingle, Corrupt, RandomScale  # noqa: E402

__all__ = ["APRSingle", "CamVidDataset", "Corrupt", "RandomScale", "ShapesDataset", "write_shapes"]
