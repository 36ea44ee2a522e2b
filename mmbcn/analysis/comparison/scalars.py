"""Reads what a training logged, over all its interruptions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_scalars(work_dir: Path, key: str) -> list[dict[str, Any]]:
    """The points that have a key, of what mmengine's ``LocalVisBackend`` wrote, by iteration.

    Of iterations that were run again after an interruption, the latest counts.

    Args:
        work_dir: of the training; each attempt has a folder there, named by its time.
        key: of a scalar, such as ``loss``.
    """
    points: dict[int, dict[str, Any]] = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for point in _lines(path):
            if key in point:
                points[point["step"]] = point
    return [points[step] for step in sorted(points)]


def last_iteration(work_dir: Path) -> int:
    """The latest iteration that the latest attempt logged; 0 where there is none."""
    paths = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return max((p["step"] for path in paths[-1:] for p in _lines(path)), default=0)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the process ended, or is still writing
            continue
