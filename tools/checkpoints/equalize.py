"""Give the layers of a checkpoint's network equal norms; what it computes stays the same (ENorm).

For networks without normalization layers (norm 'none'). Of all weights that differ by scales of
channels between layers, the result are those of the smallest sum of squares: to train on from, to
average or to compare. Outputs on a random image are compared before anything is written. What the
optimizer remembers is left out: train on with load_from, not with --resume.

Example:
    python tools/checkpoints/equalize.py CONFIG work_dirs/NAME/iter_300.pth
"""

import sys
from pathlib import Path

sys.path.pop(0)  # else inspect.py, beside this file, hides Python's own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from _common import add_config_args, add_trust_arg, make_parser, read_config, run
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mmbcn.analysis.equalize import equalize_checkpoint
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.checkpoints.write import write_checkpoint


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    parser.add_argument("checkpoint", help="checkpoint file or URL")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: CHECKPOINT's name + _equalized)"
    )
    parser.add_argument(
        "--c",
        type=float,
        default=1.0,
        help="norm of the weights behind a channel over that of those before it (%(default)s); "
        "slightly above 1 makes later layers smaller",
    )
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Equalize, say what changed, write."""
    args = parse_args()
    path = fetch(args.checkpoint)
    out = args.out or path.with_stem(f"{path.stem}_equalized")
    checkpoint = read_checkpoint(path, trust_pickle=args.trust_pickle)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tracing the network", total=None)
        checkpoint, done, error = equalize_checkpoint(
            read_config(args),
            checkpoint,
            args.checkpoint,
            args.c,
            lambda cycle, largest: bar.update(
                task, description=f"cycle {cycle}, scales change by {largest:.1e} (until 1e-04)"
            ),
        )
    print(done.text())
    print(f"outputs differ by at most {error:.1e} of the largest one")
    write_checkpoint(checkpoint, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
