"""Writes the results of an analysis: JSON, tables and figures, each whole or not at all."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from mmbcn.checkpoints.write import whole_file
from mmbcn.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


def check_folder(path: Path) -> None:
    """Check that results can be written to a folder, before any is computed; it is made with them.

    Raises:
        UsageError: it is a file or lies in one, or may not be written to.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UsageError(f"cannot write to the folder {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to the folder {path}: no permission to write to {there}")


def write_json(content: Any, path: Path) -> Path:
    """Write plain data; returns the path."""
    with whole_file(path, "result") as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def write_csv(table: "pd.DataFrame", path: Path) -> Path:
    """Write a table; returns the path."""
    with whole_file(path, "table") as part:
        table.to_csv(part, index=False, lineterminator="\n")
    return path


def write_figure(figure: Figure, path: Path, dpi: int = 110) -> Path:
    """Write a PNG; returns the path."""
    with whole_file(path, "figure") as part:
        figure.savefig(part, format="png", dpi=dpi, metadata={"Software": None})
    return path
