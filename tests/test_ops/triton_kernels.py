"""The Triton kernels against float64 oracles; `test_triton.py` runs this file, in its own process.

On a CPU they are interpreted (``TRITON_INTERPRET=1`` before the first import of triton), on a GPU
compiled. New tensors are full of NaN, so that a value that no program writes is found; tiles are
tiny, so that rows have several parts of several tiles.
"""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mmbcn import BCN, MicroBCN
from mmbcn.ops import (
    batch_channel_norm,
    batch_moments,
    channel_moments,
    channel_statistics,
    kalman_norm,
    row_moments,
    standardize_weight,
    triton_pass_kernels,
    triton_passes,
    triton_stages,
    triton_weight_standardization,
    update_estimates,
)
from mmbcn.ops.backend import backend_for
from mmbcn.ops.weight_standardization import standardize_weight_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "odd": (2, 6, 5, 7),
    "parts": (1, 2, 21, 20),
    "channels": (2, 18, 3, 3),
    "no_position": (3, 6),
    "1d": (2, 6, 17),
    "3d": (2, 6, 3, 2, 3),
}
LAYOUTS = [(name, False) for name in SHAPES]
LAYOUTS += [(name, True) for name, shape in SHAPES.items() if len(shape) > 3]
CASES = [(*layout, torch.float32) for layout in LAYOUTS]
OTHERS = torch.float64, torch.float16, torch.bfloat16
CASES += [("odd", last, dtype) for dtype in OTHERS for last in (False, True)]
# of results, against the largest; the interpreter truncates to bfloat16
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def hard_conditions(monkeypatch):
    monkeypatch.setenv("MMBCN_BACKEND", "triton")
    monkeypatch.setattr(triton_passes, "_TILE", 64)
    monkeypatch.setattr(triton_passes, "_CHANNELS", 16)
    monkeypatch.setattr(triton_stages, "_BLOCK", 32)
    monkeypatch.setattr(triton_weight_standardization, "_BLOCK", 32)
    triton_weight_standardization._launches.cache_clear()
    triton_passes._passes.cache_clear()
    triton_stages.arithmetic_of.cache_clear()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled_with_nan(getattr(torch, name)))


def filled_with_nan(make):
    def wrapped(*args, **kwargs):
        new = make(*args, **kwargs)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    return wrapped


def values(shape, dtype=torch.float64, seed=0, scale=2.0, shift=0.7, last=False):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift).to(dtype).to(DEVICE)
    if last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[len(shape)])
    return x


def rows_of(x):
    """(N, C, positions) in float64."""
    return x.double().reshape(*x.shape[:2], -1)


def spread(value, x):
    return value.double().view(*value.shape, *[1] * (x.dim() - value.dim()))


