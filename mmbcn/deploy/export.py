"""Exports a segmentor: folded, written, verified, measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmbcn.analysis.images import SplitImages
from mmbcn.checkpoints.write import whole_file
from mmbcn.deploy.formats import FORMATS, LEAST_SIDE, Run
from mmbcn.deploy.int8 import quantize
from mmbcn.deploy.report import FoldReport
from mmbcn.deploy.segmenter import Segmenter, file_metadata
from mmbcn.deploy.verify import Verification, batches_of, pictures_at, verify
from mmbcn.errors import UsageError

OPSET = 21  # the first one in which GroupNormalization is an operator of the standard
VERIFIED = 8  # images


@dataclass(frozen=True)
class Export:
    """A file that was written.

    Attributes:
        path: of the file.
        run: runs it.
        size: height and width of the images that it was made for.
        folded: what folding did, if it was asked for.
        verified: how it differs from the model, if that was asked for.
    """

    path: Path
    run: Run
    size: tuple[int, int]
    folded: FoldReport | None = None
    verified: Verification | None = None


def export(
    cfg: Config,
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    path: Path,
    kind: str = "onnx",
    size: tuple[int, int] | None = None,
    dynamic: bool = False,
    folded: bool = False,
    half: bool = False,
    opset: int = OPSET,
    check: bool = False,
) -> Export:
    """Write a segmentor as one file, whole or not at all.

    Args:
        cfg: its config.
        checkpoint: the content of the file that its weights are from; for the metadata.
        model: the segmentor; it stays as it is.
        path: where to write.
        kind: one of `FORMATS`.
        size: height and width of the images; None: those of the first image of the val split, as
            the test pipeline gives it.
        dynamic: any number of images, of any size from 32 pixels on.
        folded: fold norms into convolutions.
        half: compute in float16.
        opset: version of ONNX's operators.
        check: compare with the model on images of the val split.

    Raises:
        UsageError: the size is too small, the model cannot be exported, a package is missing, or
            the file does not give what the model does.
    """
    images = _images(cfg, VERIFIED, "val")
    size = tuple(size or images[0].shape[1:])
    least = LEAST_SIDE if dynamic else 1
    if min(size) < least:
        kind = "dynamic file" if dynamic else "file"
        raise UsageError(
            f"a {kind} takes images of {least} pixels or more in height and width, got "
            f"{size[0]} x {size[1]} (--input-size)"
        )
    segmenter = Segmenter(model, folded, half)
    options = dict(opset=opset) if kind == "onnx" else {}
    facts = dict(dynamic=dynamic, dtype="float16" if half else "float32", **options)
    metadata = file_metadata(cfg, checkpoint, model, size, **facts)
    example = torch.from_numpy(next(pictures_at(images, *size)))[None]
    with whole_file(path, "exported file") as part:
        FORMATS[kind].write(segmenter, example, dynamic, metadata, part, **options)
        run = FORMATS[kind].run(part)
        batches = batches_of(images, *size, dynamic)
        verified = verify(model, run, batches) if check else None
    report = segmenter.model.fold_report if folded else None
    return Export(path, run, size, report, verified)


def export_int8(cfg: Config, source: Export, path: Path, num_images: int) -> Export:
    """Quantize an ONNX file, with ranges from images of the training split.

    Args:
        cfg: the config.
        source: the file in float32.
        path: where to write.
        num_images: as many, evenly spread over the split.
    """
    pictures = pictures_at(_images(cfg, num_images, "train"), *source.size)
    with whole_file(path, "INT8 file") as part:
        quantize(source.path, part, pictures)
        run = FORMATS["onnx"].run(part)
    return Export(path, run, source.size)


def random_pictures(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """One picture of noise, to measure latency on: (1, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (1, *size, 3), np.uint8)


def _images(cfg: Config, count: int, split: str) -> list[Tensor]:
    batches = SplitImages(cfg, count, 1, split)
    images = [image for batch in batches for image in batch["inputs"]]
    wrong = next((i for i in images if i.dtype != torch.uint8 or i.shape[0] != 3), None)
    if wrong is not None:
        raise UsageError(
            f"exported files take pictures of 3 channels, uint8; the config's test pipeline gives "
            f"{wrong.shape[0]} channels of {wrong.dtype}"
        )
    return images
