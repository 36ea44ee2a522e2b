"""Two processes against one process on the concatenated batch, in float64.

All cases run in one pair of processes, which write what they got; the tests compare.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmbcn import BCN, MicroBCN, SyncBCN

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"
)
C, G, STEPS = 6, 3, 3


def randomized(layer):
    g = torch.Generator().manual_seed(0)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) + 0.5)
    return layer


def converted():
    return nn.SyncBatchNorm.convert_sync_batchnorm(randomized(BCN(C, G)))


# name -> (the layer in each process, the layer in one process, samples of each rank, size)
CASES = {
    "sync": (lambda: randomized(SyncBCN(C, G)), BCN, (3, 1), 4),
    "cumulative": (
        lambda: randomized(SyncBCN(C, G, momentum=None)),
        lambda *a: BCN(*a, momentum=None),
        (1, 2),
        2,
    ),
    "converted": (converted, BCN, (1, 2), 4),
    "micro": (lambda: randomized(MicroBCN(C, G, sync=True)), MicroBCN, (3, 1), 4),
    "micro_fixed_rate": (
        lambda: randomized(MicroBCN(C, G, warmup=False, sync=True)),
        lambda *a: MicroBCN(*a, warmup=False),
        (1, 2),
        2,
    ),
    "empty_rank": (lambda: randomized(SyncBCN(C, G)), BCN, (2, 0), 4),
    "empty_rank_0": (lambda: randomized(SyncBCN(C, G)), BCN, (0, 2), 4),
    "micro_empty_rank": (lambda: randomized(MicroBCN(C, G, sync=True)), MicroBCN, (2, 0), 4),
    "one_value_each": (lambda: randomized(SyncBCN(C, G)), BCN, (1, 1), 1),
    "one_value_in_all": (lambda: randomized(SyncBCN(C, G)), BCN, (1, 0), 1),
    "all_empty": (lambda: randomized(SyncBCN(C, G)), BCN, (0, 0), 2),
    "micro_all_empty": (lambda: randomized(MicroBCN(C, G, sync=True)), MicroBCN, (0, 0), 2),
    "checkpointed": (lambda: randomized(SyncBCN(C, G)), BCN, (2, 1), 3),
    "micro_checkpointed": (
        lambda: randomized(MicroBCN(C, G, sync=True)),
        MicroBCN,
        (2, 1),
        3,
    ),
}


def batch(step, ranks, size):
    g = torch.Generator().manual_seed(10 + step)
    shape = (sum(ranks), C, size, size)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + step
    for i in range(len(x)):
        x[i] += 3 * i  # ranks differ in mean
    return x, torch.randn(shape, generator=g, dtype=torch.float64)


def train(layer, batches, recompute=False):
    """Outputs and input gradients of each step, parameter gradients and statistics at the end."""
    steps = []
    for x, dy in batches:
        x = x.clone().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y * dy).sum().backward()
        steps.append((y.detach(), x.grad))
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params(layer)}
    return dict(steps=steps, grads=grads, buffers=dict(layer.named_buffers()))


def params(layer):
    return list(layer.named_parameters())


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    for name, (make, _, ranks, size) in CASES.items():
        part = slice(0, ranks[0]) if rank == 0 else slice(ranks[0], None)
        whole = [batch(step, ranks, size) for step in range(STEPS)]
        layer = make()
        results[name] = train(layer, [(x[part], dy[part]) for x, dy in whole], "check" in name)
    layer = randomized(SyncBCN(C, G)).eval()
    results["eval"] = layer(batch(0, (1, 1), 2)[0][:1]).detach()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks_results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sync"))
    mp.spawn(worker, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks_results, name):
    _, make, ranks, size = CASES[name]
    expected = train(randomized(make(C, G)), [batch(step, ranks, size) for step in range(STEPS)])
    results = [r[name] for r in ranks_results]
    close = dict(rtol=1e-10, atol=1e-10)
    for step, (y, dx) in enumerate(expected["steps"]):
        torch.testing.assert_close(torch.cat([r["steps"][step][0] for r in results]), y, **close)
        torch.testing.assert_close(torch.cat([r["steps"][step][1] for r in results]), dx, **close)
    for key, grad in expected["grads"].items():
        summed = results[0]["grads"][key] + results[1]["grads"][key]
        torch.testing.assert_close(summed, grad, **close, msg=key)
    for key, value in expected["buffers"].items():
        for r in results:
            torch.testing.assert_close(r["buffers"][key], value, **close, msg=key)


def test_sharing_matters(ranks_results):
    """Guards the comparison: without sharing, each rank would have got something else."""
    _, _, ranks, size = CASES["sync"]
    x, _ = batch(0, ranks, size)
    alone = randomized(BCN(C, G))(x[: ranks[0]])
    shared = ranks_results[0]["sync"]["steps"][0][0]
    assert (alone - shared).abs().max() > 0.1


def test_eval_needs_no_exchange(ranks_results):
    expected = randomized(BCN(C, G)).eval()(batch(0, (1, 1), 2)[0][:1])
    for r in ranks_results:
        torch.testing.assert_close(r["eval"], expected, rtol=1e-12, atol=1e-12)
