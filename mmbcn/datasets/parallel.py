"""Works through a list with several processes and a progress bar."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import cv2
from rich.console import Console
from rich.progress import track

from mmbcn.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, title: str
) -> Iterator[Result]:
    """Yield ``function(item)`` for each of the items, in their order.

    With one worker in this process, else in others: then the function, items and results must be
    picklable. The progress bar is on stderr.

    Raises:
        UsageError: Fewer than one worker.
    """
    if workers < 1:
        raise UsageError(f"workers must be 1 or more, got {workers}")
    bar = dict(description=title, total=len(items), console=Console(stderr=True))
    if workers == 1:
        yield from track(map(function, items), **bar)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        # The processes start here, hence before the bar's thread does.
        results = pool.map(function, items, chunksize=max(1, min(8, len(items) // (4 * workers))))
        yield from track(results, **bar)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers
    cv2.setNumThreads(0)
