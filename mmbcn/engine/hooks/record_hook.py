"""Keeps what a test found, for those who compare runs: numbers, and a few label maps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.hooks import Hook
from PIL import Image

from mmbcn.checkpoints.write import whole_file
from mmbcn.engine.hooks.panel_hook import is_chosen
from mmbcn.registry import HOOKS

_WIDTH = 480  # of pictures, pixels at most


@HOOKS.register_module()
class RecordHook(Hook):
    """Write ``<work_dir>/record/test.json`` after a test, and some images with their label maps.

    The JSON file has the classes, the metrics as the evaluator gives them, and of each class the
    pixels where truth and prediction agree (``intersection``) and that either has (``union``), over
    all images. Beside it, for a few images spread evenly over the dataset, in its colours:
    ``<number>_<name>_{image.jpg,truth.png,prediction.png}``. For one rank.

    Args:
        num_images: how many images are written.
    """

    def __init__(self, num_images: int = 4) -> None:
        self.num_images = num_images

    def before_test_epoch(self, runner: Any) -> None:
        """Begin with no pixel."""
        self.seen = 0
        meta = runner.test_dataloader.dataset.metainfo
        self.classes, self.palette = meta["classes"], meta["palette"]
        self.confusion = np.zeros((len(self.classes),) * 2, np.int64)  # truth, prediction
        self.folder = Path(runner.work_dir, "record")
        self.folder.mkdir(parents=True, exist_ok=True)

    def after_test_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Count the pixels of one batch."""
        total = len(runner.test_dataloader.dataset)
        count = len(self.classes)
        for sample in outputs or ():
            truth, predicted = (
                data.data[0].cpu().numpy().astype(np.int64)
                for data in (sample.gt_sem_seg, sample.pred_sem_seg)
            )
            known = truth < count  # the rest is ignored
            pairs = truth[known] * count + predicted[known]
            self.confusion += np.bincount(pairs, minlength=count**2).reshape(count, count)
            if is_chosen(self.seen, total, self.num_images):
                stem = self.folder / f"{self.seen:04d}_{Path(sample.img_path).stem}"
                _write_image(sample.img_path, Path(f"{stem}_image.jpg"))
                self._write_labels(truth, Path(f"{stem}_truth.png"))
                self._write_labels(predicted, Path(f"{stem}_prediction.png"))
            self.seen += 1

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the numbers."""
        agree = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - agree
        content = dict(
            classes=list(self.classes),
            palette=[list(map(int, color)) for color in self.palette],
            images=self.seen,
            intersection=agree.tolist(),
            union=union.tolist(),
            metrics={k: float(v) for k, v in (metrics or {}).items()},
        )
        with whole_file(self.folder / "test.json", "record") as part:
            part.write_text(json.dumps(content))

    def _write_labels(self, labels: np.ndarray, path: Path) -> None:
        colors = np.full((256, 3), 255, np.uint8)  # ignored: white
        colors[: len(self.palette)] = self.palette
        labels = np.where(labels < len(self.classes), labels, 255).astype(np.uint8)
        image = Image.fromarray(cv2.resize(labels, _size(labels), interpolation=cv2.INTER_NEAREST))
        image.putpalette(colors.ravel().tolist())
        image.save(path, optimize=True)


def _size(picture: np.ndarray) -> tuple[int, int]:
    height, width = picture.shape[:2]
    scale = min(1.0, _WIDTH / width)
    return round(width * scale), round(height * scale)


def _write_image(source: str, path: Path) -> None:
    image = mmcv.imfrombytes(get(source))
    image = cv2.resize(image, _size(image), interpolation=cv2.INTER_AREA)
    mmcv.imwrite(image, str(path), [cv2.IMWRITE_JPEG_QUALITY, 85])
