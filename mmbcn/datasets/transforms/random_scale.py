"""Random scaling relative to the image's own size."""

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, Resize
from mmcv.transforms.utils import cache_randomness

from mmbcn.errors import UsageError
from mmbcn.registry import TRANSFORMS


@TRANSFORMS.register_module()
class RandomScale(BaseTransform):
    """Scale image and label by one factor, relative to the image's own size.

    mmcv's ``RandomResize`` scales relative to one fixed size, which distorts or rescales data
    whose images differ in size. The work is mmcv's ``Resize``: the image bilinear, the label
    nearest; ``img_shape``, ``scale`` and ``scale_factor`` are updated.

    Args:
        ratio_range: Smallest and largest factor; the factor is uniform between the two.

    Raises:
        UsageError: Unless ``0 < smallest <= largest``.
    """

    def __init__(self, ratio_range: tuple[float, float] = (0.5, 2.0)) -> None:
        low, high = ratio_range
        if not 0 < low <= high:
            raise UsageError(
                f"RandomScale expects ratio_range=(smallest, largest) with 0 < smallest <= "
                f"largest, got {tuple(ratio_range)}; the default is (0.5, 2.0)"
            )
        self.ratio_range = (low, high)

    @cache_randomness
    def _random_ratio(self) -> float:
        return np.random.uniform(*self.ratio_range)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Scale what ``results`` holds, in place."""
        height, width = results["img"].shape[:2]
        ratio = self._random_ratio()
        scale = (max(round(width * ratio), 1), max(round(height * ratio), 1))
        return Resize(scale=scale).transform(results)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ratio_range={self.ratio_range})"
