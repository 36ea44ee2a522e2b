"""Cityscapes: ``*_labelTrainIds.png`` from the published ``gtFine``.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016. The
table of labels is that of cityscapesScripts (https://github.com/mcordts/cityscapesScripts,
``helpers/labels.py``), as is the way polygons are drawn (``preparation/json2labelImg.py``).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mmbcn.datasets.prepare.convert import Job, Summary, convert, read_label
from mmbcn.errors import UsageError

IGNORED = 255
SOURCES = ("labelIds", "polygons")
_SUFFIXES = dict(labelIds="_labelIds.png", polygons="_polygons.json")


class Label(NamedTuple):
    """A kind of thing: its name, its id in ``labelIds``, its id in ``labelTrainIds``."""

    name: str
    id: int
    train_id: int


# 'license plate' has the ids -1: it is never drawn.
LABELS = (
    Label("unlabeled", 0, IGNORED),
    Label("ego vehicle", 1, IGNORED),
    Label("rectification border", 2, IGNORED),
    Label("out of roi", 3, IGNORED),
    Label("static", 4, IGNORED),
    Label("dynamic", 5, IGNORED),
    Label("ground", 6, IGNORED),
    Label("road", 7, 0),
    Label("sidewalk", 8, 1),
    Label("parking", 9, IGNORED),
    Label("rail track", 10, IGNORED),
    Label("building", 11, 2),
    Label("wall", 12, 3),
    Label("fence", 13, 4),
    Label("guard rail", 14, IGNORED),
    Label("bridge", 15, IGNORED),
    Label("tunnel", 16, IGNORED),
    Label("pole", 17, 5),
    Label("polegroup", 18, IGNORED),
    Label("traffic light", 19, 6),
    Label("traffic sign", 20, 7),
    Label("vegetation", 21, 8),
    Label("terrain", 22, 9),
    Label("sky", 23, 10),
    Label("person", 24, 11),
    Label("rider", 25, 12),
    Label("car", 26, 13),
    Label("truck", 27, 14),
    Label("bus", 28, 15),
    Label("caravan", 29, IGNORED),
    Label("trailer", 30, IGNORED),
    Label("train", 31, 16),
    Label("motorcycle", 32, 17),
    Label("bicycle", 33, 18),
)
_NOT_DRAWN = "license plate"
_TRAIN_IDS = {label.name: label.train_id for label in LABELS}


def make_train_ids(root: Path, source: str | None, workers: int) -> Summary:
    """Write a ``*_labelTrainIds.png`` beside every annotation in ``root/gtFine``.

    Args:
        root: Folder of the dataset.
        source: One of ``SOURCES``; None: ``labelIds``, or polygons for an image without them.
            Both give the same.
        workers: Number of processes.

    Raises:
        UsageError: No annotation found.
    """
    folder = root / "gtFine"
    jobs: dict[Path, Job] = {}
    for kind in [source] if source else SOURCES:
        suffix = _SUFFIXES[kind]
        for path in sorted(folder.glob(f"*/*/*{suffix}")):
            target = path.with_name(path.name.removesuffix(suffix) + "_labelTrainIds.png")
            jobs.setdefault(target, Job(path, target))
    if not jobs:
        wanted = " or ".join(f"*{_SUFFIXES[kind]}" for kind in ([source] if source else SOURCES))
        raise UsageError(
            f"expected gtFine_trainvaltest.zip unpacked in {root}, but there is no {wanted} in "
            f"{folder}/<split>/<city>"
        )
    return convert(train_ids, jobs.values(), workers, "train ids")


def count_train_ids(root: Path) -> dict[str, int]:
    """The number of ``*_labelTrainIds.png`` of each split in ``root/gtFine``."""
    folders = sorted(path for path in (root / "gtFine").iterdir() if path.is_dir())
    return {path.name: len(list(path.glob("*/*_labelTrainIds.png"))) for path in folders}


def train_ids(path: Path) -> NDArray[np.uint8]:
    """The train ids (H, W) of a ``*_labelIds.png`` or a ``*_polygons.json``.

    Raises:
        UsageError: An id, a name or a structure that Cityscapes does not have.
        OSError: A missing or broken file.
    """
    return _from_polygons(path) if path.suffix == ".json" else _from_ids(path)


def _from_ids(path: Path) -> NDArray[np.uint8]:
    ids = read_label(path)
    unknown = [value for value in np.unique(ids).tolist() if value >= len(LABELS)]
    if unknown:
        raise UsageError(f"expected label ids of 0 to {len(LABELS) - 1}, got {unknown[:5]}")
    return np.array([label.train_id for label in LABELS], np.uint8)[ids]


def _from_polygons(path: Path) -> NDArray[np.uint8]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        picture = Image.new("L", (content["imgWidth"], content["imgHeight"]), IGNORED)
        canvas = ImageDraw.Draw(picture)
        for thing in content["objects"]:
            _draw(canvas, thing)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            "expected JSON with imgWidth, imgHeight and objects of label and polygon, got "
            f"{type(error).__name__}: {error}"
        ) from None
    return np.asarray(picture)


def _draw(canvas: ImageDraw.ImageDraw, thing: dict[str, Any]) -> None:
    name = thing["label"]
    if name not in _TRAIN_IDS and name != _NOT_DRAWN:
        name = name.removesuffix("group")  # 'cargroup': cars that cannot be told apart
    if thing.get("deleted") or name == _NOT_DRAWN:
        return
    if name not in _TRAIN_IDS:
        raise UsageError(f"the label {name!r} is not one of Cityscapes'")
    canvas.polygon([(x, y) for x, y in thing["polygon"]], fill=_TRAIN_IDS[name])
