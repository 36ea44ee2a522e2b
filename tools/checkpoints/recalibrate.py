"""Set a checkpoint's running statistics to those of its weights on the training images, exactly.

For BatchNorm, SyncBN, BCN, SyncBCN and MicroBCN, after weights have changed without training. Each
layer gets the moments over all values of all images, while the layers before it already normalize
with theirs: the statistics of one huge batch. Takes one pass up to each layer; --one-pass is
faster and approximate. Labels are not read. Weights stay as they are, bit for bit.

Example:
    python tools/checkpoints/recalibrate.py CONFIG work_dirs/NAME/averaged.pth --num-images 500
"""

import sys
from pathlib import Path

sys.path.pop(0)  # else inspect.py, beside this file, hides Python's own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from _calibration import add_calibration_args, run_calibration
from _common import add_config_args, add_trust_arg, make_parser, read_config, run

from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.checkpoints.write import write_checkpoint


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    parser.add_argument("checkpoint", help="checkpoint file or URL")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: CHECKPOINT's name + _recalibrated)"
    )
    add_calibration_args(parser)
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Calibrate, say what changed, write."""
    args = parse_args()
    path = fetch(args.checkpoint)
    out = args.out or path.with_stem(f"{path.stem}_recalibrated")
    checkpoint = read_checkpoint(path, trust_pickle=args.trust_pickle)
    checkpoint = run_calibration(args, read_config(args), checkpoint, args.checkpoint)
    write_checkpoint(checkpoint, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
