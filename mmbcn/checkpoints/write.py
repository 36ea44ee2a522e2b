"""Writes checkpoint files, whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmbcn.errors import UsageError


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write under a temporary name, renamed when it is complete.

    Args:
        content: what to save. Of it ``.safetensors`` takes ``"state_dict"``, and ``"meta"``: each
            value as JSON, as `read_checkpoint` reads it.
        path: of the file; its folder is made. ``.safetensors``, or anything else for
            ``torch.save``.

    Raises:
        UsageError: the path is a folder, or safetensors is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            _save_safetensors(content, part)
        else:
            torch.save(content, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _save_safetensors(content: Mapping[str, Any], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        raise UsageError(
            f"writing {path.suffix} needs safetensors: pip install safetensors"
        ) from None
    meta = {str(k): json.dumps(v) for k, v in content.get("meta", {}).items()}
    state = {k: v.detach().clone().contiguous() for k, v in content["state_dict"].items()}
    save_file(state, str(path), {"format": "pt", **meta})
