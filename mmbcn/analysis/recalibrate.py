"""Recalibrates a checkpoint of an mm model over the training images of its config."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from mmbcn.analysis.borrowed import Progress
from mmbcn.analysis.calibration import calibrate
from mmbcn.analysis.changes import Calibration
from mmbcn.analysis.images import KeptBatches, TrainImages
from mmbcn.analysis.segmentor import load_segmentor, run_heads


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
    model, state = load_segmentor(cfg, checkpoint, source)
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
