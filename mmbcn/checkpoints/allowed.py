"""Which classes a checkpoint may name: torch's own, and those that mmengine stores.

What is allowed can hold data only. ``getattr``, by which mmengine's ``HistoryBuffer`` names its
statistics, stands for a function that gives these and nothing else.
"""

import pickle
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch._weights_only_unpickler import _get_allowed_globals

_NUMPY_CORE = "numpy._core" if find_spec("numpy._core") else "numpy.core"
_OF_MMENGINE = (
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
    ("mmengine.config.config", "ConfigDict"),
)
_STATISTICS = ("min", "max", "mean", "current")
_BY_TORCH = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")  # since torch 2.6


def _history_method(owner: type, name: str) -> Any:
    """Stands for ``getattr`` in a file."""
    if getattr(owner, "__name__", "") != "HistoryBuffer" or name not in _STATISTICS:
        owner = getattr(owner, "__qualname__", owner)
        raise pickle.UnpicklingError(f"GLOBAL {owner}.{name} was not an allowed global")
    return getattr(owner, name)


@cache
def allowed_globals() -> dict[str, Any]:
    """What may be named beyond torch's own, as name in the file -> object."""
    multiarray = import_module(f"{_NUMPY_CORE}.multiarray")
    found: dict[str, Any] = {"numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray}
    for core in ("numpy.core", "numpy._core"):  # written by numpy 1 or 2
        for name in ("_reconstruct", "scalar"):
            found[f"{core}.multiarray.{name}"] = getattr(multiarray, name)
    for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?US":  # no objects
        cls = type(np.dtype(kind))
        found[f"{cls.__module__}.{cls.__qualname__}"] = cls
    found["_codecs.encode"] = import_module("_codecs").encode
    if find_spec("mmengine"):
        for module, name in _OF_MMENGINE:
            found[f"{module}.{name}"] = getattr(import_module(module), name)
        found["builtins.getattr"] = _history_method
    return found


def allow_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's checkpoints, in this process.

    So those who load with mmengine itself can read our checkpoints too: the classic mmengine
    0.10.7 allows nothing. Does nothing before torch 2.6, where mmengine reads everything.
    """
    if _BY_TORCH:
        torch.serialization.add_safe_globals([(v, k) for k, v in allowed_globals().items()])


class _Unpickler(pickle.Unpickler):
    """The same restriction for torch before 2.6, which cannot be told what to allow."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("__builtin__.", "builtins.")
        known = {**_get_allowed_globals(), **allowed_globals()}
        if path not in known:
            raise pickle.UnpicklingError(f"GLOBAL {path} was not an allowed global")
        return known[path]


_RESTRICTED = SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


def safe_load(path: str | Path, map_location: Any) -> Any:
    """``torch.load`` that builds nothing but data.

    Raises:
        pickle.UnpicklingError: the file names something else.
    """
    if not _BY_TORCH:
        return torch.load(path, map_location, pickle_module=_RESTRICTED, weights_only=False)
    allow_globals()
    return torch.load(path, map_location, weights_only=True)


def refused_globals(path: str | Path, error: Exception) -> list[str]:
    """The names for which `safe_load` raised ``error``; empty: it was for something else."""
    first = re.search(r"GLOBAL (.+?) (?:was not an allowed|whose module)", str(error))
    if not first:
        return []
    names = {first[1]}
    if _BY_TORCH:
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (ValueError, RuntimeError):  # a file in torch's format before 1.6
            unsafe = []
        names |= {name.removeprefix("builtins.") for name in unsafe}
    return sorted(names)
