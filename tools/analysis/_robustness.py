"""What the tools that measure robustness share: arguments, progress bars, the files they write."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from mmbcn.analysis.files import write_csv, write_figure
from mmbcn.analysis.kept_results import KeptResults, fingerprint
from mmbcn.analysis.segmentor import load_segmentor
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.read import read_checkpoint

Stage = Callable[[str], Callable[[int, int | None], None]]


def add_shared_args(parser: argparse.ArgumentParser, number: str) -> None:
    """Add the arguments beside those of configs; ``number``: the option for fewer test images."""
    parser.add_argument("checkpoint", help="checkpoint file or URL")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument(
        number,
        type=int,
        metavar="N",
        help="measure on as many test images, evenly spread over the set (default: all of them)",
    )


def load(args: argparse.Namespace, cfg: Config) -> tuple[nn.Module, dict[str, str]]:
    """The model with the checkpoint's weights, and what tells it from others."""
    path = fetch(args.checkpoint)
    checkpoint = read_checkpoint(path, trust_pickle=args.trust_pickle)
    model, _ = load_segmentor(cfg, checkpoint, args.checkpoint)
    return model, fingerprint(path, cfg, "test_evaluator")


def title(args: argparse.Namespace, details: str) -> str:
    """Of a figure: the config and the norm it was switched to, and details."""
    norm = f", {args.norm}" if args.norm else ""
    return f"{Path(args.config).stem}{norm}\n{details}"


def fill(
    results: KeptResults, names: Iterable[str], measure: Callable[[str, Stage], float]
) -> None:
    """Measure what is missing, under a bar over all and one for what is being measured."""
    names = list(names)
    missing = [name for name in names if name not in results]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        whole = bar.add_task("all", total=len(names), completed=len(names) - len(missing))
        part = bar.add_task("", total=None)
        for name in missing:

            def stage(title: str, name: str = name) -> Callable[[int, int | None], None]:
                bar.reset(part, description=f"{name}: {title}", total=None)
                return lambda done, total: bar.update(part, completed=done, total=total)

            results[name] = measure(name, stage)
            bar.advance(whole)
            bar.console.print(f"{name}: mIoU {results[name]:.2f}", highlight=False)


def write(out: Path, rows: Sequence[Mapping[str, Any]], figure: Figure) -> None:
    """Write table and figure beside the kept results, and say where."""
    write_csv(pd.DataFrame(rows), out / "results.csv")
    write_figure(figure, out / "results.png")
    print("wrote " + ", ".join(str(out / f"results.{kind}") for kind in ("json", "csv", "png")))
