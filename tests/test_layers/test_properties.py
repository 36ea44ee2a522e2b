"""The layers on whatever hypothesis comes up with, against a float64 oracle of their own formulas.

The oracle is written in elementary operations and differentiated by autograd; it shares no code
with the package. Errors are compared with what the arithmetic allows: a small multiple of the
rounding unit of the statistics' dtype times the size of the terms that are added up, plus, for half
precision, the rounding of the result itself.
"""

import math
import os
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmbcn import BCN, MicroBCN, SyncBCN, WSConv2d
from mmbcn.layers import AffineInstanceNorm, AutoGroupNorm
from mmbcn.layers.groups import resolve_num_groups

UNIT = {torch.float64: 1e-13, torch.float32: 1e-6}  # of the statistics, with some sums' growth
HALF = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
quick = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
thorough = settings(quick, max_examples=4000)


@dataclass
class Case:
    """One call of a layer."""

    cls: type
    backend: str
    dtype: torch.dtype
    samples: int
    groups: int
    width: int
    positions: tuple[int, ...]
    layout: str
    pattern: str
    training: bool
    momentum: float | None
    steps: int
    warmup: bool
    eps: float
    seed: int

    def input(self) -> tuple[Tensor, Tensor]:
        """X and the upstream gradient, in dtype and layout."""
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.samples, self.groups * self.width, *self.positions)
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        if self.pattern == "offset":
            x = x + 30 * torch.randn(shape[1], generator=g).view(1, -1, *[1] * len(self.positions))
        elif self.pattern == "constant":
            x = torch.full_like(x, 0.7)
        elif self.pattern == "sparse":
            x = x * (x > 1)
        elif self.pattern == "small":
            x = x * 1e-3
        elif self.pattern == "large":
            x = x * 1e3
        dy = torch.randn(shape, generator=g, dtype=torch.float64)
        return self.laid_out(x.to(self.dtype)), dy.to(self.dtype)

    def laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "strided":
            return x.repeat_interleave(2, -1)[..., ::2]
        if self.layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x

    def layer(self) -> torch.nn.Module:
        options = dict(warmup=self.warmup) if self.cls is MicroBCN else {}
        layer = self.cls(self.groups * self.width, self.groups, self.eps, self.momentum, **options)
        g = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=g) + 0.5)
            layer.bn.running_mean.copy_(torch.randn(len(layer.bn.weight), generator=g))
            layer.bn.running_var.copy_(torch.rand(len(layer.bn.weight), generator=g) + 0.5)
            layer.bn.num_batches_tracked.fill_(self.steps)
        if self.dtype == torch.float64:
            layer.double()
        return layer.train(self.training)


cases = st.builds(
    Case,
    cls=st.sampled_from([BCN, MicroBCN, SyncBCN]),
    backend=st.sampled_from(["reference", "aten"]),
    dtype=st.sampled_from([*UNIT, *HALF]),
    samples=st.integers(1, 4),
    groups=st.integers(1, 4),
    width=st.integers(1, 4),
    positions=st.lists(st.integers(1, 7), max_size=3).map(tuple),
    layout=st.sampled_from(["contiguous", "channels_last", "strided", "transposed"]),
    pattern=st.sampled_from(["normal", "offset", "constant", "sparse", "small", "large"]),
    training=st.booleans(),
    momentum=st.sampled_from([0.1, 0.0, 1.0, None]),
    steps=st.integers(0, 20),
    warmup=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
    seed=st.integers(0, 999),
)


