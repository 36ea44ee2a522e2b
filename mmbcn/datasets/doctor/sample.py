"""Reads one sample as the config does, and more strictly, and says what is wrong with it."""

import hashlib
import io
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.fileio import get
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mmbcn.datasets.doctor.causes import guess_cause
from mmbcn.datasets.doctor.findings import Finding
from mmbcn.datasets.doctor.part import Reader
from mmbcn.datasets.image_file import damage
from mmbcn.errors import UsageError

_IMAGES = ("img_path", "img_path2")
_SHOWN = 8


class Moments(NamedTuple):
    """Of an image, per channel.

    Attributes:
        count: number of pixels.
        mean: shape (C,).
        m2: sum of squared differences from the mean, shape (C,).
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]


class Record(NamedTuple):
    """What was seen of a sample; small, whatever its size.

    Attributes:
        findings: what is wrong.
        size: (height, width) of the image; None: unreadable.
        moments: of the image.
        digest: of the image's pixels.
        counts: number of pixels of each label value, 0 to 255; None: no readable label.
    """

    findings: list[Finding]
    size: tuple[int, int] | None = None
    moments: Moments | None = None
    digest: bytes | None = None
    counts: NDArray[np.int64] | None = None


def inspect(reader: Reader, info: dict[str, Any]) -> Record:
    """Read a sample and check it."""
    findings: list[Finding] = []
    results = dict(info, seg_fields=[])
    paths = [str(info[key]) for key in _IMAGES if info.get(key)]
    faults = [fault for path in paths if (fault := _file_fault(path, "image", reader))]
    image = None
    if faults:
        findings += faults
    else:
        try:
            results = read_image(reader, results)
            image = results["img"]
        except UsageError as error:
            findings.append(Finding("unreadable image", paths[0], str(error)))
    size = None if image is None else tuple(results.get("img_shape", image.shape[:2])[:2])
    moments = None if image is None else _moments(image)
    if moments is not None and not moments.m2.any():
        findings.append(Finding("uniform image", paths[0], "every pixel has the same colour"))

    counts = None
    if info.get("seg_map_path"):
        counts, more = _inspect_label(reader, results, size)
        findings += more
    digest = None if image is None else _digest(image)
    return Record(findings, size, moments, digest, counts)


def read_image(reader: Reader, results: dict[str, Any]) -> dict[str, Any]:
    """Load the image as the config does: ``results['img']``.

    Raises:
        UsageError: The config's transforms cannot read it.
    """
    return _run(reader.load_image, results, "img")


def read_label(reader: Reader, results: dict[str, Any]) -> NDArray[Any]:
    """Load the label as the config does: (H, W), or another shape where it is no label.

    Raises:
        UsageError: The config's transforms cannot read it.
    """
    if "gt_seg_map" not in results:
        results = _run(reader.load_label, results, "gt_seg_map")
    return np.asarray(results["gt_seg_map"])


def _run(transforms: list[Any], results: dict[str, Any], key: str) -> dict[str, Any]:
    for transform in transforms:
        name = type(transform).__name__
        try:
            results = transform(results)
        except Exception as error:  # whatever a transform may raise
            reason = str(error) or type(error).__name__
            raise UsageError(f"{name} fails: {reason}") from error
    if not results or results.get(key) is None:
        raise UsageError(f"{name} gives no {key!r}")
    return results


def _file_fault(path: str, what: str, reader: Reader) -> Finding | None:
    """A missing or damaged file."""
    try:
        data = get(path, backend_args=reader.backend_args)
    except FileNotFoundError:
        return Finding(f"missing {what}", path)
    except Exception as error:  # whatever a storage backend may raise
        return Finding(f"unreadable {what}", path, f"{type(error).__name__}: {error}")
    fault = damage(data)
    return Finding(f"unreadable {what}", path, fault) if fault else None


def _inspect_label(
    reader: Reader, results: dict[str, Any], size: tuple[int, int] | None
) -> tuple[NDArray[np.int64] | None, list[Finding]]:
    path = str(results["seg_map_path"])
    fault = _file_fault(path, "label", reader)
    if fault:
        return None, [fault]
    try:
        label = read_label(reader, results)
    except UsageError as error:
        return None, [Finding("unreadable label", path, str(error))]
    stored, kind = _stored(path, reader)
    if label.ndim != 2:
        text = f"shape {label.shape}: a colour mask, where class indices are wanted"
        if stored is not None and stored.ndim == 2:
            text = "it has a palette; LoadAnnotations needs imdecode_backend='pillow' to keep it"
        return None, [Finding("label is not one channel", path, text)]
    findings = []
    if size is not None and label.shape != size:
        text = "image {}x{}, label {}x{} (height x width)".format(*size, *label.shape)
        if label.shape == size[::-1]:
            text += "; an image that its EXIF data turns?"
        findings.append(Finding("image and label differ in size", path, text))
    if kind == "JPEG":
        findings.append(Finding("label stored with loss", path, "JPEG changes class indices"))
    if stored is not None and stored.dtype not in (np.uint8, np.bool_):
        low, high = stored.min(), stored.max()
        fits = label.dtype != np.uint8 or 0 <= low <= high <= 255
        kind = "label stored as 16 bits or more" if fits else "label has more than 8 bits"
        text = f"{stored.dtype} with the values {low} to {high}"
        if not fits:
            text += ", of which only the lowest 8 bits are read; ids of instances?"
            return None, [*findings, Finding(kind, path, text)]
        findings.append(Finding(kind, path, text))
    return _check_values(reader, results, label, stored, findings)


def _stored(path: str, reader: Reader) -> tuple[NDArray[Any] | None, str | None]:
    """The values in the file, before the config's transforms, and its format."""
    try:
        with Image.open(io.BytesIO(get(path, backend_args=reader.backend_args))) as picture:
            return np.asarray(picture), picture.format
    except UnidentifiedImageError:
        return None, None


