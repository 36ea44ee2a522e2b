"""Make Cityscapes' *_labelTrainIds.png from the published gtFine.

Finished files are skipped: it goes on where it was interrupted.

Example:
    python tools/datasets/cityscapes.py data/cityscapes
"""

import argparse
import sys
from pathlib import Path

from mmbcn.datasets.parallel import num_cores
from mmbcn.datasets.prepare.cityscapes import SOURCES, count_train_ids, make_train_ids

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import make_parser, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    root = "data/cityscapes"
    add("root", nargs="?", type=Path, default=root, help="folder with gtFine (%(default)s)")
    add(
        "--source",
        choices=SOURCES,
        help="make them from these alone (default: labelIds, polygons where there are none)",
    )
    add("--workers", type=int, default=num_cores(), help="number of processes (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Make the labels and say how many there are."""
    args = parse_args()
    summary = make_train_ids(args.root, args.source, args.workers)
    print(f"train ids: {summary}")
    counts = count_train_ids(args.root)
    print("now there: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    summary.check()


if __name__ == "__main__":
    run(main)
