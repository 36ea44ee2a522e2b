"""A data preprocessor that shows each image a second time, with the amplitude of another.

Paper: Chen et al. 2021, https://arxiv.org/abs/2108.08487 (APR-P)
"""

from typing import Any

import torch
from mmseg.models import SegDataPreProcessor

from mmbcn.errors import UsageError
from mmbcn.ops.recombination import recombine
from mmbcn.registry import MODELS


@MODELS.register_module()
class APRPairDataPreProcessor(SegDataPreProcessor):
    """mmseg's ``SegDataPreProcessor``; in training the batch becomes cat[x, x~].

    With probability ``prob``, drawn for each batch, x~ has the phase of x and the amplitudes of the
    images of the batch in a random order; else it is x again. Each x~ has the labels of the x whose
    phase it has. The exchange is the last step: on normalized and padded images. ::

        model = dict(data_preprocessor=dict(type="mmbcn.APRPairDataPreProcessor"))

    A step takes the time and memory of a batch twice as large. mmseg's losses are means over all
    pixels, so the loss is the mean over both halves; the authors add the halves, as twice the loss
    weight would do. Tests are as with ``SegDataPreProcessor``.

    Args:
        prob: of the exchange; the authors' code has 0.6 for CIFAR and 0.5 for ImageNet.
        per_channel: see `mmbcn.ops.recombination.recombine`.
        **kwargs: as for ``SegDataPreProcessor``.

    Raises:
        UsageError: ``prob`` is no probability; in training, a batch of a single image, which has
            no other whose amplitude it could take.
    """

    def __init__(self, prob: float = 0.5, per_channel: bool = False, **kwargs: Any) -> None:
        if not 0 <= prob <= 1:
            raise UsageError(f"APRPairDataPreProcessor expects prob between 0 and 1, got {prob}")
        super().__init__(**kwargs)
        self.prob, self.per_channel = prob, per_channel

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Normalize and pad as ``SegDataPreProcessor`` does, then double the batch in training."""
        data = super().forward(data, training)
        if not training:
            return data
        x = data["inputs"]
        if len(x) < 2:
            raise UsageError(
                "APRPairDataPreProcessor expects batches of 2 images or more in training, got 1, "
                "which has no other to take the amplitude of: raise train_dataloader.batch_size "
                "(an incomplete last batch: drop_last=True), or use the transform mmbcn.APRSingle"
            )
        mixed = x
        if torch.rand(()) < self.prob:
            mixed = recombine(x, x[torch.randperm(len(x))], self.per_channel)
        samples = data["data_samples"]
        data["inputs"] = torch.cat([x, mixed])
        data["data_samples"] = [*samples, *(sample.clone() for sample in samples)]
        return data
