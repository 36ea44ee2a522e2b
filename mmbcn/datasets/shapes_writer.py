"""Writes the scenes of ShapesDataset to disk as Cityscapes, Pascal VOC 2012 or CamVid.

So that the configs of those sets run without them. The files appear in the target folder only
when all of them are written.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2

from mmbcn.datasets.parallel import run_parallel
from mmbcn.datasets.shapes import encode_png
from mmbcn.datasets.shapes_raw import RAW_FILES, SBD
from mmbcn.datasets.shapes_scene import check_scene, draw_scene
from mmbcn.errors import UsageError

_JPEG_FLAGS = (cv2.IMWRITE_JPEG_QUALITY, 95)


class _Scene(NamedTuple):
    split: str
    seed: int
    index: int

    @property
    def name(self) -> str:
        return f"shapes_{self.index:06d}_{self.seed:06d}"


def _cityscapes(scene: _Scene) -> tuple[str, str]:
    stem = f"{scene.split}/shapes/{scene.name}"
    return f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelTrainIds.png"


def _voc(scene: _Scene) -> tuple[str, str]:
    labels = "SegmentationClassAug" if scene.split == "aug" else "SegmentationClass"
    return f"JPEGImages/{scene.name}.jpg", f"{labels}/{scene.name}.png"


def _camvid(scene: _Scene) -> tuple[str, str]:
    stem = f"{scene.split}/{scene.name}"
    return f"images/{stem}.jpg", f"annotations/{stem}.png"


# Where the image and the label of a scene go.
LAYOUTS: dict[str, Callable[[_Scene], tuple[str, str]]] = {
    "cityscapes": _cityscapes,
    "voc": _voc,
    "camvid": _camvid,
}

# The splits in each list. SBD has images of VOC's training and validation sets too.
VOC_LISTS = dict(train=("train",), val=("val",), trainval=("train", "val"), aug=("aug",))
SBD_LISTS = dict(train=("aug",), val=("train", "val"))


def write_shapes(
    out: str | Path,
    layout: str,
    num_train: int = 20,
    num_val: int = 8,
    size: tuple[int, int] = (256, 512),
    seed: int = 0,
    workers: int = 1,
    raw: bool = False,
) -> dict[str, int]:
    """Write a training and a validation set to ``out``.

    Training scenes are those of ``ShapesDataset(seed=2 * seed)``, validation scenes those of
    ``2 * seed + 1``: no two sets share a scene. PNG images are exact, JPEG images (VOC, CamVid)
    nearly so; labels are exact everywhere. VOC also gets the split ``aug`` of
    ``pascal_voc12_aug``: another ``num_train`` scenes, in neither of the other two.

    Args:
        out: Target folder, empty or not yet there.
        layout: One of ``LAYOUTS``.
        num_train: Number of training scenes.
        num_val: Number of validation scenes.
        size: (height, width) of a scene, in pixels.
        seed: Which sets.
        workers: Number of processes.
        raw: Write as well what the labels are made from: Cityscapes' polygons and ``labelIds``,
            or SBD (of VOC) in ``benchmark_RELEASE``.

    Returns:
        The number of scenes of each split.

    Raises:
        UsageError: A target folder that holds something, or an argument that cannot be.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    for name, value in dict(num_train=num_train, num_val=num_val, workers=workers).items():
        if value < 1:
            raise UsageError(f"{name} must be 1 or more, got {value}")
    if raw and layout not in RAW_FILES:
        raise UsageError(f"raw is for the layouts {' and '.join(RAW_FILES)}, not for {layout}")
    check_scene(seed, size)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} is there already and nothing in it is overwritten; "
            "name an empty or a new folder, or move the old one away"
        )

    scenes = [_Scene("train", 2 * seed, index) for index in range(num_train)]
    scenes += [_Scene("val", 2 * seed + 1, index) for index in range(num_val)]
    if layout == "voc":
        scenes += [_Scene("aug", 2 * seed, num_train + index) for index in range(num_train)]

    out.mkdir(parents=True, exist_ok=True)
    # Inside `out`, hence on the same disk: moving from there is a rename.
    with tempfile.TemporaryDirectory(
        prefix=".partial-", dir=out, ignore_cleanup_errors=True
    ) as partial_dir:
        write = partial(_write_scene, Path(partial_dir), layout, size, raw)
        for _ in run_parallel(write, scenes, workers, "scenes"):
            pass
        if layout == "voc":
            folder = Path(partial_dir) / "ImageSets" / "Segmentation"
            _write_lists(folder, scenes, VOC_LISTS)
            if raw:
                _write_lists(Path(partial_dir) / SBD, scenes, SBD_LISTS)
        for folder in sorted(Path(partial_dir).iterdir()):
            folder.replace(out / folder.name)
    splits = [scene.split for scene in scenes]
    return {split: splits.count(split) for split in dict.fromkeys(splits)}


def _write_scene(root: Path, layout: str, size: tuple[int, int], raw: bool, scene: _Scene) -> None:
    image, label = draw_scene(scene.seed, scene.index, *size)
    image_path, label_path = LAYOUTS[layout](scene)
    files = {label_path: encode_png(label)}
    if image_path.endswith(".jpg"):
        files[image_path] = cv2.imencode(".jpg", image, _JPEG_FLAGS)[1].tobytes()
    else:
        files[image_path] = encode_png(image)
    if raw:
        files |= RAW_FILES[layout](label_path, label)
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def _write_lists(folder: Path, scenes: list[_Scene], lists: dict[str, tuple[str, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, splits in lists.items():
        names = [f"{scene.name}\n" for scene in scenes if scene.split in splits]
        (folder / f"{file}.txt").write_text("".join(names))
