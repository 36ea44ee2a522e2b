"""The folder of a comparison: what is in it, and where."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmbcn.analysis.comparison.plan import Rules, Run
from mmbcn.analysis.comparison.result import DONE, read_result
from mmbcn.analysis.comparison.settings import check_config, run_config, write_config
from mmbcn.analysis.files import check_folder
from mmbcn.checkpoints.write import whole_file
from mmbcn.engine.data_check import check_folders
from mmbcn.errors import UsageError

_FILE = "comparison.json"
_LR = dict(
    linear="linear in the batch size",
    sqrt="as the square root of the batch size",
    constant="the same for all batch sizes",
)


@dataclass(frozen=True)
class Place:
    """The files of one run: ``runs/<name>`` in the comparison's folder; ``work`` is the heavy part.

    Attributes:
        out: the comparison's folder.
        run: which run.
    """

    out: Path
    run: Run

    @property
    def folder(self) -> Path:
        """Of the run: its config, result and pictures."""
        return self.out / "runs" / self.run.name

    @property
    def work(self) -> Path:
        """Checkpoints and logs, which may be removed once there is a result."""
        return self.folder / "work"

    @property
    def config(self) -> Path:
        """The config that the run is trained and tested with."""
        return self.folder / "config.py"

    @property
    def result(self) -> Path:
        """What came of it; there once the run is finished."""
        return self.folder / "result.json"

    @property
    def checkpoint(self) -> Path:
        """Of the end of the training."""
        return self.work / f"iter_{self.run.iters}.pth"

    def is_finished(self, retry_failed: bool) -> bool:
        """Whether there is a result that is to stay."""
        result = read_result(self.result)
        return result is not None and (not retry_failed or result["status"] == DONE)


def prepare(
    cfg: Config, source: str, rules: Rules, runs: Sequence[Run], out: Path, command: str
) -> None:
    """Check that the data is there; write each run's config, and what the comparison is.

    Args:
        cfg: the config that all runs are derived from.
        source: its file.
        rules: of the comparison.
        runs: its plan.
        out: its folder. Runs that are there from another call belong to the comparison too.
        command: what was called.

    Raises:
        UsageError: something is missing or does not fit, or the folder is of another comparison.
    """
    check_folders(cfg, ("train", "val"))
    configs = {run: run_config(cfg, run) for run in runs}  # all of them, before any is written
    known = read_comparison(out) if (out / _FILE).is_file() else dict(commands=[], runs=[])
    others = _other_runs(known, runs, out)
    if others:
        _check_equal(known["rules"], rules, runs, others)
    for run in others:
        check_config(run_config(cfg, run), Place(out, run).config)
    check_folder(out)
    for run, own in configs.items():
        write_config(own, Place(out, run).config)
    commands = [*known["commands"], *([command] if command not in known["commands"] else [])]
    every = [*runs, *others]
    content = dict(
        name=Path(source).stem,
        config=source,
        commands=commands,
        rules=rules.describe(),
        equal_rules=_equal_rules(cfg, rules, every),
        runs=[asdict(run) for run in every],
    )
    with whole_file(out / _FILE, "comparison") as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def read_comparison(out: Path) -> dict[str, Any]:
    """What `prepare` wrote.

    Raises:
        UsageError: nothing, or it is damaged.
    """
    try:
        content = json.loads((out / _FILE).read_text())
        for run in content["runs"]:
            Run(**run)
        if not {"name", "commands", "rules", "equal_rules"} <= {*content}:
            raise ValueError("entries are missing")
        return content
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{out} holds no comparison ({_FILE} is missing): give the --out that its runs were "
            "trained with, or leave --report-only out to train them"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{out / _FILE} cannot be read ({error}). Remove it and repeat the command that the "
            "runs were trained with, without --report-only: finished runs stay"
        ) from error


def _other_runs(known: dict[str, Any], runs: Sequence[Run], out: Path) -> list[Run]:
    """The runs of earlier calls that are there and not planned now."""
    names = {run.name for run in runs}
    known_runs = [Run(**run) for run in known["runs"]]
    return [r for r in known_runs if r.name not in names and Place(out, r).config.is_file()]


def _check_equal(
    known: dict[str, Any], rules: Rules, runs: Sequence[Run], others: Sequence[Run]
) -> None:
    """Raise where new runs would not be comparable with those of earlier calls."""
    advice = "Give another --out"
    if known["equal"] != rules.equal:
        raise UsageError(
            f"the runs that are there have --equal {known['equal']}, now it is {rules.equal}. "
            f"{advice}"
        )
    for run in runs:
        for other in others:
            alike = rules.equal == "iterations" or run.batch_size == other.batch_size
            if alike and run.iters != other.iters:
                raise UsageError(
                    f"{other.name}, which is there, has {other.iters} iterations, {run.name} would "
                    f"have {run.iters}. {advice}, or the same --iters"
                )


def _equal_rules(cfg: Config, rules: Rules, runs: Sequence[Run]) -> dict[str, str]:
    """The rules in words."""
    base, optimizer = cfg.train_dataloader.batch_size, dict(cfg.optim_wrapper.optimizer)
    kind = optimizer.pop("type")
    settings = ", ".join(f"{k} {v}" for k, v in optimizer.items() if k != "lr")
    of_batch = {run.batch_size: run.iters for run in runs}
    lengths = ", ".join(f"{iters} at batch size {size}" for size, iters in of_batch.items())
    if rules.equal == "images":
        length = f"all runs see equally many images; iterations: {lengths}"
    else:
        length = f"all runs have {runs[0].iters} iterations; larger batches see more images"
    if rules.lrs:
        rates = ", ".join(f"{lr:g}" for lr in sorted({run.lr for run in runs}))
        rate = f"all of {rates}, for every norm and batch size"
    else:
        rates = {run.batch_size: f"{run.lr:g} at batch size {run.batch_size}" for run in runs}
        rate = f"{_LR[rules.lr_rule]}: {', '.join(rates.values())} (the config's: "
        rate += f"{cfg.optim_wrapper.optimizer.lr:g} at {base})"
    schedulers = cfg.get("param_scheduler") or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    return {
        "model": "the config's; only norm layers, and with _ws convolutions, are others",
        "weights": "each seed begins with the same weights for every norm and batch size",
        "data": "each seed brings the same images, crops and colours in the same order for every "
        "norm, and for every batch size, which cuts that order into batches",
        "length": length,
        "learning rate": rate,
        "schedule": ", then ".join(s["type"] for s in schedulers) + ", stretched to the iterations",
        "optimizer": f"{kind}, {settings}",
        "test": "the last weights, once, on the validation set; no checkpoint is picked",
    }
