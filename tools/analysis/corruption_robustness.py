"""Measure mIoU on corrupted test images: 15 common corruptions, each at 5 severities.

The corruptions are those of ImageNet-C (Hendrycks and Dietterich 2019), on the images as they are
loaded, before they are resized. Each number is kept when it is there: repeat the command to go on,
also with more corruptions or severities. Needs: pip install "mmbcn[corruptions]".

Example:
    python tools/analysis/corruption_robustness.py CONFIG CHECKPOINT --severities 1 3 5
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import add_config_args, add_trust_arg, make_parser, read_config, run
from _robustness import Stage, add_shared_args, fill, load, title, write

from mmbcn.analysis.corruption_robustness import CLEAN, cell_name, draw, summarize
from mmbcn.analysis.evaluation import TestSet
from mmbcn.analysis.kept_results import KeptResults
from mmbcn.datasets.transforms.corrupt import CORRUPTIONS, SEVERITIES, Corrupt

NAMES = [name for group in CORRUPTIONS.values() for name in group]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    add_shared_args(parser, "--num-images")
    add = parser.add_argument
    add("--corruptions", nargs="+", choices=NAMES, default=NAMES, help="(default: all)")
    add("--severities", nargs="+", type=int, choices=SEVERITIES, default=SEVERITIES)
    add("--seed", type=int, default=0, help="of the corruptions' chance (%(default)s)")
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then write the table and the figure."""
    args = parse_args()
    cfg = read_config(args)
    out = args.out or Path(f"work_dirs/{Path(args.config).stem}_corruptions")
    corruptions = [name for name in NAMES if name in args.corruptions]
    severities = sorted(set(args.severities))
    Corrupt(corruptions[0], severities[0])  # is the library there?
    tests = TestSet(cfg, args.num_images)
    model, settings = load(args, cfg)
    settings |= dict(test_images=tests.num_images, seed=args.seed)
    results = KeptResults(out / "results.json", settings)
    cells: dict[str, tuple[str, int] | None] = {CLEAN: None}
    cells |= {cell_name(c, s): (c, s) for c in corruptions for s in severities}

    def measure(name: str, stage: Stage) -> float:
        cell = cells[name]
        if cell is None:
            return tests.miou(model, stage("testing"))
        step = dict(type="mmbcn.Corrupt", name=cell[0], severity=cell[1], seed=args.seed)
        return TestSet(cfg, args.num_images, step).miou(model, stage("testing"))

    fill(results, cells, measure)
    rows = summarize(corruptions, severities, results)
    head = "".join(f"{s:>8}" for s in severities)
    print(f"{'severity':20}{head}{'mean':>8}{'relative':>11}")
    for row in rows:
        values = "".join(f"{row[f'severity_{s}']:8.2f}" for s in severities)
        print(f"{row['corruption']:20}{values}{row['miou']:8.2f}{row['relative']:>9} %")
    write(out, rows, draw(rows, title(args, f"{tests.num_images} test images")))


if __name__ == "__main__":
    run(main)
