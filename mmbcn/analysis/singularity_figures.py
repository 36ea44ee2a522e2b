"""Figures of the distance to elimination singularities."""

import re
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmbcn.analysis.singularity import DEAD, MEASURES, Singularity

LABELS = dict(
    sigma_mu=r"$\sigma_\mu$",
    sigma_sigma=r"$\sigma_\sigma$",
    dead="share of dead channels",
    kl="mean KL(. || N(0, 1))",
)
_COLUMNS = 6
_GAUSSIAN_EDGE = 2.326  # means so many stds below zero leave P(active) = 1 % of a Gaussian
_DEAD_COLOR = "#c0392b"


def draw_channels(found: Singularity, title: str) -> Figure:
    """The channels of each layer as points (mean, std); BatchNorm's reference is (0, 1)."""
    layers = found.layers
    columns = min(_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure((2.1 * columns, 2.0 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    means = np.concatenate([layer.mean for layer in layers])
    stds = np.concatenate([layer.std for layer in layers])
    left, right = min(means.min(), -1), max(means.max(), 1)
    edge = np.array([left, 0.0])
    for ax, layer in zip(axes, layers, strict=False):
        dead = (layer.active < DEAD).numpy()
        ax.plot(edge, -edge / _GAUSSIAN_EDGE, color="0.6", linestyle=":", linewidth=1)
        points = dict(s=7, linewidths=0, alpha=0.7)
        ax.scatter(layer.mean[~dead], layer.std[~dead], color="#0072B2", **points)
        ax.scatter(layer.mean[dead], layer.std[dead], color=_DEAD_COLOR, **points)
        ax.plot(0, 1, "+", color="black", markersize=8)
        ax.set_title(f"{layer.name}\n{dead.sum()} of {len(dead)} dead", fontsize=6.5)
        ax.tick_params(labelsize=7)
        _clean(ax)
    for ax in axes[len(layers) :]:
        ax.axis("off")
    axes[0].set_xlim(left - 0.05 * (right - left), right + 0.05 * (right - left))
    axes[0].set_ylim(0, max(1.1, 1.05 * stds.max()))
    figure.supxlabel("mean of a channel", fontsize=9)
    figure.supylabel("std of a channel", fontsize=9)
    figure.suptitle(
        f"{title}: +: BatchNorm before its affine; below the dots a Gaussian channel is dead",
        fontsize=9,
    )
    return figure


def draw_spreads(models: Mapping[str, Singularity]) -> Figure:
    """The layers of each model as points (sigma_mu, sigma_sigma), larger the deeper they are."""
    figure = Figure((5.6, 4.6), layout="constrained")
    ax = figure.subplots()
    for (label, found), color in zip(models.items(), _colors(len(models)), strict=True):
        x, y = ([getattr(layer, key) for layer in found.layers] for key in MEASURES[:2])
        sizes = np.linspace(8, 70, len(x))
        ax.scatter(x, y, sizes, color=color, alpha=0.6, linewidths=0, label=label)
    ax.plot(0, 0, "+", color="black", markersize=10, label="BatchNorm before its affine")
    ax.set(xlabel=LABELS["sigma_mu"], ylabel=LABELS["sigma_sigma"])
    ax.set_title("spread over the channels; larger: deeper layers", fontsize=10)
    _clean(ax)
    ax.legend(fontsize=7)
    return figure


def draw_depth(models: Mapping[str, Singularity]) -> Figure:
    """Each measure, the share of dead channels too, of each layer in the order of execution."""
    names = list(dict.fromkeys(_place(v.name) for found in models.values() for v in found.layers))
    width = max(7.0, 1.5 + 0.16 * len(names))
    figure = Figure((width, 2.0 * len(MEASURES) + 1.2), layout="constrained")
    axes = figure.subplots(len(MEASURES), 1, sharex=True)
    for (label, found), color in zip(models.items(), _colors(len(models)), strict=True):
        places = [names.index(_place(layer.name)) for layer in found.layers]
        for ax, key in zip(axes, MEASURES, strict=True):
            values = [getattr(layer, key) for layer in found.layers]
            ax.plot(places, values, "o-", color=color, markersize=3, linewidth=1, label=label)
    for ax, key in zip(axes, MEASURES, strict=True):
        ax.set_ylabel(LABELS[key], fontsize=8)
        ax.set_ylim(bottom=0)
        _clean(ax)
    axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes[0].legend(fontsize=7, ncols=3)
    return figure


def draw_curves(runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Figure:
    """Each measure's mean over the layers, over the iterations of each run."""
    figure = Figure((9.0, 5.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    for (label, run), color in zip(runs.items(), _colors(len(runs)), strict=True):
        for ax, key in zip(axes, MEASURES, strict=True):
            values = [means[key] for means in run.values()]
            ax.plot(list(run), values, "o-", color=color, markersize=3.5, label=label)
    for ax, key in zip(axes, MEASURES, strict=True):
        ax.set_title(f"{LABELS[key]}, mean of the layers", fontsize=9)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _clean(ax)
    for ax in axes[2:]:
        ax.set_xlabel("iteration")
    axes[0].legend(fontsize=7)
    return figure


def _place(name: str) -> str:
    """A layer's name without the kind of norm, which mm models put into it: bn1, gn1."""
    return re.sub(r"(?<![^.])(bn|gn|ln|in)(?=\d*$)", "norm", name)


def _colors(number: int) -> list[object]:
    if number <= 10:
        return [f"C{i}" for i in range(number)]
    return list(mpl.colormaps["viridis"](np.linspace(0, 0.95, number)))


def _clean(ax: Axes) -> None:
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
