"""The figures of the two experiments."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmbcn.analysis.comparison.figures import color_of
from mmbcn.analysis.tables import import_pandas

if TYPE_CHECKING:
    import pandas as pd

_MARKS = dict(marker="o", markersize=3.5, linewidth=1.5)


def draw_perturbed(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against the planted spread of the means, and against the share of dead channels."""
    table = import_pandas().DataFrame(rows)
    figure, axes = _panels(3)
    stds = sorted(table["planted_sigma_sigma"].unique())
    for i, sigma_sigma in enumerate(stds):
        own = table[table["planted_sigma_sigma"] == sigma_sigma]
        look = dict(color=f"C{i}", label=rf"$\sigma_\sigma$ = {sigma_sigma:g} planted")
        _line(axes[0], own, "planted_sigma_mu", "accuracy", **look)
        _line(axes[1], own, "planted_sigma_mu", "dead", **look)
        axes[2].scatter(own["dead"], own["accuracy"], s=14, **look)
    axes[0].set(xlabel=r"$\sigma_\mu$ planted", ylabel="accuracy", title="accuracy")
    axes[1].set(xlabel=r"$\sigma_\mu$ planted", ylabel="share", title="dead channels, measured")
    axes[2].set(xlabel="share of dead channels", ylabel="accuracy", title="each run")
    axes[0].legend(fontsize=8)
    return figure


def draw_trained(rows: Sequence[dict[str, Any]]) -> Figure:
    """The distance from BatchNorm's statistics over the epochs, and the paths in its two axes."""
    table = import_pandas().DataFrame(rows)
    figure, axes = _panels(3)
    for norm, own in table.groupby("norm", sort=False):
        look = dict(
            color=color_of(str(norm)),
            linestyle="--" if str(norm).endswith("_ws") else "-",
            label=norm,
        )
        _line(axes[0], own, "epoch", "kl", **look)
        path = own.groupby("epoch")[["sigma_mu", "sigma_sigma"]].mean()
        axes[1].plot(path["sigma_mu"], path["sigma_sigma"], linewidth=1, **look)
        last = path.iloc[-1]
        filled = "white" if look["linestyle"] == "--" else look["color"]
        axes[1].plot(*last, "o", color=look["color"], markerfacecolor=filled, zorder=3)
        _line(axes[2], own, "epoch", "accuracy", **look)
    axes[0].set(xlabel="epoch", ylabel="mean KL(. || N(0, 1))", title="StatDiff (our measure)")
    axes[0].set_yscale("log")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set(xlabel=r"$\sigma_\mu$", ylabel=r"$\sigma_\sigma$", title="spreads; dot: the end")
    axes[1].set_xlim(left=0)
    axes[1].set_ylim(bottom=0)
    axes[2].set(xlabel="epoch", ylabel="accuracy", title="accuracy")
    axes[2].legend(fontsize=8, ncols=2)
    return figure


def _panels(number: int) -> tuple[Figure, np.ndarray]:
    figure = Figure((4.0 * number, 3.4), layout="constrained")
    axes = figure.subplots(1, number)
    for ax in axes:
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(ax: Axes, table: "pd.DataFrame", x: str, y: str, **look: Any) -> None:
    """The mean over the seeds, in a band from the least to the largest."""
    found = table.groupby(x)[y].agg(["mean", "min", "max"])
    ax.plot(found.index, found["mean"], **_MARKS, **look)
    ax.fill_between(
        found.index, found["min"], found["max"], color=look["color"], alpha=0.13, linewidth=0
    )
