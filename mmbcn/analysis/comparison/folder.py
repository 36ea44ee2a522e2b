"""The folder of a comparison: what is in it, and where."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmbcn.analysis.comparison.plan import Rules, Run
from mmbcn.analysis.comparison.settings import run_config, write_config
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
        if not self.result.is_file():
            return False
        return not retry_failed or json.loads(self.result.read_text())["status"] == "done"


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
    for run in runs:
        write_config(run_config(cfg, run), Place(out, run).config)
    known = read_comparison(out) if (out / _FILE).is_file() else dict(commands=[], runs=[])
    commands = [*known["commands"], *([command] if command not in known["commands"] else [])]
    planned = [asdict(run) for run in runs]
    content = dict(
        name=Path(source).stem,
        config=source,
        commands=commands,
        rules=rules.describe(),
        equal_rules=_equal_rules(cfg, rules, runs),
        runs=[*planned, *(run for run in known["runs"] if run not in planned)],
    )
    with whole_file(out / _FILE, "comparison") as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def read_comparison(out: Path) -> dict[str, Any]:
    """What `prepare` wrote.

    Raises:
        UsageError: nothing.
    """
    try:
        return json.loads((out / _FILE).read_text())
    except FileNotFoundError as error:
        raise UsageError(
            f"{out} holds no comparison ({_FILE} is missing): give the --out that its runs were "
            "trained with, or leave --report-only out to train them"
        ) from error


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
        rate = f"all of {', '.join(f'{lr:g}' for lr in rules.lrs)} for every norm and batch size"
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
