"""Measure mIoU with noisy weights, before and after calibrating the running statistics to them.

For each kind of noise and level, and for several chips (seeds of the noise): the mIoU on the test
images as it is, and with running statistics calibrated to the noisy weights on training images,
without labels. Beside them the same without noise, since calibration alone changes mIoU too. Each
number is kept when it is there: repeat the command to go on, also with more levels or chips.

Example:
    python tools/analysis/noise_robustness.py CONFIG CHECKPOINT --levels 0.05 0.1 0.2 --chips 5
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _calibration import add_calibration_args
from _common import add_config_args, add_trust_arg, make_parser, read_config, run
from _robustness import Stage, add_shared_args, fill, load, title, write

from mmbcn.analysis.calibration import find_layers
from mmbcn.analysis.evaluation import TestSet
from mmbcn.analysis.images import KeptBatches, SplitImages, test_pipeline
from mmbcn.analysis.kept_results import KeptResults, digest
from mmbcn.analysis.noise_robustness import METHODS, draw, measure, plan, summarize
from mmbcn.analysis.tracking import check_momentum
from mmbcn.analysis.weight_noise import NOISES, check_noise
from mmbcn.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    add_shared_args(parser, "--test-images")
    add = parser.add_argument
    add("--noise", nargs="+", choices=NOISES, default=list(NOISES), help="kinds (default: all)")
    add(
        "--levels",
        nargs="+",
        type=float,
        default=[0.05, 0.1, 0.2],
        metavar="ETA",
        help="standard deviation of the noise: additive, over the range of the layer's weights; "
        "multiplicative, over the weight; lognormal, of the logarithm (default: 0.05 0.1 0.2)",
    )
    add("--chips", type=int, default=3, metavar="N", help="seeds 0 to N-1 (%(default)s)")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["noisy", "calibrated"],
        help="tracked: statistics follow the test images themselves (default: noisy calibrated)",
    )
    add("--momentum", type=float, default=0.1, help="of 'tracked' (%(default)s)")
    add_calibration_args(parser)
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then write the table and the figure."""
    args = parse_args()
    if args.chips < 1 or min(args.levels) <= 0:
        raise UsageError("--chips must be 1 or more, and --levels above 0")
    for level in args.levels:
        check_noise(args.noise[0], level, seed=0)
    check_momentum(args.momentum)
    cfg = read_config(args)
    out = args.out or Path(f"work_dirs/{Path(args.config).stem}_noise")
    tests = TestSet(cfg, args.test_images)
    model, settings = load(args, cfg)
    methods = [m for m in METHODS if m in args.methods]
    if not dict(find_layers(model)):
        print("the model keeps no running statistics: there is nothing to calibrate")
        methods = ["noisy"]
    images = SplitImages(cfg, args.num_images, args.batch_size)
    settings |= dict(test_images=tests.num_images, calibration_images=images.num_images)
    settings |= dict(calibration_set=digest(cfg.train_dataloader.dataset, test_pipeline(cfg)))
    settings |= dict(one_pass=args.one_pass, momentum=args.momentum)
    if args.one_pass:  # which depends on it
        settings |= dict(batch_size=args.batch_size)
    results = KeptResults(out / "results.json", settings)
    cells = {
        cell.name: cell for cell in plan(args.noise, sorted(set(args.levels)), args.chips, methods)
    }
    batches = KeptBatches(images)

    def measure_cell(name: str, stage: Stage) -> float:
        cell = cells[name]
        return measure(cell, model, tests, batches, args.momentum, args.one_pass, stage)

    fill(results, cells, measure_cell)
    rows = summarize(list(cells.values()), results)
    print(f"{'noise':15}{'level':>7}  {'statistics':12}{'mIoU':>7}  over chips")
    for row in rows:
        spread = f" +- {row['std']:.2f}" if row["std"] != "" else ""
        print(
            f"{row['noise']:15}{row['level']:7g}  {row['method']:12}{row['miou']:7.2f}{spread}"
            f"  ({row['chips']})"
        )
    details = f"{tests.num_images} test images, chips: {args.chips}"
    write(out, rows, draw(rows, title(args, details)))


if __name__ == "__main__":
    run(main)
