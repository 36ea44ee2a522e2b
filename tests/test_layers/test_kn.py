"""Kalman normalization against oracles that share no code with it.

Filtered statistics and outputs: NumPy, one channel at a time. Gradients: ``nn.BatchNorm2d`` where
the gain is one, finite differences elsewhere, and the network without checkpointing for the one
with it.
"""

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmbcn import KN
from mmbcn.errors import UsageError
from mmbcn.layers import describe_links, link_norms, unlink_norms
from mmbcn.ops import kalman_norm

EPS = 1e-5
CLOSE = dict(rtol=1e-10, atol=1e-10)


class Block(nn.Module):
    """A residual block with dropout, as mmseg's in its use of checkpointing."""

    def __init__(self, norm, channels, reentrant):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.bn2 = norm(channels)
        self.dropout = nn.Dropout(0.5)
        self.reentrant = reentrant

    def inner(self, x):
        y = self.dropout(self.bn1(self.conv1(x)).relu())
        return self.bn2(self.conv2(y)) + x

    def forward(self, x):
        if self.reentrant is None or not x.requires_grad:
            return self.inner(x).relu()
        return checkpoint(self.inner, x, use_reentrant=self.reentrant).relu()


class Net(nn.Module):
    """A stem, two residual blocks and a head: as many ways for statistics as ResNets have."""

    def __init__(self, norm, channels=4, reentrant=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, channels, 3, stride=2), norm(channels), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(norm, channels, reentrant) for _ in range(2)))
        self.head = nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), norm(3), nn.ReLU())

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def randomize(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4 + 0.2)
    return net.double()


def net(q=0.3, transition="conv", dtype=torch.float64, **options):
    net = Net(lambda c: KN(c, q=q, transition=transition), **options)
    link_norms(net)
    assert len([m for m in net.modules() if isinstance(m, KN) and m.link]) == 5
    return randomize(net).to(dtype)


def data(n=2, size=9, channels=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=g, dtype=torch.float64) * 2 + 0.7


def result(net, xs, seed=3):
    """Forward all inputs, then one backward; everything that may differ."""
    torch.manual_seed(seed)
    xs = [x.detach().clone().requires_grad_() for x in xs]
    ys = [net(x) for x in xs]
    sum((i + 1) * y.square().sum() for i, y in enumerate(ys)).backward()
    return {
        **{f"y{i}": y.detach() for i, y in enumerate(ys)},
        **{f"dx{i}": x.grad for i, x in enumerate(xs)},
        **{f"d {k}": p.grad for k, p in net.named_parameters()},
        **{k: b.clone() for k, b in net.named_buffers()},
    }


def assert_same(a, b, **close):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **(close or CLOSE), msg=lambda m, k=key: k + m)


# --- the formulas --------------------------------------------------------------------------------


def moments(x):
    values = x.detach().numpy().transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
    return np.array([v.mean() for v in values]), np.array(
        [np.mean((v - v.mean()) ** 2) for v in values]
    )


def numpy_step(observed, predicted, q):
    (mo, vo), (mp_, vp) = observed, predicted
    return (1 - q) * mp_ + q * mo, (1 - q) * vp + q * vo + q * (1 - q) * (mo - mp_) ** 2


def numpy_output(layer, x, m, v):
    w, b = (p.detach().numpy() for p in (layer.weight, layer.bias))
    return (x - m[:, None, None]) / np.sqrt(v + EPS)[:, None, None] * w[:, None, None] + b[
        :, None, None
    ]


def pair(q, transition, seed=0):
    """Conv, norm, ReLU, conv, norm."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2),
        KN(3, q=q),
        nn.ReLU(),
        nn.Conv2d(3, 5, 3),
        KN(5, q=q, transition=transition),
    )
    link_norms(net)
    return randomize(net)


def predicted_by_hand(net, x, drawn=None):
    """What the last layer of `pair` is to expect, computed by NumPy."""
    m, v = moments(net[0](x))
    if net[4].transition == "linear":
        a, r = net[4].transition_weight.detach().numpy(), net[4].transition_noise.detach().numpy()
        sigma = a @ np.diag(v) @ a.T + np.diag(np.exp(r))
        return a @ m, np.diag(sigma)
    fed = np.maximum(m[:, None, None] + np.sqrt(v)[:, None, None] * drawn, 0)
    return moments(F.conv2d(torch.from_numpy(fed)[None], net[3].weight, net[3].bias))


def noise_of(shape, seed):
    """The values that the layer draws after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
    return torch.randn(shape, generator=g, dtype=torch.float64)[0].numpy()


