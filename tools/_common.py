"""What the tools share: reading a config with its switches, one message for a mistake."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmbcn.engine.config_check import check_keys
from mmbcn.errors import UsageError
from mmbcn.norms import norm_names, set_norm

# of each launcher, a variable that its processes have
_RANK = dict(pytorch="RANK", slurm="SLURM_PROCID", mpi="OMPI_COMM_WORLD_LOCAL_RANK")


class _Overrides(DictAction):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        wrong = [text for text in args[1] if "=" not in text]
        if wrong:
            parser.error(
                f"--cfg-options takes KEY=VALUE, without spaces around =; got {wrong[0]!r}"
            )
        try:
            super().__call__(parser, *args, **kwargs)
        except (AssertionError, RecursionError):
            parser.error(
                f"--cfg-options cannot read {' '.join(args[1])}: give lists as KEY=[A,B], and the "
                "entries of a dict one by one, KEY.ENTRY=VALUE"
            )


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a tool's docstring, up to its examples."""
    return argparse.ArgumentParser(
        description=doc.partition("\n\nExample")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config_args(
    parser: argparse.ArgumentParser, name: str = "config", required: bool = True
) -> None:
    """Add the arguments that most tools have; ``name`` may be an option, ``--config``."""
    needed = {"required": required} if name.startswith("-") else {}
    parser.add_argument(name, help="config file", **needed)
    parser.add_argument("--norm", help=f"switch the normalization: {', '.join(norm_names())}")
    add_override_arg(parser)


def add_override_arg(parser: argparse.ArgumentParser) -> None:
    """Add the argument that overrides settings of the config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Overrides,
        metavar="KEY=VALUE",
        help="override settings of the config, e.g. train_dataloader.batch_size=1",
    )


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training and testing."""
    parser.add_argument("--work-dir", help="where to save (default: work_dirs/<config stem>)")
    parser.add_argument("--launcher", choices=["none", *_RANK], default="none", help="of jobs")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="set by launchers"
    )


def add_load_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of loading checkpoints."""
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="load what matches of a checkpoint that does not fit, instead of stopping",
    )
    add_trust_arg(parser)


def add_trust_arg(parser: argparse.ArgumentParser) -> None:
    """Add the argument of reading checkpoints."""
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read a checkpoint that holds more than data: it may run any code",
    )


def read_config(args: argparse.Namespace) -> Config:
    """The config, with --cfg-options and --norm applied."""
    if not Path(args.config).is_file():
        raise UsageError(f"there is no config {args.config}; configs/README.md lists those shipped")
    try:
        cfg = Config.fromfile(args.config)
    except (OSError, SyntaxError) as error:  # no Python, or a _base_ that is not there
        raise UsageError(f"cannot read the config {args.config}: {error}") from error
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except (KeyError, TypeError) as error:
        raise UsageError(f"--cfg-options does not fit the config: {error.args[0]}") from error
    if getattr(args, "norm", None):
        check_keys(cfg)
        set_norm(cfg.model, args.norm)
    return cfg


def read_run_config(args: argparse.Namespace) -> Config:
    """The config of a training or test run by `NormRunner`."""
    if args.launcher != "none" and _RANK[args.launcher] not in os.environ:
        raise UsageError(
            f"--launcher {args.launcher} is for processes that torchrun, srun or mpirun starts: "
            "tools/dist_train.sh CONFIG NUM_GPUS (or dist_test.sh), tools/slurm_train.sh. For one "
            "process no --launcher"
        )
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    cfg.setdefault("runner_type", "mmbcn.NormRunner")
    for key in ("allow_partial", "trust_pickle"):
        if getattr(args, key):
            cfg[key] = True
    return cfg


def check_device(name: str) -> str:
    """The device, if it is there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar, and what moves it: called with how many are done and how many there are, if known."""
    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn(f"{{task.completed}} of {{task.total}} {unit}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run(main: Callable[[], None]) -> None:
    """Run a tool; a user's mistake ends it with one message."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells report it
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
