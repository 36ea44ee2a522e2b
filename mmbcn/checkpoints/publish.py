"""Makes of a training checkpoint the file to publish: weights, and what is needed to use them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmbcn.checkpoints.key_maps import find_state
from mmbcn.checkpoints.write import write_checkpoint

# Of mmengine's meta not: seed, experiment_name, time and hook_msgs (paths on the trainer's machine)
_KEPT = (
    "cfg",
    "dataset_meta",
    "CLASSES",  # mm 0.x
    "PALETTE",
    "iter",
    "epoch",
    "mmengine_version",
    "mmbcn_version",
    "converted_from",
    "averaged",
    "calibrated",
)
_BLOCK = 1 << 20


def publish(checkpoint: Mapping[str, Any], source: str, path: Path) -> Path:
    """Write weights and needed meta under a name that ends in their hash, as OpenMMLab does.

    ``bcn.pth`` becomes ``bcn-0123abcd.pth``, with the first 8 digits of the file's SHA-256, which
    ``torch.hub.load_state_dict_from_url(check_hash=True)`` compares. The same checkpoint gives the
    same file. It holds tensors and plain Python only, so that
    ``torch.load(..., weights_only=True)`` reads it without mmengine.

    Args:
        checkpoint: the content of a file. Of one that mmengine's ``EMAHook`` saved, the averaged
            weights are published, which stand under ``state_dict``.
        source: its name, for messages.
        path: where to write; ``.safetensors``, or ``.pth``.

    Returns:
        The path of the file.

    Raises:
        UsageError: there are no weights, or safetensors is not installed.
    """
    meta = {k: _plain(v) for k, v in (checkpoint.get("meta") or {}).items() if k in _KEPT}
    state = {k: _own(v) for k, v in find_state(checkpoint, source).items()}
    unnamed = path.with_name(f".{path.stem}-unnamed{path.suffix}")
    write_checkpoint({"meta": meta, "state_dict": state}, unnamed)
    try:
        named = path.with_name(f"{path.stem}-{_sha256(unnamed)[:8]}{path.suffix}")
        return unnamed.replace(named)
    finally:
        unnamed.unlink(missing_ok=True)


def _own(value: Tensor) -> Tensor:
    """A tensor that shares its memory with none, laid out in the order of its indices."""
    return value.detach().clone().contiguous()


def _plain(value: Any) -> Any:
    """The value in Python's own types."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
