"""Builds, loads and runs the segmentor of a config, to be measured."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

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


def run_heads(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a segmentor on images, its auxiliary heads too, which tests leave out.

    Args:
        model: the segmentor.
        batch: ``inputs``, a list of images of one size, as its data preprocessor takes them, and
            perhaps ``data_samples``.

    Returns:
        The heads' outputs; where the decode head is none of mmseg's, the predictions.
    """
    data = model.data_preprocessor(batch, False)
    heads = [getattr(model, "decode_head", None)]
    if not isinstance(heads[0], BaseDecodeHead):
        return model(**data, mode="predict")
    spare = getattr(model, "auxiliary_head", None)
    heads += spare if isinstance(spare, nn.ModuleList) else [spare]
    features = model.extract_feat(data["inputs"])
    return [head(features) for head in heads if head is not None]
