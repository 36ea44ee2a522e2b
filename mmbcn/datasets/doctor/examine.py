"""Examines whole datasets: every sample, and what only shows over many of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmbcn.datasets.doctor.findings import Finding
from mmbcn.datasets.doctor.part import Part, find_orphans, other_suffixes
from mmbcn.datasets.doctor.sample import Moments, Record, inspect
from mmbcn.datasets.parallel import run_parallel

# A normalized image should have a mean near 0 and a standard deviation near 1.
MAX_MEAN, MAX_SPREAD = 2.0, 4.0
_SHOWN = 20


@dataclass
class Diagnosis:
    """What was seen of a part.

    Attributes:
        part: the part.
        same_as: the name of an earlier part with the same files, which is not examined again.
        findings: what is wrong.
        bad: indices of the samples with an error.
        counts: number of pixels of each label value, 0 to 255.
        images: number of images that have the value.
        labels: number of readable labels.
        moments: of all images with as many channels as the first; None: no readable image.
        sizes: how many images have each (height, width).
    """

    part: Part
    same_as: str | None = None
    findings: list[Finding] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    labels: int = 0
    moments: Moments | None = None
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, index: int, record: Record) -> None:
        """Add what was seen of sample ``index``."""
        for finding in record.findings:
            self.find(finding, index)
        if record.counts is not None:
            self.labels += 1
            self.counts += record.counts
            self.images += record.counts > 0
        if record.size is not None:
            self.sizes[record.size] = self.sizes.get(record.size, 0) + 1
            self.moments = merge_moments(self.moments, record.moments)

    def find(self, finding: Finding, index: int | None = None) -> None:
        """Add something wrong; with sample ``index``, where it is about one."""
        self.findings.append(finding)
        if finding.is_error and index is not None:
            self.bad.add(index)


Seen = dict[bytes, list[tuple[Diagnosis, int]]]  # digest of an image -> where it was


def merge_moments(one: Moments | None, two: Moments | None) -> Moments | None:
    """The moments of two sets of pixels together (Chan, Golub, LeVeque 1983)."""
    if one is None or two is None:
        return one or two
    if one.mean.shape != two.mean.shape:
        return one
    count = one.count + two.count
    delta = two.mean - one.mean
    mean = one.mean + delta * (two.count / count)
    return Moments(count, mean, one.m2 + two.m2 + delta**2 * (one.count * two.count / count))


def examine(parts: Sequence[Part], workers: int) -> list[Diagnosis]:
    """Open every file of every part.

    Args:
        parts: as of ``open_parts``.
        workers: number of processes. Each holds one sample at a time.
    """
    result: list[Diagnosis] = []
    seen: Seen = {}
    for part in parts:
        paths = part.paths()
        diagnosis = Diagnosis(part)
        same = (d.part.name for d in result if d.part.paths() == paths)
        diagnosis.same_as = next(same, None) if paths else None
        result.append(diagnosis)
        if diagnosis.same_as is None:
            records = run_parallel(partial(inspect, part.reader), part.samples, workers, part.name)
            for index, record in enumerate(records):
                diagnosis.add(index, record)
                if record.digest is not None:
                    _compare(diagnosis, index, record.digest, seen)
            _check_whole(diagnosis, parts)
    return result


def _compare(here: Diagnosis, index: int, digest: bytes, seen: Seen) -> None:
    """Look for the image of sample ``index`` among those seen before."""
    path = here.part.samples[index]["img_path"]
    before = seen.setdefault(digest, [])
    twins = [place for place in before if place[0].part.split == here.part.split]
    for earlier, number in twins[:1] or before:
        earlier_path = earlier.part.samples[number]["img_path"]
        if earlier.part.split == "train" != here.part.split:  # the one to leave out is in training
            text = f"also in {here.part.name}: {path}"
            earlier.find(Finding("same image in two splits", earlier_path, text), number)
        else:
            text = f"also in {earlier.part.name}: {earlier_path}"
            here.find(Finding("same image twice", path, text), index)
    before.append((here, index))


def _check_whole(diagnosis: Diagnosis, parts: Sequence[Part]) -> None:
    part, reader = diagnosis.part, diagnosis.part.reader
    _check_files(diagnosis, parts)
    classes = part.dataset.metainfo.get("classes")
    if classes:
        wrong = sorted({count for count in part.head_classes if count != len(classes)})
        if wrong:
            text = f"num_classes is {wrong} in the model's heads, the dataset has {len(classes)}"
            diagnosis.find(Finding("model and dataset differ", "", text))
    if reader.num_classes is None:
        text = "neither the dataset's metainfo nor a head of the model says how many"
        diagnosis.find(Finding("classes unknown", "", text))
    elif diagnosis.labels:
        _check_classes(diagnosis, reader.num_classes)
    _check_preprocessor(diagnosis)


def _check_files(diagnosis: Diagnosis, parts: Sequence[Part]) -> None:
    part = diagnosis.part
    folder = (getattr(part.dataset, "data_prefix", None) or {}).get("img_path") or ""
    if not part.samples:
        text = f"no image with the suffix {part.dataset.img_suffix!r}{_other_suffixes(part)}"
        diagnosis.find(Finding("no images", folder, text))
    elif not any(label for _, label in part.paths()):
        diagnosis.find(Finding("no labels", "", "the config names none; only images are checked"))
    orphans = find_orphans(parts, part)
    text = f"no image for it in {folder}{_other_suffixes(part)}" if orphans else ""
    for path in orphans:
        diagnosis.find(Finding("label without image", path, text))


def _other_suffixes(part: Part) -> str:
    suffixes = other_suffixes(part)
    return f"; there are images with the suffix {suffixes}" if suffixes else ""


def _check_classes(diagnosis: Diagnosis, num_classes: int) -> None:
    part = diagnosis.part
    absent = [k for k in range(num_classes) if not diagnosis.counts[k]]
    if absent:
        names = ", ".join(part.classes[k] for k in absent[:_SHOWN])
        text = f"{len(absent)} of {num_classes}: {names}{', ...' if len(absent) > _SHOWN else ''}"
        if getattr(part.dataset, "reduce_zero_label", False) and num_classes - 1 in absent:
            text += ". Perhaps 0 is a class: then reduce_zero_label must be False"
        diagnosis.find(Finding("classes that never occur", "", text))
    if num_classes > 1 and not diagnosis.counts[1:255].any() and diagnosis.counts[255]:
        text = "no label has another value than 0 and 255: 0/255 masks need the foreground as 1"
        diagnosis.find(Finding("label values outside the classes", "", text))


def _check_preprocessor(diagnosis: Diagnosis) -> None:
    wanted, found = preprocessor_moments(diagnosis), image_moments(diagnosis)
    if wanted is None or found is None or len(wanted[0]) != len(found[0]):
        return
    mean, std = (found[0] - wanted[0]) / wanted[1], found[1] / wanted[1]
    if abs(mean).max() > MAX_MEAN or std.max() > MAX_SPREAD or std.min() < 1 / MAX_SPREAD:
        text = (
            "normalized images have the mean {} and the standard deviation {}, not 0 and 1".format(
                *(", ".join(f"{value:.2f}" for value in values) for values in (mean, std))
            )
        )
        diagnosis.find(Finding("preprocessor does not fit", "", text))


def image_moments(diagnosis: Diagnosis) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Mean and standard deviation per channel, in the order in which the model sees them."""
    if diagnosis.moments is None:
        return None
    count, mean, m2 = diagnosis.moments
    flip = len(mean) == 3 and diagnosis.part.preprocessor.get("bgr_to_rgb", False)
    order = slice(None, None, -1 if flip else 1)
    return mean[order], np.sqrt(m2 / count)[order]


def preprocessor_moments(
    diagnosis: Diagnosis,
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Mean and standard deviation of the model's ``data_preprocessor``; None: it has none."""
    values = [diagnosis.part.preprocessor.get(key) for key in ("mean", "std")]
    if any(value is None for value in values):
        return None
    mean, std = (np.asarray(value, np.float64).reshape(-1) for value in values)
    return mean, std
