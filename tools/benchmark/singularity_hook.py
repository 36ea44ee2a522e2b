"""Time what SingularityHook adds to a training step that it watches, on random images.

Example:
    python tools/benchmark/singularity_hook.py --backbone r18 --batch 2 --crop 176 240
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _common import ROOT, command, write_csv
from mmseg.utils import register_all_modules
from steps import training_step
from torch import nn

from mmbcn.analysis.environment import environment
from mmbcn.analysis.timing import Timing, markdown_table, time_interleaved
from mmbcn.engine import SingularityHook

OUT = ROOT / "tools/benchmark/results/singularity_hook"
NORMS = ("bn", "gn_ws", "bcn", "microbcn_ws")
HEADING = """# What SingularityHook costs

DeepLabV3 {backbone}, batch {batch}, crops of {crop[0]}x{crop[1]}: a training step that the hook
watches, divided by one that it does not, medians of interleaved rounds. Every 50th step is watched
by default: the last column is (ratio - 1) / 50, the share of the training's time. Made by
`{command}`.

{where}

"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="r18", choices=["r18", "r50", "r101"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, nargs=2, default=[176, 240], metavar=("H", "W"))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each norm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="result files, without the suffix")
    return parser.parse_args()


def watched(step: Callable[[], None], model: nn.Module) -> Callable[[], None]:
    """The step with all that the hook does about it."""
    scalars: list[dict[str, float]] = []
    visualizer = SimpleNamespace(add_scalars=lambda values, step: scalars.append(values))
    runner: Any = SimpleNamespace(model=model, iter=0, visualizer=visualizer)
    hook = SingularityHook(interval=1)

    def watched_step() -> None:
        scalars.clear()
        hook.before_train_iter(runner, 0)
        step()
        hook.after_train_iter(runner, 0)
        assert scalars, "the hook saw nothing"

    return watched_step


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    args.amp = None
    register_all_modules()
    rows, table = [], []
    where = environment(args.device)
    for norm in NORMS:
        step, model = training_step(args, args.backbone, norm)
        cases = {"plain": step, "watched": watched(step, model)}
        times = time_interleaved(cases, args.seconds, min_rounds=5)
        plain, seen = (Timing.of(times[name]) for name in ("plain", "watched"))
        share = (seen.p50 / plain.p50 - 1) / 50
        row = dict(norm=norm, plain_ms=round(plain.p50, 3), watched_ms=round(seen.p50, 3))
        setting = dict(backbone=args.backbone, batch=args.batch, crop="x".join(map(str, args.crop)))
        rows.append({**setting, **row, "share": round(share, 5), **where})
        table.append(
            {
                "norm": norm,
                "step, ms": plain.p50,
                "watched step, ms": seen.p50,
                "ratio": seen.p50 / plain.p50,
                "of the training, %": 100 * share,
            }
        )
    write_csv(args.out.with_suffix(".csv"), rows)
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if value != "")
    text = HEADING.format(
        backbone=args.backbone, batch=args.batch, crop=args.crop, command=command(), where=facts
    )
    args.out.with_suffix(".md").write_text(text + markdown_table(table) + "\n")
    print(markdown_table(table))


if __name__ == "__main__":
    main()
