"""Reads checkpoint files, without running what is in them.

A ``.pth`` file is a pickle: loading it may run any code. So files are read with
``weights_only=True``, extended by the classes that mmengine stores (`mmbcn.checkpoints.allowed`).
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmbcn.checkpoints.allowed import refused_globals, safe_load
from mmbcn.errors import UsageError

_AGAIN = "download or copy it again, or take an earlier checkpoint of the run"
_HEADS = (  # how a file begins -> what it is, and what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "an HTML or XML page, as a download that needs a login or a confirmation leaves it"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file, of Keras perhaps"),
)


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", trust_pickle: bool = False
) -> dict[str, Any]:
    """The content of a checkpoint file.

    Args:
        path: a file of ``torch.save``, or a ``.safetensors`` file.
        map_location: as in ``torch.load``; a device for ``.safetensors``.
        trust_pickle: let the file run any code, where it holds other classes than data.

    Returns:
        What was saved, a dict. A whole saved module gives ``{"state_dict": ...}`` (with
        ``trust_pickle``), and so does ``.safetensors``, whose metadata becomes ``"meta"``: each
        value decoded where it is JSON.

    Raises:
        UsageError: the file is missing, empty, cut short, something else than a checkpoint, or
            holds classes that are not allowed; says which, and what to do.
    """
    path = check_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, map_location)
    content = _load(path, map_location, trust_pickle)
    if isinstance(content, nn.Module):
        return {"state_dict": content.state_dict()}
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{path} is no checkpoint: expected a dict of weights, found a {type(content).__name__}"
        )
    return content


def check_file(path: str | Path) -> Path:
    """The path of a checkpoint, if there is a file and something in it.

    Raises:
        UsageError: there is none, or it is empty.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UsageError(f"the checkpoint {path} is a folder, not a file{_neighbours(path)}")
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}{_neighbours(path)}")
    if path.stat().st_size == 0:
        raise UsageError(f"the checkpoint {path} is empty (0 bytes): {_AGAIN}")
    return path


def _neighbours(path: Path) -> str:
    """The checkpoints beside a path that does not exist, or in the folder that it is."""
    folder = path if path.is_dir() else path.parent
    names = sorted(p.name for kind in ("*.pth", "*.pt", "*.safetensors") for p in folder.glob(kind))
    return f". {folder} has: {', '.join(names[-5:])}" if names else ""


def _load(path: Path, map_location: Any, trust_pickle: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other kinds of files, told below
            if trust_pickle:
                return torch.load(path, map_location, weights_only=False)
            return safe_load(path, map_location)
    except Exception as error:
        refused = refused_globals(path, error)
        if refused:
            raise UsageError(
                f"{path} was not loaded: beyond weights and what mmengine stores it holds "
                f"{', '.join(refused)}, and building these may run any code. If you trust whoever "
                "made the file: --trust-pickle (trust_pickle=True in a config or in Python)"
            ) from error
        if _is_out_of_memory(error):
            raise
        reason = _diagnose(path, error)
        raise UsageError(f"{path} is no checkpoint that can be read: {reason}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error)


def _diagnose(path: Path, error: Exception) -> str:
    """What is wrong with a file that ``torch.load`` failed on, and what to do."""
    with path.open("rb") as file:
        head = file.read(512)
    for start, what in _HEADS:
        if head.lstrip().startswith(start):
            return f"it is {what}"
    if head.startswith(b"PK"):
        return _diagnose_zip(path, error)
    if b"\0" not in head and _is_text(head):
        return f"it is a text file that begins with {head[:40].decode(errors='replace')!r}"
    if len(head) > 257 and head[257:262] == b"ustar":
        return "it is a tar archive: unpack it first"
    if head[8:9] == b"{" and b'"dtype"' in head:
        return "it is a safetensors file under another name: rename it to .safetensors"
    if head.startswith(b"\x80"):  # the pickle protocol
        if isinstance(error, (EOFError, pickle.UnpicklingError)) or "EOF" in str(error):
            return f"it is a pickle that ends too early, or is not of torch.save: {_AGAIN}"
        return f"it is a pickle, but not of torch.save ({_short(error)})"
    return f"its format is unknown, {_AGAIN} ({_short(error)})"


def _diagnose_zip(path: Path, error: Exception) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError):
        return f"it is cut short or damaged ({path.stat().st_size} bytes): {_AGAIN}"
    if damaged:
        return f"it is damaged ({damaged} has a wrong checksum): {_AGAIN}"
    if any(name.endswith("constants.pkl") for name in names):
        return "it is a TorchScript archive; save the module's state_dict() instead"
    if not any(name.endswith("data.pkl") for name in names):
        return f"it is a zip of something else ({', '.join(names[:3])}, ...): unpack it first"
    return _short(error)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a character cut at the end
            return False
        text = head[: error.start].decode()
    return all(c.isprintable() or c.isspace() for c in text)


def _short(error: Exception) -> str:
    """The last line of an error's message: torch's own advice stands before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Check the documentation")]
    return (lines[-1] if lines else type(error).__name__)[:200]


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise UsageError(f"reading {path} needs safetensors: pip install safetensors") from None
    device = "cpu" if map_location is None or callable(map_location) else str(map_location)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(
            f"{path} is no safetensors file that can be read: {_AGAIN} ({error})"
        ) from error
    return {"state_dict": state, "meta": {key: _decode(text) for key, text in metadata.items()}}


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
