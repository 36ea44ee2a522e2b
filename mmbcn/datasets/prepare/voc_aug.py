"""Pascal VOC 2012 with the Semantic Boundaries Dataset: labels and lists of "VOC12aug".

Hariharan et al., "Semantic contours from inverse detectors", ICCV 2011. Names, folders and lists
are those of mmsegmentation's ``tools/dataset_converters/voc_aug.py``.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from mmbcn.datasets.prepare.convert import Job, Summary, convert, write_file
from mmbcn.errors import UsageError

NUM_CLASSES = 21
PUBLISHED = dict(trainaug=10582, aug=9118)  # the lengths of the lists of the published data


class Folders(NamedTuple):
    """Where the two datasets are.

    Attributes:
        lists: VOC's ``ImageSets/Segmentation``.
        labels: the new ``SegmentationClassAug``.
        sbd: SBD's folder with ``cls``, ``train.txt`` and ``val.txt``.
    """

    lists: Path
    labels: Path
    sbd: Path


def find_folders(voc: Path, sbd: Path) -> Folders:
    """Find the parts of VOC 2012 and of SBD in their folders or one above.

    Raises:
        UsageError: A part is missing.
    """
    voc = next((p for p in (voc, voc / "VOC2012") if (p / "ImageSets").is_dir()), voc)
    sbd = next((p for p in (sbd, sbd / "dataset") if (p / "cls").is_dir()), sbd)
    lists = voc / "ImageSets" / "Segmentation"
    parts = [lists / "train.txt", lists / "val.txt"]
    parts += [sbd / "cls", sbd / "train.txt", sbd / "val.txt"]
    missing = [str(path) for path in parts if not path.exists()]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} not found. Expected VOC2012 of VOCtrainval_11-May-2012.tar, and "
            "benchmark_RELEASE of SBD's benchmark.tgz with dataset/cls/*.mat, dataset/train.txt "
            "and dataset/val.txt"
        )
    return Folders(lists, voc / "SegmentationClassAug", sbd)


def make_labels(folders: Folders, workers: int) -> Summary:
    """Write a PNG of class indices to ``SegmentationClassAug`` for every ``.mat`` of SBD.

    Raises:
        UsageError: A listed image has no ``.mat``.
    """
    files = {path.stem: path for path in sorted((folders.sbd / "cls").glob("*.mat"))}
    missing = sorted(_read_sbd(folders) - set(files))
    if missing:
        raise UsageError(
            f"{len(missing)} images of SBD's lists have no .mat in {folders.sbd / 'cls'}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Unpack it again"
        )
    jobs = [Job(path, folders.labels / f"{stem}.png") for stem, path in files.items()]
    return convert(read_mat, jobs, workers, "SBD labels")


def write_lists(folders: Folders) -> dict[str, int]:
    """Write ``trainaug.txt`` (train and SBD without val) and ``aug.txt`` (that without train).

    Returns:
        The length of each list.
    """
    train, val = (_read_list(folders.lists / f"{name}.txt") for name in ("train", "val"))
    sbd = _read_sbd(folders)
    lists = dict(trainaug=sorted((train | sbd) - val), aug=sorted(sbd - train - val))
    for name, stems in lists.items():
        write_file(folders.lists / f"{name}.txt", "".join(f"{s}\n" for s in stems).encode())
    return {name: len(stems) for name, stems in lists.items()}


def read_mat(path: Path) -> NDArray[np.uint8]:
    """The class indices (H, W) in a ``.mat`` of SBD.

    Raises:
        UsageError: No MATLAB file with a ``GTcls.Segmentation`` of classes 0 to 20.
        OSError: A missing file.
    """
    data = path.read_bytes()
    try:
        label = loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
    # scipy has no common error for a broken file
    except (KeyError, IndexError, TypeError, ValueError, OSError, MatReadError) as error:
        raise UsageError(
            f"expected a MATLAB file with GTcls.Segmentation, got {type(error).__name__}: {error}"
        ) from None
    if label.ndim != 2 or not 0 <= label.min() <= label.max() < NUM_CLASSES:
        raise UsageError(
            f"expected classes 0 to {NUM_CLASSES - 1} of shape (H, W), got {label.min()} to "
            f"{label.max()} of shape {label.shape}"
        )
    return label.astype(np.uint8)


def _read_sbd(folders: Folders) -> set[str]:
    return _read_list(folders.sbd / "train.txt") | _read_list(folders.sbd / "val.txt")


def _read_list(path: Path) -> set[str]:
    return set(path.read_text().split())
