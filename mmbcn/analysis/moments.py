"""Mean and variance of each channel over all values of many batches, in float64.

Parts are combined by within- and between-part sums of squares (Chan, Golub, LeVeque 1983), so each
counts with its number of values, and nothing is lost where the mean is large against the spread.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class ChannelMoments:
    """Count, mean and sum of squared deviations of each channel, of what was added so far.

    Args:
        num_features: channels C.
        device: where they are kept.

    Attributes:
        count: number of values of each channel.
        batches: number of batches that they came in.
        mean: (C,), float64.
        squares: sum of squared deviations from the mean, (C,), float64.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.batches = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def add(self, x: Tensor) -> None:
        """Add all values of a batch (N, C, ...); an empty one changes nothing."""
        count = x.numel() // len(self.mean)
        if not count:
            return
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x.detach().to(self.mean), dims, correction=0)
        self._merge(count, 1, mean, var * count)

    def biased(self) -> Tensor:
        """Variance around the mean of all values, divided by their number."""
        return self.squares / max(self.count, 1)

    def unbiased(self) -> Tensor:
        """Variance around the mean of all values, divided by their number less one."""
        return self.squares / max(self.count - 1, 1)

    def gather(self) -> None:
        """Take in what the other ranks of the default process group have; all call it."""
        if not is_distributed():
            return
        own = torch.cat([self.mean, self.squares, self.mean.new_tensor([self.count, self.batches])])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        self.__init__(len(self.mean), self.mean.device)
        for part in parts:
            mean, squares, numbers = part.split([len(self.mean), len(self.mean), 2])
            self._merge(int(numbers[0]), int(numbers[1]), mean, squares)

    def _merge(self, count: int, batches: int, mean: Tensor, squares: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        between = mean - self.mean
        self.mean = self.mean + between * (count / total)
        self.squares = self.squares + squares + between.square() * (self.count * count / total)
        self.count, self.batches = total, self.batches + batches


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
