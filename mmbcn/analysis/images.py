"""The images of one of a config's sets as the network sees images in tests.

Of any set through the *test* pipeline: whole images at test scale, without random crops and
colours, the same ones each time. Where the config tests on sliding windows, each window is an
image. Labels are not read.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader, Dataset

from mmbcn.datasets.doctor.part import open_parts
from mmbcn.engine.data_check import check_files, check_folders
from mmbcn.errors import UsageError

Batch = dict[str, list[Any]]


class SplitImages:
    """Batches of images of a config, to measure a network on.

    Args:
        cfg: a whole config.
        num_images: as many, evenly spread over the set; None: all.
        batch_size: images in a batch, less where their shapes differ.
        split: 'train', 'val' or 'test'.

    Attributes:
        total: images in the set.
        num_images: those of them that are used.
        read: those that the latest iteration has read.

    Raises:
        UsageError: the config names no images or no test pipeline, or files are missing.
    """

    def __init__(
        self,
        cfg: Mapping[str, Any],
        num_images: int | None,
        batch_size: int,
        split: str = "train",
    ) -> None:
        for name, number in (("num-images", num_images), ("batch-size", batch_size)):
            if number is not None and number < 1:
                raise UsageError(f"--{name} must be 1 or more, got {number}")
        check_folders(cfg, (split,))
        parts = open_parts(cfg, (split,))
        for part in parts:
            check_files(part.dataset, split)
        samples = [sample for part in parts for sample in part.samples]
        self.total = len(samples)
        self.num_images = min(num_images or self.total, self.total)
        chosen = [samples[i * self.total // self.num_images] for i in range(self.num_images)]
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmseg"):
            images = _Images(chosen, Compose(test_pipeline(cfg)))
        workers = (cfg.get(f"{split}_dataloader") or {}).get("num_workers", 0)
        self._loader = DataLoader(
            images, batch_size, num_workers=workers, collate_fn=pseudo_collate
        )
        self.read = 0
        test_cfg = (cfg["model"].get("test_cfg")) or {}
        self._window = None
        if test_cfg.get("mode") == "slide":
            self._window = tuple(test_cfg["crop_size"]), tuple(test_cfg["stride"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches of images of one shape, as a mm data preprocessor takes them."""
        self.read = 0
        for loaded in self._loader:
            self.read += len(loaded["inputs"])
            pairs = zip(loaded["inputs"], loaded["data_samples"], strict=True)
            for _, group in groupby(pairs, lambda pair: pair[0].shape):
                inputs, samples = map(list, zip(*group, strict=True))
                for y, x in self._windows(*inputs[0].shape[-2:]):
                    yield dict(inputs=[i[..., y, x] for i in inputs], data_samples=samples)

    def _windows(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        """The windows of mmseg's ``slide_inference``, or the whole image."""
        if self._window is None:
            yield slice(None), slice(None)
            return
        crop, stride = self._window
        sizes = (height, width)
        starts = [
            [
                max(min(i * step + size, total) - size, 0)
                for i in range(math.ceil(max(total - size, 0) / step) + 1)
            ]
            for size, step, total in zip(crop, stride, sizes, strict=True)
        ]
        for y in starts[0]:
            for x in starts[1]:
                yield slice(y, y + crop[0]), slice(x, x + crop[1])


class KeptBatches:
    """Batches that are loaded once and then stay in memory, as long as they fit into it.

    Args:
        batches: the same each time they are iterated.
        limit: bytes of image tensors; of more, all are loaded anew each time.
    """

    def __init__(self, batches: Iterable[Batch], limit: int = 4 << 30) -> None:
        self.batches, self.limit = batches, limit
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """The batches; kept at the end of the first time that reaches it."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for batch in self.batches:
            size += sum(image.nbytes for image in batch["inputs"])
            if size <= self.limit:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        if size <= self.limit:
            self._kept = kept


class _Images(Dataset):
    def __init__(self, samples: list[dict[str, Any]], pipeline: Compose) -> None:
        self.samples, self.pipeline = samples, pipeline

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.pipeline(copy.deepcopy(self.samples[index]))


def test_pipeline(cfg: Mapping[str, Any]) -> list[Any]:
    """The transforms of the test set without those that load labels."""
    for split in ("test", "val"):
        dataset = (cfg.get(f"{split}_dataloader") or {}).get("dataset") or {}
        while not dataset.get("pipeline") and ("dataset" in dataset or "datasets" in dataset):
            inner = dataset.get("dataset", dataset.get("datasets"))
            dataset = inner[0] if isinstance(inner, (list, tuple)) else inner
        if dataset.get("pipeline"):
            return [step for step in dataset["pipeline"] if "Annotation" not in str(step["type"])]
    raise UsageError("the config has no pipeline in test_dataloader or val_dataloader")
