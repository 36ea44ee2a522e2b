"""Results that are kept as soon as they are there, so that a long measurement can go on."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mmengine.config import Config

from mmbcn.checkpoints.write import whole_file
from mmbcn.errors import UsageError


class KeptResults:
    """Numbers by name in a JSON file, which is written anew with each of them.

    Args:
        path: of the file; its folder is made. What is there is taken over.
        settings: what all numbers were measured with, as JSON.

    Raises:
        UsageError: the file cannot be read, or holds numbers of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.numbers: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            return
        try:
            kept = json.loads(path.read_text())
            theirs, self.numbers = kept["settings"], kept["numbers"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no results of this tool: move it away") from error
        keys = [k for k in {**theirs, **self.settings} if theirs.get(k) != self.settings.get(k)]
        if keys:
            changes = (f"{k} {theirs.get(k)} there, {self.settings.get(k)} now" for k in keys)
            raise UsageError(
                f"{path} holds results of other settings ({'; '.join(changes)}): give another "
                "--out, or remove it to measure anew"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.numbers

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def __setitem__(self, name: str, number: float) -> None:
        self.numbers[name] = number
        with whole_file(self.path, "results") as part:
            part.write_text(
                json.dumps(dict(settings=self.settings, numbers=self.numbers), indent=1) + "\n"
            )


def fingerprint(path: Path, cfg: Config) -> dict[str, str]:
    """Settings that tell one checkpoint and one config from another."""
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    used = [cfg.get(key) for key in ("model", "test_dataloader", "test_evaluator")]
    return dict(
        checkpoint=content[:16], config=hashlib.sha256(repr(used).encode()).hexdigest()[:16]
    )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that all have the first one's keys as CSV."""
    with whole_file(path, "table") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with whole_file(path, "figure") as part:
        figure.savefig(part, format="png", dpi=120)
