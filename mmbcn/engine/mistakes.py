"""Turns what mm frameworks raise on a user's mistake, deep inside, into one message."""

import errno
import inspect
import re
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

from mmbcn.engine.data_check import no_images
from mmbcn.errors import UsageError, nearest

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_SETTINGS = re.compile(r"\w+\.__init__\(\) (?:missing|got an unexpected .*'(\w+)')")
_BUILDING = ("build_from_cfg", "build_dataloader")  # functions that read a config
_UNKNOWN = re.compile(r"(\S+) is not in the .+ registry|Cannot find \S+ in registry")
_PACKAGES = ("mmbcn", "mmcv", "mmengine", "mmseg", "torch")  # whose classes check their settings
_SHOWN = 300  # characters of settings


@contextmanager
def explained() -> Iterator[None]:
    """Raise a `UsageError` in place of an error that a config or a command caused."""
    try:
        yield
    except UsageError as error:
        inside = str(error).rpartition("mmbcn.errors.UsageError: ")[2].strip()
        raise UsageError(inside) from error  # without the traceback of a worker process
    except Exception as error:
        text = _explain(error)
        if text is None:
            raise
        raise UsageError(text) from error


def _explain(error: Exception) -> str | None:
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    frames = list(_frames(error.__traceback__))
    if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
        return (  # for a log or a picture: checkpoints have a message of their own
            f"{error.strerror}. Checkpoints are untouched. Make room where the work_dir is, then "
            "repeat the command (train.py: with --resume)"
        )
    if "more than 1 value per channel" in text:
        return (
            f"{text}\nBatchNorm cannot train on one value per channel (DeepLabV3's image pooling "
            "at batch size 1): use --norm bcn, microbcn or gn, or a larger batch"
        )
    if "stack expects each tensor to be equal size" in text:
        return (
            f"the images of a batch differ in size: {text}. A batch is padded to "
            "model.data_preprocessor.size (or size_divisor), which should be the crop size"
        )
    module = frames[-1].f_globals.get("__name__", "")
    if module.startswith("mmbcn.layers"):
        return text  # our own checks say what to do
    if "need at least one array to concatenate" in text and "self" in frames[-1].f_locals:
        return no_images(frames[-1].f_locals["self"])  # mmengine's way to say it
    if "None is not a callable" in text:  # mmengine's constructor of optimizers
        unset = [f for f in frames if f.f_locals.get("optimizer_cls", f) is None]
        return _unknown_type(unset[0].f_locals["optimizer_cfg"]["type"], unset) if unset else None
    unknown = _UNKNOWN.match(text)
    if unknown:
        # mmcv's own message says "None" where the name should be
        return _unknown_type(unknown[1] or frames[-1].f_locals.get("layer_type", "?"), frames)
    return _unfit(error, text, frames) or _unfit_head(frames) or _unfit_runner(text, frames[-1])


def _frames(link: TracebackType | None) -> Iterator[Any]:
    while link:
        yield link.tb_frame
        link = link.tb_next


def _unknown_type(name: str, frames: list[Any]) -> str:
    registry = next(f.f_locals["registry"] for f in reversed(frames) if "registry" in f.f_locals)
    root = registry.root
    known = [key for r in (registry, root, *root.children.values()) for key in r.module_dict]
    scope, dot, short = name.rpartition(".")
    if short in known:
        return (
            f"the config's type={name!r} is known, but in another scope: is it default_scope that "
            "is misspelt or missing? Or write the scope before the type, as in 'mmseg.ASPPHead'"
        )
    return (
        f"the config has type={name!r}, but no {registry.name} is registered under that name"
        f"{nearest(short, known, scope + dot)} Check its spelling, or import the module that "
        "registers it: custom_imports=dict(imports=['its.module'])"
    )


def _unfit(error: Exception, text: str, frames: list[Any]) -> str | None:
    """Settings that a class refuses while it is built from them."""
    building = [frame.f_locals for frame in frames if frame.f_code.co_name in _BUILDING]
    if not building:
        return None
    local = building[-1]
    cls = local.get("obj_cls", DataLoader if "dataloader_cfg" in local else None)
    if cls is None:  # not even a type is given
        return f"a part of the config cannot be built: {text}. Is the key before it misspelt?"
    match = _SETTINGS.match(text)
    if not match and getattr(cls, "__module__", "").partition(".")[0] not in _PACKAGES:
        return None  # a class of the user's, which may have a fault
    if not text:  # of an assertion
        text = traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
    name = local.get("obj_type", cls)
    name = name if isinstance(name, str) else name.__name__
    args = local.get("args", local.get("dataloader_cfg"))
    given = ", ".join(f"{k}={v!r}" for k, v in args.items() if _is_plain(v))
    known = [key for base in getattr(cls, "__mro__", [cls]) for key in _parameters(base)]
    hint = nearest(match[1] or "", known) if match else "."
    return (
        f"the config's settings do not fit {name}: {text.rstrip('.')}{hint} They are: "
        f"{textwrap.shorten(given, _SHOWN)}"
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, list, tuple))


def _parameters(cls: type) -> list[str]:
    try:
        return list(inspect.signature(cls).parameters)
    except (TypeError, ValueError):  # one in C
        return []


def _unfit_head(frames: list[Any]) -> str | None:
    """A head that takes other channels than the backbone gives."""
    for local in (frame.f_locals for frame in frames):
        head, stages = local.get("self"), local.get("inputs")
        index = getattr(head, "in_index", None)
        if not isinstance(index, int) or not isinstance(stages, (list, tuple)):
            continue
        channels = [stage.shape[1] for stage in stages]
        if channels[index : index + 1] != [head.in_channels]:
            return (
                f"{type(head).__name__} has in_index={index} and in_channels={head.in_channels}, "
                f"but the backbone's stages 0 to {len(channels) - 1} have "
                f"{', '.join(map(str, channels))} channels: set both, of decode_head and "
                "auxiliary_head, to fit the backbone"
            )
    return None


def _unfit_runner(text: str, frame: Any) -> str | None:
    """Settings that mmengine's runner refuses itself; not what a hook raises."""
    inside = frame.f_globals.get("__name__") == "mmengine.runner.runner"
    if not inside or frame.f_code.co_name == "call_hook":
        return None
    return f"the config does not fit the runner: {textwrap.shorten(text, _SHOWN)}"
