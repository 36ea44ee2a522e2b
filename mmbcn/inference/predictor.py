"""Runs a segmentor on images of any sizes, through the config's test pipeline."""

import copy
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from numpy.typing import NDArray
from torch import Tensor, nn

from mmbcn.analysis.images import test_pipeline
from mmbcn.datasets.image_file import damage
from mmbcn.errors import UsageError


class UnreadableError(Exception):
    """A file that is no whole image or video; its text says why."""


class Image(NamedTuple):
    """An image that was read.

    Attributes:
        pixels: (H, W, 3), BGR, 8 bits: what was seen of it, to draw on.
        data: what the pipeline makes of it.
    """

    pixels: NDArray[np.uint8]
    data: dict[str, Any]


class Prediction(NamedTuple):
    """What a segmentor says of an image.

    Attributes:
        labels: (H, W), the class of each pixel, at the image's own size.
        probabilities: (C, H, W), float32; one channel, of class 1, where the model has one output.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]


class Predictor:
    """A segmentor, and how its config reads images.

    Args:
        cfg: a whole config.
        model: its segmentor, with weights, where it is to run.
        tta: average the probabilities of all views that the config's ``tta_pipeline`` makes, as
            mmseg's ``SegTTAModel`` does (but that one of a single output too, not their sigmoids).

    Raises:
        UsageError: the config has no such pipeline, or one that does not begin with loading.
    """

    def __init__(self, cfg: Mapping[str, Any], model: nn.Module, tta: bool = False) -> None:
        if tta and "tta_pipeline" not in cfg:
            raise UsageError("--tta needs tta_pipeline in the config")
        steps = copy.deepcopy(cfg["tta_pipeline"] if tta else test_pipeline(cfg))
        load, rest = steps[0], _without_labels(steps[1:])
        if "LoadImage" not in str(load["type"]):
            raise UsageError(f"the test pipeline should begin with LoadImageFromFile, got {load}")
        self._scope = cfg.get("default_scope") or "mmseg"
        with DefaultScope.overwrite_default_scope(self._scope):
            self._load, self._rest = Compose([load]), Compose(rest)
        self.model, self._tta = model.eval(), tta

    def read(self, path: Path) -> Image:
        """Read an image file.

        Raises:
            UnreadableError: it is damaged, or none, or the test pipeline cannot take it.
        """
        try:
            fault = damage(path.read_bytes())
            results = fault or self._load(dict(img_path=str(path)))
        except AssertionError as error:  # mmcv's, where the decoder gives nothing
            raise UnreadableError("no image in a format that can be read") from error
        except Exception as error:  # whatever a decoder raises
            raise UnreadableError(str(error) or type(error).__name__) from error
        if fault:
            raise UnreadableError(fault)
        return self._image(results)

    def take(self, frame: NDArray[np.uint8]) -> Image:
        """Take an image (H, W, 3), BGR.

        Raises:
            UnreadableError: the test pipeline cannot take it.
        """
        return self._image(dict(img=frame, img_shape=frame.shape[:2], ori_shape=frame.shape[:2]))

    def _image(self, results: dict[str, Any]) -> Image:
        pixels = results["img"].clip(0, 255).astype(np.uint8)
        try:
            return Image(pixels, self._rest(results))
        except (cv2.error, ValueError) as error:  # a side of 0 pixels after resizing, ...
            height, width = pixels.shape[:2]
            raise UnreadableError(
                f"the test pipeline cannot take an image of {height}x{width} pixels "
                f"({str(error).strip()})"
            ) from error

    def __call__(self, images: Sequence[Image]) -> list[Prediction]:
        """Predict; images of one size run as one batch."""
        predictions: dict[int, Prediction] = {}
        order = sorted(range(len(images)), key=lambda i: images[i].pixels.shape)
        for _, group in groupby(order, lambda i: images[i].pixels.shape):
            indices = list(group)
            found = self._run([images[i].data for i in indices])
            predictions.update(zip(indices, found, strict=True))
        return [predictions[i] for i in range(len(images))]

    @torch.inference_mode()
    def _run(self, data: list[dict[str, Any]]) -> list[Prediction]:
        batch = pseudo_collate(data)
        if not self._tta:
            batch = {key: [values] for key, values in batch.items()}
        views = [dict(zip(batch, view, strict=True)) for view in zip(*batch.values(), strict=True)]
        outputs = [self.model.test_step(view) for view in views]
        head = self.model.decode_head
        threshold = getattr(head[-1] if isinstance(head, nn.ModuleList) else head, "threshold", 0.5)
        return [_merge(samples, threshold) for samples in zip(*outputs, strict=True)]


def _merge(samples: Sequence[Any], threshold: float) -> Prediction:
    """The mean of the probabilities of one image's views."""
    mean = sum(_probabilities(sample.seg_logits.data) for sample in samples) / len(samples)
    if len(mean) == 1:
        labels = (mean[0] > threshold).long()
    elif len(samples) == 1:  # rounding in the softmax could tie two classes
        labels = samples[0].pred_sem_seg.data[0].long()
    else:
        labels = mean.argmax(0)
    return Prediction(labels.cpu().numpy(), mean.cpu().numpy())


def _probabilities(scores: Tensor) -> Tensor:
    """(C, H, W) of mmseg's ``seg_logits``, which of one output are probabilities already."""
    return scores.float() if len(scores) == 1 else scores.float().softmax(0)


def _without_labels(steps: Sequence[Any]) -> list[Any]:
    """The transforms without those that load labels, inside of ``TestTimeAug`` too."""
    kept = [step for step in steps if "Annotation" not in str(step["type"])]
    for step in kept:
        if "transforms" in step:
            step["transforms"] = [t for t in map(_without_labels, step["transforms"]) if t]
    return kept
