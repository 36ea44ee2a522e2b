"""The doctor's pictures: images with their labels laid over, and the share of each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from mmbcn.datasets.doctor.examine import Diagnosis
from mmbcn.datasets.doctor.part import Part
from mmbcn.datasets.doctor.sample import read_image, read_label
from mmbcn.errors import UsageError

NUM_TILES, NUM_BAD, COLUMNS, TILE_WIDTH = 24, 8, 4, 480
IGNORED, NO_CLASS = (255, 255, 255), (255, 0, 255)
_LEGEND_ROW = 0.25  # inches
_NOTHING_TO_SEE = ("missing", "unreadable")  # kinds of errors


def write_pictures(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Write ``<part>_overlays.png`` and ``<part>_classes.png``.

    The first shows samples with an error, where image and label can be read, and others from all
    over the part. The second is written where there are labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    reasons = _reasons(diagnosis)
    chosen = _chosen(diagnosis, reasons)
    if chosen:
        paths.append(folder / f"{diagnosis.part.name}_overlays.png")
        _sheet(diagnosis.part, chosen, reasons).savefig(paths[-1], dpi=100)
    if diagnosis.labels:
        paths.append(folder / f"{diagnosis.part.name}_classes.png")
        _chart(diagnosis).savefig(paths[-1], dpi=100)
    return paths


def _chosen(diagnosis: Diagnosis, reasons: dict[int, str]) -> list[int]:
    """Indices of the samples that are shown."""
    bad = [i for i, text in sorted(reasons.items()) if not text.startswith(_NOTHING_TO_SEE)]
    good = [i for i in range(len(diagnosis.part.samples)) if i not in diagnosis.bad]
    number = min(NUM_TILES - len(bad[:NUM_BAD]), len(good))
    chosen = np.linspace(0, len(good) - 1, number).round().astype(int)
    return bad[:NUM_BAD] + [good[i] for i in chosen]


def _sheet(part: Part, chosen: list[int], reasons: dict[int, str]) -> Figure:
    tiles = [_tile(part, index) for index in chosen]
    seen = set().union(*(values for _, values in tiles))
    names = dict(enumerate(part.classes))
    handles = [
        Patch(facecolor=_rgb(_color(part, value)), edgecolor="gray", label=f"{value} {name}")
        for value, name in names.items()
        if value in seen
    ]
    for text, color, values in (
        ("ignored", IGNORED, {part.reader.ignore_index} - set(names)),
        ("no class", NO_CLASS, seen - set(names) - {part.reader.ignore_index}),
    ):
        if values & seen:
            handles.append(Patch(facecolor=_rgb(color), edgecolor="gray", label=text))

    rows = -(-len(chosen) // COLUMNS)
    ratio = max(picture.shape[0] for picture, _ in tiles) / TILE_WIDTH
    width = COLUMNS * 4.0
    legend = (-(-len(handles) // 8) + 1) * _LEGEND_ROW
    height = rows * (4.0 * ratio + 0.3) + legend
    figure = Figure((width, height))
    grid = dict(left=0.005, right=0.995, wspace=0.02, hspace=0.3 / (4.0 * ratio))
    grid |= dict(bottom=legend / height, top=1 - 0.3 / height)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, gridspec_kw=grid).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (picture, _), index in zip(axes, tiles, chosen, strict=False):
        ax.imshow(picture)
        reason = reasons.get(index)
        title = Path(part.samples[index]["img_path"]).stem[-42:]
        ax.set_title(reason or title, fontsize=8, color="red" if reason else "black", pad=3)
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=min(8, len(handles)), fontsize=8)
    return figure


def _reasons(diagnosis: Diagnosis) -> dict[int, str]:
    """The first error of each bad sample, with its file."""
    kinds = {}
    for finding in reversed(diagnosis.findings):
        if finding.is_error:
            kinds[finding.path] = finding.kind
    reasons = {}
    for index in diagnosis.bad:
        info = diagnosis.part.samples[index]
        path = next(p for p in (info["img_path"], info.get("seg_map_path")) if p in kinds)
        reasons[index] = f"{kinds[path]}\n{Path(path).name[-42:]}"
    return reasons


def _tile(part: Part, index: int) -> tuple[NDArray[np.uint8], set[int]]:
    """A sample, RGB, as far as it can be read, and the label values in it."""
    results: dict[str, Any] = dict(part.samples[index], seg_fields=[])
    try:
        results = read_image(part.reader, results)
        picture = _as_rgb(results["img"])
    except UsageError:
        return np.full((TILE_WIDTH * 3 // 4, TILE_WIDTH, 3), 128, np.uint8), set()
    size = TILE_WIDTH, max(1, round(picture.shape[0] * TILE_WIDTH / picture.shape[1]))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    if not results.get("seg_map_path"):
        return picture, set()
    try:
        label = read_label(part.reader, results)
    except UsageError:
        return picture, set()
    if label.ndim != 2:
        return picture, set()
    label = cv2.resize(label.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
    values, inverse = np.unique(label, return_inverse=True)
    colors = np.array([_color(part, value) for value in values.tolist()], np.uint8)
    overlay = cv2.addWeighted(picture, 0.5, colors[inverse.reshape(label.shape)], 0.5, 0)
    return overlay, set(values.tolist())


def _as_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    image = np.atleast_3d(image)[..., :3]
    image = image[..., ::-1] if image.shape[2] == 3 else image[..., :1].repeat(3, 2)
    if image.dtype != np.uint8:
        image = image.astype(np.float64)
        image = 255 * (image - image.min()) / max(np.ptp(image), 1e-12)
    return np.ascontiguousarray(image, np.uint8)


def _color(part: Part, value: int) -> Sequence[int]:
    if 0 <= value < len(part.classes):
        palette = part.dataset.metainfo.get("palette") or []
        return palette[value] if value < len(palette) else (value * 37 % 256, value * 91 % 256, 128)
    return IGNORED if value == part.reader.ignore_index else NO_CLASS


def _rgb(color: Sequence[int]) -> list[float]:
    return [channel / 255 for channel in color]


def _chart(diagnosis: Diagnosis) -> Figure:
    """Share of the pixels of each class, on a logarithmic axis."""
    part = diagnosis.part
    names = list(part.classes)
    shares = 100 * diagnosis.counts[: len(names)] / max(diagnosis.counts.sum(), 1)
    figure = Figure((9, 1.2 + 0.22 * len(names)), layout="constrained")
    ax = figure.subplots()
    colors = [_rgb(_color(part, value)) for value in range(len(names))]
    bars = ax.barh(range(len(names)), shares, color=colors, edgecolor="gray")
    ax.bar_label(bars, [f"{share:.3g} %" if share else "never" for share in shares], padding=3)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    if shares.any():
        ax.set_xscale("log")
        ax.set_xlim(shares[shares > 0].min() / 3, 400)
    ax.set_xlabel("% of the pixels")
    ax.set_title(f"{part.name}: {diagnosis.labels} labels")
    return figure
