"""Make the labels and lists of VOC12aug from Pascal VOC 2012 and SBD.

Writes SegmentationClassAug, and aug.txt and trainaug.txt into ImageSets/Segmentation, where
mmsegmentation looks for them. Finished labels are skipped: it goes on where it was interrupted.

Example:
    python tools/datasets/voc_aug.py data/VOCdevkit/VOC2012 data/benchmark_RELEASE
"""

import argparse
import sys
from pathlib import Path

from mmbcn.datasets.parallel import num_cores
from mmbcn.datasets.prepare.voc_aug import PUBLISHED, find_folders, make_labels, write_lists

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import make_parser, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("voc", type=Path, help="VOC2012, or the VOCdevkit that holds it")
    add("sbd", type=Path, help="SBD's benchmark_RELEASE, or its folder with cls")
    add("--workers", type=int, default=num_cores(), help="number of processes (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Make the labels, then the lists, and say how many there are."""
    args = parse_args()
    folders = find_folders(args.voc, args.sbd)
    summary = make_labels(folders, args.workers)
    print(f"labels in {folders.labels}: {summary}")
    summary.check()
    for name, count in write_lists(folders).items():
        note = "as published" if count == PUBLISHED[name] else f"published: {PUBLISHED[name]}"
        print(f"{folders.lists / name}.txt: {count} images ({note})")


if __name__ == "__main__":
    run(main)