@pytest.mark.parametrize("q", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("transition", ["conv", "linear"])
def test_output_and_estimates_equal_a_numpy_kalman_step(q, transition):
    """The linear transition has no randomness; the draw of the other is known."""
    net, x = pair(q, transition), data(size=7)
    h = net[2](net[1](net[0](x)))
    predicted = predicted_by_hand(net, x, noise_of((1, 3, 6, 6), 8))
    torch.manual_seed(8)
    y = net(x)
    z = net[3](h).detach()
    observed = moments(z)
    m, v = numpy_step(observed, predicted, q)
    np.testing.assert_allclose(y.detach().numpy(), numpy_output(net[4], z.numpy(), m, v), rtol=1e-9)
    count = z.numel() / 5
    running_var = v + q * observed[1] / (count - 1)
    np.testing.assert_allclose(net[4].running_mean.numpy(), 0.1 * m, rtol=1e-9)
    np.testing.assert_allclose(net[4].running_var.numpy(), 0.9 + 0.1 * running_var, rtol=1e-9)
    if q == 0:
        assert not np.allclose(m, observed[0], rtol=0.1)


def test_fusion_has_the_moments_of_the_sampled_mixture():
    g, n, q = np.random.default_rng(0), 2_000_000, 0.3
    predicted, observed = np.array([[1.0], [4.0]]), np.array([[-2.0], [0.5]])
    from_observed = g.random(n) < q
    samples = np.where(from_observed, g.normal(-2.0, 0.5**0.5, n), g.normal(1.0, 2.0, n))
    x = torch.tensor([-2 - 0.5**0.5, -2 + 0.5**0.5], dtype=torch.float64).view(2, 1, 1, 1)
    one = torch.ones(1, dtype=torch.float64)
    tensors = (torch.from_numpy(v) for v in (observed, predicted))
    _, filtered, gain = kalman_norm(x, *tensors, one, 0 * one, q, EPS, lambda: None)
    assert gain == pytest.approx(q)
    assert filtered[0].item() == pytest.approx(samples.mean(), abs=0.01)
    assert filtered[1].item() == pytest.approx(samples.var(), rel=0.01)


@pytest.mark.parametrize("transition", ["conv", "linear"])
def test_gain_one_is_batch_norm(transition):
    """Outputs, every gradient, and the running estimates, over several steps."""
    a = net(1.0, transition)
    b = randomize(Net(nn.BatchNorm2d))
    b.load_state_dict({k: v for k, v in a.state_dict().items() if "transition" not in k})
    for m in (*a.modules(), *b.modules()):
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    for step in range(3):
        a.zero_grad(), b.zero_grad()
        got, expected = (result(m, [data(2 + step % 2, seed=step)]) for m in (a, b))
        learned = {k: got.pop(k) for k in list(got) if "transition" in k}
        assert_same(got, expected)
        assert all(not g.any() for g in learned.values())
        assert len(learned) == (10 if transition == "linear" else 0)


def test_unlinked_layers_are_batch_norm():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), KN(4, q=0.1), nn.Conv2d(4, 3, 1), KN(3, q=0.1))
    net = randomize(net)
    bn = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    bn.double().load_state_dict(net.state_dict())
    assert_same(result(net, [data(), data(3)]), result(bn, [data(), data(3)]))


