"""The folder that predictions are written to, each file whole or not at all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.registry import DATASETS, DefaultScope
from numpy.typing import NDArray

from mmbcn.analysis.files import check_folder
from mmbcn.analysis.kept_results import describe_changes
from mmbcn.checkpoints.write import whole_file
from mmbcn.errors import UsageError
from mmbcn.inference.predictor import Prediction
from mmbcn.inference.sources import Source, name_sources, overlay_video

_RECORD = "predictions.json"
_ROW = 24  # pixels of a line of the legend


class Results:
    """Where the files of each source are, and which are there.

    Args:
        out: the folder; made.
        settings: what the predictions are made with, as JSON; kept in the folder, with the names.
        sources: the files that are predicted.
        kinds: 'overlays', and of 'labels' and 'probabilities', what is written too.
        overwrite: let nothing that is there count from now on, also if this run breaks off.

    Attributes:
        sources: the sources by name.

    Raises:
        UsageError: there can be no such folder, or it holds predictions that were made with other
            settings.
    """

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        sources: Sequence[Source],
        kinds: Sequence[str],
        overwrite: bool = False,
    ) -> None:
        self.out, self.kinds = out, list(kinds)
        check_folder(out)
        record = out / _RECORD
        names, self._since = {}, 0.0
        if record.is_file():
            names, self._since = _read(record, settings, overwrite)
        self.sources = name_sources(sources, names)
        names |= {name: str(source.path) for name, source in self.sources.items()}
        with whole_file(record, "record") as part:
            part.touch()
            if overwrite:
                self._since = part.stat().st_mtime  # by the clock of the results
            content = dict(settings=settings, since=self._since, names=names)
            part.write_text(json.dumps(content, indent=1) + "\n")

    def path(self, kind: str, name: str, frame: int | None = None) -> Path:
        """The file of a source, or of a video's frame."""
        if kind == "overlays" and self.sources[name].is_video:
            return self.out / kind / overlay_video(name)
        inside = name if frame is None else f"{name}/{frame:06d}"
        return self.out / kind / f"{inside}{'.npz' if kind == 'probabilities' else '.png'}"

    def is_done(self, name: str) -> bool:
        """Whether all files of a source are there, and not older than it or the settings."""
        source = self.sources[name]
        frame = 0 if source.is_video else None
        paths = [self.path(kind, name, frame) for kind in self.kinds]
        if not all(path.is_file() for path in paths):
            return False
        overlay, *others = (path.stat().st_mtime for path in paths)
        if source.is_video and overlay < max(others, default=overlay):
            return False  # it is written last: the others are of a run that broke off
        return min([overlay, *others]) >= max(source.path.stat().st_mtime, self._since)

    def write(
        self,
        name: str,
        picture: NDArray[np.uint8],
        prediction: Prediction,
        frame: int | None = None,
    ) -> None:
        """Write the files of an image, or those of a video's frame."""
        for kind in self.kinds:
            if kind == "overlays" and frame is not None:
                continue
            path = self.path(kind, name, frame)
            with whole_file(path, "prediction") as part, part.open("wb") as file:
                if kind == "probabilities":
                    half = prediction.probabilities.astype(np.float16)
                    np.savez_compressed(file, probabilities=half)
                else:
                    wide = len(prediction.probabilities) > 256
                    labels = prediction.labels.astype(np.uint16 if wide else np.uint8)
                    image = picture if kind == "overlays" else labels
                    file.write(cv2.imencode(".png", image)[1].tobytes())

    @contextmanager
    def video(self, name: str) -> Iterator[Path]:
        """A path to write a video's overlays to, which becomes the file at the end."""
        path = self.path("overlays", name)
        with whole_file(path, "video") as part:
            written = part.with_suffix(part.suffix + ".mp4")  # OpenCV goes by the suffix
            try:
                yield written
                written.replace(part)
            finally:
                written.unlink(missing_ok=True)


def _read(
    record: Path, settings: Mapping[str, Any], overwrite: bool
) -> tuple[dict[str, str], float]:
    """The names, and the time since which files are of these settings."""
    try:
        kept = json.loads(record.read_text())
        theirs, names = dict(kept["settings"]), dict(kept["names"])
        since = float(kept["since"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{record} is no record of this tool: give another --out") from error
    changes = describe_changes(theirs, settings)
    if changes and not overwrite:
        raise UsageError(
            f"{record.parent} holds predictions made with other settings ({changes}): give another "
            "--out, or --overwrite to make them anew"
        )
    return names, since


def find_classes(
    cfg: Mapping[str, Any], checkpoint: Mapping[str, Any], number: int
) -> tuple[list[str], NDArray[np.uint8]]:
    """The classes' names, and their colours (number, 3) in BGR.

    Of the checkpoint; else of the config's dataset; else numbers and colours drawn at random.
    """
    dataset: Any = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    while "type" in dataset and ("dataset" in dataset or "datasets" in dataset):
        inner = dataset.get("dataset", dataset.get("datasets"))
        dataset = inner[0] if isinstance(inner, (list, tuple)) else inner
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmseg"):
        kind = DATASETS.get(dataset["type"]) if isinstance(dataset.get("type"), str) else None
    kept = (checkpoint.get("meta") or {}).get("dataset_meta") or {}
    for meta in (kept, dataset.get("metainfo") or {}, getattr(kind, "METAINFO", {})):
        names, palette = meta.get("classes"), meta.get("palette")
        if names and palette and len(names) == len(palette) == max(number, 2):
            return list(names), np.asarray(palette, np.uint8)[:, ::-1]
    colors = np.random.default_rng(42).integers(0, 256, (max(number, 2), 3), np.uint8)
    return [f"class {i}" for i in range(len(colors))], colors


def blend(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], colors: NDArray[np.uint8], opacity: float
) -> NDArray[np.uint8]:
    """Lay the classes' colours over an image, both (H, W, 3) in BGR."""
    return cv2.addWeighted(pixels, 1 - opacity, colors[labels], opacity, 0)


def draw_legend(names: Sequence[str], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of the classes' numbers, names and colours, BGR."""
    texts = [f"{i} {name}" for i, name in enumerate(names)]
    width = _ROW + 20 + 10 * max(map(len, texts))
    picture = np.full((_ROW * len(texts) + 4, width, 3), 255, np.uint8)
    for i, (text, color) in enumerate(zip(texts, colors, strict=True)):
        top = i * _ROW + 4
        cv2.rectangle(picture, (4, top), (_ROW, top + _ROW - 6), color.tolist(), -1)
        place = (_ROW + 8, top + _ROW - 9)
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return picture
