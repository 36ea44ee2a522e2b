"""Write procedural scenes in the layout of a dataset that you do not have (yet).

Example:
    python tools/datasets/shapes.py --layout cityscapes
"""

import argparse
import re

from mmbcn.datasets.shapes_writer import LAYOUTS, write_shapes
from mmbcn.errors import UsageError

# The folder that the configs of each layout read.
DEFAULT_OUT = dict(cityscapes="data/cityscapes", voc="data/VOCdevkit/VOC2012", camvid="data/camvid")


def parse_size(text: str) -> tuple[int, int]:
    """Read a size like 256x512 (height x width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, like 256x512, got {text!r}")
    return int(match[1]), int(match[2])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layout", required=True, choices=list(LAYOUTS), help="the dataset to stand in for")
    add("--out", help="a new or empty folder (default: where the layout's configs look)")
    add("--train", type=int, default=20, help="number of training scenes (%(default)s)")
    add("--val", type=int, default=8, help="number of validation scenes (%(default)s)")
    add("--size", type=parse_size, default="256x512", help="height x width (%(default)s)")
    add("--seed", type=int, default=0, help="which scenes (%(default)s)")
    add("--workers", type=int, default=1, help="number of processes (%(default)s)")
    add(
        "--raw",
        action="store_true",
        help="also write what the dataset is published as: polygons and labelIds (cityscapes), "
        "SBD's .mat files (voc)",
    )
    return parser.parse_args()


def main() -> None:
    """Write the scenes and say what was written."""
    args = parse_args()
    out = args.out or DEFAULT_OUT[args.layout]
    try:
        counts = write_shapes(
            out, args.layout, args.train, args.val, args.size, args.seed, args.workers, args.raw
        )
    except (UsageError, OSError) as e:
        raise SystemExit(f"error: {e}") from None
    height, width = args.size
    parts = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"wrote {parts} scenes of {height}x{width} to {out} in the layout {args.layout}")
    print(f"next: python tools/train.py CONFIG, with a CONFIG whose data_root is {out}")


if __name__ == "__main__":
    main()