@pytest.mark.parametrize(("ratio", "used"), [(99.0, True), (101.0, False), (np.inf, False)])
def test_predictions_that_are_far_off_are_not_used(ratio, used):
    """Above a mean ratio of variances of 100; gradients too are then those of BatchNorm."""
    x = data(2, 4, 3).requires_grad_()
    m, v = moments(x)
    ratios = np.array([0.5, 1.0, 3 * ratio - 1.5])
    predicted = torch.tensor(np.stack([m + 1, v * ratios]), requires_grad=True)
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    observed = torch.from_numpy(np.stack([m, v]))
    y, filtered, gain = kalman_norm(x, observed, predicted, weight, bias, 0.1, EPS, lambda: None)
    grads = torch.autograd.grad(y.square().sum(), [x, weight, bias, predicted])
    if used:
        expected = numpy_step((m, v), predicted.detach().numpy(), 0.1)
        np.testing.assert_allclose(filtered.detach().numpy(), expected, rtol=1e-10)
        assert grads[3].abs().min() > 0
        return
    assert gain == 1
    z = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    torch.testing.assert_close(y, z, **CLOSE)
    expected = torch.autograd.grad(z.square().sum(), [x, weight, bias])
    for a, b in zip(grads, expected, strict=False):
        torch.testing.assert_close(a, b, **CLOSE)
    assert not grads[3].any()


@pytest.mark.parametrize("transition", ["conv", "linear"])
def test_gradcheck(transition):
    """Through the statistics of both layers, the prediction, and its weights."""
    net = pair(0.4, transition)
    names, values = zip(*net.named_parameters(), strict=True)
    buffers = dict(net.named_buffers())

    def call(x, *parameters):
        torch.manual_seed(8)
        state = {k: v.clone() for k, v in buffers.items()}
        state.update(zip(names, parameters, strict=True))
        return torch.func.functional_call(net, state, (x,))

    leaves = [t.detach().clone().requires_grad_() for t in (data(2, 5), *values)]
    assert torch.autograd.gradcheck(call, leaves, atol=1e-6)


def test_gradient_reaches_the_layer_before_through_the_statistics_alone():
    net, x = pair(0.0, "linear"), data(2, 6)
    z = data(2, 3, 5, seed=4)
    before = net(x)  # its graph must live
    out = net[4](z)  # not made from x
    loss = out.sum() + out.square().sum() + 0 * before.sum()
    (grad,) = torch.autograd.grad(loss, net[0].weight)
    assert grad.abs().min() > 0


# --- eval ----------------------------------------------------------------------------------------


def test_eval_is_batch_norm_and_ignores_predecessors():
    a, b = net(0.1), Net(nn.BatchNorm2d).double()
    for step in range(2):
        a(data(seed=step))
    b.load_state_dict(a.state_dict())
    a.eval(), b.eval()
    expected, state = b(data()), torch.get_rng_state()
    torch.testing.assert_close(a(data()), expected, **CLOSE)
    assert torch.equal(torch.get_rng_state(), state)
    layer = a.blocks[1].bn1
    before = layer(data(channels=4))
    with torch.no_grad():
        a.blocks[0].bn2.running_var.mul_(9)
        a.blocks[1].conv1.weight.mul_(3)
    assert torch.equal(layer(data(channels=4)), before)


def test_frozen_predecessors_give_their_estimates():
    net, x = pair(0.3, "linear"), data(size=7)
    net(x)
    net[1].eval()
    z = net[3](net[2](net[1](net[0](x)))).detach()
    y = net(x)
    m1, v1 = net[1].running_mean.numpy(), net[1].running_var.numpy()
    a, r = net[4].transition_weight.detach().numpy(), net[4].transition_noise.detach().numpy()
    m, v = numpy_step(moments(z), (a @ m1, (a**2) @ v1 + np.exp(r)), 0.3)
    np.testing.assert_allclose(y.detach().numpy(), numpy_output(net[4], z.numpy(), m, v), rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3)])
def test_one_value_per_channel_uses_the_estimates(shape):
    layer = randomize(KN(3))
    layer.running_mean.normal_()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    torch.testing.assert_close(y, layer.eval()(x), **CLOSE)


# --- repeated, interleaved and lone passes -------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("transition", ["conv", "linear"])
def test_checkpointing_changes_nothing(transition, reentrant, passes):
    """Also not the gradient between blocks, which goes beside the tensors, nor the dropout."""
    xs = [data(seed=i) + i for i in range(passes)]
    expected = result(net(transition=transition), xs)
    assert expected["stem.1.num_batches_tracked"] == passes
    assert_same(result(net(transition=transition, reentrant=reentrant), xs), expected)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_several_steps_leave_no_graph_behind(reentrant):
    plain, other = net(), net(reentrant=reentrant)
    for step in range(3):
        results = []
        for model in (plain, other):
            model.zero_grad()
            results.append(result(model, [data(seed=step)]))
        assert_same(*results)
        for m in other.modules():
            if isinstance(m, KN):
                assert m.passes.latest._attached() is None
                assert m.passes.latest._owed is None


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_loss_that_is_dropped_leaves_no_activations_behind(reentrant):
    """Without a backward pass, such as of a loss that is not finite."""

    class Saved:
        def __init__(self, value):
            self.value = value.detach()  # the graph is not to keep itself
            alive.add(self)

    alive, model = weakref.WeakSet(), net(reentrant=reentrant)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        loss = model(data()).sum()
    assert len(alive) > 10
    del loss
    assert len(alive) == 0
    assert_same(*(result(m, [data(seed=2)]) for m in (model, copy.deepcopy(model))))


