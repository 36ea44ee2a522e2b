"""The batch-channel norms on a GPU, against the plain code in float64 on the CPU."""

import itertools
import math

import pytest
import torch

from mmbcn import BCN, KN, MicroBCN
from mmbcn.ops.backend import backend_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NORMS = {"BCN": BCN, "MicroBCN": MicroBCN, "KN": KN}
SHAPES = [(2, 64, 37, 53), (1, 64, 64, 96), (3, 64, 1, 1), (2, 96, 128, 257), (2, 64, 6000)]
# of the largest value: outputs, gradients and estimates after steps
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
STEPS = 3


def inputs(shape, dtype, last=False, shift=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    x, dy = (value.to(dtype) for value in draw)
    x += shift
    if last:
        x, dy = (v.contiguous(memory_format=torch.channels_last) for v in (x, dy))
    return x, dy


def steps(norm, device, dtype, batches):
    """Outputs and gradients of training steps, estimates after them, and an output in eval."""
    norm = norm.to(device, torch.promote_types(dtype, torch.float32))
    results = {}
    for i, (x, dy) in enumerate(batches):
        x = x.to(device, dtype).requires_grad_()
        y = norm(x)
        y.backward(dy.to(device, dtype))
        results[f"y {i}"], results[f"dx {i}"] = y, x.grad
    results |= {f"grad of {name}": p.grad for name, p in norm.named_parameters()}
    results |= {name: b.clone() for name, b in norm.named_buffers()}
    results["y in eval"] = norm.eval()(batches[0][0].to(device, dtype))
    return {name: value.detach() for name, value in results.items()}


def make(name, channels):
    torch.manual_seed(1)
    norm = NORMS[name](channels)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, 1, 0.3)
    return norm


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_float64_on_the_cpu_agrees(name, shape, dtype, monkeypatch):
    layouts = (False, True) if len(shape) == 4 else (False,)
    for last, shift in itertools.product(layouts, (0.5, 300.0)):
        few = math.prod(shape[2:]) == 1
        if shift > 1 and (few or dtype != torch.float32):
            continue
        batches = [inputs(shape, dtype, last, shift, seed) for seed in range(STEPS)]
        monkeypatch.setenv("MMBCN_BACKEND", "reference")
        expected = steps(make(name, shape[1]), "cpu", torch.float64, batches)
        monkeypatch.delenv("MMBCN_BACKEND")
        found = steps(make(name, shape[1]), "cuda", dtype, batches)
        assert found.keys() == expected.keys()
        # the digits of a large mean; a group of two values
        tolerance = TOLERANCE[dtype] * (20 if few or shift > 1 else 1)
        for key, value in found.items():
            right = expected[key]
            error = (value.cpu().double() - right).abs().max() / right.abs().max().clamp(min=1e-3)
            assert error < tolerance, (key, last, shift, float(error))
            assert value.dtype == (dtype if key[0] in "yd" else value.dtype), key
        if last and shape[2] > 1:
            assert found["y 0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["BCN", "MicroBCN"])
def test_large_tensors_get_kernels(name):
    x, _ = inputs((2, 64, 64, 64), torch.float32)
    assert backend_for(x.cuda()) == "triton"
    assert backend_for(x) == "aten"


@pytest.mark.parametrize("name", NORMS)
def test_the_same_bits_in_every_run(name):
    batches = [inputs((2, 64, 129, 255), torch.float32, seed=seed) for seed in range(STEPS)]
    first, second = (steps(make(name, 64), "cuda", torch.float32, batches) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_device(name, shape):
    norm = make(name, shape[1]).cuda()
    x, dy = (value.cuda() for value in inputs(shape, torch.float32))
    x.requires_grad_()
    norm(x).backward(dy)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm(x).backward(dy)
        norm.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["BCN", "MicroBCN"])
def test_in_a_cuda_graph(name):
    shape = 2, 64, 65, 127
    batches = [inputs(shape, torch.float32, seed=seed) for seed in range(STEPS)]
    norms = [make(name, 64).cuda() for _ in range(2)]
    x, dy = torch.zeros(shape, device="cuda", requires_grad=True), torch.zeros(shape, device="cuda")
    norm = norms[0]
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            norm(x).backward(dy)
    torch.cuda.synchronize()
    norm.load_state_dict(norms[1].state_dict())
    norm.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = norm(x)
        y.backward(dy)
    for x_new, dy_new in batches:
        with torch.no_grad():
            x.copy_(x_new)
        dy.copy_(dy_new)
        graph.replay()
        leaf = x_new.cuda().requires_grad_()
        norms[1].zero_grad()
        right = norms[1](leaf)
        right.backward(dy_new.cuda())
        assert torch.equal(y, right)
        assert torch.equal(x.grad, leaf.grad)
        for a, b in zip(norm.parameters(), norms[1].parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    for (key, a), b in zip(norm.state_dict().items(), norms[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["BCN", "MicroBCN"])
def test_compiled(name):
    batches = [inputs((2, 64, 33, 65), torch.float32, seed=seed) for seed in range(STEPS)]
    expected = steps(make(name, 64), "cuda", torch.float32, batches)
    norm = make(name, 64)
    norm.compile()
    found = steps(norm, "cuda", torch.float32, batches)
    for key, value in found.items():
        error = (value - expected[key]).abs().max() / expected[key].abs().max()
        assert error < 2e-5, (key, float(error))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_autocast(name, dtype):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 64, 3).cuda()
    norm, plain = make(name, 64).cuda(), make(name, 64).cuda()
    x = torch.randn(2, 3, 66, 130, device="cuda")
    with torch.autocast("cuda", dtype):
        between = conv(x)
        y = norm(between)
        y.float().square().mean().backward()
    assert between.dtype == y.dtype == dtype
    right = plain(between.detach().float())
    assert (y - right).abs().max() < TOLERANCE[dtype] * right.abs().max()
    for parameter in norm.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["BCN", "MicroBCN"])
def test_more_than_2_to_the_31_values(name):
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    size = 8300
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(1, 32, size, size, dtype=torch.float16, device="cuda")
    for channel in range(32):
        x[0, channel].normal_(0.1 * channel, 1 + 0.1 * channel, generator=g)
    assert x.numel() > 1 << 31
    norm = NORMS[name](32, num_groups=1).cuda()
    y = norm(x)
    moments = [(v.mean(), v.var(correction=0)) for v in (x[0, c].double() for c in range(32))]
    mean, var = (torch.stack(values) for values in zip(*moments, strict=True))
    around = 0 if name == "MicroBCN" else mean  # its first step: all of the batch, around zero
    scale = (var + (mean - around).square() + 1e-5).rsqrt()
    group = ((var * scale.square()).mean() + 1e-5).rsqrt()
    for c in (0, 13, 31):
        right = (x[0, c].double() - mean[c]) * scale[c] * group
        assert (y[0, c] - right).abs().max() < 1e-2, c
