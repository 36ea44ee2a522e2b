"""The mIoU of an exported file, by mmseg's metric."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from mmbcn.analysis.evaluation import TestSet
from mmbcn.deploy.formats import Run
from mmbcn.deploy.verify import pictures_at


class FileModel(nn.Module):
    """A file in the place of the segmentor that it was made of.

    Args:
        model: the segmentor; resizes the logits to the truth's size.
        run: runs the file.
        size: height and width that the file takes; None: any.
    """

    def __init__(self, model: nn.Module, run: Run, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.run, self.size = model, run, size

    def test_step(self, data: Mapping[str, Any]) -> list[Any]:
        """Predictions, as mmseg's models give them."""
        samples = []
        for image, sample in zip(data["inputs"], data["data_samples"], strict=True):
            height, width = self.size or image.shape[1:]
            (picture,) = pictures_at([image], height, width)
            logits = torch.from_numpy(np.asarray(self.run(picture[None])[1]))
            samples += self.model.postprocess_result(logits, [sample])
        return samples


def validation_set(cfg: Config) -> TestSet:
    """The validation split of a config, to measure on.

    Raises:
        UsageError: there is none, or files are missing.
    """
    split = dict(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator)
    return TestSet({**cfg, **split})
