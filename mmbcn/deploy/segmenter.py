"""A segmentor as a file holds it: pictures in, labels out, with nothing to know about a config."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn

import mmbcn
from mmbcn.analysis.environment import commit
from mmbcn.analysis.relu_inputs import find_norms
from mmbcn.deploy.affine import is_standardized
from mmbcn.deploy.folding import fold
from mmbcn.errors import UsageError

INPUT, OUTPUTS = "images", ("labels", "logits")


class Segmenter(nn.Module):
    """From pictures, as OpenCV reads them, to the class of every pixel.

    The data preprocessor's normalization is inside, in float32 whatever the weights are. Images are
    taken whole: a config that tests on sliding windows does something else. The auxiliary heads
    are left out.

    Args:
        model: one of mmseg's segmentors; it stays as it is.
        folded: fold its norms (`mmbcn.deploy.fold`).
        half: compute in float16.

    Shape: (N, H, W, 3) uint8, blue, green, red -> labels (N, H, W) uint8 (int32 with more than 256
    classes), logits (N, C, H, W) float32

    Raises:
        UsageError: the data preprocessor pads images.
    """

    def __init__(self, model: nn.Module, folded: bool = False, half: bool = False) -> None:
        super().__init__()
        self.model = fold(model) if folded else _copy(model)
        self.model.auxiliary_head = None
        before = model.data_preprocessor
        if getattr(before, "test_cfg", None):
            raise UsageError(
                "the config's data_preprocessor pads images in tests (test_cfg), which exported "
                "files do not: remove it, --cfg-options model.data_preprocessor.test_cfg=None"
            )
        self.dtype = torch.float16 if half else torch.float32
        self.model.to(self.dtype).requires_grad_(False)
        self.flip = bool(before._channel_conversion)
        self.register_buffer("mean", getattr(before, "mean", torch.zeros(3, 1, 1)).clone())
        self.register_buffer("std", getattr(before, "std", torch.ones(3, 1, 1)).clone())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and logits."""
        x = images.permute(0, 3, 1, 2).float()
        x = (x.flip(1) if self.flip else x).sub(self.mean).div(self.std)
        meta = dict(img_shape=tuple(x.shape[2:]))
        logits = self.model.encode_decode(x.to(self.dtype), [meta]).float()
        if logits.shape[1] > 1:
            labels = logits.argmax(1)
        else:
            labels = logits[:, 0].sigmoid() > self.model.decode_head.threshold
        return labels.to(torch.uint8 if logits.shape[1] <= 256 else torch.int32), logits


def _copy(model: nn.Module) -> nn.Module:
    from copy import deepcopy

    return deepcopy(model).eval()


def file_metadata(
    cfg: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    size: tuple[int, int],
    **others: Any,
) -> dict[str, str]:
    """What a file says of itself, for who uses it without its config; values as JSON.

    Args:
        cfg: the whole config.
        checkpoint: the content of its file.
        model: the segmentor, before folding.
        size: height and width of the images that it was made for.
        **others: more of it.
    """
    meta = (checkpoint.get("meta") or {}).get("dataset_meta") or _dataset_meta(cfg)
    before = model.data_preprocessor
    content = dict(
        input="uint8 (N, H, W, 3), channels blue, green, red, not normalized",
        classes=list(meta.get("classes") or ()),
        palette=[list(map(int, colour)) for colour in meta.get("palette") or ()],  # red first
        height=size[0],
        width=size[1],
        mean=before.mean.flatten().tolist() if before._enable_normalize else [],
        std=before.std.flatten().tolist() if before._enable_normalize else [],
        norm=sorted({type(norm).__name__ for _, norm in find_norms(model)}),
        weight_standardization=any(map(is_standardized, model.modules())),
        mmbcn=mmbcn.__version__,
        commit=commit(),
        **others,
    )
    return {key: json.dumps(value) for key, value in content.items()}


def _dataset_meta(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    dataset = (cfg.get("val_dataloader") or {}).get("dataset") or {}
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmseg"):
        kind = DATASETS.get(dataset.get("type", ""))
    return {**getattr(kind, "METAINFO", {}), **(dataset.get("metainfo") or {})}