def error(actual, expected):
    """Largest error, relative to the expected values' size."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def test_the_cases_have_several_parts_of_several_tiles():
    for last in (False, True):
        x = values(SHAPES["parts"], last=last)
        passes = triton_passes.passes_over(x)
        assert passes.last == last
        if DEVICE == "cpu":
            assert passes.parts > 1
            assert passes.steps > 1
            assert passes.tiles % passes.steps  # the last part is shorter
        assert passes.positions % passes.block_m
    assert triton_passes.passes_over(values(SHAPES["channels"])).blocks > 1
    assert triton_passes.passes_over(values(SHAPES["channels"], last=True)).blocks > 2


@pytest.mark.parametrize(("name", "last", "dtype"), CASES)
def test_passes(name, last, dtype):
    x = values(SHAPES[name], dtype, last=last)
    dy = values(SHAPES[name], dtype, seed=1)  # contiguous, also where x is not
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    center, scale, shift, p = (values(x.shape[:2], statistics, seed) for seed in range(2, 6))
    tolerance = TOLERANCE[statistics]

    mean, var = triton_passes.row_moments(x)
    expected_var, expected_mean = torch.var_mean(rows_of(x), 2, correction=0)
    assert mean.dtype == var.dtype == statistics
    assert error(mean, expected_mean) < tolerance
    assert error(var, expected_var) < tolerance

    total, dot = triton_passes.row_dots(dy, x, center)
    assert total.dtype == dot.dtype == statistics
    from_center = rows_of(x) - center.double().unsqueeze(2)
    assert error(total, rows_of(dy).sum(2)) < tolerance
    assert error(dot, (rows_of(dy) * from_center).sum(2)) < tolerance

    y = triton_passes.scale_shift(x, center, scale, shift)
    line = spread(scale, x) * (x.double() - spread(center, x)) + spread(shift, x)
    assert error(y, line) < TOLERANCE[dtype]
    dx = triton_passes.combine(dy, x, center, p, scale, shift)
    assert error(dx, spread(p, x) * dy.double() + line) < TOLERANCE[dtype]
    for out in (y, dx):
        assert out.dtype == dtype
        assert out.stride() == x.stride()


@pytest.mark.parametrize("last", [False, True])
def test_moments_where_the_mean_is_ten_thousand_times_the_spread(last):
    x = values((1, 2, 21, 20), torch.float32, scale=1.0, shift=1e4, last=last)
    x[:, 1, 0, 0] = 0  # an outlier in the place that the others are measured from
    mean, var = row_moments(x)
    expected_var, expected_mean = torch.var_mean(rows_of(x), 2, correction=0)
    assert error(mean, expected_mean) < 1e-7
    assert ((var - expected_var) / expected_var).abs().max() < 1e-4


@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_in_its_row(last):
    x = values((2, 3, 11, 20), torch.float32, last=last)
    clean_mean, clean_var = row_moments(x)
    for n, c, i, value in ((0, 1, 0, torch.inf), (1, 0, 100, -torch.inf), (1, 2, 219, torch.nan)):
        x[n, c, i // 20, i % 20] = value
    mean, var = row_moments(x)
    touched = torch.tensor([[False, True, False], [True, False, True]], device=DEVICE)
    assert torch.equal(var.isfinite(), ~touched)
    assert not mean[touched].isfinite().any()
    assert torch.equal(mean[~touched], clean_mean[~touched])
    assert torch.equal(var[~touched], clean_var[~touched])


NAMES = ["y", "x", "bn_weight", "bn_bias", "weight", "bias"]


def parameters(channels, groups, dtype=torch.float64):
    """Affine parameters of both stages, then batch statistics of another batch."""
    sizes = channels, channels, groups, groups, channels
    new = [values((size,), dtype, 10 + i, scale=0.5, shift=0.6) for i, size in enumerate(sizes)]
    return *new, values((channels,), dtype, 20).abs() + 0.5


def by_torch(x, dy, affine, groups, constants):
    """Output and every gradient in float64, by torch's own functions and autograd."""
    x, *affine = (t.detach().double().requires_grad_() for t in (x, *affine))
    gb, bb, g, b = affine
    mean, var = (None, None) if constants is None else (t.double() for t in constants)
    z = F.batch_norm(x, mean, var, gb, bb, constants is None, 0.0, 1e-5)
    of_channel = (t.repeat_interleave(x.shape[1] // groups) for t in (g, b))
    y = F.group_norm(z, groups, *of_channel, 1e-5)
    return y.detach(), *torch.autograd.grad(y, [x, *affine], dy.double())


def by_kernels(x, dy, affine, groups, constants):
    x, *affine = (t.detach().requires_grad_() for t in (x, *affine))
    assert backend_for(x) == "triton"
    rows = row_moments(x)
    if constants is None:
        mean, var, count = batch_moments(*rows, x[:1].numel() // x.shape[1])
    else:
        (mean, var), count = constants, None
    y = batch_channel_norm(x, mean, var, *affine, groups, count=count, rows=rows)
    return y.detach(), *torch.autograd.grad(y, [x, *affine], dy)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "constants"])
@pytest.mark.parametrize(("name", "last", "dtype"), CASES)
def test_output_and_every_gradient(name, last, dtype, frozen):
    groups = {"odd": 2, "parts": 1, "no_position": 2}.get(name, 3)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (values(SHAPES[name], dtype, seed, last=last) for seed in (0, 1))
    *affine, mean, var = parameters(x.shape[1], groups, statistics)
    arguments = x, dy, affine, groups, (mean, var) if frozen else None
    results = by_kernels(*arguments), by_torch(*arguments)
    for what, actual, expected in zip(NAMES, *results, strict=True):
        wanted = dtype if what in "yx" else statistics
        assert actual.dtype == wanted
        assert error(actual, expected) < max(TOLERANCE[wanted], 20 * TOLERANCE[statistics]), what


@pytest.mark.parametrize("groups", [1, 20])
@pytest.mark.parametrize("samples", [1, 5])
def test_groups_of_all_channels_and_of_one(groups, samples):
    x, dy = (values((samples, 20, 3, 5), torch.float32, seed) for seed in (0, 1))
    passes = triton_passes.passes_over(values((5, 20, 3, 5)))
    assert (
        triton_stages.Arithmetic(passes, 1, 0, 0).tile["BLOCK_N"] < 5
    )  # several blocks of samples
    *affine, _, _ = parameters(20, groups, torch.float32)
    results = [f(x, dy, affine, groups, None) for f in (by_kernels, by_torch)]
    for what, actual, expected in zip(NAMES, *results, strict=True):
        if what == "bn_bias" and groups == 20:  # the channel stage takes all of it away
            assert actual.abs().max() < 1e-5 * results[1][0].abs().sum()
        else:
            assert error(actual, expected) < 2e-5, what


def test_upstream_gradients_of_any_layout():
    x = values((2, 6, 5, 7), torch.float32, last=True)
    *affine, _, _ = parameters(6, 3, torch.float32)
    for dy in (
        values((2, 6, 1, 1), torch.float32).expand_as(x),
        values((2, 6, 7, 5), torch.float32).mT,
        values((2, 12, 5, 7), torch.float32)[:, ::2],
    ):
        results = (f(x, dy, affine, 3, None) for f in (by_kernels, by_torch))
        for what, actual, expected in zip(NAMES, *results, strict=True):
            assert error(actual, expected) < 2e-5, what


def test_inputs_of_other_strides():
    wide = values((2, 12, 7, 5), torch.float32)
    dy = values((2, 6, 5, 7), torch.float32, 1)
    *affine, _, _ = parameters(6, 3, torch.float32)
    results = (f(wide[:, ::2].mT, dy, affine, 3, None) for f in (by_kernels, by_torch))
    for what, actual, expected in zip(NAMES, *results, strict=True):
        assert error(actual, expected) < 2e-5, what


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)])
def test_empty_tensors(shape):
    x = torch.zeros(shape, device=DEVICE)
    *affine, mean, var = parameters(6, 3, torch.float32)
    y, *grads = by_kernels(x, x, affine, 3, (mean, var))
    assert y.shape == x.shape
    assert not any(grad.any() for grad in grads)


