"""The small task, the perturbed statistics and the experiments on them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
pytest.importorskip("pandas")

import cv2
from mmengine.fileio import get

from mmbcn import BCN, WSConv2d
from mmbcn.analysis import measure_singularity
from mmbcn.analysis.paper import experiments
from mmbcn.analysis.paper.experiments import Task
from mmbcn.analysis.paper.figures import draw_perturbed, draw_trained
from mmbcn.analysis.paper.network import (
    accuracy,
    build_network,
    perturb_statistics,
    train_epochs,
)
from mmbcn.analysis.paper.patches import Patches, cut_patches
from mmbcn.errors import UsageError


def random_patches(n=130, classes=3, size=8):
    """The class is the mean."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=g)
    images = torch.randn(n, 3, size, size, generator=g) + 2 * labels[:, None, None, None]
    return Patches(images - images.mean(), labels)


def test_patches_are_cut_around_their_class(tiny_config):
    cfg = tiny_config(size=40)
    done = []
    patches = cut_patches(cfg, "train", 35, 16, lambda *a: done.append(a))
    assert done[-1] == (16, 16)
    assert patches.images.shape[1:] == (3, 16, 16)
    assert patches.images.dtype == torch.float32
    counts = patches.labels.bincount()
    assert counts.max() <= 35 // (counts > 0).sum()
    assert (counts > 0).sum() >= 3
    again = cut_patches(cfg, "train", 35, 16)
    assert torch.equal(patches.images, again.images)

    def read(i, kind):
        data = get(f"shapes://0/40x40/{i}_{kind}.png")
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)

    whole = [(read(i, "image"), read(i, "label")) for i in range(16)]
    windows = {
        image[y : y + 16, x : x + 16].tobytes(): label[y + 8, x + 8]
        for image, label in whole
        for y in range(25)
        for x in range(25)
    }
    for image, label in zip(patches.images, patches.labels, strict=True):
        pixels = image.permute(1, 2, 0).contiguous().numpy().astype(np.uint8)
        assert windows[pixels.tobytes()] == label


def test_patches_that_do_not_fit(tiny_config):
    with pytest.raises(UsageError, match="no image of the train set is larger than patches of 64"):
        cut_patches(tiny_config(size=40), "train", 10, 64)


@pytest.mark.parametrize("norm", ["bn", "bcn_ws"])
def test_network(norm):
    model = build_network(5, 4, norm, seed=3)
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [4, 4, 8, 8, 16, 16]
    assert all(isinstance(conv, WSConv2d) for conv in convs) == (norm == "bcn_ws")
    assert sum(isinstance(m, BCN if norm == "bcn_ws" else nn.BatchNorm2d) for m in model) == 6
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    for a, b in zip(model.parameters(), build_network(5, 4, norm, 3).parameters(), strict=True):
        assert torch.equal(a, b)


def test_perturbed_statistics_are_what_the_relus_get():
    model = build_network(3, 32, "bn", seed=0)
    perturb_statistics(model, 2.0, 0.5, seed=1)
    x = torch.randn(64, 3, 32, 32)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        model.train()(x)  # the statistics of x
    found = measure_singularity(model, [x]).layers
    means = torch.cat([v.mean for v in found])
    stds = torch.cat([v.std for v in found])
    assert means.std() == pytest.approx(2.0, rel=0.15)
    assert stds.std() == pytest.approx(0.5, rel=0.15)
    assert stds.mean() == pytest.approx(1.0, rel=0.1)
    for v, norm in zip(found, [m for m in model if isinstance(m, nn.BatchNorm2d)], strict=True):
        torch.testing.assert_close(v.mean.float(), norm.bias, rtol=1e-3, atol=1e-3)
    none = build_network(3, 8, "bn", seed=0)
    perturb_statistics(none, 0.0, 0.0, seed=1)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in none if hasattr(m, "eps"))


def test_training_learns_and_leaves_the_perturbation():
    data = random_patches()
    model = build_network(3, 8, "bn", seed=0)
    perturb_statistics(model, 1.0, 0.2, seed=0)
    before = copy.deepcopy(model)
    assert list(train_epochs(model, data, 12, 0.05, seed=0)) == list(range(1, 13))
    assert accuracy(model, data) > 0.9
    for old, new in zip(before, model, strict=True):
        if isinstance(new, nn.BatchNorm2d):
            assert torch.equal(old.weight, new.weight)
            assert torch.equal(old.bias, new.bias)
        elif isinstance(new, nn.Conv2d):
            assert not torch.equal(old.weight, new.weight)


def test_accuracy_is_the_share_found():
    images = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
    assert accuracy(nn.Identity(), Patches(images, torch.tensor([0, 1, 0, 1]))) == 0.5


def test_experiments_have_a_row_for_each_run(monkeypatch):
    monkeypatch.setattr(experiments, "NORMS", ("ln", "bcn_ws"))
    monkeypatch.setattr(experiments, "SIGMA_MUS", (0.0, 4.0))
    monkeypatch.setattr(experiments, "SIGMA_SIGMAS", (0.0,))
    data, ticks = random_patches(), []
    task = Task(data, data, 4, 2, 0.05, range(2), lambda: ticks.append(1))
    perturbed, trained = list(task.perturbed()), list(task.trained())
    assert len(ticks) == task.ticks() == 2 * 2 * 2 + 2 * 2 * 2
    assert [(r["planted_sigma_mu"], r["seed"]) for r in perturbed] == [
        *((0.0, 0), (0.0, 1), (4.0, 0), (4.0, 1))
    ]
    assert [(r["norm"], r["seed"], r["epoch"]) for r in trained] == [
        (norm, seed, epoch) for norm in ("ln", "bcn_ws") for seed in (0, 1) for epoch in (1, 2)
    ]
    assert min(r["sigma_mu"] for r in perturbed[2:]) > 5 * max(r["sigma_mu"] for r in perturbed[:2])
    assert all(0 <= r["accuracy"] <= 1 for r in perturbed + trained)
    for figure in (draw_perturbed(perturbed), draw_trained(trained)):
        figure.draw_without_rendering()
    line = draw_trained(trained).axes[0].get_lines()[0]
    kl = [[r["kl"] for r in trained if r["norm"] == "ln" and r["epoch"] == e] for e in (1, 2)]
    np.testing.assert_allclose(line.get_ydata(), np.mean(kl, 1))
