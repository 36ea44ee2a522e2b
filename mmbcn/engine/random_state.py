"""The states of the random generators, and randomness that belongs to a sample, not to a process.

Augmentation draws from Python's, NumPy's and torch's global generators. Each loader process has its
own, whose states end with it, so a resumed run would augment otherwise than the interrupted one.
`NumberedSampler` lets each sample carry its number; the generators are seeded from that before the
sample is loaded. So neither an interruption nor the number of workers changes what is drawn.
"""

import os
import random
from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler, get_worker_info


def get_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's CPU generators, and of the CUDA device in use."""
    kind, key, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(kind, key.tolist(), *rest),  # plain types: a checkpoint of them loads anywhere
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into a state that `get_random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _seed_generators(entropy: tuple[int, ...]) -> None:
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    # not torch.manual_seed, which would seed the GPUs of this process too
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))


class _Draw(int):
    """A sample's index, and where its randomness comes from."""

    entropy: tuple[int, ...]


class _Load:
    """Loads the samples of a batch, each with the randomness of its own number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, draws: list[int]) -> list[Any]:
        state = get_random_state() if get_worker_info() is None else None
        samples = []
        for draw in draws:
            if isinstance(draw, _Draw):
                _seed_generators(draw.entropy)
            samples.append(self.dataset[int(draw)])
        if state is not None:  # the main process has more to draw: dropout, ...
            set_random_state(state)
        return samples


class NumberedSampler(Sampler):
    """A sampler whose samples draw their randomness from (seed, rank, pass, position in the pass).

    Args:
        dataset: what is sampled; it gets the method ``__getitems__``, which loaders prefer.
        sampler: config of the sampler that decides the order.
        seed: of the order and of the samples, the same for all ranks; None: a random one.
    """

    def __init__(self, dataset: Sized, sampler: dict[str, Any], seed: int | None = None) -> None:
        self.rank, _ = get_dist_info()
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        if seed is None:
            seed = getattr(self.sampler, "seed", None)
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0  # of the next pass
        self.position = 0  # where it begins: number of its first sample
        self.passed = 0  # samples to leave out at its beginning
        dataset.__getitems__ = _Load(dataset)

    def __iter__(self) -> Iterator[int]:
        """The inner sampler's indices, numbered."""
        epoch, first, passed = self.epoch, self.position, self.passed
        self.epoch, self.position, self.passed = epoch + 1, 0, 0
        for number, index in enumerate(islice(self.sampler, passed, None), first + passed):
            draw = _Draw(index)
            draw.entropy = self.seed, self.rank, epoch, number
            yield draw

    def __len__(self) -> int:
        """The inner sampler's length."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Tell the inner sampler which pass comes next."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)

    def reseed(self, seed: int) -> None:
        """Take the seed of the run that is resumed; before the first sample is drawn."""
        self.seed = seed
        if hasattr(self.sampler, "seed"):
            self.sampler.seed = seed

    @property
    def skip(self) -> Callable[[int], None]:
        """Go to a position, if the inner sampler can; mmengine's loops call it on resuming."""
        skip = self.sampler.skip

        def skip_and_count(number: int) -> None:
            skip(number)
            self.position = number

        return skip_and_count

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not there yet
            raise AttributeError(name)
        return getattr(self.sampler, name)


class ShelteredWorker:
    """A loader's ``worker_init_fn``: puts the worker into a process group of its own.

    Launchers send SIGTERM to whole process groups. A worker that it reached would break its run
    with an error, before the checkpoint is saved. The main process ends its workers itself.

    Args:
        init: what to call first, with the worker's number; None: nothing.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker_id: int) -> None:
        """Prepare this worker process."""
        if self.init is not None:
            self.init(worker_id)
        if hasattr(os, "setpgid"):  # not on Windows
            os.setpgid(0, 0)
