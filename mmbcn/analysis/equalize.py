"""Equalizes a segmentor, and a checkpoint of one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmbcn.analysis.borrowed import evaluating
from mmbcn.analysis.segmentor import load_segmentor, run_heads
from mmbcn.equalization import Equalization, Equalizer
from mmbcn.errors import UsageError

_SIZE = 64  # of the image to run on
_TOLERANCE = 1e-5  # of outputs in float32, as a share of the largest one


def equalize_checkpoint(
    cfg: Config,
    checkpoint: Mapping[str, Any],
    source: str,
    c: float = 1.0,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, Any], Equalization, float]:
    """The weights of a checkpoint, equalized until nothing moves.

    Args:
        cfg: the config that the checkpoint was trained with.
        checkpoint: the content of a file; not changed.
        source: its name, for messages.
        c: see `Equalizer`.
        progress: see `Equalizer.converge`.

    Returns:
        A new checkpoint of weights and meta alone (what an optimizer remembers belongs to the old
        weights), what was done, and the largest difference of an output on a random image, as a
        share of the largest output.

    Raises:
        UsageError: the checkpoint is of another model, cannot be equalized, or its outputs changed.
    """
    model, state = load_segmentor(cfg, checkpoint, source, "cpu")  # GPUs may round to TF32
    if not any(key.startswith("auxiliary_head.") for key in state):
        model.auxiliary_head = None
    batch = _random_image(model)
    expected = _outputs(model, batch)
    done = segmentor_equalizer(model, c).converge(progress=progress)
    pairs = zip(_outputs(model, batch), expected, strict=True)
    error = max(((new - old).abs().max() / old.abs().max()).item() for new, old in pairs)
    if not error <= _TOLERANCE:
        raise UsageError(
            f"after equalization, outputs of {source} differ by up to {error:.1e} of the largest "
            f"one, more than {_TOLERANCE:.0e}: do its weights overflow float32?"
        )
    others = checkpoint if "state_dict" in checkpoint else {}
    meta = dict(others.get("meta") or dict(cfg=cfg.pretty_text))
    meta["equalized"] = f"c = {c:g}, {done.cycles} cycles"
    equalized = model.state_dict()
    state = {key: equalized[key].to(value) for key, value in state.items()}
    return {"meta": meta, "state_dict": state}, done, error


def segmentor_equalizer(model: nn.Module, c: float, ignore_norms: bool = False) -> Equalizer:
    """The `Equalizer` of a segmentor, with all its heads."""
    batch = _random_image(model)
    return Equalizer(model, lambda: run_heads(model, batch), c, ignore_norms)


def _random_image(model: nn.Module) -> dict[str, list[Tensor]]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    image = torch.randint(256, (3, _SIZE, _SIZE), dtype=torch.uint8, generator=generator)
    return dict(inputs=[image.to(device)])


def _outputs(model: nn.Module, batch: dict[str, list[Tensor]]) -> list[Tensor]:
    with evaluating(model):
        return run_heads(model, batch)
