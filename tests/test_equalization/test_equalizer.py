"""Equalization: the function stays, norms become equal, optimizers' memories stay in step."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Chain, Joins, Kinds, Pyramid, build, conv, rescale_joins
from torch import nn

from mmbcn import equalize
from mmbcn.equalization import Equalizer
from mmbcn.errors import UsageError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def equalizer(model, c=1.0, x=X, **options):
    return Equalizer(model, lambda: model(x), c, **options)


def squares(model):
    """The sum of squared weights, biases left out."""
    weights = [p for n, p in model.named_parameters() if "bias" not in n and n != "shift"]
    return sum(p.square().sum().item() for p in weights if p.dim() > 1)


@pytest.mark.parametrize("c", [1.0, 1.1])
@pytest.mark.parametrize("kind", [Joins, Pyramid, Kinds])
def test_output_is_unchanged(kind, c):
    model = build(kind)
    with torch.no_grad():
        expected = model(X)
        before = [p.clone() for p in model.parameters()]
        balance = equalizer(model, c)
        for _ in range(5):
            balance.cycle()
        torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9 * expected.std())
        balance.converge()
        torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9 * expected.std())
    moved = [
        (p / q - 1).abs().max() > 1e-3 for p, q in zip(model.parameters(), before, strict=True)
    ]
    kept = {Joins: {"last.bias"}, Pyramid: {"last.bias"}, Kinds: {"prelu.weight"}}[kind]
    names = [n for n, _ in model.named_parameters()]
    assert {n for n, m in zip(names, moved, strict=True) if not m} == kept


def test_output_is_unchanged_in_float32():
    model = build(Joins).float()
    x = X.float()
    with torch.no_grad():
        expected = model(x)
        equalize(model, x)
        error = (model(x) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5


@pytest.mark.parametrize("c", [1.0, 1.2])
def test_cycle_is_the_formula_of_the_paper(c):
    model = build(Chain)
    layers = [m for m in model if isinstance(m, nn.Conv2d)]
    weights = [m.weight.detach().numpy().copy() for m in layers]
    biases = [m.bias.detach().numpy().copy() for m in layers]
    scales = []
    for one, two in pairwise(weights):
        left = np.sqrt((one**2).sum((1, 2, 3)))
        right = np.sqrt((two**2).sum((0, 2, 3)))
        scales.append(np.sqrt(right / (c * left)))
    for k, scale in enumerate(scales):
        weights[k] *= scale[:, None, None, None]
        biases[k] *= scale
        weights[k + 1] /= scale[:, None, None]
    equalizer(model, c).cycle()
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        np.testing.assert_allclose(layer.weight.detach(), weight, rtol=1e-12)
        np.testing.assert_allclose(layer.bias.detach(), bias, rtol=1e-12)


@pytest.mark.parametrize("kind", [Joins, Pyramid, Kinds])
def test_sum_of_squares_never_grows(kind):
    model = build(kind)
    balance = equalizer(model)
    sums = [squares(model)]
    for _ in range(30):
        balance.cycle()
        sums.append(squares(model))
    assert all(new <= old * (1 + 1e-12) for old, new in pairwise(sums))
    assert sums[-1] < 0.9 * sums[0]


def test_rescaled_networks_converge_to_the_same_weights():
    results = []
    for seed in (1, 2):
        model = build(Joins)
        expected = model(X)
        rescale_joins(model, seed)
        torch.testing.assert_close(model(X), expected)
        equalizer(model).converge(tolerance=1e-12)
        results.append([p.detach() for p in model.parameters()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("c", [1.0, 1.1])
def test_ratio_of_norms_is_c_at_convergence(c):
    model = build(Joins)
    done = equalizer(model, c).converge(tolerance=1e-10)
    assert done.largest <= 1e-10

    def norm(layers, dims):
        return sum(layer.weight.square().sum(dims) for layer in layers).sqrt()

    joins = [
        ([model.stem, model.outer1], [model.inner1, model.inner2, model.skip]),
        ([model.outer2, model.skip], [model.last]),
        ([model.inner1], [model.outer1]),
        ([model.inner2], [model.outer2]),
    ]
    for writers, readers in joins:
        ratio = norm(readers, (0, 2, 3)) / norm(writers, (1, 2, 3))
        torch.testing.assert_close(ratio, torch.full_like(ratio, c), rtol=1e-6, atol=0)


def train(model, optimizer, steps=4):
    for step in range(steps):
        x = X * (step + 1) + step
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "adam": lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_remembers_what_it_would_in_the_new_coordinates(name):
    """Gathered at constant weights: scaling network and memory = gathering at scaled weights."""
    model = build(Joins)
    scaled = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters(), 0.0)
    train(model, optimizer)
    equalizer(model).cycle(optimizer)
    equalizer(scaled).cycle()
    reference = OPTIMIZERS[name](scaled.parameters(), 0.0)
    train(scaled, reference)
    for one, two in zip(model.parameters(), scaled.parameters(), strict=True):
        for key, value in reference.state[two].items():
            torch.testing.assert_close(optimizer.state[one][key], value, rtol=1e-9, atol=0)


def test_momentum_step_after_rescaling_is_as_derived():
    """With factor f on a weight: w -> f w, buffer -> buffer / f, gradient -> gradient / f."""
    model = build(Joins)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
    train(model, optimizer)
    old = copy.deepcopy(model)
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    old.zero_grad()
    old(X).square().mean().backward()
    equalizer(model).cycle(optimizer)
    factors = [
        p.detach() / q.detach() for p, q in zip(model.parameters(), old.parameters(), strict=True)
    ]
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()
    for p, q, buffer, f in zip(model.parameters(), old.parameters(), buffers, factors, strict=True):
        torch.testing.assert_close(
            p.data, q * f - 1e-6 * (0.9 * buffer + q.grad) / f, rtol=1e-9, atol=0
        )


def test_unknown_memory_is_refused():
    model = build(Joins)
    optimizer = torch.optim.Adadelta(model.parameters())
    train(model, optimizer)
    optimizer.state[model.stem.weight].clear()  # as if it had been added later
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(UsageError, match="Adadelta's 'square_avg'"):
        equalizer(model).cycle(optimizer)
    after = model.state_dict(), optimizer.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)])
def test_norms_are_refused_by_name(norm):
    model = nn.Sequential(conv(3, 4), norm, nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 2)).double()
    with pytest.raises(UsageError, match=rf"in the way .* 1 of them: 1 \({type(norm).__name__}\)"):
        equalize(model, X)
    with pytest.raises(UsageError, match="1 of them: Functional"):
        equalize(Functional().double(), X)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(3, 4), conv(4, 2)

    def forward(self, x):
        return self.two(F.relu(F.group_norm(self.one(x), 2)))


class Idle(nn.Module):
    """Layers that only training runs: a head on the hidden layer, and a lone parameter."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv(3, 4), conv(4, 2)
        self.head = nn.Sequential(nn.BatchNorm2d(4), conv(4, 2))
        self.gate = nn.Sequential(nn.Sigmoid())
        self.gate.shift = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        x = F.relu(self.one(x))
        if self.training:
            return self.two(x), self.head(x), self.gate(x + self.gate.shift)
        return self.two(x)


