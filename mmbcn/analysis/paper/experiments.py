"""The two experiments: accuracy against perturbed statistics, and statistics over the training."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmbcn.analysis.paper.network import (
    accuracy,
    build_network,
    perturb_statistics,
    train_epochs,
)
from mmbcn.analysis.paper.patches import Patches
from mmbcn.analysis.singularity import mean_measures, measure_singularity

NORMS = ("ln", "gn", "gn_ws", "bn", "bcn", "bcn_ws")
SIGMA_MUS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
SIGMA_SIGMAS = (0.0, 0.5, 1.0)
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What every run has in common.

    Attributes:
        train: normalized images to train on.
        test: others, for the accuracy and the statistics.
        width: see `build_network`.
        epochs: of each run.
        lr: the first learning rate.
        seeds: of weights, order and perturbation.
        tick: called after each epoch.
    """

    train: Patches
    test: Patches
    width: int
    epochs: int
    lr: float
    seeds: range
    tick: Callable[[], None]

    def perturbed(self) -> Iterator[Row]:
        """A row for each run with perturbed statistics, after its training."""
        for sigma_sigma, sigma_mu, seed in itertools.product(SIGMA_SIGMAS, SIGMA_MUS, self.seeds):
            model = self._build("bn", seed)
            perturb_statistics(model, sigma_mu, sigma_sigma, seed)
            for _ in self._epochs(model, seed):
                pass
            planted = dict(planted_sigma_mu=sigma_mu, planted_sigma_sigma=sigma_sigma, seed=seed)
            yield dict(**planted, **self._measures(model))

    def trained(self) -> Iterator[Row]:
        """A row for each norm, seed and epoch."""
        for norm, seed in itertools.product(NORMS, self.seeds):
            model = self._build(norm, seed)
            for epoch in self._epochs(model, seed):
                yield dict(norm=norm, seed=seed, epoch=epoch, **self._measures(model))

    def ticks(self) -> int:
        """How often `tick` is called in all."""
        runs = len(SIGMA_MUS) * len(SIGMA_SIGMAS) + len(NORMS)
        return runs * len(self.seeds) * self.epochs

    def _build(self, norm: str, seed: int) -> nn.Sequential:
        num_classes = int(self.train.labels.max()) + 1
        return build_network(num_classes, self.width, norm, seed)

    def _epochs(self, model: nn.Module, seed: int) -> Iterator[int]:
        for epoch in train_epochs(model, self.train, self.epochs, self.lr, seed):
            yield epoch
            self.tick()

    def _measures(self, model: nn.Module) -> Row:
        """The accuracy and the mean of each measure over the layers, in eval mode, on `test`."""
        found = measure_singularity(model, self.test.images.split(256))
        return dict(accuracy=accuracy(model, self.test), **mean_measures(found.layers))
