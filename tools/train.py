"""Train a model from a config.

Example:
    python tools/train.py configs/deeplabv3_r101_bcn.py --norm bcn_ws
"""

import argparse

from _common import add_config_args, add_load_args, add_run_args, read_run_config, run
from mmengine.device import get_device
from mmengine.registry import RUNNERS

from mmbcn.engine.config_check import check_keys
from mmbcn.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_args(parser)
    add_run_args(parser)
    add_load_args(parser)
    parser.add_argument("--resume", action="store_true", help="from the work_dir's last checkpoint")
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision (on CPUs in bfloat16, which is slow)"
    )
    parser.add_argument("--seed", type=int, help="of weights, data order and augmentation")
    return parser.parse_args()


def main() -> None:
    """Train."""
    args = parse_args()
    cfg = read_run_config(args)
    check_keys(cfg, "train")
    cfg.resume = args.resume or cfg.get("resume", False)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get("randomness", {}), seed=args.seed)
    if args.amp and cfg.optim_wrapper.type != "AmpOptimWrapper":
        if cfg.optim_wrapper.type != "OptimWrapper":
            raise UsageError(
                f"--amp needs optim_wrapper.type 'OptimWrapper', got {cfg.optim_wrapper.type!r}"
            )
        if get_device() == "cpu":
            cfg.optim_wrapper.type = "mmbcn.BFloat16OptimWrapper"
        else:
            cfg.optim_wrapper.type = "AmpOptimWrapper"
            cfg.optim_wrapper.loss_scale = "dynamic"
    RUNNERS.build(cfg).train()


if __name__ == "__main__":
    run(main)
