"""What the benchmarks share beside fair timing: their command lines and CSV files."""

import csv
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def command() -> str:
    """The command line of this run."""
    tool = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return shlex.join(["python", str(tool), *sys.argv[1:]])


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write rows that all have the first one's keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
