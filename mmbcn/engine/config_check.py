"""Finds mistakes in a config before anything is built, and says what to do."""

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.runner import Runner

from mmbcn.errors import UsageError, nearest
from mmbcn.norms import find_class

_FOR_ALL = ("type", "requires_grad")  # what mmcv's build_norm_layer takes itself
_CHANNELS = ("num_features", "num_channels", "normalized_shape")  # what the network fills in
_BESIDE = (
    "allow_partial",
    "custom_imports",
    "find_unused_parameters",
    "runner_type",
    "trust_pickle",
)
_OF = dict(
    train=("train_dataloader", "train_cfg", "optim_wrapper"),
    val=("val_dataloader", "val_cfg", "val_evaluator"),
    test=("test_dataloader", "test_cfg", "test_evaluator"),
)


def check_keys(cfg: Mapping[str, Any], split: str | None = None) -> None:
    """Check that a config has the model, and what a split needs.

    Raises:
        UsageError: names the keys that are missing.
    """
    wanted = ("model",) if split is None else _OF[split]
    missing = [key for key in wanted if not cfg.get(key)]
    if missing:
        raise UsageError(
            f"the config has no {', '.join(missing)}; is it a fragment of a config, from _base_? "
            "configs/README.md lists those that can be run"
        )


def check_names(cfg: Mapping[str, Any]) -> None:
    """Check that no key of a config is a misspelt one of the runner's: nothing would read it.

    Raises:
        UsageError: names the key, and the one that was probably meant.
    """
    known = [*inspect.signature(Runner.__init__).parameters, *_BESIDE]
    for key in cfg:
        hint = nearest(key, known, cutoff=0.91)
        if key not in known and hint != ".":
            raise UsageError(f"the config has the key {key!r}, which nothing reads{hint}")


def check_not_sharded(cfg: Mapping[str, Any]) -> None:
    """Check that no sharding of the model is asked for, which mmengine's ``Runner`` cannot save.

    Raises:
        UsageError: the config has a ``strategy``, or wraps the model in FSDP.
    """
    wrapper = (cfg.get("model_wrapper_cfg") or {}).get("type")
    if cfg.get("strategy") or "FullySharded" in str(wrapper):
        key = "strategy" if cfg.get("strategy") else "model_wrapper_cfg"
        raise UsageError(
            f"NormRunner does not shard models, and the config has {key}={cfg[key]}. Remove the "
            "key to train with DistributedDataParallel, or use torch's fully_shard in a loop of "
            "your own: see docs/distributed.md"
        )


def check_work_dir(path: str) -> None:
    """Check that a run can write where it is to save; makes the folder.

    Raises:
        UsageError: says what the file system says.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write in the work_dir {path}: {error.strerror}. Give one that can be "
            "written to: --work-dir PATH (or work_dir in the config)"
        ) from error


def check_norm_cfgs(model_cfg: Mapping[str, Any]) -> None:
    """Check that every ``norm_cfg`` has the settings that its layer needs, and no unknown ones.

    Only for layers of this package and of torch: others may read further keys on the way.

    Raises:
        UsageError: names the place and the keys.
    """
    for norm_cfg, place in _norm_cfgs(model_cfg, "model"):
        cls = find_class(norm_cfg.get("type"))
        if cls is None or not cls.__module__.startswith(("mmbcn.", "torch.nn.")):
            continue
        parameters = inspect.signature(cls).parameters
        known = [*_FOR_ALL, *parameters]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
            continue
        needed = [key for key, p in parameters.items() if p.default is p.empty]
        missing = [key for key in needed if key not in (*_CHANNELS, *norm_cfg)]
        if missing:
            raise UsageError(f"{place} needs {', '.join(missing)} for {cls.__name__}")
        for key in norm_cfg:
            if key not in known:
                raise UsageError(
                    f"{place} has the unknown key {key!r}{nearest(key, known)} "
                    f"{cls.__name__} knows: {', '.join(known)}"
                )


def _norm_cfgs(node: Any, place: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _norm_cfgs(item, f"{place}[{i}]")
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key == "norm_cfg":
                cfgs = value if isinstance(value, list) else [value]
                yield from ((c, f"{place}.{key}") for c in cfgs if isinstance(c, Mapping))
            else:
                yield from _norm_cfgs(value, f"{place}.{key}")
