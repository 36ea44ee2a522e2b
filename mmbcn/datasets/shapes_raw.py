"""What Cityscapes and SBD publish, made from a label map: polygons, label ids, MATLAB structs."""

import io
import json
from collections.abc import Callable
from pathlib import PurePosixPath

import cv2
import numpy as np
from scipy.io import savemat

from mmbcn.datasets.prepare.cityscapes import IGNORED, LABELS
from mmbcn.datasets.shapes import encode_png
from mmbcn.datasets.shapes_scene import Image

SBD = "benchmark_RELEASE/dataset"
_SUFFIX = "_labelTrainIds.png"
_NAMES = {label.train_id: label.name for label in LABELS if label.train_id != IGNORED}
_IDS = {label.train_id: label.id for label in LABELS if label.train_id != IGNORED}


def cityscapes_ids(label: Image) -> Image:
    """Cityscapes' label ids (H, W) of a map of train ids."""
    table = np.zeros(256, np.uint8)
    table[list(_IDS)] = list(_IDS.values())
    return table[label]


def cityscapes_polygons(label: Image) -> bytes:
    """Cityscapes' polygons of a map of train ids (H, W), as JSON.

    Drawn one over the other, in their order, they give exactly the map: one polygon around each
    4-connected component, and a component in another's hole after the one around it.
    """
    polygons = []
    for train_id in np.unique(label):
        count, components = cv2.connectedComponents(
            (label == train_id).astype(np.uint8), connectivity=4
        )
        for index in range(1, count):
            mask = (components == index).astype(np.uint8)
            (contour,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            filled = cv2.drawContours(np.zeros_like(mask), [contour], 0, 1, cv2.FILLED)
            polygons.append((int(filled.sum()), _NAMES[train_id], contour[:, 0]))
    polygons.sort(key=lambda polygon: -polygon[0])
    # A polygon has two points or more: that of a single pixel, twice the same.
    objects = [
        dict(label=name, polygon=(points if len(points) > 1 else points.repeat(2, 0)).tolist())
        for _, name, points in polygons
    ]
    height, width = label.shape
    return json.dumps(dict(imgHeight=height, imgWidth=width, objects=objects)).encode()


def sbd_struct(label: Image) -> bytes:
    """SBD's ``GTcls`` of a label map (H, W), as a MATLAB file."""
    present = [int(value) for value in np.unique(label) if value]
    file = io.BytesIO()
    savemat(file, dict(GTcls=dict(Segmentation=label, CategoriesPresent=present)))
    return file.getvalue()


def _cityscapes(label_path: str, label: Image) -> dict[str, bytes]:
    stem = label_path.removesuffix(_SUFFIX)
    return {
        f"{stem}_labelIds.png": encode_png(cityscapes_ids(label)),
        f"{stem}_polygons.json": cityscapes_polygons(label),
    }


def _voc(label_path: str, label: Image) -> dict[str, bytes]:
    return {f"{SBD}/cls/{PurePosixPath(label_path).stem}.mat": sbd_struct(label)}


# From the path and the content of a scene's label to its raw files.
RAW_FILES: dict[str, Callable[[str, Image], dict[str, bytes]]] = {
    "cityscapes": _cityscapes,
    "voc": _voc,
}
