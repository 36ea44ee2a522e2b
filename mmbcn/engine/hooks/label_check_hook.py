"""Stops on labels that are no class, before the loss fails on them or the metric drops them."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmbcn.errors import UsageError
from mmbcn.registry import HOOKS

_SHOWN = 10


def _head(runner: Any) -> torch.nn.Module | None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    head = getattr(getattr(model, "module", model), "decode_head", None)
    return head[-1] if isinstance(head, torch.nn.ModuleList) else head


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Check every label map that reaches the model; costs one comparison per pixel.

    Raises:
        UsageError: A label is neither a class nor the ignore index; names the file and values.
    """

    def _check(self, runner: Any, data_batch: dict[str, Any]) -> None:
        head = _head(runner)
        if head is None or not isinstance(data_batch, dict):
            return
        ignore = getattr(head, "ignore_index", None)
        ignore = 255 if ignore is None else ignore
        for sample in data_batch.get("data_samples") or ():
            if "gt_sem_seg" not in sample:
                continue
            label = sample.gt_sem_seg.data
            wrong = label[((label < 0) | (label >= head.num_classes)) & (label != ignore)]
            if wrong.numel():
                values = wrong.unique().tolist()
                more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
                raise UsageError(
                    f"{sample.get('seg_map_path', 'a label map')} has the label values "
                    f"{values[:_SHOWN]}{more}, but the model has the classes 0 to "
                    f"{head.num_classes - 1} (and {ignore} to ignore). Usual causes: label ids "
                    "where train ids are wanted, a colour or 0/255 mask, num_classes of another "
                    "dataset, or a reduce_zero_label that is missing"
                )

    def before_train(self, runner: Any) -> None:
        """Warn of a head for another number of classes than the dataset has."""
        head, data = _head(runner), runner.train_dataloader.dataset
        classes = getattr(data, "metainfo", {}).get("classes")
        if head is not None and classes and len(classes) != head.num_classes:
            runner.logger.warning(
                f"The dataset has {len(classes)} classes, but decode_head.num_classes is "
                f"{head.num_classes}: is it of another dataset?"
            )

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Check a training batch."""
        self._check(runner, data_batch)

    def before_val_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Check a validation batch."""
        self._check(runner, data_batch)

    def before_test_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Check a test batch."""
        self._check(runner, data_batch)