def estimates(case: Case, layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Mean and variance that normalize (differentiable), and the running estimates afterwards."""
    old_mean, old_var = layer.bn.running_mean.double(), layer.bn.running_var.double()
    over = [0, *range(2, x.dim())]
    count = x.numel() // x.shape[1]
    micro = case.cls is MicroBCN
    if not case.training or (count == 1 and not micro):
        return old_mean, old_var, old_mean, old_var
    mean = x.sum(over) / count
    rate = case.momentum
    if rate is None or (micro and case.warmup):
        rate = max(rate or 0.0, 1 / (case.steps + (2 if micro and count == 1 else 1)))
    if micro:
        spread = ((x - old_mean.view(-1, *[1] * (x.dim() - 2))) ** 2).sum(over) / count
        new_mean = ((1 - rate) * old_mean + rate * mean).detach()
        new_var = ((1 - rate) * old_var + rate * spread).detach()
        return new_mean, new_var, new_mean, new_var
    squares = ((x - mean.view(-1, *[1] * (x.dim() - 2))) ** 2).sum(over)
    new_mean = ((1 - rate) * old_mean + rate * mean).detach()
    new_var = ((1 - rate) * old_var + rate * squares / (count - 1)).detach()
    return mean, squares / count, new_mean, new_var


def check_batch_channel_norm(case: Case) -> None:
    layer = case.layer()
    x, dy = case.input()
    leaves = [x, layer.bn.weight, layer.bn.bias, layer.weight, layer.bias]
    x64, gb, bb, g, b = (t.detach().double().requires_grad_() for t in leaves)
    mean, var, new_mean, new_var = estimates(case, layer, x64)
    trailing = [1] * len(case.positions)
    spread = [1, -1, *trailing]
    slope = (gb / (var + case.eps).sqrt()).view(spread)
    z = (slope * (x64 - mean.view(spread)) + bb.view(spread)).unflatten(1, (case.groups, -1))
    over = list(range(2, z.dim()))
    centred = z - z.mean(over, keepdim=True)
    rstd = 1 / ((centred**2).mean(over, keepdim=True) + case.eps).sqrt()
    per_group = [1, case.groups, 1, *trailing]
    y = (centred * rstd * g.view(per_group) + b.view(per_group)).flatten(1, 2)
    grads = torch.autograd.grad((y * dy.double()).sum(), [x64, gb, bb, g, b], allow_unused=True)

    assume(max(t.abs().max() for t in (y, grads[0])) < torch.finfo(case.dtype).max)

    # sizes of the terms that are added up to get each result
    terms = slope.abs() * (x64.abs() + mean.abs().view(spread)) + bb.abs().view(spread)
    terms = (rstd * terms.unflatten(1, (case.groups, -1))).flatten(1, 2)  # of z_hat
    gain = (rstd * g.view(per_group).abs()).amax()
    hat = (x64 - mean.view(spread)) / (var + case.eps).sqrt().view(spread)
    up, n = dy.double().norm(), y.numel() ** 0.5
    dz = gain * up * (1 + terms.amax())
    sizes = {
        "y": g.abs().amax() * terms.norm() + b.abs().amax() * n,
        "x": slope.abs().amax() * dz * (1 + hat.abs().amax()),
        "bn.weight": dz * (hat.norm() + n),
        "bn.bias": dz * n,
        "weight": up * (terms.norm() + n),
        "bias": up * n,
    }

    with mock.patch.dict(os.environ, MMBCN_BACKEND=case.backend):
        x = x.detach().requires_grad_()
        got = layer(x)
        got_grads = torch.autograd.grad((got * dy).sum(), [x, *leaves[1:]])
    unit = UNIT.get(case.dtype, UNIT[torch.float32])
    for name, a, e in zip(sizes, [got, *got_grads], [y, *grads], strict=True):
        e = torch.zeros_like(a).double() if e is None else e
        half = 0.0  # of the last place, of normal numbers and of those below
        if name in "yx":
            info = torch.finfo(case.dtype)
            below = info.smallest_normal * info.eps / 2 * a.numel() ** 0.5
            half = HALF.get(case.dtype, 0) * e.norm() + below
        assert a.shape == e.shape, name
        assert a.dtype == (case.dtype if name in "yx" else layer.weight.dtype), name
        assert (a.double() - e).norm() <= 20 * unit * sizes[name] + half, name
    close = dict(rtol=100 * unit, atol=100 * unit * float(x64.abs().max()) ** 2)
    torch.testing.assert_close(layer.bn.running_mean.double(), new_mean, **close)
    torch.testing.assert_close(layer.bn.running_var.double(), new_var, **close)
    moved = case.training and (case.cls is MicroBCN or x.numel() > x.shape[1])
    assert int(layer.bn.num_batches_tracked) == case.steps + moved


def case(**changes) -> Case:
    """A case by hand; what is not said is ordinary."""
    return Case(
        **dict(
            dict(cls=BCN, backend="aten", dtype=torch.float32, samples=2, groups=2, width=3),
            **dict(positions=(3, 5), layout="contiguous", pattern="normal", training=True),
            **dict(momentum=0.1, steps=3, warmup=True, eps=1e-5, seed=0),
        )
        | changes
    )


@quick
@given(cases)
@example(case(samples=1, positions=()))  # one value per channel
@example(case(samples=1, positions=(1, 1), cls=SyncBCN))
@example(case(samples=1, positions=(1, 1), cls=MicroBCN))
@example(case(dtype=torch.float16, positions=()))
@example(case(dtype=torch.bfloat16, layout="channels_last"))
@example(  # two gradients of x that nearly cancel
    case(
        **dict(dtype=torch.bfloat16, backend="reference", samples=3, width=2, positions=()),
        **dict(pattern="large", eps=1.0, seed=17),
    )
)
@example(case(width=1, positions=(), samples=4))  # groups of one value
def test_batch_channel_norms(case):
    check_batch_channel_norm(case)


@pytest.mark.slow
@thorough
@given(cases)
def test_batch_channel_norms_thoroughly(case):
    check_batch_channel_norm(case)


@quick
@given(cases, st.integers(1, 3))
def test_splitting_the_batch_changes_nothing_in_eval(case, at):
    """Eval is per sample: no sample sees another."""
    case.training, case.samples = False, 4
    layer, (x, _) = case.layer(), case.input()
    with mock.patch.dict(os.environ, MMBCN_BACKEND=case.backend):
        together, apart = layer(x), torch.cat([layer(x[:at]), layer(x[at:])])
    unit = HALF.get(case.dtype, 1e-4 if case.dtype == torch.float32 else 1e-9)
    assert (together - apart).double().norm() <= unit * (1 + together.double().norm())


@quick
@given(
    out=st.integers(1, 5),
    inside=st.integers(1, 4),
    kernel=st.sampled_from([(1, 2), (2, 1), (3, 3), (1, 5)]),
    groups=st.integers(1, 3),
    eps_inside=st.booleans(),
    unbiased=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_weight_standardization(
    out, inside, kernel, groups, eps_inside, unbiased, dtype, scale, seed
):
    torch.manual_seed(seed)
    conv = WSConv2d(
        inside * groups,
        out * groups,
        kernel,
        groups=groups,
        eps_inside=eps_inside,
        unbiased=unbiased,
    ).to(dtype)
    with torch.no_grad():
        conv.weight.mul_(scale)
    w = conv.weight.detach().double().requires_grad_()
    n = w[0].numel()
    centred = w - w.mean((1, 2, 3), keepdim=True)
    var = (centred**2).sum((1, 2, 3), keepdim=True) / (n - unbiased)
    expected = centred / ((var + 1e-5).sqrt() if eps_inside else var.sqrt() + 1e-5)
    dy = torch.randn(w.shape, dtype=torch.float64)
    (dw,) = torch.autograd.grad((expected * dy).sum(), w)
    got = conv.standardized_weight()
    (got_dw,) = torch.autograd.grad((got * dy.to(dtype)).sum(), conv.weight)
    rtol = 1e-10 if dtype == torch.float64 else 2e-5
    assert (got - expected).norm() <= rtol * (1 + expected.norm())
    steepest = float((1 / (var + 1e-10).sqrt()).max())
    assert (got_dw - dw).norm() <= rtol * (dw.norm() + steepest * dy.norm())


@quick
@given(st.integers(1, 4096))
def test_automatic_groups(channels):
    groups = resolve_num_groups("auto", channels)
    fitting = [g for g in range(1, 33) if channels % g == 0 and channels // g >= 2] or [1]
    assert groups == max(fitting)
    assert AutoGroupNorm(channels).num_groups == groups


@quick
@given(cases)
def test_relatives(case):
    """The per-sample relatives, which share the settings of the cases."""
    assume(case.samples * case.width * math.prod(case.positions) > 1)  # torch's GroupNorm refuses
    x, _ = case.input()
    for layer, groups in (
        (AutoGroupNorm(x.shape[1], case.groups, case.eps), case.groups),
        (AffineInstanceNorm(x.shape[1], case.eps), x.shape[1]),
    ):
        z = x.double().reshape(case.samples, groups, -1)
        centred = z - z.mean(2, keepdim=True)
        expected = centred / ((centred**2).mean(2, keepdim=True) + case.eps).sqrt()
        got = layer.to(case.dtype)(x)
        size = (z.abs() / ((centred**2).mean(2, keepdim=True) + case.eps).sqrt()).norm()
        unit = HALF.get(case.dtype, UNIT.get(case.dtype, 0))
        assert got.dtype == case.dtype
        assert (got.double().reshape(z.shape) - expected).norm() <= 20 * unit * (1 + size)
