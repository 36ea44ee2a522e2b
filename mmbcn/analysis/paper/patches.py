"""A small image classification task, cut out of a segmentation set: what is in the middle?"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmbcn.datasets.doctor.part import Part, open_parts
from mmbcn.datasets.doctor.sample import read_image, read_label
from mmbcn.engine.data_check import check_files, check_folders
from mmbcn.errors import UsageError

_IMAGES = 400  # that many are read at most, evenly spread
_PER_IMAGE = 12  # patches of a class out of one image, at most


class Patches(NamedTuple):
    """Images and their classes.

    Attributes:
        images: (N, 3, size, size), float32, as the dataset's files: 0 to 255.
        labels: (N,), int64: the class of the pixel in the middle.
    """

    images: Tensor
    labels: Tensor


def cut_patches(
    cfg: Mapping[str, Any],
    split: str,
    number: int,
    size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Patches:
    """Cut patches around random pixels, of every class as many, or all that there are.

    Args:
        cfg: a config with this split's data loader; its images are read without its pipeline.
        split: 'train', 'val' or 'test'.
        number: of patches, at most; the same ones each time.
        size: height and width of a patch.
        progress: called with the number of images read and of all.

    Raises:
        UsageError: data is missing, or the images are smaller than a patch.
    """
    check_folders(cfg, (split,))
    parts = open_parts(cfg, (split,))
    for part in parts:
        check_files(part.dataset, split)
    samples = [(part, sample) for part in parts for sample in part.samples]
    count = min(_IMAGES, len(samples))
    random = np.random.default_rng(0)
    found: dict[int, list[np.ndarray]] = {}
    for i in range(count):
        part, sample = samples[i * len(samples) // count]
        for label, patch in _patches_of(part, sample, size, random):
            found.setdefault(label, []).append(patch)
        if progress:
            progress(i + 1, count)
    if not found:
        raise UsageError(f"no image of the {split} set is larger than patches of {size} pixels")
    chosen = []
    for label in sorted(found):
        take = random.permutation(len(found[label]))[: number // len(found)]
        chosen += [(label, found[label][i]) for i in take]
    labels, images = zip(*chosen, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous()
    return Patches(pixels, torch.tensor(labels))


def _patches_of(
    part: Part, sample: dict[str, Any], size: int, random: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    results = read_image(part.reader, dict(sample, seg_fields=[]))
    image, label = results["img"], read_label(part.reader, results)
    half = size // 2
    inner = label[half : label.shape[0] - half, half : label.shape[1] - half]
    found = []
    for value in np.unique(inner):
        if value == part.reader.ignore_index:
            continue
        places = np.argwhere(inner == value)
        for y, x in places[random.permutation(len(places))[:_PER_IMAGE]]:
            found.append((int(value), image[y : y + size, x : x + size].copy()))
    return found
