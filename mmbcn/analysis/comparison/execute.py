"""Trains and tests the runs of a comparison, several at a time, going on where it was left."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any

from mmengine.device import get_device

from mmbcn.analysis.comparison.folder import Place
from mmbcn.analysis.comparison.plan import Run
from mmbcn.analysis.comparison.process import Ended, run_tool
from mmbcn.analysis.comparison.result import (
    Result,
    failure,
    keep_pictures,
    success,
    write_result,
)
from mmbcn.analysis.comparison.scalars import last_iteration
from mmbcn.analysis.environment import environment, mm_versions
from mmbcn.datasets.parallel import num_cores
from mmbcn.errors import UsageError

Progress = Callable[[Run, str, int], None]


class Interrupted(Exception):
    """A run was ended from outside."""


class Executor:
    """Trains and tests runs in processes.

    Args:
        out: the comparison's folder.
        jobs: runs at a time; the cores (or ``OMP_NUM_THREADS``) are divided among them.

    Attributes:
        busy: runs that were left alone: another process is at them.
    """

    def __init__(self, out: Path, jobs: int) -> None:
        if jobs < 1:
            raise UsageError(f"--jobs must be 1 or more, got {jobs}")
        self.out, self.jobs = out, jobs
        self.busy: set[Run] = set()
        self.stop, self.writing = Event(), Lock()
        cores = int(os.environ.get("OMP_NUM_THREADS") or num_cores())
        self.threads = max(1, cores // jobs)
        self.facts = {**environment(get_device()), **mm_versions(), "threads": self.threads}

    def run_all(
        self, runs: Sequence[Run], progress: Progress
    ) -> Iterator[tuple[Run, Result | None]]:
        """Yield each run when it has ended, with its result; None: interrupted, or `busy`.

        Args:
            runs: those to train and test.
            progress: called with a run, what it does, and the iterations done.
        """
        self.progress = progress
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._run, run): run for run in runs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)

    def _run(self, run: Run) -> Result | None:
        place = Place(self.out, run)
        place.work.mkdir(parents=True, exist_ok=True)
        with _lock(place.work / "lock") as lock:
            if lock is None:
                self.busy.add(run)
            if lock is None or self.stop.is_set():
                return None
            try:
                result = self._train_and_test(place, lock)
            except Interrupted:
                return None
            result["environment"] = self.facts
            write_result(result, place.result)
            return result

    def _train_and_test(self, place: Place, lock: int) -> Result:
        run, peak = place.run, None
        if not place.checkpoint.is_file():
            trained = self._tool(place, "train.py", [place.config, "--resume"], place.work, lock)
            if trained.code:
                return failure(run, trained.message, place.work)
            peak = trained.peak_bytes
        test_dir = place.work / "test"
        args = [place.config, place.checkpoint]
        tested = self._tool(place, "test.py", args, test_dir, lock)
        if tested.code:
            return failure(run, tested.message, place.work)
        with self.writing:  # all runs write the same images
            keep_pictures(test_dir, place.folder, self.out / "images")
        result = success(run, place.work, test_dir)
        return result | dict(process_bytes=peak, test_seconds=tested.seconds)

    def _tool(self, place: Place, tool: str, args: list[Any], work_dir: Path, lock: int) -> Ended:
        training = tool == "train.py"
        title = "training" if training else "testing"

        def watch() -> None:
            done = last_iteration(place.work) if training else place.run.iters
            self.progress(place.run, title, done)

        ended = run_tool(
            tool,
            [*args, "--work-dir", work_dir],
            place.work / f"{title}.log",
            dict(os.environ, OMP_NUM_THREADS=str(self.threads)),
            self.stop,
            watch,
            lock,
        )
        if ended.interrupted:
            raise Interrupted
        return ended


@contextmanager
def _lock(path: Path) -> Iterator[int | None]:
    """The descriptor of a locked file; None where another comparison, or what it left, has it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()
