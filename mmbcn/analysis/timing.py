"""Fair timing of several things in one run, and tables of what came out."""

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Milliseconds of one call: 20 %, 50 % and 80 % quantile over the rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Timing":
        """The quantiles of at least two rounds."""
        fifths = quantiles(milliseconds, n=5)
        return cls(fifths[0], median(milliseconds), fifths[3])


def time_interleaved(
    cases: dict[str, Callable[[], object]],
    seconds: float = 1.0,
    min_rounds: int = 7,
    warm: bool = False,
) -> dict[str, Timing]:
    """Time the cases in turn, so that whatever slows the machine down slows all of them.

    Every round calls each case once, beginning with another one than the round before; two rounds
    of warming up are not counted. Where other programs come and go, measure several times with
    something else in between, and put the rounds together.

    Args:
        cases: what to call, by name.
        seconds: time for all rounds together.
        min_rounds: as many at least, however long they take.
        warm: call each case once more right before it is timed, so that it finds the memory that
            itself has freed, not what another case has left.
    """
    names = list(cases)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    done = -2
    while done < min_rounds or time.perf_counter() < end:
        for i in range(len(names)):
            name = names[(i + done) % len(names)]
            if warm:
                cases[name]()
            _wait_for_device()
            start = time.perf_counter()
            cases[name]()
            _wait_for_device()
            if done >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
        done += 1
    return times


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, headed by the first one's keys; floats with two decimals."""

    def line(cells: list[Any]) -> str:
        return (
            "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )

    head = list(rows[0])
    return "\n".join(
        [line(head), line(["---"] * len(head)), *(line(list(row.values())) for row in rows)]
    )
