"""Weight standardization against numpy, and against mmcv's layer where that is the formula."""

import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from mmbcn import WSConv2d
from mmbcn.ops import standardize_weight

VARIANTS = {
    "released_backbones": (dict(), lambda v, n, eps: np.sqrt(v * n / (n - 1) + eps)),
    "mmcv": (dict(eps_inside=False), lambda v, n, eps: np.sqrt(v * n / (n - 1)) + eps),
    "paper": (dict(unbiased=False), lambda v, n, eps: np.sqrt(v + eps)),
    "outside_biased": (
        dict(unbiased=False, eps_inside=False),
        lambda v, n, eps: np.sqrt(v) + eps,
    ),
}


def standardized_numpy(weight, spread, eps):
    out = np.empty_like(weight)
    for i, filt in enumerate(weight):
        n = filt.size
        mean = filt.sum() / n
        out[i] = (filt - mean) / spread(((filt - mean) ** 2).sum() / n, n, eps)
    return out


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_equal_numpy(variant, eps):
    options, spread = VARIANTS[variant]
    torch.manual_seed(0)
    conv = WSConv2d(4, 6, 3, groups=2, eps=eps, **options).double()
    with torch.no_grad():
        conv.weight.mul_(2).add_(0.3)
    expected = torch.from_numpy(standardized_numpy(conv.weight.detach().numpy(), spread, eps))
    torch.testing.assert_close(conv.standardized_weight(), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(
        conv(x), F.conv2d(x, expected, conv.bias, groups=2), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant):
    options, spread = VARIANTS[variant]
    torch.manual_seed(0)
    conv = WSConv2d(2, 2, (2, 1), **options).double()
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    (conv(x) * dy).sum().backward()
    weight = conv.weight.detach().numpy().copy()

    def loss(w):
        fixed = torch.from_numpy(standardized_numpy(w, spread, 1e-5))
        return float((F.conv2d(x.detach(), fixed, conv.bias.detach()) * dy).sum())

    expected, h = np.empty_like(weight), 1e-6
    for i in np.ndindex(weight.shape):
        up, down = weight.copy(), weight.copy()
        up[i] += h
        down[i] -= h
        expected[i] = (loss(up) - loss(down)) / (2 * h)
    np.testing.assert_allclose(conv.weight.grad.numpy(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(conv.bias.grad, dy.sum((0, 2, 3)))
    fixed = torch.from_numpy(standardized_numpy(weight, spread, 1e-5))
    torch.testing.assert_close(x.grad, F.conv_transpose2d(dy, fixed))


def test_equals_mmcv_convws():
    mmcv_cnn = pytest.importorskip("mmcv.cnn", exc_type=ImportError)
    torch.manual_seed(0)
    options = dict(stride=2, padding=1, dilation=1, groups=2)
    ours = WSConv2d(4, 6, 3, eps_inside=False, **options).double()
    theirs = mmcv_cnn.ConvWS2d(4, 6, 3, **options).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [0.0, 0.5])  # exactly representable: the variance is exactly 0
def test_constant_filter_has_finite_gradients(variant, value):
    conv = WSConv2d(4, 2, 3, **VARIANTS[variant][0])
    with torch.no_grad():
        conv.weight[0] = value
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    y = conv(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert conv.weight.grad.isfinite().all()
    assert not conv.standardized_weight()[0].any()


def test_one_weight_per_filter_is_refused():
    for channels, groups in ((1, 1), (4, 4)):
        with pytest.raises(ValueError, match="at least 2 weights"):
            WSConv2d(channels, 4, 1, groups=groups)
    WSConv2d(2, 4, 1)


def test_is_a_conv2d():
    conv = WSConv2d(3, 5, (3, 1), stride=2, padding=(1, 0), padding_mode="reflect", bias=False)
    assert isinstance(conv, nn.Conv2d)
    assert list(conv.state_dict()) == ["weight"]
    plain = nn.Conv2d(3, 5, (3, 1), stride=2, padding=(1, 0), padding_mode="reflect", bias=False)
    plain.load_state_dict(conv.state_dict())
    with torch.no_grad():
        plain.weight.copy_(conv.standardized_weight())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(conv(x), plain(x))
    assert list(WSConv2d(3, 5, 3).state_dict()) == list(nn.Conv2d(3, 5, 3).state_dict())


def test_scale_and_shift_of_the_weights_do_not_matter():
    conv = WSConv2d(4, 6, 3, eps=0.0).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(3.0).add_(2.0)
    torch.testing.assert_close(conv(x), before, rtol=1e-9, atol=1e-9)


# --- what eval keeps -----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The weights that were standardized by a layer, in order."""
    made = []

    def spy(weight, *args):
        made.append(weight.shape)
        return standardize_weight(weight, *args)

    monkeypatch.setattr("mmbcn.layers.conv_ws.standardize_weight", spy)
    return made


def frozen(channels=3):
    """A layer in eval that has been run twice, and an input."""
    torch.manual_seed(0)
    conv, x = WSConv2d(channels, 4, 3).eval(), torch.randn(1, channels, 6, 6)
    with torch.no_grad():
        conv(x)
        conv(x)
    return conv, x


@torch.no_grad()
def assert_current(conv, x):
    """The layer convolves with the weights as they are now, the first time and the second."""
    spread = VARIANTS["released_backbones"][1]
    for _ in range(2):
        y = conv(x)
        weight = conv.weight.detach().clone().double().numpy()
        fixed = torch.from_numpy(standardized_numpy(weight, spread, conv.eps))
        expected = F.conv2d(x.double(), fixed, conv.bias.double())
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    conv(x)  # reading the weight made the layer forget; leave it as between two images


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_eval_standardizes_once(calls, context):
    conv, x = frozen()
    assert len(calls) == 1
    with context():
        for size in (6, 6, 9):
            conv(torch.randn(2, 3, size, size))
        assert conv.weight.device == x.device
        assert tuple(conv.weight.shape) == (4, 3, 3, 3)
        conv(x)
    assert len(calls) == 1
    assert_current(conv, x)


def test_what_inference_mode_keeps_serves_other_modes():
    torch.manual_seed(0)
    conv, x = WSConv2d(3, 4, 3).eval(), torch.randn(1, 3, 6, 6)
    with torch.inference_mode():
        conv(x)
    with torch.no_grad():
        conv(x)
    conv(x.requires_grad_()).sum().backward()
    assert x.grad.any()
    assert conv.weight.grad.any()
    assert_current(conv, x)


def test_training_and_gradients_keep_nothing(calls):
    conv, x = frozen()
    del calls[:]
    conv(x)  # eval, with gradients
    conv.train()
    with torch.no_grad():
        conv(x)
        conv(x)
    assert len(calls) == 3
    assert type(conv.weight) is nn.Parameter


def sgd_step(conv, x):
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    with torch.enable_grad():
        conv(x).square().sum().backward()
    optimizer.step()


def other_state(conv):
    return {k: torch.randn_like(v) for k, v in conv.state_dict().items()}


def numpy_write(conv, x):
    conv.weight.detach().numpy()[1:] = 0.3 * np.random.default_rng(0).random((3, 3, 3, 3))


EDITS = {
    "optimizer step": sgd_step,
    "in place": lambda conv, x: conv.weight.mul_(2).add_(torch.randn_like(conv.weight)),
    "one value": lambda conv, x: conv.weight.__setitem__((1, 0, 0, 0), 7.0),
    "foreach": lambda conv, x: torch._foreach_mul_([conv.weight], torch.rand(())),
    "initializer": lambda conv, x: nn.init.normal_(conv.weight),
    "out argument": lambda conv, x: torch.add(torch.randn(4, 3, 3, 3), 0.0, out=conv.weight),
    "data": lambda conv, x: conv.weight.data.copy_(torch.randn_like(conv.weight)),
    "data of one filter": lambda conv, x: conv.weight.data[1].normal_(),
    "data of a view": lambda conv, x: conv.weight[1].data.normal_(),
    "data of a state dict": lambda conv, x: conv.state_dict()["weight"].data.normal_(),
    "new data": lambda conv, x: setattr(conv.weight, "data", torch.randn(4, 3, 3, 3)),
    "numpy": numpy_write,
    "storage": lambda conv, x: conv.weight.untyped_storage().copy_(
        torch.randn(4, 3, 3, 3).untyped_storage()
    ),
    "state dict": lambda conv, x: conv.load_state_dict(other_state(conv)),
    "assigned state dict": lambda conv, x: conv.load_state_dict(other_state(conv), assign=True),
    "new parameter": lambda conv, x: setattr(conv, "weight", nn.Parameter(torch.randn(4, 3, 3, 3))),
    "swapped tensors": lambda conv, x: torch.utils.swap_tensors(
        conv.weight, nn.Parameter(torch.randn(4, 3, 3, 3))
    ),
    "dtype": lambda conv, x: conv.half().float(),
    "eps": lambda conv, x: setattr(conv, "eps", 0.3),
}


@pytest.mark.parametrize("edit", EDITS)
def test_eval_sees_every_edit(edit):
    conv, x = frozen()
    with torch.no_grad():
        before = conv(x)
        EDITS[edit](conv, x)
        assert not torch.allclose(conv(x), before, atol=1e-4)
    assert_current(conv, x)


@pytest.mark.parametrize("alias", ["data", "detach", "state_dict", "numpy", "flat"])
def test_eval_sees_edits_through_what_was_held_before(alias):
    torch.manual_seed(0)
    conv, x = WSConv2d(3, 4, 3).eval(), torch.randn(1, 3, 6, 6)
    if alias == "flat":  # parameters that are views of one buffer
        held = torch.randn(2 * conv.weight.numel())
        conv.weight.data = held[: conv.weight.numel()].view_as(conv.weight)
    held = {
        "data": lambda: conv.weight.data,
        "detach": lambda: conv.weight.detach().data,
        "state_dict": lambda: conv.state_dict()["weight"].data,
        "numpy": lambda: conv.weight.detach().numpy(),
        "flat": lambda: held,
    }[alias]()
    assert_current(conv, x)
    held[:] = held[:] ** 2
    assert_current(conv, x)


def test_tied_weights_stay_current():
    (one, x), (other, _) = frozen(), frozen()
    other.weight = one.weight
    for conv in (one, other, one):
        assert_current(conv, x)
        conv.weight.data.normal_()
        with torch.no_grad():
            (other if conv is one else one)(x)
        assert_current(conv, x)


def test_memory_shared_with_other_processes_is_not_kept(calls):
    conv, x = frozen()
    conv.share_memory()
    del calls[:]
    with torch.no_grad():
        conv(x)
        conv(x)
    assert len(calls) == 2


@pytest.mark.parametrize("update_buffers", [False, True])
def test_ema_of_mmengine_is_seen(update_buffers):
    pytest.importorskip("mmengine")
    from mmengine.hooks import EMAHook
    from mmengine.model import ExponentialMovingAverage

    conv, x = frozen()
    hook = EMAHook()
    hook.src_model = conv
    hook.ema_model = ExponentialMovingAverage(conv, momentum=0.5, update_buffers=update_buffers)
    for _ in range(3):
        assert_current(hook.ema_model.module.eval(), x)
        with torch.no_grad():
            conv.weight.normal_()
        hook.ema_model.update_parameters(conv)  # lerp_ of .data
        assert_current(hook.ema_model.module, x)
        assert_current(conv, x)
        hook._swap_ema_parameters()  # copy_ of .data
        assert_current(conv, x)
        assert_current(hook.ema_model.module, x)


def test_copies_carry_weights_only():
    conv, x = frozen()
    plain = len(pickle.dumps(WSConv2d(3, 4, 3).eval()))
    assert len(pickle.dumps(conv)) == plain
    for copy in (deepcopy(frozen()[0]), pickle.loads(pickle.dumps(frozen()[0]))):
        assert list(copy.state_dict()) == ["weight", "bias"]
        assert type(copy.weight) is nn.Parameter
        assert_current(copy, x)
        copy.weight.data.normal_()
        assert_current(copy, x)
        assert_current(conv, x)


def test_mode_frees_the_memory(monkeypatch):
    kept = []
    plain_forward = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        WSConv2d,
        "_conv_forward",
        lambda self, x, w, b: (kept.append(weakref.ref(w)), plain_forward(self, x, w, b))[1],
    )
    conv, _ = frozen()
    assert kept[-1]() is not None
    conv.train()
    assert kept[-1]() is None


def test_replicas_and_parametrizations_use_their_own_weights():
    conv, x = frozen()
    replica = conv._replicate_for_data_parallel()
    replica.weight = torch.randn(4, 3, 3, 3)
    replica.bias = conv.bias.detach()
    assert_current(replica, x)
    replica.weight.normal_()
    assert_current(replica, x)
    assert type(replica.weight) is torch.Tensor
    assert_current(conv, x)

    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1)

    torch.nn.utils.parametrize.register_parametrization(conv, "weight", Doubled())
    assert_current(conv, x)
    conv.parametrizations.weight.original.data.normal_()
    assert_current(conv, x)


def test_threads_share_a_layer():
    conv, x = frozen()
    with torch.no_grad():
        expected = conv(x)

    @torch.no_grad()
    def work(i):
        if i % 3 == 0:
            conv.weight.data.add_(0)  # breaks the seal
        return conv(x)

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(work, range(200)):
            torch.testing.assert_close(y, expected)


needs_new_dynamo = pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 refuses it")


@needs_new_dynamo
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_after_eval(grad):
    conv, x = frozen()
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            y = compiled(x)
        with torch.no_grad():
            torch.testing.assert_close(y, conv(x), rtol=1e-4, atol=1e-4)
        if grad:
            conv.weight.grad = None
            y.square().sum().backward()
            compiled_grad, conv.weight.grad = conv.weight.grad, None
            conv(x).square().sum().backward()
            torch.testing.assert_close(conv.weight.grad, compiled_grad, rtol=1e-3, atol=1e-3)
        conv.weight.data.normal_()
        assert_current(conv, x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "how",
    ["trace", "script", "fx", "export", pytest.param("export strict", marks=needs_new_dynamo)],
)
def test_exported_after_eval_keeps_no_constant(how, grad):
    conv, x = frozen()
    with torch.set_grad_enabled(grad):
        exported = {
            "trace": lambda: torch.jit.trace(conv, x),
            "script": lambda: torch.jit.script(conv),
            "fx": lambda: torch.fx.symbolic_trace(conv),
            "export": lambda: torch.export.export(conv, (x,), strict=False).module(),
            "export strict": lambda: torch.export.export(conv, (x,), strict=True).module(),
        }[how]()
        torch.testing.assert_close(exported(x), conv(x), rtol=1e-4, atol=1e-4)
        exported.load_state_dict(other_state(conv))
        conv.load_state_dict(exported.state_dict())
        torch.testing.assert_close(exported(x), conv(x), rtol=1e-4, atol=1e-4)
    assert_current(conv, x)


@torch.no_grad()
def test_fake_tensors_are_not_kept():
    torch.manual_seed(0)
    conv, x = WSConv2d(3, 4, 3).eval(), torch.randn(1, 3, 6, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        conv(mode.from_tensor(x))
    assert type(conv(x)) is torch.Tensor
    assert_current(conv, x)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_convolves_in_low_precision_on_float32_statistics(training):
    conv, x = frozen()
    conv.train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        y = conv(x)
        again = conv(x)
    weight = conv.weight.detach().double().numpy()
    fixed = torch.from_numpy(standardized_numpy(weight, VARIANTS["released_backbones"][1], 1e-5))
    expected = F.conv2d(x.bfloat16(), fixed.bfloat16(), conv.bias.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(again, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_eval_on_cuda(calls):
    conv, x = frozen()
    conv, x = conv.cuda(), x.cuda()
    del calls[:]
    with torch.no_grad():
        expected = conv(x)
        torch.testing.assert_close(conv(x), expected)
        assert len(calls) == 1
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # may run before the other's kernels
            torch.testing.assert_close(conv(x), expected)
        assert len(calls) == 2
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = conv(x)
        conv.weight.data.normal_()
        graph.replay()
        torch.testing.assert_close(y, conv(x))
