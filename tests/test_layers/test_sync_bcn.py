"""Two and four processes against one process on the concatenated batch, in float64.

All cases run in one set of processes, which write what they got; the tests compare.
"""

import os

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
    # of four processes
    "four": (lambda: randomized(SyncBCN(C, G)), BCN, (2, 1, 1, 3), 3),
    "four_converted": (converted, BCN, (1, 1, 1, 1), 2),
    "four_with_empty": (lambda: randomized(SyncBCN(C, G)), BCN, (0, 3, 0, 1), 3),
    "four_micro": (lambda: randomized(MicroBCN(C, G, sync=True)), MicroBCN, (2, 0, 1, 1), 3),
    "four_checkpointed": (lambda: randomized(SyncBCN(C, G)), BCN, (1, 2, 0, 1), 3),
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


def run_cases(rank, world):
    results = {}
    for name, (make, _, ranks, size) in CASES.items():
        if len(ranks) == world:
            part = slice(sum(ranks[:rank]), sum(ranks[: rank + 1]))
            whole = [batch(step, ranks, size) for step in range(STEPS)]
            layer = make()
            results[name] = train(layer, [(x[part], dy[part]) for x, dy in whole], "check" in name)
    return results


def count_bytes(rank):
    """Bytes that each layer hands to the exchange: in forward, with backward, recomputed, eval."""
    exchange, sent = dist.all_reduce, []

    def counting(value, *args, **kwargs):
        sent.append(value.numel() * value.element_size())
        return exchange(value, *args, **kwargs)

    dist.all_reduce = counting
    results = {}
    for make in (BCN, SyncBCN, MicroBCN, lambda *a: MicroBCN(*a, sync=True)):
        layer, counts = make(C, G), []
        x = torch.randn(rank + 1, C, 8, 8, requires_grad=True)
        y = layer(x)
        counts.append(sum(sent))
        y.sum().backward()
        counts.append(sum(sent))
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        counts.append(sum(sent))
        layer.eval()(x).sum().backward()
        counts.append(sum(sent))
        sent.clear()
        results[type(layer).__name__, layer.sync] = counts
    dist.all_reduce = exchange
    return results


def worker(rank, folder):
    torch.set_num_threads(1)
    results = {}
    for world in (4, 2):
        if rank >= world:
            continue
        init = f"file://{folder}/init{world}"
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
        for backend in ("auto", "aten"):
            os.environ["MMBCN_BACKEND"] = backend
            results[backend] = results.get(backend, {}) | run_cases(rank, world)
        results[f"bytes of {world}"] = count_bytes(rank)
        if world == 2:
            layer = randomized(SyncBCN(C, G)).eval()
            results["eval"] = layer(batch(0, (1, 1), 2)[0][:1]).detach()
        dist.destroy_process_group()
    torch.save(results, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks_results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sync"))
    mp.spawn(worker, (folder,), nprocs=4)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks_results, name, backend):
    _, make, ranks, size = CASES[name]
    expected = train(randomized(make(C, G)), [batch(step, ranks, size) for step in range(STEPS)])
    results = [r[backend][name] for r in ranks_results[: len(ranks)]]
    close = dict(rtol=1e-10, atol=1e-10)
    for step, (y, dx) in enumerate(expected["steps"]):
        torch.testing.assert_close(torch.cat([r["steps"][step][0] for r in results]), y, **close)
        torch.testing.assert_close(torch.cat([r["steps"][step][1] for r in results]), dx, **close)
    for key, grad in expected["grads"].items():
        summed = sum(r["grads"][key] for r in results)
        torch.testing.assert_close(summed, grad, **close, msg=key)
    for key, value in expected["buffers"].items():
        for r in results:
            torch.testing.assert_close(r["buffers"][key], value, **close, msg=key)


@pytest.mark.parametrize("name", [name for name in CASES if "micro" in name])
def test_estimates_of_all_ranks_are_identical(ranks_results, name):
    for backend in ("auto", "aten"):
        first, *others = (r[backend][name]["buffers"] for r in ranks_results[: len(CASES[name][2])])
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_exchanged(ranks_results, ranks):
    """As docs/distributed.md says, whatever the size of the batch and of the images."""
    moments, gradients = 4 * ranks * (2 * C + 1), 4 * 2 * C
    once = moments + gradients
    twice = once + moments + once  # a recomputed forward exchanges again
    for r in ranks_results[:ranks]:
        assert r[f"bytes of {ranks}"] == {
            ("BCN", False): [0, 0, 0, 0],
            ("SyncBCN", True): [moments, once, twice, twice],
            ("MicroBCN", False): [0, 0, 0, 0],
            ("MicroBCN", True): [moments, moments, 2 * moments, 2 * moments],
        }


def test_sharing_matters(ranks_results):
    """Guards the comparison: without sharing, each rank would have got something else."""
    _, _, ranks, size = CASES["sync"]
    x, _ = batch(0, ranks, size)
    alone = randomized(BCN(C, G))(x[: ranks[0]])
    shared = ranks_results[0]["auto"]["sync"]["steps"][0][0]
    assert (alone - shared).abs().max() > 0.1


def test_eval_needs_no_exchange(ranks_results):
    expected = randomized(BCN(C, G)).eval()(batch(0, (1, 1), 2)[0][:1])
    for r in ranks_results[:2]:
        torch.testing.assert_close(r["eval"], expected, rtol=1e-12, atol=1e-12)
