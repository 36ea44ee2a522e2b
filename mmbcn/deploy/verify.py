"""Compares an exported file with the PyTorch model that it was made of, on real images."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from mmbcn.analysis.borrowed import evaluating
from mmbcn.deploy.formats import Run
from mmbcn.errors import UsageError

AGREEMENT = 0.999  # of the pixels, at least


@dataclass(frozen=True)
class Verification:
    """How a file's outputs differ from the model's.

    Attributes:
        images: that were compared.
        shapes: of the batches, (N, H, W).
        error: the largest absolute difference of a logit.
        largest: the largest absolute logit of the model.
        agreement: the share of pixels with the same class.
    """

    images: int
    shapes: tuple[tuple[int, int, int], ...]
    error: float
    largest: float
    agreement: float

    def text(self) -> str:
        """One line."""
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        return (
            f"verified on {self.images} images ({shapes}): logits differ by at most "
            f"{self.error:.2e} (the largest is {self.largest:.3g}), "
            f"{100 * self.agreement:.4f} % of the pixels have the same class"
        )


def pictures_at(images: Iterable[Tensor], height: int, width: int) -> Iterator[np.ndarray]:
    """Images as the file takes them, resized where they have another size.

    Shape: each (3, H, W) uint8 -> (height, width, 3) uint8
    """
    for image in images:
        picture = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
        if picture.shape[:2] != (height, width):
            picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
        yield picture


def batches_of(
    images: list[Tensor], height: int, width: int, dynamic: bool
) -> Iterator[np.ndarray]:
    """Batches of pictures: each alone, and for a dynamic file all once more by twos in odd sizes.

    Shape: (1, height, width, 3), then (2, other height, other width, 3)
    """
    for picture in pictures_at(images, height, width):
        yield picture[None]
    if dynamic:
        others = list(pictures_at(images, height * 3 // 4 | 1, width * 5 // 4 | 1))
        for first in range(0, len(others) - len(others) % 2, 2):
            yield np.stack(others[first : first + 2])


def verify(model: nn.Module, run: Run, batches: Iterable[np.ndarray]) -> Verification:
    """Run both on the same pictures.

    The model's side is mmseg's own: data preprocessor, network, resizing to the image's size.

    Args:
        model: the segmentor in float32.
        run: runs the file.
        batches: (N, H, W, 3) uint8.

    Raises:
        UsageError: less than 99.9 % of the pixels have the same class, or logits are not finite.
    """
    count, error, largest, same, pixels = 0, 0.0, 0.0, 0, 0
    shapes = {}
    for batch in batches:
        labels, logits = run(batch)
        expected = _logits(model, batch)
        if logits.shape != expected.shape or not np.isfinite(logits).all():
            raise UsageError(
                f"the exported file is wrong: for images of shape {batch.shape} its logits are "
                f"{'not finite' if logits.shape == expected.shape else logits.shape}, the model's "
                f"{expected.shape}"
            )
        classes = _classes(model, expected)
        error = max(error, float(np.abs(logits - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        same += int((labels == classes).sum())
        pixels += classes.size
        shapes[batch.shape[:3]] = None
        count += len(batch)
    done = Verification(count, tuple(shapes), error, largest, same / pixels)
    if done.agreement < AGREEMENT:
        raise UsageError(
            f"the exported file does not compute what the model does: {done.text()}, less than "
            f"{100 * AGREEMENT:g} %. No file was kept"
        )
    return done


def _logits(model: nn.Module, batch: np.ndarray) -> np.ndarray:
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in batch]
    with evaluating(model):
        inputs = model.data_preprocessor(dict(inputs=images), False)["inputs"]
        metas = [dict(img_shape=tuple(inputs.shape[2:]))] * len(batch)
        return model.encode_decode(inputs, metas).cpu().numpy()


def _classes(model: nn.Module, logits: np.ndarray) -> np.ndarray:
    samples = model.postprocess_result(torch.from_numpy(logits))  # mmseg's own
    return np.stack([sample.pred_sem_seg.data[0].numpy() for sample in samples])
