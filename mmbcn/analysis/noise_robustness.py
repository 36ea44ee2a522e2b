"""How weight noise lowers the mIoU, and how much of it calibration gives back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from mmbcn.analysis.borrowed import buffers_kept
from mmbcn.analysis.calibration import Progress, calibrate
from mmbcn.analysis.evaluation import TestSet
from mmbcn.analysis.segmentor import run_heads
from mmbcn.analysis.tracking import track
from mmbcn.analysis.weight_noise import WeightNoise

METHODS = ("noisy", "calibrated", "tracked")
_COLORS = dict(noisy="#D55E00", calibrated="#0072B2", tracked="#009E73")  # Okabe and Ito 2008
_NAMES = dict(additive="additive: sigma / range", multiplicative="multiplicative: sigma")
_NAMES["lognormal"] = "log-normal: sigma"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        noise: of `WeightNoise`'s kinds; "" without noise.
        level: its eta.
        chip: its seed.
        method: of ``METHODS``.
    """

    noise: str
    level: float
    chip: int
    method: str

    @property
    def name(self) -> str:
        """The cell in words."""
        if not self.noise:
            return f"clean {self.method}" if self.method != "noisy" else "clean"
        return f"{self.noise} {self.level:g} chip {self.chip} {self.method}"


def plan(
    noises: Sequence[str], levels: Sequence[float], chips: int, methods: Sequence[str]
) -> list[Cell]:
    """All measurements: first those without noise, then chip by chip."""
    cells = [Cell("", 0.0, 0, method) for method in methods]
    for chip in range(chips):
        for noise in noises:
            cells += [Cell(noise, level, chip, m) for level in levels for m in methods]
    return cells


def measure(
    cell: Cell,
    model: nn.Module,
    tests: TestSet,
    images: Iterable[Any],
    momentum: float,
    one_pass: bool,
    progress: Callable[[str], Progress],
) -> float:
    """The mIoU of one cell; the model is as before afterwards.

    Args:
        cell: what to measure.
        model: a segmentor with its trained weights.
        tests: for the mIoU.
        images: batches to calibrate with, as `run_heads` takes them.
        momentum: of `track`.
        one_pass: see `calibrate`.
        progress: gives a progress for each stage, of which it gets the name.
    """
    noise = WeightNoise(model, cell.noise, cell.level, cell.chip) if cell.noise else nullcontext()
    tracked = track(model, momentum) if cell.method == "tracked" else nullcontext()
    with buffers_kept(model), noise:
        if cell.method == "calibrated":
            calibrate(model, images, run_heads, one_pass, progress("calibrating"))
        with tracked:
            return tests.miou(model, progress("testing"))


def summarize(cells: Sequence[Cell], results: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each noise, level and method, over the chips; std is that of a sample."""
    groups: dict[tuple[str, float, str], list[float]] = {}
    for cell in cells:
        key = cell.noise, cell.level, cell.method
        groups.setdefault(key, []).append(results[cell.name])
    return [
        dict(
            noise=noise or "none",
            level=level,
            method=method,
            chips=len(values),
            miou=round(mean(values), 3),
            std=round(stdev(values), 3) if len(values) > 1 else "",
        )
        for (noise, level, method), values in groups.items()
    ]


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Plot mIoU over the levels, for each noise; bars: standard deviation over the chips."""
    noises = list(dict.fromkeys(row["noise"] for row in rows if row["noise"] != "none"))
    clean = {row["method"]: row["miou"] for row in rows if row["noise"] == "none"}
    figure = Figure((max(6, 1.2 + 3.6 * len(noises)), 3.8), layout="constrained")
    axes = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    for ax, noise in zip(axes, noises, strict=True):
        levels = sorted({row["level"] for row in rows if row["noise"] == noise})
        for method in clean:
            points = [r for r in rows if r["noise"] == noise and r["method"] == method]
            points.sort(key=lambda row: row["level"])
            ax.errorbar(
                range(len(levels) + 1),
                [clean[method], *(p["miou"] for p in points)],
                [0.0, *(p["std"] or 0.0 for p in points)],
                color=_COLORS[method],
                marker="o",
                markersize=4,
                capsize=3,
                label=method,
            )
        if "noisy" in clean:
            ax.axhline(clean["noisy"], color="gray", linestyle=":", label="clean")
        ax.set_xticks(range(len(levels) + 1), ["0", *(f"{level:g}" for level in levels)])
        ax.set_xlabel(f"noise, {_NAMES[noise]}")
        ax.grid(color="#e6e9ee")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mIoU, %")
    axes[0].set_ylim(0, 1.1 * max(row["miou"] for row in rows) + 1)
    axes[-1].legend()
    figure.suptitle(title, fontsize=10)
    return figure
