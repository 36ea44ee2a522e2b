"""The fused form on tensors of training size, and all that an op has to work under.

Expected values: torch's own BatchNorm and GroupNorm in float64. The layers' tests cover small and
odd shapes on both forms.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmbcn import BCN, MicroBCN
from mmbcn.ops import batch_channel_norm, row_moments, update_estimates
from mmbcn.ops.aten import _CHUNK
from mmbcn.ops.backend import backend_for

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
LAYERS = [BCN, MicroBCN]
EPS = 1e-5
# more than a chunk of positions, of a length that can be cut and one that cannot
SHAPES = [(2, 8, 96, 176), (1, 8, 177, 125), (3, 64, 16, 16), (5, 512, 3, 3)]

layouts = pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["nchw", "nhwc"])
layers = pytest.mark.parametrize("cls", LAYERS)


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """On the fused form, with new memory full of NaN: what is not written is found."""
    monkeypatch.setenv("MMBCN_BACKEND", "aten")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(cls, channels, groups, dtype=torch.float32):
    torch.manual_seed(0)
    layer = cls(channels, groups).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_().add_(0.5)
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 1.5)
        layer.bn.num_batches_tracked.fill_(9)  # the warm-up is over
    return layer


def values(shape, layout=CONTIGUOUS, shift=0.5, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) + shift).to(dtype).to(memory_format=layout)


def step(layer, x, dy):
    """y, dx, parameter gradients."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    return y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)


def oracle(layer, x, dy):
    """The same from torch's layers in float64, before the layer has seen x."""
    layer = copy.deepcopy(layer).double()
    x, bn = x.detach().double().requires_grad_(), layer.bn
    mean, var, affine = bn.running_mean, bn.running_var, (bn.weight, bn.bias)
    if isinstance(layer, MicroBCN):
        own, squares = x.detach().mean((0, 2, 3)), (x.detach() - mean.view(-1, 1, 1)).square()
        var = 0.9 * var + 0.1 * squares.mean((0, 2, 3))
        mean = 0.9 * mean + 0.1 * own
        z = F.batch_norm(x, mean, var, *affine, False, 0.0, EPS)
    else:
        z = F.batch_norm(x, mean, var, *affine, True, 0.1, EPS)
    over = (1, len(layer.weight), 1, 1, 1)
    y = F.group_norm(z, len(layer.weight), eps=EPS).unflatten(1, (len(layer.weight), -1))
    y = (y * layer.weight.view(over) + layer.bias.view(over)).flatten(1, 2)
    leaves = [x, *layer.parameters()]
    return (y.detach(), *torch.autograd.grad(y, leaves, dy.double())), (mean, var)


def worst(actual, expected):
    """The largest relative error of the tensors; NaN where one has NaN (``max`` drops those)."""
    pairs = zip(actual, expected, strict=True)
    return float(torch.stack([(a.double() - e).norm() / e.norm() for a, e in pairs]).max())


@layouts
@layers
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_in_float64(shape, cls, layout):
    layer, x, dy = make(cls, shape[1], 4), values(shape, layout), values(shape, layout, 0, seed=2)
    expected, statistics = oracle(layer, x, dy)
    actual = step(layer, x, dy)
    assert worst(actual, expected) < 1e-5
    estimates = layer.bn.running_mean, layer.bn.running_var
    assert worst(estimates, statistics) < 1e-6
    for tensor in actual[:2]:
        assert tensor.is_contiguous(memory_format=layout)


def test_shapes_reach_what_they_are_for():
    positions = [h * w for _, _, h, w in SHAPES]
    assert positions[0] > _CHUNK
    assert positions[0] % 2 == 0
    assert positions[1] > _CHUNK
    assert positions[1] % 2 == 1


@layouts
@layers
@pytest.mark.parametrize("ratio", [33.0, 1e3, 1e4])
def test_means_far_above_the_spread(ratio, cls, layout):
    shape = (2, 8, 48, 64)
    layer, x, dy = make(cls, 8, 4), values(shape, layout, ratio), values(shape, layout, 0, seed=2)
    layer.bn.running_mean.copy_(x.mean((0, 2, 3)))
    expected, _ = oracle(layer, x, dy)
    assert worst(step(layer, x, dy)[:2], expected[:2]) < 1e-3


@layouts
@pytest.mark.parametrize("wide", [True, False], ids=["all_rows", "one_row"])
def test_row_moments_of_rows_that_are_nearly_constant(wide, layout):
    x = values((3, 8, 40, 50), layout)
    if wide:
        x += 1e4
    else:
        x[1, 3] += 1e4
    mean, var = row_moments(x)
    exact = torch.var_mean(x.double(), (2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(var.double(), exact[0], rtol=1e-4, atol=0)


@layouts
@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, cls, layout, monkeypatch):
    monkeypatch.setattr("mmbcn.ops.aten._STEP", 4096)  # several pieces, the last one shorter
    shape = (2, 8, 33, 47)
    x, dy = values(shape, layout, dtype=dtype), values(shape, layout, 0, dtype, 2)
    layer = make(cls, 8, 4)
    expected, _ = oracle(layer, x, dy)
    actual = step(layer, x, dy)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in actual[2:])
    assert worst(actual[:2], expected[:2]) < torch.finfo(dtype).eps  # one rounding
    assert worst(actual[2:], expected[2:]) < 1e-5
    assert actual[1].is_contiguous(memory_format=layout)


