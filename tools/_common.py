"""What the tools share: reading a config with its switches, one message for a mistake."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction

from mmbcn.errors import UsageError
from mmbcn.norms import norm_names, set_norm


def add_config_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every tool has."""
    parser.add_argument("config", help="config file")
    parser.add_argument("--norm", help=f"switch the normalization: {', '.join(norm_names())}")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="override settings of the config, e.g. train_dataloader.batch_size=1",
    )


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training and testing."""
    parser.add_argument("--work-dir", help="where to save (default: work_dirs/<config stem>)")
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="of jobs"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="set by launchers"
    )


def read_config(args: argparse.Namespace) -> Config:
    """The config, with --cfg-options and --norm applied."""
    if not Path(args.config).is_file():
        raise UsageError(f"there is no config {args.config}; configs/README.md lists those shipped")
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if args.norm:
        set_norm(cfg.model, args.norm)
    return cfg


def read_run_config(args: argparse.Namespace) -> Config:
    """The config of a training or test run by `NormRunner`."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    cfg.setdefault("runner_type", "mmbcn.NormRunner")
    return cfg


def run(main: Callable[[], None]) -> None:
    """Run a tool; a user's mistake ends it with one message."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells report it
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise SystemExit(
            f"error: {error}\nBatchNorm cannot train on one value per channel (DeepLabV3's image "
            "pooling at batch size 1): use --norm bcn, microbcn or gn, or a larger batch"
        ) from None
