"""2,000 training iterations: memory stays where it was after the warm-up."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.hooks import Hook
from mmengine.registry import RUNNERS

ITERATIONS, EVERY, WARM_UP = 2000, 20, 500


class Sampler(Hook):
    """Resident memory (MB) every 20 iterations, and live tensors every 500."""

    priority = "LOWEST"

    def __init__(self):
        self.memory, self.tensors, self.losses = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (batch_idx + 1) % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % WARM_UP == 0:
            gc.collect()
            self.tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow(tiny_config):
    """With the norms that remember most, logging, checkpoints, and the hooks that are shipped."""
    cfg = tiny_config("microbcn_ws", iters=ITERATIONS, size=32, batch=1)
    cfg.default_hooks.checkpoint = dict(
        type="CheckpointHook", by_epoch=False, interval=500, max_keep_ckpts=1
    )
    cfg.default_hooks.logger.interval = 50
    sampler = Sampler()
    runner = RUNNERS.build(cfg)
    runner.register_hook(sampler)
    runner.train()
    memory = np.array(sampler.memory)
    assert len(memory) == ITERATIONS // EVERY
    warm = WARM_UP // EVERY
    before, after = np.median(memory[warm : 2 * warm]), np.median(memory[-warm:])
    told = f"{before:.1f} MB after the warm-up, {after:.1f} MB at the end"
    assert after <= 1.02 * before, told
    assert max(sampler.tensors) == sampler.tensors[0]  # those of earlier tests may go
    assert np.isfinite(sampler.losses).all()