@triton.jit
def corner_kernel(out_ptr, sample, row, position, rows, positions, LAST: tl.constexpr):
    zero = tl.program_id(0)
    corner, _, _ = triton_pass_kernels._tile(
        sample + zero, row + zero, position + zero, rows, positions, 16, 16, LAST
    )
    tl.store(out_ptr, corner)


def test_offsets_beyond_two_to_the_31():
    out = torch.zeros((), dtype=torch.int64, device=DEVICE)
    corner_kernel[(1,)](out, 0, 70_000, 16, 80_000, 70_001, LAST=False)
    assert int(out) == 70_000 * 70_001 + 16
    corner_kernel[(1,)](out, 3, 32, 60_000, 512, 90_000, LAST=True)
    assert int(out) == (3 * 90_000 + 60_000) * 512 + 32
    corner_kernel[(1,)](out, 30_000, 32, 60_000, 512, 90_000, LAST=True)
    assert int(out) == (30_000 * 90_000 + 60_000) * 512 + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_moments(dtype):
    row_mean = values((5, 300), dtype, shift=1e3, scale=1.0)
    row_var = values((5, 300), dtype, 1).abs()
    mean, var, count = batch_moments(row_mean, row_var, 7)
    expected_mean = row_mean.double().mean(0)
    # what 7 positions at the row's mean +- its spread would give
    both = torch.stack([row_mean.double() + s * row_var.double().sqrt() for s in (1, -1)])
    assert count == 35
    assert error(mean, expected_mean) < TOLERANCE[dtype]
    assert error(var, both.flatten(0, 1).var(0, correction=0)) < 10 * TOLERANCE[dtype]


