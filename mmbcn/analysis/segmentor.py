"""Builds, loads and runs the segmentor of a config, to be measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmbcn.checkpoints.fit import fit_checkpoint


def load_segmentor(
    cfg: Config, checkpoint: Mapping[str, Any], source: str, device: str | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a config with the weights of a checkpoint, and what was loaded.

    Args:
        cfg: the config that the checkpoint was trained with.
        checkpoint: the content of a file. Auxiliary heads may be missing.
        source: its name, for messages.
        device: where the model goes; None: mmengine's choice.

    Raises:
        UsageError: the checkpoint is of another model or norm.
    """
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmseg"):
        model = MODELS.build(cfg.model)
    optional = ("auxiliary_head",)
    text = cfg.pretty_text
    rules = dict(exact=True, optional=optional, allow_partial=None)
    state, _ = fit_checkpoint(model, checkpoint, source, config=text, **rules)
    model.load_state_dict(state, strict=False)
    return model.to(device or get_device()), state


def run_heads(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """Run a segmentor on images, its auxiliary heads too, which tests leave out.

    Args:
        model: the segmentor.
        batch: ``inputs``, a list of images of one size, as its data preprocessor takes them, and
            perhaps ``data_samples``.

    Returns:
        The heads' outputs, of a cascade those of each stage; where a decode head is none of
        mmseg's, the tensors of the predictions.
    """
    data = model.data_preprocessor(batch, False)
    stages = _heads(getattr(model, "decode_head", None))
    if not stages or not all(isinstance(head, BaseDecodeHead) for head in stages):
        return list(_tensors(model(**data, mode="predict")))
    images = data["inputs"]
    features = model.extract_feat(images)
    outputs = [stages[0](features)]
    for head in stages[1:-1]:
        outputs.append(head(features, outputs[-1]))
    if len(stages) > 1:  # as mmseg does: PointHead can do no other
        metas = [dict(img_shape=images.shape[2:])] * len(images)
        outputs.append(stages[-1].predict(features, outputs[-1], metas, model.test_cfg))
    outputs += [head(features) for head in _heads(getattr(model, "auxiliary_head", None))]
    return list(_tensors(outputs))


def _heads(head: nn.Module | None) -> list[nn.Module]:
    if head is None:
        return []
    return [*head] if isinstance(head, nn.ModuleList) else [head]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for value in tree_leaves(outputs):
        if isinstance(value, BaseDataElement):
            yield from _tensors(value.values())
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value