@layers
def test_half_precision_of_two_dimensions(cls):
    x, dy = (values((64, 512), dtype=torch.bfloat16, seed=s).reshape(64, 512) for s in (1, 2))
    layer = make(cls, 512, 32)
    expected, _ = oracle(layer, x[:, :, None, None], dy[:, :, None, None])
    actual = step(layer, x, dy)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert worst([a.view(e.shape)], [e]) < torch.finfo(torch.bfloat16).eps


@layers
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_spread_as_in_torch(bad, cls):
    x = values((2, 8, 12, 16))
    x[1, 3, 5, 5] = bad
    layer = make(cls, 8, 4)
    (y, *_), (mean, var) = oracle(layer, x, torch.ones_like(x))
    ours = layer(x)
    assert torch.equal(ours.isnan(), y.isnan())
    assert torch.equal(layer.bn.running_mean.isfinite(), mean.isfinite())
    assert torch.equal(layer.bn.running_var.isfinite(), var.isfinite())


@layouts
@layers
@pytest.mark.parametrize("value", [0.0, 0.1, 3e4])
def test_constant_inputs_have_finite_gradients(value, cls, layout):
    x = torch.full((2, 8, 12, 16), value).to(memory_format=layout)
    for tensor in step(make(cls, 8, 4), x, values(x.shape, layout, 0)):
        assert tensor.isfinite().all()


@layers
def test_expanded_and_strided_gradients(cls):
    shape = (2, 8, 12, 16)
    for layout in (CONTIGUOUS, LAST):
        x = values(shape, layout)
        for dy in (
            values((2, 8, 1, 1), shift=0).expand(shape),
            values((12, 16), shift=0).expand(shape),
            values((2, 8, 16, 12), shift=0).mT,
            values((2, 16, 12, 16), shift=0)[:, ::2],
            values(shape, LAST if layout == CONTIGUOUS else CONTIGUOUS, 0),
        ):
            layer = make(cls, 8, 4)
            expected, _ = oracle(layer, x, dy)
            actual = step(layer, x, dy)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * e.abs().max())


@layers
def test_two_forwards_before_one_backward(cls):
    layer = make(cls, 8, 4, torch.float64)
    inputs = [values((2, 8, 12, 16), shift=s, dtype=torch.float64) for s in (0, 3)]
    expected = []
    for x in inputs:
        layers = copy.deepcopy(layer)  # with the estimates that this pass finds
        expected.append(step(layers, x, torch.ones_like(x).tril()))
        layer(x)
    layer = make(cls, 8, 4, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    outputs = [layer(x) for x in leaves]
    torch.autograd.backward(outputs, [torch.ones_like(x).tril() for x in leaves])
    for leaf, (_, dx, *_) in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, dx, rtol=1e-10, atol=1e-10)
    for p, *grads in zip(layer.parameters(), *(e[2:] for e in expected), strict=True):
        torch.testing.assert_close(p.grad, sum(grads), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [None, 2 * 5 * 6])
