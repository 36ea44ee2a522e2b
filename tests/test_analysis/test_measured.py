"""Names, runs, tables and figures of measured models."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("pandas")

from mmbcn.analysis import LayerSingularity, Singularity
from mmbcn.analysis.measured import (
    Measured,
    label_all,
    read_measured,
    run_of_hook,
    runs_of_checkpoints,
    tables,
)
from mmbcn.analysis.singularity import MEASURES
from mmbcn.analysis.singularity_figures import (
    draw_channels,
    draw_curves,
    draw_depth,
    draw_spreads,
)
from mmbcn.errors import UsageError


def layer(name, channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean, std, active, kl = torch.rand(4, channels, dtype=torch.float64, generator=g)
    active[0], kl[-1] = 0.001, torch.nan
    return LayerSingularity(name, "BCN", 100, mean, std, active, kl)


def measured(source="w/iter_1.pth", iteration=None, layers=("a", "b.1"), seed=0):
    found = [layer(name, 3 + i, seed + i) for i, name in enumerate(layers)]
    return Measured(source, iteration, "config.py", "5 images", Singularity(found, {}, []))


def labels(*sources):
    return list(label_all([measured(source) for source in sources]))


def test_names_are_as_short_as_they_can():
    assert labels("w/iter_1.pth", "w/iter_2.pth") == ["iter_1", "iter_2"]
    assert labels("v/iter_1.pth", "w/iter_1.pth", "w/a.pth") == ["v/iter_1", "w/iter_1", "a"]
    assert labels("a/x/w/i.pth", "a/y/w/i.pth") == ["x/w/i", "y/w/i"]
    assert labels("w/i.pth", "x/w/i.pth") == ["w/i", "x/w/i"]
    assert labels("w/i.pth", "w/i.safetensors") == ["i.pth", "i.safetensors"]
    with pytest.raises(UsageError, match=r"w/i\.pth is given twice"):
        labels("w/i.pth", "w/i.pth")


def test_runs_are_folders_with_several_iterations():
    models = [
        measured("a/w/iter_20.pth", 20, seed=1),
        measured("a/w/iter_3.pth", 3, seed=2),
        measured("a/v/iter_5.pth", 5),
        measured("a/u/best.pth", None),
    ]
    runs = runs_of_checkpoints(models)
    assert list(runs) == ["a/w"]
    assert list(runs["a/w"]) == [3, 20]
    sigmas = [v.sigma_mu for v in models[1].found.layers]
    assert runs["a/w"][3]["sigma_mu"] == pytest.approx(sum(sigmas) / 2)


def test_run_of_the_hook(tmp_path):
    lines = [dict(loss=1.0, step=10)]
    for step, value in ((10, 1.0), (20, 2.0)):
        means = {f"singularity/{k}": value + i for i, k in enumerate(MEASURES)}
        lines.append({**means, "singularity/backbone.bn1/kl": 9.0, "step": step})
    path = tmp_path / "20260101_000000/vis_data/scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, lines)))
    run = run_of_hook(tmp_path)
    assert run == {
        10: dict(sigma_mu=1.0, sigma_sigma=2.0, dead=3.0, kl=4.0),
        20: dict(sigma_mu=2.0, sigma_sigma=3.0, dead=4.0, kl=5.0),
    }
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(UsageError, match="has no scalars of SingularityHook"):
        run_of_hook(tmp_path)


def test_file_gives_back_what_was_written(tmp_path):
    models = [measured(iteration=7), measured("w/other.pth", seed=9)]
    path = tmp_path / "singularity.json"
    path.write_text(json.dumps(dict(models=[m.as_dict() for m in models]), allow_nan=False))
    for read, model in zip(read_measured(path), models, strict=True):
        assert read.as_dict() == model.as_dict()
        for a, b in zip(read.found.layers, model.found.layers, strict=True):
            for key in ("mean", "std", "active", "kl_of_channel"):
                torch.testing.assert_close(
                    getattr(a, key), getattr(b, key), rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"models": [{"source": "a"}]}', "{}", '{"models": []}']
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"other\.json is no singularity\.json that can be read"):
        read_measured(path)


def test_tables_name_the_model():
    layers, channels = tables(label_all([measured(), measured("w/iter_2.pth", seed=9)]))
    assert list(layers["model"]) == ["iter_1"] * 2 + ["iter_2"] * 2
    assert list(layers.columns[:3]) == ["model", "layer", "norm"]
    assert list(channels["model"]) == ["iter_1"] * 7 + ["iter_2"] * 7
    assert list(channels.columns[:3]) == ["model", "layer", "channel"]


def points(ax):
    return np.concatenate([c.get_offsets() for c in ax.collections])


def test_channels_are_points():
    found = measured(layers=[f"layer{i}" for i in range(8)]).found
    figure = draw_channels(found, "title")
    figure.draw_without_rendering()
    shown = [ax for ax in figure.axes if ax.axison]
    assert len(shown) == 8
    for ax, expected in zip(shown, found.layers, strict=True):
        got = points(ax)
        wanted = np.stack([expected.mean, expected.std], 1)
        assert {*map(tuple, got)} == {*map(tuple, wanted)}
        assert len(ax.collections[1].get_offsets()) == 1  # the dead one
        assert "1 of" in ax.get_title()
        (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert low < wanted[:, 0].min()
        assert high > wanted[:, 0].max()
        assert bottom <= wanted[:, 1].min()
        assert top > wanted[:, 1].max()


def test_depth_puts_the_layers_of_several_norms_above_one_another():
    names = dict(bn=["stem.1", "a.bn1", "b.bn"], gn_ws=["stem.1", "a.gn1", "b.gn"])
    models = {norm: measured(layers=layers).found for norm, layers in names.items()}
    axis = draw_depth(models).axes[-1]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["stem.1", "a.norm1", "b.norm"]
    assert all(list(line.get_xdata()) == [0, 1, 2] for line in axis.get_lines())


def test_spreads_depth_and_curves():
    models = {f"m{i}": measured(seed=i, layers=["a", "b"][: 1 + i % 2]).found for i in range(12)}
    spreads = draw_spreads(models)
    depth = draw_depth(models)
    means = [dict(zip(MEASURES, row, strict=True)) for row in np.arange(12.0).reshape(3, 4)]
    curves = draw_curves({"run": {3: means[0], 20: means[1]}, "other": {1: means[2]}})
    for figure in (spreads, depth, curves):
        figure.draw_without_rendering()
    wanted = [(v.sigma_mu, v.sigma_sigma) for found in models.values() for v in found.layers]
    np.testing.assert_allclose(points(spreads.axes[0]), wanted)
    for ax, key in zip(depth.axes, ("sigma_mu", "sigma_sigma", "dead", "kl"), strict=True):
        lines = ax.get_lines()
        assert [list(line.get_ydata()) for line in lines] == [
            [getattr(v, key) for v in found.layers] for found in models.values()
        ]
    assert [t.get_text() for t in depth.axes[-1].get_xticklabels()] == ["a", "b"]
    line = curves.axes[2].get_lines()[0]
    assert list(line.get_xdata()) == [3, 20]
    assert list(line.get_ydata()) == [2, 6]
