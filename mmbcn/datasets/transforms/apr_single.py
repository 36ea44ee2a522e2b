"""Amplitude-phase recombination of an image with a changed copy of itself.

Paper: Chen et al. 2021, https://arxiv.org/abs/2108.08487 (APR-S). Operations and their strengths:
Hendrycks et al. 2020, AugMix, https://arxiv.org/abs/1912.02781, at severity 3, as in the authors'
code. Deviations: by default only the operations that move nothing; rounded and clipped before the
cast to uint8, which in the authors' code wraps around.
"""

from collections.abc import Callable
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from numpy.typing import NDArray

from mmbcn.errors import UsageError
from mmbcn.ops.recombination import recombine
from mmbcn.registry import TRANSFORMS

Image = NDArray[np.uint8]
_SEVERITY = 3.0
_IGNORED = 255


def _level() -> float:
    """A strength, of 10 at most."""
    return np.random.uniform(0.1, _SEVERITY)


def _either_way(value: float) -> float:
    return value if np.random.random() < 0.5 else -value


_PHOTOMETRIC: list[Callable[[Image], Image]] = [
    mmcv.auto_contrast,
    mmcv.imequalize,
    lambda image: mmcv.posterize(image, 4 - int(_level() * 4 / 10)),
    lambda image: mmcv.solarize(image, 256 - int(_level() * 256 / 10)),
]


def _rotation(height: int, width: int) -> NDArray[np.float64]:
    center = (width - 1) / 2, (height - 1) / 2
    return cv2.getRotationMatrix2D(center, _either_way(int(_level() * 30 / 10)), 1.0)


def _shear(axis: int) -> NDArray[np.float64]:
    matrix = np.eye(2, 3)
    matrix[axis, 1 - axis] = _either_way(_level() * 0.3 / 10)
    return matrix


def _shift(axis: int, size: int) -> NDArray[np.float64]:
    matrix = np.eye(2, 3)
    matrix[axis, 2] = _either_way(int(_level() * size / 3 / 10))
    return matrix


_GEOMETRIC: list[Callable[[int, int], NDArray[np.float64]]] = [
    _rotation,
    lambda height, width: _shear(0),
    lambda height, width: _shear(1),
    lambda height, width: _shift(0, width),
    lambda height, width: _shift(1, height),
]


@TRANSFORMS.register_module()
class APRSingle(BaseTransform):
    """APR-S: an operation, then often amplitude and phase of the image and a changed copy of it.

    x <- op1(x), always. Then with probability ``prob``, x' = op2(x), and the result has the
    amplitude of x' and the phase of x, or the amplitude of x and the phase of x', as a coin falls.
    The operations are autocontrast, equalize, posterize and solarize. Belongs behind crop and flip,
    right before ``PackSegInputs``::

        dict(type="mmbcn.APRSingle")

    Args:
        prob: of recombination.
        geometric: rotations, shears and shifts too. The labels follow the image whose phase is
            used; what comes from outside is black, and ignored (255).
        per_channel: see `mmbcn.ops.recombination.recombine`.

    Raises:
        UsageError: ``prob`` is no probability, or an image is not uint8 with three channels.
    """

    def __init__(
        self, prob: float = 0.5, geometric: bool = False, per_channel: bool = False
    ) -> None:
        if not 0 <= prob <= 1:
            raise UsageError(f"APRSingle expects prob between 0 and 1, got {prob}")
        self.prob, self.geometric, self.per_channel = prob, geometric, per_channel

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change the image of ``results``, and with ``geometric`` its labels."""
        image = results["img"]
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise UsageError(
                f"APRSingle expects a uint8 image (H, W, 3), got {image.dtype} {image.shape}: put "
                "it behind transforms that give such images, and before any normalization"
            )
        fields = results.get("seg_fields", [])
        image, labels = self._operate(image, [results[field] for field in fields])
        if np.random.random() < self.prob:
            other, moved = self._operate(image, labels)
            if np.random.random() < 0.5:
                image = _recombined(image, other, self.per_channel)
            else:
                image, labels = _recombined(other, image, self.per_channel), moved
        results["img"] = image
        results.update(zip(fields, labels, strict=True))
        return results

    def _operate(self, image: Image, labels: list[Any]) -> tuple[Image, list[Any]]:
        """A random operation."""
        number = len(_PHOTOMETRIC) + (len(_GEOMETRIC) if self.geometric else 0)
        index = np.random.randint(number)
        if index < len(_PHOTOMETRIC):
            return _PHOTOMETRIC[index](image), labels
        matrix = _GEOMETRIC[index - len(_PHOTOMETRIC)](*image.shape[:2])
        size = image.shape[1::-1]
        warped = [
            cv2.warpAffine(x, matrix, size, flags=cv2.INTER_NEAREST, borderValue=_IGNORED)
            for x in labels
        ]
        return cv2.warpAffine(image, matrix, size), warped

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(prob={self.prob}, geometric={self.geometric}, "
            f"per_channel={self.per_channel})"
        )


def _recombined(phase_of: Image, amplitude_of: Image, per_channel: bool) -> Image:
    p, a = (
        torch.from_numpy(x.transpose(2, 0, 1).astype(np.float32)) for x in (phase_of, amplitude_of)
    )
    mixed = recombine(p, a, per_channel).round_().clamp_(0, 255).to(torch.uint8)
    return np.ascontiguousarray(mixed.numpy().transpose(1, 2, 0))
