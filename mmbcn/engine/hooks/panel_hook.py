"""Writes a picture of each result: image, ground truth and prediction side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.hooks import Hook

from mmbcn.registry import HOOKS

_MIN_HEIGHT, _LEGEND_ROW = 256, 22


@HOOKS.register_module()
class PanelHook(Hook):
    """Write ``<out_dir>/<number>_<image name>.png`` for images that are tested.

    Args:
        out_dir: folder of the pictures, made where it is missing.
        limit: how many pictures, spread evenly over the dataset; None: one for every image.
    """

    def __init__(self, out_dir: str, limit: int | None = None) -> None:
        self.out_dir = Path(out_dir)
        self.limit = limit
        self.seen = 0  # samples tested by this rank
        self.count = 0  # pictures written by this rank

    def after_test_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Draw the results of one batch."""
        dataset = runner.test_dataloader.dataset
        meta, total = dataset.metainfo, len(dataset)
        for sample in outputs or ():
            index = self.seen * runner.world_size + runner.rank
            self.seen += 1
            if not is_chosen(index, total, self.limit):
                continue
            self.count += 1
            panel = draw_panel(sample, meta["classes"], meta["palette"])
            self.out_dir.mkdir(parents=True, exist_ok=True)
            name = f"{index:04d}_{Path(sample.img_path).stem}.png"
            mmcv.imwrite(panel, str(self.out_dir / name))

    def after_test(self, runner: Any) -> None:
        """Say where the pictures are."""
        runner.logger.info(f"{self.count} prediction pictures are in {self.out_dir}")


def is_chosen(index: int, total: int, limit: int | None) -> bool:
    """Whether the sample is one of ``limit`` that are spread evenly over ``total``; None: all."""
    limit = total if limit is None else min(limit, total)
    return index < total and (index + 1) * limit // total > index * limit // total


def draw_panel(sample: Any, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Image, ground truth and prediction of a ``SegDataSample``, with a legend; BGR."""
    image = mmcv.imfrombytes(get(sample.img_path))
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = np.asarray(palette, np.uint8)[:, ::-1]
    columns = [("image", image)]
    truth = sample.gt_sem_seg.data[0].cpu().numpy() if "gt_sem_seg" in sample else None
    if truth is not None:
        columns.append(("ground truth", colors[truth.astype(np.uint8)]))
    predicted = sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)
    columns.append(("prediction", colors[predicted]))
    scale = max(1, -(-_MIN_HEIGHT // image.shape[0]))
    size = (image.shape[1] * scale, image.shape[0] * scale)
    panel = np.hstack([_titled(cv2.resize(p, size, interpolation=0), t) for t, p in columns])
    shown = np.unique(
        predicted
        if truth is None
        else np.concatenate([truth[truth < len(classes)], predicted.ravel()])
    )
    return np.vstack([panel, *_legend(shown, classes, colors, panel.shape[1])])


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
    bar = np.full((_LEGEND_ROW, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, title, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([bar, picture])


def _legend(
    shown: np.ndarray, classes: Sequence[str], colors: np.ndarray, width: int
) -> list[np.ndarray]:
    rows, x = [], width
    for index in shown.astype(int):
        wanted = 34 + 10 * len(classes[index])
        if x + wanted > width:
            rows.append(np.full((_LEGEND_ROW, width, 3), 255, np.uint8))
            x = 4
        cv2.rectangle(rows[-1], (x, 4), (x + 14, 18), colors[index].tolist(), -1)
        place = (x + 20, 16)
        cv2.putText(rows[-1], classes[index], place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1)
        x += wanted
    return rows