def _check_values(
    reader: Reader,
    results: dict[str, Any],
    label: NDArray[Any],
    stored: NDArray[Any] | None,
    findings: list[Finding],
) -> tuple[NDArray[np.int64], list[Finding]]:
    path = str(results["seg_map_path"])
    values, numbers = _histogram(label)
    ignored = values == reader.ignore_index
    num_classes = reader.num_classes or 256
    inside = ignored | (values >= 0) & (values < num_classes)
    in_file = _histogram(label if stored is None or stored.ndim != 2 else stored)[0].tolist()
    if not inside.all():
        wrong = values[~inside].tolist()
        text = _list(wrong) + f" in {numbers[~inside].sum() / label.size:.1%} of the pixels"
        if not set(wrong) <= set(in_file):
            text += f" (in the file: {_list(in_file)})"
        reduced = bool(results.get("reduce_zero_label"))
        cause = guess_cause(in_file, num_classes, reader.ignore_index, reduced)
        if any(finding.kind == "label stored with loss" for finding in findings):
            cause = "a JPEG, which changes class indices"
        text += f"; the classes are 0 to {num_classes - 1}. Perhaps {cause}"
        findings.append(Finding("label values outside the classes", path, text))
    elif ignored.all():
        findings.append(Finding("suspicious label", path, "every pixel is ignored"))
    elif in_file == [0, 255] and reader.ignore_index == 255:
        text = "only 0 and 255, which is ignored; a 0/255 mask needs its foreground as 1"
        findings.append(Finding("suspicious label", path, text))
    counts = np.zeros(256, np.int64)
    small = (values >= 0) & (values < 256)
    counts[values[small].astype(int)] = numbers[small]
    return counts, findings


def _histogram(label: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The values that occur, and how often."""
    if label.dtype != np.uint8:
        return np.unique(label, return_counts=True)
    numbers = np.bincount(label.ravel(), minlength=256)
    return np.flatnonzero(numbers), numbers[numbers > 0]


def _list(values: list[int]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more


def _moments(image: NDArray[Any]) -> Moments:
    pixels = image.reshape(-1, 1, image.shape[-1] if image.ndim == 3 else 1)
    if pixels.shape[2] <= 4 and pixels.dtype in (np.uint8, np.uint16, np.float32):
        mean, std = (values[:, 0] for values in cv2.meanStdDev(pixels))
    else:
        mean, std = (f(pixels[:, 0], axis=0, dtype=np.float64) for f in (np.mean, np.std))
    return Moments(len(pixels), mean, std**2 * len(pixels))


def _digest(image: NDArray[Any]) -> bytes:
    shape = f"{image.shape} {image.dtype}".encode()
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16, key=shape[:64]).digest()
