"""The norms within DistributedDataParallel and FSDP2: two processes against one, in float64.

All cases run in one pair of processes, which write what they got; the tests compare.
"""

import contextlib
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mmbcn import BCN, MicroBCN, SyncBCN, WSConv2d

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"
)
C, G, STEPS = 6, 3, 4
BATCHES = (2, 3)  # samples of each rank
FSDP = "fully_shard"
NORMS = {
    "sync": (lambda: SyncBCN(C, G), lambda: BCN(C, G)),
    "micro": (lambda: MicroBCN(C, G, sync=True), lambda: MicroBCN(C, G)),
}
# what is done -> arguments of DistributedDataParallel
WRAPPERS = {
    "plain": {},
    "accumulation": {},
    "find_unused_parameters": dict(find_unused_parameters=True),
    "static_graph": dict(static_graph=True),
    FSDP: None,
}


class Net(nn.Module):
    """A small network; one of its two branches is used."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Sequential(WSConv2d(3, C, 3), norm(), nn.ReLU())
        self.unused = nn.Sequential(nn.Conv2d(C, C, 1), norm())
        self.head = nn.Sequential(nn.Conv2d(C, C, 1), norm())

    def forward(self, x):
        return self.head(self.stem(x)).square().mean((1, 2, 3)).sum()


def network(norm, unused=True):
    net = Net(norm).double()
    if not unused:
        net.unused = None
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3 + 0.5)
    return net


def batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn((sum(BATCHES), 3, 7, 5), generator=g, dtype=torch.float64)
    return x + torch.arange(sum(BATCHES)).view(-1, 1, 1, 1)


def train(net, parts, scale, no_sync=None):
    """Steps of SGD; with ``no_sync``, of two batches each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step, x in enumerate(parts):
        half = no_sync is not None and step % 2 == 0
        with no_sync() if half else contextlib.nullcontext():
            loss = net(x)
            (loss * scale).backward()
        losses.append(loss.item())
        if not half:
            optimizer.step()
            optimizer.zero_grad()
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    tensors = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in inner.state_dict().items()}
    return dict(losses=losses, state={k: v.detach().clone() for k, v in tensors.items()})


def wrapped(norm, wrapper):
    net = network(NORMS[norm][0], unused=wrapper == "find_unused_parameters")
    if wrapper != FSDP:
        return DistributedDataParallel(net, broadcast_buffers=False, **WRAPPERS[wrapper])
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in (net.stem, net.head):
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def synchronized_buffers(rank):
    """What the hook makes of buffers that differ."""
    from mmbcn.engine import SyncBuffersHook

    models = [BCN(C, G), BCN(C, G)]
    for model in models:
        model.bn.running_mean.fill_(rank)
        model.bn.running_var.fill_(3 - 2 * rank)
        model.bn.num_batches_tracked.fill_(7 + rank)
    runner = SimpleNamespace(model=models[0], hooks=[SimpleNamespace(ema_model=models[1])])
    hook = SyncBuffersHook()
    hook.before_val_epoch(runner)
    return [dict(model.named_buffers()) for model in models]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    part = slice(0, BATCHES[0]) if rank == 0 else slice(BATCHES[0], None)
    parts = [batch(step)[part] for step in range(STEPS)]
    results = {}
    for norm in NORMS:
        for wrapper in WRAPPERS:
            net = wrapped(norm, wrapper)
            # gradients become the ranks' mean, and the loss of the whole batch is their sum
            no_sync = net.no_sync if wrapper == "accumulation" else None
            results[norm, wrapper] = train(net, parts, 2, no_sync)
    if find_spec("mmseg"):
        results["buffers"] = synchronized_buffers(rank)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("wrappers"))
    mp.spawn(worker, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("norm", NORMS)
def test_trains_as_one_process(ranks_results, norm, wrapper):
    """Losses, weights and statistics after steps of SGD with momentum."""
    net = network(NORMS[norm][1], unused=wrapper == "find_unused_parameters")
    no_sync = contextlib.nullcontext if wrapper == "accumulation" else None
    expected = train(net, [batch(step) for step in range(STEPS)], 1, no_sync)
    results = [r[norm, wrapper] for r in ranks_results]
    losses = [sum(both) for both in zip(*(r["losses"] for r in results), strict=True)]
    assert losses == pytest.approx(expected["losses"], rel=1e-10)
    assert abs(losses[-1] - losses[0]) > 1e-3
    for r in results:
        assert r["state"].keys() == expected["state"].keys()
        for key, value in expected["state"].items():
            torch.testing.assert_close(r["state"][key], value, rtol=1e-10, atol=1e-10, msg=key)
            assert torch.equal(r["state"][key], results[0]["state"][key]), key


def test_buffers_are_synchronized(ranks_results):
    """Floats become the ranks' mean, integers their maximum; of averaged weights' models too."""
    pytest.importorskip("mmseg")
    for r in ranks_results:
        for buffers in r["buffers"]:
            assert buffers["bn.running_mean"].eq(0.5).all()
            assert buffers["bn.running_var"].eq(2).all()
            assert buffers["bn.num_batches_tracked"] == 8


@pytest.mark.parametrize(
    "options",
    [
        dict(strategy=dict(type="FSDPStrategy")),
        dict(model_wrapper_cfg=dict(type="MMFullyShardedDataParallel")),
    ],
)
def test_sharding_by_mmengine_is_refused(tiny_config, options):
    pytest.importorskip("mmseg")
    from mmbcn.engine import NormRunner
    from mmbcn.errors import UsageError

    key, value = next(iter(options.items()))
    with pytest.raises(UsageError, match=f"does not shard models, .*{key}=.*{value['type']}"):
        NormRunner.from_cfg(tiny_config(**options))
