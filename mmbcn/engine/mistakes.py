"""Turns what mm frameworks raise on a user's mistake, deep inside, into one message."""

import errno
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import TracebackType
from typing import Any

from mmbcn.engine.data_check import no_images
from mmbcn.errors import UsageError

_SETTINGS = re.compile(r"(\w+)\.__init__\(\) (?:missing|got an unexpected .*'(\w+)')")
_BUILDING = ("build_from_cfg", "build_dataloader")  # functions that read a config
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNKNOWN = re.compile(r"(\S+) is not in the .+ registry|Cannot find \S+ in registry")


@contextmanager
def explained() -> Iterator[None]:
    """Raise a `UsageError` in place of an error that a config or a command caused."""
    try:
        yield
    except UsageError as error:
        inside = str(error).rpartition("mmbcn.errors.UsageError: ")[2].strip()
        raise UsageError(inside) from error  # without the traceback of a worker process
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise UsageError(  # for a log or a picture: checkpoints have a message of their own
            f"{error.strerror}. Checkpoints are untouched. Make room where the work_dir is, then "
            "repeat the command (train.py: with --resume)"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        text = _explain(error)
        if text is None:
            raise
        raise UsageError(text) from error


def _explain(error: Exception) -> str | None:
    text = str(error.args[0]) if error.args else ""
    frames = list(_frames(error.__traceback__))
    if "more than 1 value per channel" in text:
        return (
            f"{text}\nBatchNorm cannot train on one value per channel (DeepLabV3's image pooling "
            "at batch size 1): use --norm bcn, microbcn or gn, or a larger batch"
        )
    module = frames[-1].f_globals.get("__name__", "")
    if module.startswith("mmbcn.layers"):
        return text  # our own checks say what to do
    if "need at least one array to concatenate" in text and "self" in frames[-1].f_locals:
        return no_images(frames[-1].f_locals["self"])  # mmengine's way to say it
    building = [f for f in frames if f.f_code.co_name in _BUILDING]
    if building and module.startswith("torch.utils.data"):
        return f"the data loader's settings: {text}"
    unknown, settings = _UNKNOWN.match(text), _SETTINGS.match(text)
    if "None is not a callable" in text:  # mmengine's constructor of optimizers
        unset = [f for f in frames if f.f_locals.get("optimizer_cls", f) is None]
        return _unknown_type(unset[0].f_locals["optimizer_cfg"]["type"], unset) if unset else None
    if unknown:
        # mmcv's own message says "None" where the name should be
        return _unknown_type(unknown[1] or frames[-1].f_locals.get("layer_type", "?"), frames)
    if building and settings:
        return _wrong_settings(text, *settings.groups(), frames)
    return None


def _frames(traceback: TracebackType | None) -> Iterator[Any]:
    while traceback:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _unknown_type(name: str, frames: list[Any]) -> str:
    registry = next(f.f_locals["registry"] for f in reversed(frames) if "registry" in f.f_locals)
    root = registry.root
    known = [key for r in (registry, root, *root.children.values()) for key in r.module_dict]
    scope, dot, short = name.rpartition(".")
    return (
        f"the config has type={name!r}, but no {registry.name} is registered under that name"
        f"{_nearest(short, known, scope + dot)} Check its spelling, or import the module that "
        "registers it: custom_imports=dict(imports=['its.module'])"
    )


def _wrong_settings(text: str, name: str, key: str | None, frames: list[Any]) -> str:
    built = [frame.f_locals.get("obj_cls") for frame in frames]
    classes = [cls for cls in (*built, frames[-1].f_globals.get(name)) if inspect.isclass(cls)]
    known = [p for cls in classes[-1:] for base in cls.__mro__ for p in _parameters(base)]
    return (
        f"the config's settings do not fit {name}: {text}{_nearest(key or '', known)} "
        f"Check the keys beside type={name!r}"
    )


def _parameters(cls: type) -> list[str]:
    try:
        return list(inspect.signature(cls).parameters)
    except (TypeError, ValueError):  # one in C
        return []


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    swapped = [other for other in known if sorted(other.lower()) == sorted(name.lower())]
    close = swapped or get_close_matches(name, known, n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else "."
