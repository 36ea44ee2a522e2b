"""Common corruptions of images, for measuring robustness.

Paper: Hendrycks, Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", https://arxiv.org/abs/1903.12261. The work is done by imagecorruptions-imaug, with
the parameters of ImageNet-C for images of any size: https://github.com/imaug/imagecorruptions
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from numpy.typing import NDArray

from mmbcn.errors import UsageError
from mmbcn.registry import TRANSFORMS

CORRUPTIONS = dict(
    noise=("gaussian_noise", "shot_noise", "impulse_noise"),
    blur=("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    weather=("snow", "frost", "fog", "brightness"),
    digital=("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
_MIN_SIZE = 32
_OWN_GENERATOR = ("impulse_noise", "glass_blur")  # the others draw from NumPy's global one


@TRANSFORMS.register_module()
class Corrupt(BaseTransform):
    """Corrupt an image; its label stays as it is.

    The same for an image of the same name each time, in whatever order and process. Chance is the
    same at all severities: the direction of a motion, the picture of frost. ``elastic_transform``
    and ``zoom_blur`` move what is in the image by some pixels, and as in the benchmark the labels
    are not moved. Belongs right behind ``LoadImageFromFile``.

    Args:
        name: of the 15 in ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of chance, together with the image's file name.

    Raises:
        UsageError: an unknown name or severity, imagecorruptions-imaug is not installed, or an
            image is not uint8 with three channels, and 32 pixels high and wide at least.
    """

    def __init__(self, name: str, severity: int, seed: int = 0) -> None:
        known = [n for group in CORRUPTIONS.values() for n in group]
        if name not in known:
            raise UsageError(f"unknown corruption {name!r}; known: {', '.join(known)}")
        if not isinstance(severity, int) or severity not in SEVERITIES:
            raise UsageError(f"severity must be one of {SEVERITIES}, got {severity!r}")
        self.name, self.severity, self.seed = name, severity, seed
        self._corrupt = _library()
        # what is compiled is compiled here, not in each worker process
        self._apply(np.zeros((_MIN_SIZE, _MIN_SIZE, 3), np.uint8), 0)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change the image of ``results``."""
        image = results["img"]
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or min(image.shape[:2]) < _MIN_SIZE:
            raise UsageError(
                f"Corrupt expects a uint8 image (H, W, 3) with H and W of {_MIN_SIZE} and more, "
                f"got {image.dtype} {image.shape} ({results.get('img_path')})"
            )
        text = f"{self.seed} {self.name} {Path(str(results.get('img_path'))).name}"
        results["img"] = self._apply(image, zlib.crc32(text.encode()))
        return results

    def _apply(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        rgb = np.ascontiguousarray(image[..., ::-1])
        own = dict(seed=seed) if self.name in _OWN_GENERATOR else {}
        with _seeded(seed), redirect_stdout(None):  # it tells of sizes that it has to crop
            changed = self._corrupt(rgb, self.severity, self.name, **own)
        return np.ascontiguousarray(changed[..., ::-1])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name!r}, severity={self.severity}, seed={self.seed})"
        )


def _library() -> Any:
    try:
        version("imagecorruptions-imaug")  # not its forerunner, of the same import name
    except PackageNotFoundError:
        raise UsageError(
            "corruptions need imagecorruptions-imaug: pip install 'mmbcn[corruptions]'"
        ) from None
    from imagecorruptions import corrupt

    return corrupt


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator with a seed; afterwards it goes on as if nothing had been drawn."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