def test_parameters_that_do_not_run_are_refused_by_name():
    model = build(Idle)
    before = copy.deepcopy(model.state_dict())
    idle = r"not used in eval, 5 of them: head\.0\.weight, head\.0\.bias, .*, gate\.shift\."
    for options in ({}, dict(ignore_norms=True)):
        with pytest.raises(UsageError, match=idle):
            equalizer(model, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.head = model.gate = None
    expected = model(X)
    assert equalizer(model).balanced == 4
    torch.testing.assert_close(model(X), expected)


class Keyword(nn.Sequential):
    """Calls its layers by keyword."""

    def forward(self, x):
        for layer in self:
            x = layer(input=x)
        return x


def test_norms_called_by_keyword_are_found():
    model = Keyword(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)).double()
    with pytest.raises(UsageError, match=r"1 of them: 1 \(BatchNorm2d\)"):
        equalize(model, X)
    model[1].bias.data += 1
    plain = copy.deepcopy(nn.Sequential(model[0], model[2], model[3]))
    equalizer(model, ignore_norms=True).cycle()
    equalizer(plain).cycle()
    for i, j in ((0, 0), (3, 2)):
        torch.testing.assert_close(model[i].weight, plain[j].weight)


def test_ignored_norms_are_as_if_not_there():
    plain = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), conv(5, 2)).double()
    normed = nn.Sequential(
        *(plain[0], nn.BatchNorm2d(4), nn.ReLU(), plain[2], nn.GroupNorm(1, 5), nn.ReLU()), plain[4]
    ).double()
    normed = copy.deepcopy(normed)
    affine = [p.clone() for n in (1, 4) for p in normed[n].parameters()]
    equalizer(plain).cycle()
    equalizer(normed, ignore_norms=True).cycle()
    for i, j in ((0, 0), (2, 3), (4, 6)):
        torch.testing.assert_close(plain[i].weight, normed[j].weight)
    assert all(map(torch.equal, affine, (p for n in (1, 4) for p in normed[n].parameters())))


