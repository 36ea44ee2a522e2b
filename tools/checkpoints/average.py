"""Average the weights of several checkpoints, or take those that EMAHook averaged.

Sums are in float64. Averaged weights need new running statistics: with --config they are measured
on the config's training images (see recalibrate.py).

Example:
    python tools/checkpoints/average.py iter_18000.pth iter_20000.pth --out avg.pth --config CONFIG
"""

import sys
from pathlib import Path

sys.path.pop(0)  # else inspect.py, beside this file, hides Python's own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Iterator
from typing import Any

from _calibration import add_calibration_args, run_calibration
from _common import add_config_args, add_trust_arg, make_parser, read_config, run

from mmbcn.checkpoints.average import average_checkpoints, holds_ema
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.inspect import has_statistics
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.checkpoints.write import write_checkpoint


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="checkpoint files or URLs")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--ema", action="store_true", help="insist on weights averaged by EMAHook; one file will do"
    )
    group = parser.add_argument_group("recalibration of the running statistics")
    add_config_args(group, "--config", required=False)
    add_calibration_args(group)
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Average, calibrate, write."""
    args = parse_args()
    cfg = read_config(args) if args.config else None
    checkpoint = average_checkpoints(read(args), args.ema)
    if cfg is not None:
        checkpoint = run_calibration(args, cfg, checkpoint, "the average")
    elif has_statistics(checkpoint["state_dict"]):
        print(
            "warning: the running statistics are averages too, and are not those of the averaged "
            "weights: give --config, or run tools/checkpoints/recalibrate.py"
        )
    write_checkpoint(checkpoint, args.out)
    print(f"wrote {args.out}, the average of {len(args.checkpoints)}")


def read(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The checkpoints, one after the other."""
    for name in args.checkpoints:
        checkpoint = read_checkpoint(fetch(name), trust_pickle=args.trust_pickle)
        if holds_ema(checkpoint) and not args.ema:
            print(f"note: {name} was saved by EMAHook: the weights in it are averaged already")
        yield name, checkpoint


if __name__ == "__main__":
    run(main)
