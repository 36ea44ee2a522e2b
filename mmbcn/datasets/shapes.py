"""ShapesDataset: a segmentation set that is drawn on demand and needs no download.

Images and labels are reached through mmengine's file layer: the storage backend of the prefix
``shapes``, registered on import, turns ``shapes://<seed>/<height>x<width>/<index>_image.png`` and
``..._label.png`` into the bytes of a PNG. So the standard ``LoadImageFromFile``,
``LoadAnnotations`` and ``SegVisualizationHook`` read them like any file.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import cv2
from mmengine.fileio import BaseStorageBackend, register_backend
from mmseg.datasets import BaseSegDataset

from mmbcn.datasets.shapes_scene import CLASSES, PALETTE, Image, check_scene, draw_scene
from mmbcn.errors import UsageError
from mmbcn.registry import DATASETS

_URI = re.compile(r"shapes://(\d+)/(\d+)x(\d+)/(\d+)_(image|label)\.png", re.ASCII)
_PNG_FLAGS = (cv2.IMWRITE_PNG_COMPRESSION, 1)  # the fastest level; noise hardly compresses

# An image and its label are read one after the other: one scene is enough.
_last_scene = lru_cache(maxsize=1)(draw_scene)


@DATASETS.register_module()
class ShapesDataset(BaseSegDataset):
    """Scenes of textured shapes under varying light: shape and pattern tell the class, colour not.

    Scene ``index`` depends on (``seed``, ``index``, ``size``) alone, so that sets of different
    seeds are disjoint and a set can be extended without changing its first images.

    Args:
        num_images: Number of scenes.
        size: (height, width) of a scene, in pixels.
        seed: Which set; give each split its own.
        **kwargs: As for mmsegmentation's ``BaseSegDataset``: ``pipeline``, ``metainfo``, ...

    Raises:
        UsageError: A number of images, a size or a seed that cannot be.
    """

    METAINFO: ClassVar[dict[str, Any]] = dict(classes=CLASSES, palette=PALETTE)

    def __init__(
        self,
        num_images: int,
        size: Sequence[int] = (128, 128),
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(num_images, Integral) or num_images < 1:
            raise UsageError(f"num_images must be an integer of 1 or more, got {num_images!r}")
        check_scene(seed, size)
        self.num_images = num_images
        self.size = tuple(size)
        self.seed = seed
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Name the image and the label of every scene."""
        height, width = self.size
        return [
            dict(
                img_path=f"shapes://{self.seed}/{height}x{width}/{index}_image.png",
                seg_map_path=f"shapes://{self.seed}/{height}x{width}/{index}_label.png",
                label_map=self.label_map,
                reduce_zero_label=self.reduce_zero_label,
                seg_fields=[],
            )
            for index in range(self.num_images)
        ]


@register_backend("shapes", prefixes="shapes", force=True)
class ShapesBackend(BaseStorageBackend):
    """Read-only mmengine storage backend of the ``shapes://`` paths."""

    def get(self, filepath: str | Path) -> bytes:
        """The PNG of a scene's image or label.

        Raises:
            UsageError: A path of another form, or a size that cannot be.
        """
        match = _URI.fullmatch(str(filepath))
        if match is None:
            raise UsageError(
                "expected a path like shapes://<seed>/<height>x<width>/<index>_image.png or "
                f"..._label.png, got {str(filepath)!r}"
            )
        seed, height, width, index = map(int, match.groups()[:4])
        check_scene(seed, (height, width))
        image, label = _last_scene(seed, index, height, width)
        return encode_png(image if match[5] == "image" else label)

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        """There is no text in scenes.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{str(filepath)!r} is a PNG, not a text; read it with get()")


def encode_png(array: Image) -> bytes:
    """PNG of an image (H, W, 3), BGR, or of a label (H, W)."""
    return cv2.imencode(".png", array, _PNG_FLAGS)[1].tobytes()
