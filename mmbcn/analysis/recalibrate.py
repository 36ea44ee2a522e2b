"""Recalibrates a checkpoint of an mm model over the training images of its config."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from mmbcn.analysis.calibration import Progress, calibrate
from mmbcn.analysis.changes import Calibration
from mmbcn.analysis.images import Batch, KeptBatches, TrainImages
from mmbcn.checkpoints.fit import fit_checkpoint


def recalibrate(
    cfg: Config,
    checkpoint: Mapping[str, Any],
    source: str,
    num_images: int | None = None,
    batch_size: int = 4,
    one_pass: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Calibration]:
    """The checkpoint with running statistics of the config's training images.

    Args:
        cfg: the config that the checkpoint was trained with.
        checkpoint: the content of a file; not changed.
        source: its name, for messages.
        num_images: as many, evenly spread over the set; None: all.
        batch_size: images at a time; with ``one_pass`` False the result does not depend on it.
        one_pass: all layers at once; see `calibrate`.
        progress: see `calibrate`.

    Returns:
        A new checkpoint with all that was in the old one, and what changed.

    Raises:
        UsageError: the checkpoint is of another model or norm, or has nothing to calibrate.
    """
    images = TrainImages(cfg, num_images, batch_size)
    model, state = load_model(cfg, checkpoint, source)
    done = calibrate(
        model, images if one_pass else KeptBatches(images), run_heads, one_pass, progress
    )
    others = checkpoint if "state_dict" in checkpoint else {}
    meta = dict(others.get("meta") or dict(cfg=cfg.pretty_text))
    meta["calibrated"] = f"{images.num_images} of {images.total} training images"
    if one_pass:
        meta["calibrated"] += ", in one pass"
    calibrated = model.state_dict()
    state = {k: calibrated[k].to(v) for k, v in state.items()}
    return {**others, "meta": meta, "state_dict": state}, done


def load_model(
    cfg: Config, checkpoint: Mapping[str, Any], source: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The config's model with a checkpoint's weights, and the entries that it took.

    Args:
        cfg: the config that the checkpoint was trained with.
        checkpoint: the content of a file.
        source: its name, for messages.

    Raises:
        UsageError: the checkpoint is of another model or norm.
    """
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmseg"):
        model = MODELS.build(cfg.model)
    optional = ("auxiliary_head",)
    state, _ = fit_checkpoint(
        model, checkpoint, source, config=cfg.pretty_text, exact=True, optional=optional
    )
    model.load_state_dict(state, strict=False)
    return model.to(get_device()), state


def run_heads(model: nn.Module, batch: Batch) -> None:
    """Run a segmentor on images, its auxiliary heads too, which tests leave out."""
    data = model.data_preprocessor(batch, False)
    heads = [getattr(model, "decode_head", None)]
    if not isinstance(heads[0], BaseDecodeHead):
        model(**data, mode="predict")
        return
    spare = getattr(model, "auxiliary_head", None)
    heads += spare if isinstance(spare, nn.ModuleList) else [spare]
    features = model.extract_feat(data["inputs"])
    for head in heads:
        if head is not None:
            head(features)
