"""Make the 11-class CamVid that the configs read, from the original release or from SegNet's.

The original is 701_StillsRaw_full and LabeledApproved_full (32 classes as colours), SegNet's is
train, trainannot, val, ... (11 classes). Sizes are kept; images become JPEG of quality 95.
Finished files are skipped: it goes on where it was interrupted.

Example:
    python tools/datasets/camvid.py downloads/CamVid --out data/camvid
"""

import argparse
import sys
from pathlib import Path

from mmbcn.datasets.parallel import num_cores
from mmbcn.datasets.prepare.camvid import count_camvid, make_camvid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import make_parser, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="folder of the release")
    add("--out", type=Path, default="data/camvid", help="target folder (%(default)s)")
    add("--workers", type=int, default=num_cores(), help="number of processes (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Convert and say how many images there are."""
    args = parse_args()
    summary = make_camvid(args.source, args.out, args.workers)
    print(f"images and labels in {args.out}: {summary}")
    counts = count_camvid(args.out)
    print("now there: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    summary.check()


if __name__ == "__main__":
    run(main)