RATES = {
    (0.1, False): [0.1, 0.1, 0.1, 0.1],
    (0.3, True): [1, 1 / 2, 1 / 3, 0.3],
    (None, False): [1, 1 / 2, 1 / 3, 1 / 4],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize(("momentum", "warmup"), RATES)
def test_running_estimates(momentum, warmup, micro, dtype):
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    running = [values((300,), dtype), values((300,), dtype, 1).abs()]
    tracked = torch.tensor(0, device=DEVICE)
    expected = [value.double() for value in running]
    for step, r in enumerate(RATES[momentum, warmup]):
        mean = values((300,), statistics, 2 + step)
        var = values((300,), statistics, 12 + step).abs()
        if micro:
            new = mean.double(), var.double() + (mean.double() - expected[0]) ** 2
        else:
            new = mean.double(), var.double() * 6 / 5
        expected = [(1 - r) * old + r * value for old, value in zip(expected, new, strict=True)]
        copies = update_estimates(*running, tracked, mean, var, 6, momentum, micro, warmup)
        for copy, value, oracle in zip(copies, running, expected, strict=True):
            assert copy.data_ptr() != value.data_ptr()
            assert torch.equal(copy, value)
            assert error(value, oracle) < 4 * TOLERANCE[dtype]
    assert int(tracked) == 4


@pytest.mark.parametrize("count", [1, 2])
def test_first_estimates_of_few_values(count):
    running = [values((300,), torch.float32), values((300,), torch.float32, 1).abs()]
    old = running[0].double()
    tracked, mean, var = (
        torch.tensor(0, device=DEVICE),
        values((300,), torch.float32, 2),
        running[1].clone(),
    )
    update_estimates(*running, tracked, mean, var, count, 0.1, micro=True, warmup=True)
    expected = (old + mean.double()) / 2 if count == 1 else mean.double()
    assert error(running[0], expected) < 4 * TOLERANCE[torch.float32]


LAYERS = {
    "BCN": lambda c, g: BCN(c, g),
    "BCN, mean of all": lambda c, g: BCN(c, g, momentum=None),
    "MicroBCN": lambda c, g: MicroBCN(c, g),
    "MicroBCN, no warm-up": lambda c, g: MicroBCN(c, g, momentum=0.3, warmup=False),
}


@pytest.mark.parametrize(("name", "last", "dtype"), CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_training_steps_of_layers(layer, name, last, dtype, monkeypatch):
    """Three steps and an eval pass, against the plain code in float64; that has its own oracles."""
    channels = SHAPES[name][1]
    groups = {"odd": 2, "parts": 1, "no_position": 2}.get(name, 3)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    batches = [
        [values(SHAPES[name], dtype, 2 * i + j, last=last) for j in (0, 1)] for i in range(3)
    ]
    affine = parameters(channels, groups, statistics)
    results = []
    for backend, wide in (("triton", statistics), ("reference", torch.float64)):
        monkeypatch.setenv("MMBCN_BACKEND", backend)
        norm = LAYERS[layer](channels, groups).to(DEVICE, wide)
        ours = norm.bn.weight, norm.bn.bias, norm.weight, norm.bias
        for parameter, value in zip(ours, affine[:4], strict=True):
            parameter.data.copy_(value)
        found = {}
        for i, (x, dy) in enumerate(batches):
            leaf, dy = x if backend == "triton" else x.double(), dy.to(wide)
            leaf = leaf.detach().requires_grad_()
            y = norm(leaf)
            y.backward(dy.to(y.dtype))
            found[f"y {i}"], found[f"dx {i}"] = y, leaf.grad
        found |= {f"grad of {key}": p.grad for key, p in norm.named_parameters()}
        found |= {key: b.clone() for key, b in norm.named_buffers()}
        found["y in eval"] = norm.eval()(leaf.detach())
        results.append(found)
    for key, actual in results[0].items():
        wanted = dtype if key[0] in "yd" else statistics
        if actual.is_floating_point():
            assert actual.dtype == wanted, key
        bound = max(TOLERANCE[wanted], 40 * TOLERANCE[statistics])
        assert error(actual.detach(), results[1][key].detach().double()) < bound, key


@pytest.mark.parametrize(("name", "last", "dtype"), CASES)
def test_kalman_normalization(name, last, dtype):
    """Through its own statistics and given predictions, against elementary operations."""
    q, channels = 0.3, SHAPES[name][1]
    x, dy = values(SHAPES[name], dtype, last=last), values(SHAPES[name], dtype, seed=1)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (values((channels,), statistics, seed) for seed in (2, 3))
    predicted = values((2, channels), statistics, seed=4).abs() + 0.5
    dfiltered, dseen = (values((2, channels), statistics, seed) for seed in (5, 6))
    leaves = [x, predicted, weight, bias]

    x64, p64, w64, b64 = (t.detach().double().requires_grad_() for t in leaves)
    over = [d for d in range(x.dim()) if d != 1]
    mean = x64.sum(over) / (x.numel() // channels)
    var = (x64 - spread(mean.unsqueeze(0), x)).square().sum(over) / (x.numel() // channels)
    m = (1 - q) * p64[0] + q * mean
    v = (1 - q) * p64[1] + q * var + q * (1 - q) * (mean - p64[0]) ** 2
    rstd = (v + 1e-5) ** -0.5
    w, b, m_, r = (spread(t.unsqueeze(0), x) for t in (w64, b64, m, rstd))
    y = w * (x64 - m_) * r + b
    filtered, seen = torch.stack([m, v]), torch.stack([mean, var])
    outputs, upstream = (y, filtered, seen), (dy, dfiltered, dseen)
    loss = sum((o * d.double()).sum() for o, d in zip(outputs, upstream, strict=True))
    expected = [y, filtered, seen, *torch.autograd.grad(loss, [x64, p64, w64, b64])]

    leaves = [t.detach().requires_grad_() for t in leaves]
    observed = torch.stack(channel_moments(x)[:2])
    x, *others = leaves
    y, filtered, gain = kalman_norm(x, observed, *others, q, 1e-5, lambda: None)
    seen = channel_statistics(x)
    assert float(gain) == pytest.approx(q)
    loss = sum((o.to(d) * d).sum() for o, d in zip((y, filtered, seen), upstream, strict=True))
    got = [y, filtered, seen, *torch.autograd.grad(loss, leaves)]
    names = ["y", "filtered", "seen", "dx", "dpredicted", "dweight", "dbias"]
    for of, a, e in zip(names, got, expected, strict=True):
        wide = of in ("y", "dx")
        assert (
            error(a.detach(), e.detach())
            < (4 if wide else 20) * TOLERANCE[dtype if wide else statistics]
        ), of


FILTERS = [(6, 3, 3, 3), (5, 63, 1, 1), (3, 2, 1, 5), (2, 7), (3, 2, 5), (2, 300, 3, 3)]


@pytest.mark.parametrize("variant", [(i, u) for i in (True, False) for u in (True, False)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", FILTERS, ids=str)
def test_weight_standardization(shape, dtype, eps, variant):
    layouts = (False, True) if len(shape) == 4 else (False,)
    for last in layouts:
        weight, dy = (values(shape, dtype, seed, shift=3.0, last=last) for seed in (0, 1))
        leaf, wide = weight.requires_grad_(), weight.detach().double().requires_grad_()
        y = standardize_weight(leaf, eps, *variant)
        y.backward(dy)
        right = standardize_weight_reference(wide, eps, *variant)
        right.backward(dy.double())
        assert y.dtype == dtype
        assert y.stride() == weight.stride()
        assert error(y.detach(), right.detach()) < 4 * TOLERANCE[dtype]
        assert error(leaf.grad, wide.grad) < 20 * TOLERANCE[dtype]


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_filters(value, eps_inside, eps):
    weight = torch.full((2, 3, 3, 3), value, device=DEVICE, requires_grad=True)
    y = standardize_weight(weight, eps, eps_inside)
    y.backward(values((2, 3, 3, 3), torch.float32))
    assert not y.any()
    assert eps == 0 or weight.grad.isfinite().all()