def test_two_passes_before_backward_are_two_passes():
    xs = [data(seed=1), data(seed=2) * 3]
    together = net()
    expected = result(together, xs)
    apart = net()
    torch.manual_seed(3)
    for i, x in enumerate(xs):
        ((i + 1) * apart(x).square().sum()).backward()
    for name, p in apart.named_parameters():
        torch.testing.assert_close(p.grad, expected[f"d {name}"], **CLOSE, msg=name)


def test_a_part_alone_goes_on_with_the_latest_statistics():
    model = net()
    result(model, [data()])
    h = torch.rand(2, 4, 4, 4, dtype=torch.float64)
    for _ in range(2):
        model.head(h).sum().backward()  # the graph of the layers before is used up
    fresh = net()
    y = fresh.head(h)  # nothing has run before it
    z = fresh.head[0](h)
    expected = F.batch_norm(z, None, None, fresh.head[1].weight, fresh.head[1].bias, True, 0.0, EPS)
    torch.testing.assert_close(y, expected.relu(), **CLOSE)


def test_without_gradients():
    model = net()
    with torch.no_grad():
        torch.manual_seed(3)
        y = model(data())
    torch.testing.assert_close(y, result(net(), [data()])["y0"], **CLOSE)


# --- precision -----------------------------------------------------------------------------------


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_float32_and_autocast():
    exact = net()
    single, half = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    results = [result(exact, [data()]), result(single, [data().float()])]
    with torch.autocast("cpu", torch.bfloat16):
        results.append(result(half, [data().float()]))
    assert results[1]["y0"].dtype == torch.float32
    assert all(value.isfinite().all() for r in results for value in r.values())
    for name in ("stem.1.running_mean", "stem.1.running_var"):  # no draw is behind these
        assert results[2][name].dtype == torch.float32
        assert relative(results[1][name], results[0][name]) < 1e-6
        assert relative(results[2][name], results[0][name]) < 0.02


def test_mean_far_above_the_spread():
    x = (data(2, 8, 3) + 1e3).float()
    layer = KN(3)
    y = layer(x).detach()
    expected = F.batch_norm(x.double(), None, None, training=True)
    assert relative(y, expected) < 1e-4


# --- several ranks -------------------------------------------------------------------------------


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    for name in CASES:
        model = DistributedDataParallel(make_case(name), broadcast_buffers=False)
        results[name] = train(model, [data(seed=10 * step + rank) for step in range(3)], rank)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


CASES = {"conv": {}, "linear": dict(transition="linear"), "checkpointed": dict(reentrant=False)}


def make_case(name):
    return net(**CASES[name])


