"""Converts files one by one: in parallel, resumable, and never leaving a half-written one."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmbcn.datasets.parallel import run_parallel
from mmbcn.errors import UsageError

_SHOWN = 5
_ENDS = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}


class Job(NamedTuple):
    """One file to make.

    Attributes:
        source: what it is made from.
        target: the file; its folder is made where it is missing.
    """

    source: Path
    target: Path


class Summary(NamedTuple):
    """How a conversion ended.

    Attributes:
        written: number of files made.
        skipped: number of files that were there already.
        failed: one message for each file that could not be made.
    """

    written: int
    skipped: int
    failed: list[str]

    def __str__(self) -> str:
        return f"{self.written} written, {self.skipped} there already, {len(self.failed)} failed"

    def check(self) -> None:
        """Raise UsageError where files failed; names some of them."""
        if self.failed:
            more = f"\n  and {len(self.failed) - _SHOWN} more" if len(self.failed) > _SHOWN else ""
            raise UsageError(
                f"{len(self.failed)} files could not be made; the others are finished, and running "
                "this again goes on where it ended:\n  " + "\n  ".join(self.failed[:_SHOWN]) + more
            )


def convert(
    make: Callable[[Path], NDArray[np.uint8]], jobs: Iterable[Job], workers: int, title: str
) -> Summary:
    """Make the targets that are not finished yet.

    Args:
        make: from a source file to the image (H, W, 3), BGR, or the label (H, W). It raises
            UsageError or OSError where the file is bad.
        jobs: the files; targets are ``.png`` or ``.jpg``.
        workers: number of processes.
        title: of the progress bar.
    """
    jobs = list(jobs)
    todo = [job for job in jobs if not is_finished(job.target)]
    failed = [
        error for error in run_parallel(partial(_convert, make), todo, workers, title) if error
    ]
    return Summary(len(todo) - len(failed), len(jobs) - len(todo), failed)


def _convert(make: Callable[[Path], NDArray[np.uint8]], job: Job) -> str | None:
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        flags = [cv2.IMWRITE_JPEG_QUALITY, 95] if job.target.suffix == ".jpg" else []
        write_file(
            job.target, cv2.imencode(job.target.suffix, make(job.source), flags)[1].tobytes()
        )
    except (UsageError, OSError) as error:
        return f"{job.source}: {error}"
    return None


def write_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all.

    What a killed process leaves is called ``<name>.partial``; the next attempt replaces it.
    """
    part = path.with_name(f"{path.name}.partial")
    part.write_bytes(data)
    part.replace(path)


def is_finished(path: Path) -> bool:
    """Whether a picture is there with its end."""
    end = _ENDS[path.suffix]
    if not path.is_file() or path.stat().st_size < len(end):
        return False
    with path.open("rb") as file:
        file.seek(-len(end), 2)
        return file.read() == end


def read_label(path: Path) -> NDArray[np.uint8]:
    """A one-channel label (H, W), or the indices (H, W) of one with a palette.

    Raises:
        UsageError: The file has colours, or more than 8 bits.
        OSError: The file is missing or broken.
    """
    with Image.open(path) as image:
        if image.mode not in ("L", "P"):
            raise UsageError(
                f"expected a label map, of one channel of 8 bits; got an image of mode {image.mode}"
            )
        return np.asarray(image)
