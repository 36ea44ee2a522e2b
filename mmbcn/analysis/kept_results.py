"""Results that are kept as soon as they are there, so that a long measurement can go on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbcn.analysis.files import check_folder
from mmbcn.checkpoints.write import whole_file
from mmbcn.errors import UsageError


class KeptResults:
    """Numbers by name in a JSON file, which is written anew with each of them.

    Args:
        path: of the file; its folder is made. What is there is taken over.
        settings: what all numbers were measured with, as JSON.

    Raises:
        UsageError: there can be no such folder, the file holds something else, or numbers of other
            settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.numbers: dict[str, float] = {}
        check_folder(path.parent)
        if not path.is_file():
            return
        try:
            kept = json.loads(path.read_text())
            theirs = dict(kept["settings"])
            self.numbers = {name: float(number) for name, number in dict(kept["numbers"]).items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no results of this tool: move it away") from error
        changes = describe_changes(theirs, self.settings)
        if changes:
            raise UsageError(
                f"{path} holds results of other settings ({changes}): give another "
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


def describe_changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The settings that differ between kept results and new ones; empty: none."""
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return "; ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} now" for key in keys)


def digest(*contents: Any) -> str:
    """What tells parts of configs, or files' bytes, from others."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content if isinstance(content, bytes) else repr(content).encode())
    return found.hexdigest()[:16]


def fingerprint(path: Path, cfg: Mapping[str, Any], *keys: str) -> dict[str, str]:
    """Settings that tell one checkpoint and one config from another.

    Args:
        path: of the checkpoint.
        cfg: the config.
        keys: those of it that count, beside ``model`` and ``test_dataloader``.
    """
    used = [cfg.get(key) for key in ("model", "test_dataloader", *keys)]
    return dict(checkpoint=digest(path.read_bytes()), config=digest(used))