class Odd(nn.Module):
    """Each join here must stop scales, or tie them: named by what it does to the hidden layer."""

    def __init__(self, what):
        super().__init__()
        self.one, self.two, self.three = conv(3, 4), conv(4, 4), conv(4, 2)
        self.what = what
        if what == "frozen":
            self.two.weight.requires_grad_(False)
        if what == "other form of weight":
            self.two.bias = None
        if what == "tied":
            self.three = conv(4, 4)
            self.three.weight = self.two.weight

    def forward(self, x):
        x = F.relu(self.one(x))
        hidden = {
            "sigmoid": lambda: self.two(x).sigmoid(),
            "gate": lambda: F.relu(self.two(x)) * self.two(x).mean((2, 3), keepdim=True).sigmoid(),
            "constant": lambda: F.relu(self.two(x) + 1),
            "square": lambda: self.two(x) * self.two(x),
            "twice": lambda: F.relu(self.two(F.relu(self.two(x)))),
            "standardized": lambda: F.relu(
                F.conv2d(x, self.two.weight / self.two.weight.std(), self.two.bias)
            ),
            "norm of weight": lambda: F.relu(self.two(x) / self.two.weight.norm()),
            "channel mean": lambda: F.relu(self.two(x)).mean(1, keepdim=True).expand(-1, 4, -1, -1),
            "shuffle": lambda: (
                F.relu(self.two(x)).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
            ),
            "pad": lambda: F.pad(F.relu(self.two(x)), (1, 1)),
            "reflect": lambda: F.pad(F.relu(self.two(x)), (1, 1, 1, 1), mode="reflect"),
            "pad of ones": lambda: F.pad(F.relu(self.two(x)), (1, 1), value=1),
            "shift": lambda: F.pad(F.relu(self.two(x)), (0, 0, 0, 0, 1, -1)),
            "pool over channels": lambda: F.avg_pool2d(
                F.relu(self.two(x)).flatten(2), (3, 1), 1, (1, 0)
            ).unflatten(2, (8, 8)),
            "integers": lambda: self.two(x).int().double(),
            "integer sum": lambda: self.two(x).sum(3, True, dtype=torch.int64).double(),
            "bits": lambda: self.two(x).view(torch.int64).double(),
            "other form of weight": lambda: torch.cat(
                [F.conv2d(x.repeat(1, 2, 1, 1), self.two.weight.view(2, 8, 3, 3))] * 2, 1
            ),
            "out": lambda: torch.add(self.two(x), self.two(x), out=X.new_empty(2, 4, 8, 8)),
            "in place": lambda: self._half_in_place(F.relu(self.two(x))),
            "returned": lambda: F.relu(self.two(x)),
            "frozen": lambda: F.relu(self.two(x)),
            "tied": lambda: F.relu(self.two(x)),
            "checkpoint": lambda: torch.utils.checkpoint.checkpoint(
                lambda y: F.relu(self.two(y)), x, use_reentrant=False
            ),
        }[self.what]()
        out = self.three(hidden)
        return (out, hidden) if self.what == "returned" else out

    @staticmethod
    def _half_in_place(x):
        x = x.clone()
        x[:, :2].mul_(x[:, 2:].sigmoid())
        return x


# how many of the 8 channels between the three layers can be scaled
FREE = {
    **dict.fromkeys(["standardized", "norm of weight", "frozen", "tied"], 0),
    **dict.fromkeys(["sigmoid", "gate", "constant", "square", "channel mean", "shuffle"], 4),
    **dict.fromkeys(["twice", "returned"], 4),
    **dict.fromkeys(["pad of ones", "shift", "pool over channels"], 4),
    **dict.fromkeys(["integers", "integer sum", "bits"], 4),
    **dict.fromkeys(["pad", "reflect"], 8),
    "other form of weight": 0,
    "out": 4,
    "in place": 6,
    "checkpoint": 8,
}


@pytest.mark.parametrize("what", FREE)
def test_other_joins_keep_the_function(what):
    model = build(lambda: Odd(what))
    with torch.no_grad():
        expected = model(X)
        if not FREE[what]:
            with pytest.raises(UsageError, match="nothing to equalize"):
                equalizer(model)
            return
        balance = equalizer(model)
        balance.converge()
        torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-12)
    assert balance.balanced == FREE[what]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_on_sequences_are_refused_with_a_reason(bias):
    model = nn.Sequential(nn.Linear(8, 5, bias), nn.ReLU(), nn.Linear(5, 2, bias)).double()
    with pytest.raises(
        UsageError, match=r"inputs of \(N, F\)\)\. In the way: .*view in 0 \(Linear\)"
    ):
        equalize(model, X.flatten(2)[:, :, :8])
    equalize(model, X[0, :, 0])


def test_dead_channels_keep_their_scale():
    model = build(Chain)
    model[0].weight.data[1] = 0
    model[4].weight.data[:, 2] = 0
    expected = model(X)
    equalizer(model).converge()
    assert all(p.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model(X), expected)


def test_c_must_be_positive():
    with pytest.raises(UsageError, match="c must be a positive number"):
        equalizer(build(Chain), 0)
