"""Measure how far the ReLUs of checkpoints are from elimination singularities, and draw it.

Of every norm layer that a ReLU follows. Writes in the folder --out: channels_*.png, the channels
as points (mean, std); spreads.png, sigma_mu against sigma_sigma of each layer; depth.png, each
measure and the share of dead channels over the depth; layers.csv, channels.csv and
singularity.json. That file, of another config or norm, may be given in place of a checkpoint, to
be drawn beside. curves.png, over the training, is made of the checkpoints of one folder, and of
what SingularityHook logged in a work_dir, where that folder is given.

Example:
    python tools/analysis/singularity.py CONFIG work_dirs/NAME/iter_*.pth --out work_dirs/NAME/es
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import (
    add_config_args,
    add_trust_arg,
    check_device,
    make_parser,
    progress_bar,
    read_config,
    run,
)
from mmengine.config import Config
from mmengine.device import get_device

from mmbcn.analysis.files import check_folder, write_csv, write_figure, write_json
from mmbcn.analysis.images import SplitImages
from mmbcn.analysis.measured import (
    Measured,
    label_all,
    read_measured,
    run_of_hook,
    runs_of_checkpoints,
    tables,
)
from mmbcn.analysis.segmentor import load_segmentor, run_heads
from mmbcn.analysis.singularity import Singularity, measure_singularity
from mmbcn.analysis.singularity_figures import (
    draw_channels,
    draw_curves,
    draw_depth,
    draw_spreads,
)
from mmbcn.analysis.tables import import_pandas
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.datasets.doctor.part import SPLITS
from mmbcn.engine.config_check import check_keys


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="checkpoint",
        help="checkpoint file or URL, a singularity.json, or a work_dir with the hook's scalars",
    )
    add("--out", type=Path, help="folder of results (default: work_dirs/<config stem>_singularity)")
    add("--split", choices=SPLITS, default="train", help="whose images, unlabelled (%(default)s)")
    add(
        "--num-images",
        type=int,
        default=50,
        metavar="N",
        help="evenly spread over the set; all where it has fewer (%(default)s)",
    )
    add("--device", help="as torch calls it, cpu or cuda:1 (default: a GPU where there is one)")
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    import_pandas()  # so that it is missed now, not at the end
    cfg = read_config(args)
    check_keys(cfg)
    device = check_device(args.device or get_device())
    out = args.out or Path(f"work_dirs/{Path(args.config).stem}_singularity")
    check_folder(out)
    models, logged = [], {}
    for source in args.sources:
        if Path(source).is_dir():
            logged[f"{source}, while training"] = run_of_hook(Path(source))
        elif source.endswith(".json"):
            models += read_measured(Path(source))
        else:
            models.append(measure(args, cfg, source, device))
    runs = runs_of_checkpoints(models) | logged
    paths = write_models(models, out) if models else []
    if runs:
        paths.append(write_figure(draw_curves(runs), out / "curves.png"))
    print(f"written to {out}: {', '.join(path.name for path in paths)}")


def write_models(models: list[Measured], out: Path) -> list[Path]:
    """Print and write what was measured of the models."""
    labelled = label_all(models)
    found = {name: model.found for name, model in labelled.items()}
    layers, channels = tables(labelled)
    print(layers.to_string(index=False, float_format="{:.4f}".format))
    for name, own in found.items():
        print(f"{name}: {outcome(own)}")
    return [
        write_json(dict(models=[m.as_dict() for m in models]), out / "singularity.json"),
        write_csv(layers, out / "layers.csv"),
        write_csv(channels, out / "channels.csv"),
        write_figure(draw_spreads(found), out / "spreads.png"),
        write_figure(draw_depth(found), out / "depth.png"),
        *(
            write_figure(draw_channels(v, name), out / f"channels_{name.replace('/', '_')}.png")
            for name, v in found.items()
        ),
    ]


def measure(args: argparse.Namespace, cfg: Config, source: str, device: str) -> Measured:
    """The statistics of one checkpoint."""
    images = SplitImages(cfg, args.num_images, 1, args.split)
    checkpoint = read_checkpoint(fetch(source), trust_pickle=args.trust_pickle)
    model, _ = load_segmentor(cfg, checkpoint, source, device)
    with progress_bar(Path(source).name, "images") as update:
        found = measure_singularity(
            model, images, run_heads, lambda *_: update(images.read, images.num_images)
        )
    iteration = (checkpoint.get("meta") or {}).get("iter")
    text = f"{images.num_images} of {images.total} of {args.split}"
    return Measured(source, iteration, args.config, text, found)


def outcome(found: Singularity) -> str:
    """How many norms a ReLU follows, and what follows the others."""
    kinds: dict[str, list[str]] = {}
    for name, followers in found.others.items():
        kinds.setdefault(", ".join(followers) or "nothing", []).append(name)
    if found.unreached:
        kinds["nothing: not reached"] = found.unreached
    others = "".join(f"\n  followed by {kind}: {', '.join(n)}" for kind, n in kinds.items())
    return f"a ReLU follows {len(found.layers)} norms{others}"


if __name__ == "__main__":
    run(main)
