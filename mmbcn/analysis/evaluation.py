"""The mIoU of a model on a config's test images, again and again."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, DefaultScope
from torch import nn
from torch.utils.data import DataLoader, Subset

from mmbcn.analysis.borrowed import evaluating
from mmbcn.analysis.images import KeptBatches
from mmbcn.engine.data_check import check_files, check_folders, watch_reading
from mmbcn.errors import UsageError

_LOGGER = "mmbcn.evaluation"


class TestSet:
    """A config's test images, labels and evaluator.

    Args:
        cfg: a whole config; its ``test_dataloader`` and ``test_evaluator`` are used.
        num_images: as many, evenly spread over the set; None: all.
        extra: a transform that is put behind the one that loads the image, as a config's dict.

    Attributes:
        total: images in the set.
        num_images: those of them that are used.

    Raises:
        UsageError: the config has no such set, or files are missing.
    """

    __test__ = False  # no test, whatever pytest thinks of the name

    def __init__(
        self,
        cfg: Mapping[str, Any],
        num_images: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if num_images is not None and num_images < 1:
            raise UsageError(f"the number of test images must be 1 or more, got {num_images}")
        loader = copy.deepcopy(cfg.get("test_dataloader"))
        if not loader or not cfg.get("test_evaluator"):
            raise UsageError("the config has no test_dataloader or no test_evaluator")
        check_folders(cfg, ("test",))
        if extra and not insert_transform(loader["dataset"], extra):
            raise UsageError("no test pipeline of the config has a transform that loads images")
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmseg"):
            dataset = DATASETS.build(loader["dataset"])
            self._evaluator = Evaluator(copy.deepcopy(cfg["test_evaluator"]))
        watch_reading(dataset)
        check_files(dataset, "test")
        self._evaluator.dataset_meta = dataset.metainfo
        self.total = len(dataset)
        self.num_images = min(num_images or self.total, self.total)
        chosen = [i * self.total // self.num_images for i in range(self.num_images)]
        self._batches = KeptBatches(
            DataLoader(
                Subset(dataset, chosen),
                loader.get("batch_size", 1),
                num_workers=loader.get("num_workers", 0),
                collate_fn=pseudo_collate,
            )
        )

    def miou(self, model: nn.Module, progress: Callable[[int, int], None] | None = None) -> float:
        """The mIoU in percent.

        Args:
            model: a segmentor with a data preprocessor.
            progress: called after each batch with the number of images done and of all.

        Raises:
            UsageError: the evaluator gives none.
        """
        if not MMLogger.check_instance_created(_LOGGER):  # the table of classes is not wanted here
            MMLogger.get_instance(_LOGGER, log_level="WARNING")
        done = 0
        with evaluating(model):
            for batch in self._batches:
                outputs = model.test_step(batch)
                self._evaluator.process(data_samples=outputs, data_batch=batch)
                done += len(outputs)
                if progress:
                    progress(done, self.num_images)
        metrics = self._evaluator.evaluate(self.num_images)
        if "mIoU" not in metrics:
            raise UsageError(
                f"the config's test_evaluator gives {', '.join(metrics) or 'nothing'}, not mIoU: "
                "use dict(type='IoUMetric', iou_metrics=['mIoU'])"
            )
        return float(metrics["mIoU"])


def insert_transform(dataset: Any, transform: dict[str, Any]) -> int:
    """Put a transform behind the loading of images in all pipelines of a dataset's config.

    Returns:
        The number of pipelines.
    """
    if isinstance(dataset, (list, tuple)):
        return sum(insert_transform(part, transform) for part in dataset)
    pipeline = dataset.get("pipeline") or []
    loading = [i for i, step in enumerate(pipeline) if "LoadImage" in str(step["type"])]
    for index in loading[:1]:
        pipeline.insert(index + 1, transform)
    inner = (dataset[key] for key in ("dataset", "datasets") if key in dataset)
    return len(loading[:1]) + sum(insert_transform(part, transform) for part in inner)
