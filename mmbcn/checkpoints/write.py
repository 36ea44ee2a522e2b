"""Writes files whole or not at all, whenever process, disk or machine stop.

Of a checkpoint, the same content gives the same bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mmbcn.errors import UsageError

PART = ".part"  # appended to the name of a file that is being written


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """Give a temporary path to write to, and move it to ``path`` once its content is on the disk.

    Args:
        path: where the file belongs, in a folder that is made; what is there is replaced in one
            step.
        what: of which kind the file is, for the message.

    Raises:
        UsageError: the system could not write (disk full, no permission, ...); ``path`` is as it
            was before.
    """
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if not isinstance(error, OSError):
            raise
        raise UsageError(
            f"could not write the {what} {path}: {error.strerror or error}. Files written before "
            "are untouched. Make room or repair access, then repeat the command (train.py: with "
            "--resume)"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write under a temporary name, renamed when it is complete.

    Args:
        content: what to save. Of it ``.safetensors`` takes ``"state_dict"``, and ``"meta"``: each
            value as JSON, as `read_checkpoint` reads it.
        path: of the file; its folder is made. ``.safetensors``, or anything else for
            ``torch.save``.

    Raises:
        UsageError: the path is a folder, the system could not write, or safetensors is not
            installed.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the file to write")
    with whole_file(path, "checkpoint") as part, part.open("wb") as file:
        if path.suffix == ".safetensors":
            file.write(_safetensors(content))
        else:
            torch.save(content, file)  # given a path, it would write the file's name too


def _safetensors(content: Mapping[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        raise UsageError(
            "writing .safetensors needs safetensors: pip install safetensors"
        ) from None
    meta = {str(k): json.dumps(v) for k, v in content.get("meta", {}).items()}
    state = {k: v.detach().clone().contiguous() for k, v in content["state_dict"].items()}
    written = save(state, {"format": "pt", **meta})
    return _sort_header(written)


def _sort_header(written: bytes) -> bytes:
    """Put the metadata, which safetensors writes in a random order, in the order of its keys.

    A file is the header's length (8 bytes, little endian), the header (JSON, padded by spaces to a
    multiple of 8), and the values: https://github.com/huggingface/safetensors#format
    """
    end = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(written[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + written[end:]
