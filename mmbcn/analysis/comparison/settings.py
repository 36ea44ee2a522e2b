"""The config of each run of a comparison: the given one, with the run's settings and a record."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmbcn.analysis.comparison.plan import Run
from mmbcn.checkpoints.write import whole_file
from mmbcn.engine.config_check import check_keys
from mmbcn.errors import UsageError
from mmbcn.norms import set_norm

_POINTS = 100  # of the loss curve, at most
_SINGULARITIES = 20  # points of their curves, at most
_CHECKPOINTS = 10  # in the course of a run; the last one is kept
_PLACES = ("data_root", "num_workers", "persistent_workers", "work_dir")  # may differ per machine


def run_config(cfg: Config, run: Run) -> Config:
    """The config of one run, to be trained and tested as it is.

    The validation set is tested once, after the training. Schedules stretch with the number of
    iterations; their lower bounds follow the learning rate.

    Raises:
        UsageError: something is missing, or the norm does not fit the model.
    """
    for split in ("train", "val"):
        check_keys(cfg, split)
    new = copy.deepcopy(cfg)
    set_norm(new.model, run.norm)
    new.train_dataloader.batch_size = run.batch_size
    new.randomness = dict(new.get("randomness", {}), seed=run.seed)
    new.runner_type = "mmbcn.NormRunner"
    _set_schedule(new, run)
    _set_hooks(new, run.iters)
    new.test_dataloader, new.test_evaluator = new.val_dataloader, new.val_evaluator
    new.test_cfg = dict(type="TestLoop")
    new.val_dataloader = new.val_evaluator = new.val_cfg = None
    return new


def _set_schedule(cfg: Config, run: Run) -> None:
    optimizer = cfg.optim_wrapper.optimizer
    factor, old_iters = run.lr / optimizer.lr, cfg.train_cfg.max_iters

    def stretched(iters: int) -> int:
        return -(-iters * run.iters // old_iters)  # upwards: a short warm-up stays one

    cfg.train_cfg.max_iters = run.iters
    optimizer.lr = run.lr
    schedulers = cfg.get("param_scheduler") or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        for key in ("begin", "end", "T_max"):
            if key in scheduler:
                scheduler[key] = stretched(scheduler[key])
        if "milestones" in scheduler:
            scheduler.milestones = [stretched(point) for point in scheduler.milestones]
        if "eta_min" in scheduler:
            scheduler.eta_min *= factor


def _set_hooks(cfg: Config, iters: int) -> None:
    interval = max(1, iters // _POINTS)
    logger = dict(type="LoggerHook", interval=interval, log_metric_by_epoch=False)
    checkpoint = dict(
        type="CheckpointHook",
        by_epoch=False,
        interval=max(1, iters // _CHECKPOINTS),
        max_keep_ckpts=1,
    )
    singularity = dict(type="mmbcn.SingularityHook", interval=max(1, iters // _SINGULARITIES))
    own = dict(logger=logger, checkpoint=checkpoint, singularity=singularity)
    cfg.default_hooks = dict(cfg.get("default_hooks", {}), **own)
    # a point of the curve is the mean since the point before
    cfg.log_processor = dict(type="LogProcessor", by_epoch=False, window_size=interval)
    cfg.vis_backends = [dict(type="LocalVisBackend")]
    cfg.visualizer = dict(cfg.get("visualizer") or dict(type="Visualizer", name="visualizer"))
    cfg.visualizer["vis_backends"] = cfg.vis_backends
    hooks = list(cfg.get("custom_hooks") or [])
    for hook in (dict(type="mmbcn.NonFiniteHook"), dict(type="mmbcn.RecordHook")):
        if not any(other["type"] in (hook["type"], hook["type"][6:]) for other in hooks):
            hooks.append(hook)
    cfg.custom_hooks = hooks


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys in which two configs differ, besides where their data is and how it is loaded."""
    flat_a, flat_b = dict(_flat(_plain(a))), dict(_flat(_plain(b)))
    return sorted(k for k in {*flat_a, *flat_b} if flat_a.get(k) != flat_b.get(k))


def _plain(cfg: Mapping[str, Any]) -> Any:
    content = cfg._cfg_dict.to_dict() if isinstance(cfg, Config) else cfg
    return json.loads(json.dumps(content, default=str))  # tuples become lists


def _flat(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves, with their keys; without those that may differ from machine to machine."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if name in _PLACES:
            continue
        place = f"{key}.{name}" if key else str(name)
        if isinstance(value, (dict, list)) and value:
            yield from _flat(value, place)
        else:
            yield place, value


def check_config(cfg: Config, path: Path) -> bool:
    """Whether a run's config is there, the same to the letter.

    One that is there must be of the same settings.

    Raises:
        UsageError: it is of others, which are named, or cannot be read.
    """
    if not path.is_file():
        return False
    try:
        old = Config.fromfile(path)
    except Exception as error:  # it is Python: whatever a damaged file raises
        raise UsageError(
            f"cannot read {path} ({type(error).__name__}): remove its folder to train it anew"
        ) from error
    changed = differences(old, cfg)
    if changed:
        shown = ", ".join(changed[:8]) + (", ..." if len(changed) > 8 else "")
        raise UsageError(
            f"{path.parent} is of other settings: {shown}. Give another --out, or remove that "
            "folder to train it anew"
        )
    return _plain(old) == _plain(cfg)


def write_config(cfg: Config, path: Path) -> None:
    """Write a run's config; one that is there must be of the same settings.

    Raises:
        UsageError: it is of others; names them.
    """
    if check_config(cfg, path):
        return  # formatting takes its time
    with whole_file(path, "config") as part:
        part.write_text(cfg.pretty_text)
