"""What the tools that recalibrate share: their arguments, the progress bar, the table."""

import argparse
from typing import Any

from _common import progress_bar
from mmengine.config import Config

from mmbcn.analysis.recalibrate import recalibrate


def add_calibration_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of recalibration."""
    parser.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="as many training images, evenly spread over the set (default: all of them)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=4,
        metavar="B",
        help="images at a time (%(default)s); the result does not depend on it",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="all layers at once, each normalizing with what it has seen so far: faster by half "
        "the number of norm layers, but approximate, and it depends on the batch size",
    )


def run_calibration(
    args: argparse.Namespace, cfg: Config, checkpoint: dict[str, Any], source: str
) -> dict[str, Any]:
    """The recalibrated checkpoint; prints what changed."""
    with progress_bar("calibrating", "batches") as update:
        checkpoint, done = recalibrate(
            cfg, checkpoint, source, args.num_images, args.batch_size, args.one_pass, update
        )
    print(done.text())
    print(f"calibrated on {checkpoint['meta']['calibrated']}")
    return checkpoint
