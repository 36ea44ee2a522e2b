"""Two ranks, each with its own images, against one process with all of them."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mmbcn import SyncBCN
from mmbcn.analysis import calibrate
from mmbcn.errors import UsageError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"
)
SHARES = {"both": ((3, 1), (2,)), "one_empty": ((3, 3), ()), "none_in_the_first": ((), (2, 2))}


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), SyncBCN(6, 2)]
    return nn.Sequential(*layers).double()


def images(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 4, 5, generator=g, dtype=torch.float64) + n + seed for n in sizes]


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    states = {}
    for name, shares in SHARES.items():
        for one_pass in (False, True):
            model = net()
            try:
                calibrate(model, images(shares[rank], rank), one_pass=one_pass)
                states[name, one_pass] = model.state_dict()
            except UsageError as error:
                states[name, one_pass] = str(error)
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["both", "one_empty"])
def test_ranks_together_equal_one_process(found, name):
    model = net()
    calibrate(model, [b for rank in (0, 1) for b in images(SHARES[name][rank], rank)])
    for rank in (0, 1):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(found[rank][name, False][key], value, rtol=1e-12, atol=1e-12)
    first = [k for k in model.state_dict() if k.startswith("1.")]
    assert first
    for key in first:  # in one pass, the first layer is exact too
        for rank in (0, 1):
            expected = model.state_dict()[key]
            torch.testing.assert_close(found[rank][name, True][key], expected)
    assert all(torch.equal(v, found[1][name, True][k]) for k, v in found[0][name, True].items())


def test_no_images_in_the_first_rank_is_told_by_all(found):
    for states in found:
        for one_pass in (False, True):
            assert "no batch that reaches a norm" in states["none_in_the_first", one_pass]
