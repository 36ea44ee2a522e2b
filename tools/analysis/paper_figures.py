"""Make the paper's two kinds of figures about elimination singularities, in about 15 minutes.

On a small real task: patches of a segmentation set, classified by the pixel in their middle.
perturbed.png: a network whose post-normalization means and stds are perturbed on purpose, its
accuracy against the distance from BatchNorm's statistics. trained.png: that distance over the
training with LN, GN, GN+WS, BN, BCN and BCN+WS. paper_figures.json: every number, and where and
how it was made.

Example:
    python tools/analysis/paper_figures.py --out work_dirs/paper_figures
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import add_override_arg, make_parser, progress_bar, read_config, run

from mmbcn.analysis.environment import ROOT, environment
from mmbcn.analysis.files import write_figure, write_json
from mmbcn.analysis.paper.experiments import Task
from mmbcn.analysis.paper.figures import draw_perturbed, draw_trained
from mmbcn.analysis.paper.patches import Patches, cut_patches
from mmbcn.analysis.tables import import_pandas

CONFIG = ROOT / "configs/deeplabv3/deeplabv3_r18_bn_300_shapes-128x128.py"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("config", nargs="?", default=str(CONFIG), help="whose data sets to use (the embedded one)")
    add("--out", type=Path, default=Path("work_dirs/paper_figures"), help="folder (%(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (%(default)s)")
    add("--epochs", type=int, default=10, help="of each of the 24 runs of a seed (%(default)s)")
    add("--patches", type=int, default=3000, help="to train on; half as many test (%(default)s)")
    add("--size", type=int, default=32, help="of the patches, in pixels (%(default)s)")
    add("--width", type=int, default=16, help="channels of the first stage of 3 (%(default)s)")
    add("--lr", type=float, default=0.05, help="of all norms (%(default)s)")
    add_override_arg(parser)
    parser.set_defaults(norm=None)
    return parser.parse_args()


def main() -> None:
    """Cut the patches, train, write."""
    args = parse_args()
    import_pandas()  # so that it is missed now, not at the end
    cfg = read_config(args)
    where = environment()  # of now: the source may change meanwhile
    with progress_bar("reading", "images") as update:
        data = cut_patches(cfg, "train", args.patches, args.size, update)
        test = cut_patches(cfg, "val", args.patches // 2, args.size, update)
    mean = data.images.mean((0, 2, 3), keepdim=True)
    std = data.images.std((0, 2, 3), keepdim=True)
    data, test = (Patches((p.images - mean) / std, p.labels) for p in (data, test))
    done = 0
    with progress_bar("training", "epochs") as update:

        def tick() -> None:
            nonlocal done
            done += 1
            update(done, task.ticks())

        seeds = range(args.seeds)
        task = Task(data, test, args.width, args.epochs, args.lr, seeds, tick)
        perturbed, trained = list(task.perturbed()), list(task.trained())
    keys = ("seeds", "epochs", "patches", "size", "width", "lr")
    result = dict(
        command=f"python {shlex.join(sys.argv)}",
        environment=where,
        config=str(args.config).removeprefix(f"{ROOT}/"),
        **{key: getattr(args, key) for key in keys},
        images=dict(train=len(data.labels), test=len(test.labels)),
        classes=len(data.labels.unique()),
        perturbed=perturbed,
        trained=trained,
    )
    paths = [
        write_json(result, args.out / "paper_figures.json"),
        write_figure(draw_perturbed(perturbed), args.out / "perturbed.png"),
        write_figure(draw_trained(trained), args.out / "trained.png"),
    ]
    print(f"written to {args.out}: {', '.join(path.name for path in paths)}")


if __name__ == "__main__":
    run(main)
