"""How common corruptions of the test images lower the mIoU."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from mmbcn.datasets.transforms.corrupt import CORRUPTIONS

CLEAN = "clean"
_COLORS = dict(noise="#D55E00", blur="#0072B2", weather="#009E73", digital="#CC79A7")


def cell_name(corruption: str, severity: int) -> str:
    """The name of a measurement."""
    return f"{corruption} {severity}"


def summarize(
    corruptions: Sequence[str], severities: Sequence[int], results: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each corruption, then their mean: mIoU, mean over severities, relative to clean.

    Relative: in percent of the clean mIoU.
    """
    clean = results[CLEAN]
    rows = []
    for corruption in corruptions:
        values = {s: results[cell_name(corruption, s)] for s in severities}
        rows.append(_row(corruption, values, clean))
    means = {s: mean(results[cell_name(c, s)] for c in corruptions) for s in severities}
    return [*rows, _row("mean", means, clean), _row(CLEAN, dict.fromkeys(severities, clean), clean)]


def _row(name: str, values: Mapping[int, float], clean: float) -> dict[str, Any]:
    average = mean(values.values())
    return dict(
        corruption=name,
        **{f"severity_{s}": round(value, 3) for s, value in values.items()},
        miou=round(average, 3),
        relative=round(100 * average / clean, 2) if clean else "",
    )


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw a bar for each corruption, the mean over the severities; dots: the severities."""
    groups = {name: group for group, names in CORRUPTIONS.items() for name in names}
    shown = [row for row in rows if row["corruption"] != CLEAN]
    clean = rows[-1]["miou"]
    figure = Figure((2 + 0.5 * len(shown), 4.6), layout="constrained")
    ax = figure.subplots()
    colors = [_COLORS.get(groups.get(row["corruption"], ""), "#666666") for row in shown]
    places = range(len(shown))
    ax.bar(places, [row["miou"] for row in shown], color=colors, alpha=0.55)
    for place, row, color in zip(places, shown, colors, strict=True):
        values = [value for key, value in row.items() if key.startswith("severity_")]
        spread = [place - 0.3 + 0.6 * (i + 0.5) / len(values) for i in range(len(values))]
        ax.plot(spread, values, ".-", color=color, markersize=5, linewidth=0.8)
    ax.axhline(clean, color="gray", linestyle=":")
    ax.annotate(f"clean {clean:.1f}", (len(shown) - 0.4, clean), va="center")
    ax.set_xticks(places, [row["corruption"] for row in shown], rotation=40, ha="right")
    ax.set_xlim(-0.6, len(shown) - 0.45)
    ax.set_ylabel("mIoU, %")
    points = [v for row in rows for key, v in row.items() if key.startswith("severity_")]
    ax.set_ylim(0, 1.05 * max(*points, clean, 1e-6))
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10)
    return figure