def test_double_backward(count):
    """Through the batch's statistics too: they are functions of x where ``count`` is given."""
    x = values((2, 4, 5, 6), dtype=torch.float64).requires_grad_()
    affine = [values((n,), dtype=torch.float64, seed=n + k).requires_grad_() for n, k in AFFINE]
    mean, var = torch.randn(4).double(), torch.rand(4).double() + 0.5

    def op(x, *affine):
        statistics = (mean, var)
        if count:
            own = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
            statistics = own[1], own[0]
        return batch_channel_norm(x, *statistics, *affine, 2, count=count)

    if count is None:
        assert torch.autograd.gradcheck(op, (x, *affine))
        assert torch.autograd.gradgradcheck(op, (x, *affine))
        return

    def plain(x, bn_weight, bn_bias, weight, bias):
        z = F.batch_norm(x, None, None, bn_weight, bn_bias, True, 0.0, EPS)
        return F.group_norm(z, 2, weight.repeat_interleave(2), bias.repeat_interleave(2), EPS)

    results = []
    for form in (op, plain):
        y = form(x, *affine)
        dy = values(y.shape, dtype=torch.float64, seed=7)
        grads = torch.autograd.grad(y, [x, *affine], dy, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append([*grads, *torch.autograd.grad(penalty, [x, *affine], allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


AFFINE = [(4, 0), (4, 1), (2, 0), (2, 1)]


@layers
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, cls):
    x, dy = values((2, 8, 96, 176)), values((2, 8, 96, 176), shift=0, seed=2)
    plain, recomputed = make(cls, 8, 4), make(cls, 8, 4)
    expected = step(plain, x, dy)
    leaf = x.clone().requires_grad_()
    y = checkpoint(recomputed, leaf, use_reentrant=reentrant)
    y.backward(dy)
    actual = y.detach(), leaf.grad, *(p.grad for p in recomputed.parameters())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    for a, e in zip(recomputed.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, e)


@layers
def test_under_autocast(cls):
    x, dy = values((2, 8, 96, 176), dtype=torch.bfloat16), values((2, 8, 96, 176), shift=0)
    dy = dy.bfloat16()
    expected = step(make(cls, 8, 4), x, dy)
    layer = make(cls, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        actual = step(layer, x, dy)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    "backend",
    ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)],
)
@layouts
@layers
def test_compiled_in_one_graph_over_several_steps(cls, layout, backend, monkeypatch):
    """Gradients and estimates of each step; both backends recompute in the backward pass."""
    monkeypatch.delenv("MMBCN_BACKEND")
    eager, compiled = make(cls, 8, 4, torch.float64), make(cls, 8, 4, torch.float64)
    torch._dynamo.reset()
    forward = torch.compile(compiled, fullgraph=True, backend=backend)
    for i in range(4):
        x = values((2, 8, 9, 7), layout, i, torch.float64, seed=i)
        dy = values((2, 8, 9, 7), layout, 0, torch.float64, seed=9)
        results = []
        for call, layer in ((forward, compiled), (eager, eager)):
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            y = call(leaf)
            y.backward(dy)
            grads = [p.grad.clone() for p in layer.parameters()]
            results.append([y.detach(), leaf.grad, *grads, *layer.buffers()])
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("micro", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_estimates_as_an_operator(momentum, micro):
    running = torch.randn(6), torch.rand(6), torch.tensor(3)
    moments = torch.randn(6), torch.rand(6), torch.tensor(12.0)
    op = torch.ops.mmbcn.update_estimates.default
    torch.library.opcheck(op, (*running, *moments, momentum, micro, False))
    ours = [t.clone() for t in running]
    update_estimates(*ours, *moments[:2], 12, momentum, micro)
    op(*running, *moments, momentum, micro, False)
    for a, b in zip(ours, running, strict=True):
        torch.testing.assert_close(a, b)


def test_function_transforms(monkeypatch):
    """`torch.func` on the automatic choice, at a size where the fused form would be chosen."""
    monkeypatch.delenv("MMBCN_BACKEND")
    x = values((2, 2, 8, 128, 128), dtype=torch.float64)
    mean, var = torch.zeros(8).double(), torch.ones(8).double()
    affine = [
        values((n,), dtype=torch.float64, seed=k) for n, k in ((8, 0), (8, 1), (4, 2), (4, 3))
    ]
    assert backend_for(x[0]) == "aten"

    def loss(x):
        return batch_channel_norm(x, mean, var, *affine, 4).pow(3).sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(x)
    for one, of_all in zip(x, mapped, strict=True):
        leaf = one.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(of_all, leaf.grad, rtol=1e-9, atol=1e-9)


@layers
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty_inputs(shape, cls):
    layer = make(cls, 8, 4)
    before = copy.deepcopy(layer.state_dict())
    y, dx, *grads = step(layer, torch.zeros(shape), torch.zeros(shape))
    assert y.shape == dx.shape == shape
    assert not any(g.any() for g in grads)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@layers
def test_same_bits_in_every_run(cls):
    x, dy = values((2, 8, 96, 176)), values((2, 8, 96, 176), shift=0, seed=2)
    results = [step(make(cls, 8, 4), x, dy) for _ in range(2)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@layouts
@layers
@pytest.mark.parametrize("shape", [(2, 8, 128, 130), (1, 2048, 16, 17)], ids=str)
def test_backward_keeps_the_input_only(shape, cls, layout):
    layer, x = make(cls, shape[1], 4), values(shape, layout).requires_grad_()
    assert x.nbytes > 1 << 20
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(size for at, size in kept.items() if at not in own) <= 1.01 * x.nbytes


def test_large_outputs(monkeypatch):
    """Memory in huge pages is written to like any other; no page of a neighbour is touched."""
    monkeypatch.setattr("mmbcn.ops.memory._LARGE", 1 << 12)
    asked = []
    monkeypatch.setattr("mmbcn.ops.memory._madvise", lambda: lambda *a: asked.append(a))
    x = values((2, 8, 96, 176))
    y = make(BCN, 8, 4)(x)
    (start, length, _), *_ = asked
    assert y.data_ptr() <= start < y.data_ptr() + 4096
    assert start + length == y.data_ptr() + y.nbytes
