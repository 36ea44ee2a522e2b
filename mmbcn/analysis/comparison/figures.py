"""The figures of a comparison's report, as SVG to put into a page."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mmbcn.analysis.comparison.summary import Verdict

# Okabe and Ito 2008: told apart with any colour vision; a norm and its _ws twin share a colour
_COLORS = dict(
    bn="#0072B2",
    gn="#E69F00",
    bcn="#D55E00",
    microbcn="#009E73",
    syncbn="#56B4E9",
    syncbcn="#CC79A7",
    ln="#8C6D1F",
    frozen_bn="#666666",
    kn="#44AA99",
    ic="#882255",
    none="#999933",
)
_COLORS["in"] = "#000000"
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mmbcn",  # the same data gives the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4b2",
    "axes.labelcolor": "#3b4657",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "xtick.color": "#5a6677",
    "ytick.color": "#3b4657",
}
_SMOOTH = 9  # points of the loss that a line averages over
_DASHED = (0, (4, 1.5))


def color_of(norm: str) -> str:
    """The colour of a norm."""
    return _COLORS[norm.removesuffix("_ws")]


def _line_of(norm: str) -> dict[str, Any]:
    style = _DASHED if norm.endswith("_ws") else "-"
    return dict(color=color_of(norm), linestyle=style, linewidth=1.8)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element; its ids begin with the label, as they share one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{label}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def draw_miou(verdicts: Sequence[Verdict]) -> str:
    """The mIoU of each run as a dot, the mean of each norm as a bar with its deviation."""

    def draw(ax: Axes, verdict: Verdict) -> None:
        norms = [group.norm for group in verdict.groups]
        for y, group in enumerate(verdict.groups):
            color = color_of(group.norm)
            values = list(group.mious.values())
            if not values:
                ax.text(
                    0.01,
                    y,
                    "no result",
                    va="center",
                    color="#8a94a3",
                    style="italic",
                    transform=ax.get_yaxis_transform(),
                )
                continue
            filled = "none" if group.norm.endswith("_ws") else color
            ax.plot(values, [y] * len(values), "o", color=color, markersize=6, mfc=filled, mew=1.5)
            ax.plot([group.mean] * 2, [y - 0.32, y + 0.32], color=color, linewidth=2.5)
            if group.std is not None:
                ax.plot(
                    [group.mean - group.std, group.mean + group.std],
                    [y, y],
                    color=color,
                    alpha=0.35,
                    linewidth=7,
                    solid_capstyle="butt",
                )
        ax.set_yticks(range(len(norms)), norms)
        ax.set_ylim(len(norms) - 0.5, -0.5)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel("mIoU, %")
        ax.margins(x=0.08)

    height = 0.9 + 0.36 * max(len(verdict.groups) for verdict in verdicts)
    return _panels(verdicts, draw, "miou", height, share_x=True)


def draw_losses(verdicts: Sequence[Verdict]) -> str:
    """The training loss: mean over the seeds, smoothed; the band holds all seeds."""

    def draw(ax: Axes, verdict: Verdict) -> None:
        highest = []
        for group in verdict.groups:
            found = _mean_curve([r["curve"] for r in group.results.values()], "loss")
            if found is None:
                continue
            iters, values = found
            smooth = np.array([_smooth(row) for row in values])
            ax.plot(iters, smooth.mean(0), label=group.norm, **_line_of(group.norm))
            ax.fill_between(
                iters,
                smooth.min(0),
                smooth.max(0),
                color=color_of(group.norm),
                alpha=0.12,
                linewidth=0,
            )
            highest.append(np.quantile(smooth, 0.97))
        if highest:
            ax.set_ylim(0, 1.15 * max(highest))
        ax.set_xlabel("iteration")
        ax.set_ylabel("training loss")

    return _panels(verdicts, draw, "loss", 3.4)


def draw_costs(verdicts: Sequence[Verdict]) -> str:
    """The time of a training step and the memory of each norm."""

    def draw(ax: Axes, verdict: Verdict, key: str, unit: str, scale: float) -> None:
        norms = [group.norm for group in verdict.groups]
        for y, group in enumerate(verdict.groups):
            value = group.mean_of(key)
            if value is None:
                continue
            bar = ax.barh(y, value * scale, 0.62, color=color_of(group.norm), alpha=0.85)
            if group.norm.endswith("_ws"):
                bar[0].set(hatch="////", edgecolor="white", linewidth=0)
            place = dict(xytext=(4, 0), textcoords="offset points", va="center")
            ax.annotate(f"{value * scale:.3g}", (value * scale, y), color="#3b4657", **place)
        ax.set_yticks(range(len(norms)), norms)
        ax.set_ylim(len(norms) - 0.5, -0.5)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(unit)
        ax.margins(x=0.12)

    cuda = any(group.mean_of("cuda_bytes") for verdict in verdicts for group in verdict.groups)
    memory = "process_bytes", "peak memory of the process, MiB", 2.0**-20
    if cuda:
        memory = "cuda_bytes", "peak CUDA memory, MiB", 2.0**-20
    height = 0.9 + 0.34 * max(len(verdict.groups) for verdict in verdicts)
    kinds = [("step_seconds", "time of a step, ms", 1e3), memory]
    return _panels(verdicts, draw, "costs", height, kinds)


def draw_singularities(verdicts: Sequence[Verdict], measures: dict[str, str]) -> str | None:
    """The distance to singularities over the training, mean over the seeds; None: not measured."""

    def draw(ax: Axes, verdict: Verdict, measure: str) -> None:
        for group in verdict.groups:
            curves = [r["singularity"] for r in group.results.values() if r.get("singularity")]
            found = _mean_curve(curves, measure)
            if found is not None:
                ax.plot(found[0], found[1].mean(0), label=group.norm, **_line_of(group.norm))
        ax.set_xlabel("iteration")
        ax.set_ylabel(measures[measure])
        ax.set_ylim(bottom=0)

    groups = [group for verdict in verdicts for group in verdict.groups]
    if not any(r.get("singularity") for group in groups for r in group.results.values()):
        return None
    return _panels(verdicts, draw, "singularity", 2.6, [(measure,) for measure in measures])


def _mean_curve(
    curves: Sequence[dict[str, Any]], key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Iterations, and a row of values for each curve, as far as all of them came."""
    curves = [curve for curve in curves if curve.get(key)]
    if not curves:
        return None
    length = min(len(curve[key]) for curve in curves)
    rows = np.array([curve[key][:length] for curve in curves], float)
    return np.array(curves[0]["iter"][:length], float), rows


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A moving average, of less at the ends."""
    kernel = np.ones(min(_SMOOTH, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _panels(
    verdicts: Sequence[Verdict],
    draw: Callable[..., None],
    label: str,
    height: float,
    kinds: Sequence[Any] = ((),),
    share_x: bool = False,
) -> str:
    """A panel for each kind and batch size, with one legend where lines have labels.

    Args:
        verdicts: of the batch sizes.
        draw: called with the axes, a verdict and what is in a kind.
        label: of the figure.
        height: of a row, in inches.
        kinds: further arguments of ``draw``.
        share_x: give all panels the same horizontal axis.
    """
    items = [(verdict, kind) for kind in kinds for verdict in verdicts]
    columns = min(3, len(verdicts)) if len(verdicts) > 1 else min(2, len(items))
    rows = -(-len(items) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure((10.4, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=share_x).ravel()
        handles = {}
        for ax, (verdict, kind) in zip(axes, items, strict=False):
            draw(ax, verdict, *kind)
            ax.set_title(f"batch size {verdict.batch_size}", loc="left")
            ax.xaxis.set_major_locator(MaxNLocator(6))
            ax.set_axisbelow(True)
            handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        for ax in axes[len(items) :]:
            ax.axis("off")
        norms = dict.fromkeys(group.norm for verdict in verdicts for group in verdict.groups)
        names = [norm for norm in norms if norm in handles]
        if names:
            lines = [handles[norm] for norm in names]
            style = dict(frameon=False, handlelength=2.6, ncols=min(8, len(names)))
            figure.legend(lines, names, loc="outside upper center", **style)
        return _svg(figure, label)