def train(model, xs, rank):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step, x in enumerate(xs):
        optimizer.zero_grad()
        torch.manual_seed(100 * rank + step)
        model(x).square().mean().backward()
        optimizer.step()
    return {k.removeprefix("module."): v.detach() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def ranks_results(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch with gloo")
    folder = str(tmp_path_factory.mktemp("kn"))
    mp.spawn(ddp_worker, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_statistics_of_their_own_and_share_gradients(ranks_results, name):
    models = [make_case(name) for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in models]
    for step in range(3):
        for rank, model in enumerate(models):
            model.zero_grad()
            torch.manual_seed(100 * rank + step)
            model(data(seed=10 * step + rank)).square().mean().backward()
        for pair in zip(*(m.parameters() for m in models), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            pair[0].grad = pair[1].grad = mean
        for optimizer in optimizers:
            optimizer.step()
    for rank, model in enumerate(models):
        assert_same(ranks_results[rank][name], model.state_dict())


# --- state, copies, mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize("transition", ["conv", "linear"])
def test_state_is_batch_norms(transition):
    bn, kn = randomize(Net(nn.BatchNorm2d), seed=4), net(transition=transition)
    for b in bn.buffers():
        b.copy_(torch.rand(b.shape) * 5)
    own = {k for k in kn.state_dict() if "transition" in k}
    assert kn.state_dict().keys() - own == bn.state_dict().keys()
    assert len(own) == (10 if transition == "linear" else 0)
    kn.load_state_dict(bn.state_dict())
    for key, value in bn.state_dict().items():
        assert torch.equal(kn.state_dict()[key], value), key
    other = net(transition=transition)
    other.load_state_dict(kn.state_dict())
    bn.load_state_dict({k: v for k, v in kn.state_dict().items() if k not in own})


def test_copies_are_linked_among_themselves():
    model = net()
    result(model, [data()])
    model(data())  # statistics that are attached to a graph
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        inside = set(other.modules())
        layers = [m for m in inside if isinstance(m, KN)]
        for layer in layers:
            assert set(layer.links) == set(layers) - {other.stem[1]}
            assert layer.passes.latest is None
        model.zero_grad(), other.zero_grad()
        again = copy.deepcopy(model)
        assert_same(result(other, [data(seed=7)]), result(again, [data(seed=7)]))


@pytest.mark.parametrize("transition", ["conv", "linear"])
def test_a_part_is_copied_without_the_rest_and_can_be_linked_again(transition):
    model = net(transition=transition)
    norm = model.blocks[0].bn2
    assert b"Conv2d" not in pickle.dumps(norm)
    assert copy.deepcopy(norm).links is None
    part = pickle.loads(pickle.dumps(model.blocks))
    state = copy.deepcopy(part.state_dict())
    part.double()(data(channels=4))  # as BatchNorm
    with pytest.warns(UserWarning, match=r"1 of 4 KN .*\n  1\.bn1: mixed with the image"):
        link_norms(part)
    assert describe_links(part)["0.bn2"] == "0.conv2(relu(0.bn1))"
    assert part.state_dict().keys() == state.keys()
    learned = [k for k in state if "transition" in k]
    assert all(torch.equal(part.state_dict()[k], state[k]) for k in learned)
    unlink_norms(model)
    assert describe_links(model) == {}
    assert describe_links(copy.deepcopy(model)) == {}


def test_momentum():
    layer, bn = KN(3, momentum=None).double(), nn.BatchNorm2d(3, momentum=None).double()
    for step in range(3):
        x = data(2 + step, 4, 3, seed=step)
        torch.testing.assert_close(layer(x), bn(x), **CLOSE)
    assert_same(layer.state_dict(), bn.state_dict())


def test_mistakes():
    for bad in (-0.1, 1.1, "0.1", True):
        with pytest.raises(ValueError, match=r"q is the weight.*\[0, 1\].*0\.95"):
            KN(3, q=bad)
    with pytest.raises(ValueError, match=r"transition must be one of.*'quadratic'"):
        KN(3, transition="quadratic")
    with pytest.raises(TypeError, match="num_features must be an int"):
        KN(3.0)
    with pytest.raises(ValueError, match=r"KN expects \(N, 3, ...\), got shape \(2, 4, 5\)"):
        KN(3)(torch.rand(2, 4, 5))
    with pytest.raises(TypeError, match="real floating-point"):
        KN(3)(torch.ones(2, 3, dtype=torch.long))


def test_where_it_cannot_train():
    layer, x = KN(3), torch.rand(2, 3, 4)
    with pytest.raises(UsageError, match=r"inside a transform of torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    torch.func.grad(lambda x: layer.eval()(x).sum())(x)
    replica = layer.train()._replicate_for_data_parallel()
    with pytest.raises(UsageError, match="DataParallel"):
        replica(x)


def test_compiled_training_is_left_to_python():
    compiled = torch.compile(lambda m, x: m(x * 2) + 1, backend="eager")
    a, b = pair(0.3, "linear"), pair(0.3, "linear")
    x = data(size=7)
    torch.testing.assert_close(compiled(a, x), b(x * 2) + 1, **CLOSE)
    assert_same(a.state_dict(), b.state_dict())
