"""Small networks with every join that equalization is to know, and ways to rescale one of them."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Joins(nn.Module):
    """An identity skip, a learned one, both into one stream."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 6)
        self.inner1, self.outer1 = conv(6, 5), conv(5, 6, bias=False)
        self.inner2, self.outer2, self.skip = conv(6, 4), conv(4, 7), conv(6, 7, 1)
        self.last = conv(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = self.outer1(F.relu(self.inner1(x)))
        out += x
        x = F.relu(out, inplace=True)
        x = F.relu(self.outer2(F.relu(self.inner2(x))) + self.skip(x))
        return self.last(x)


class Pyramid(nn.Module):
    """Concatenation of branches: one of them pooled and interpolated, one zero-padded."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.branches = nn.ModuleList([conv(4, 3), conv(4, 5, 1), conv(4, 2, 1)])
        self.fuse = nn.Sequential(conv(10, 6), nn.Dropout2d(0.5), nn.LeakyReLU(0.1))
        self.last = conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        one, two, three = (F.relu(branch(x)) for branch in self.branches[:3])
        pooled = F.adaptive_avg_pool2d(two, 1)
        pooled = F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False)
        three = F.pad(three, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
        out = self.last(self.fuse(torch.cat([pooled, one, three], 1)))
        return F.interpolate(out, scale_factor=2.0, mode="bicubic")


class Kinds(nn.Module):
    """Grouped, depthwise, transposed convolutions, PReLU, factors, split channels, linear."""

    def __init__(self):
        super().__init__()
        self.grouped = conv(3, 8), conv(8, 8, groups=4)
        self.first, self.second = self.grouped
        self.depthwise = conv(8, 8, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.prelu = nn.PReLU(6)
        self.factor = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.shift = nn.Parameter(torch.randn(6, 1, 1))
        self.left, self.right = conv(2, 3), conv(4, 3)
        self.linear = nn.Linear(3 * 8 * 8, 4)
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        x = self.prelu(self.up(F.avg_pool2d(self.depthwise(x), 2)))
        x = F.relu(x * self.factor + self.shift) / 3
        left, right = x.split([2, 4], 1)
        x = F.relu(self.left(left) - self.right(right)).flatten(1)
        return self.last(F.relu(self.linear(x)))


class Chain(nn.Sequential):
    def __init__(self, widths=(3, 4, 5, 6, 2)):
        layers = []
        for inputs, outputs in pairwise(widths):
            layers += [conv(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


def build(cls: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64 with random weights and biases."""
    torch.manual_seed(seed)
    model = cls().double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 10 ** torch.randn(()).item()
    return model


def rescale_joins(model: Joins, seed: int) -> None:
    """Other weights of the same function: each channel between layers scaled at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int) -> Tensor:
        return torch.randn(channels, 1, 1, 1, generator=generator, dtype=torch.float64).exp()

    def write(scale: Tensor, *layers: nn.Conv2d) -> None:
        for layer in layers:
            layer.weight.data *= scale
            if layer.bias is not None:
                layer.bias.data *= scale.flatten()

    def read(scale: Tensor, *layers: nn.Conv2d) -> None:
        for layer in layers:
            layer.weight.data /= scale.transpose(0, 1)

    first, second, one, two = draw(6), draw(7), draw(5), draw(4)
    write(first, model.stem, model.outer1)
    read(first, model.inner1, model.inner2, model.skip)
    write(second, model.outer2, model.skip)
    read(second, model.last)
    write(one, model.inner1)
    read(one, model.outer1)
    write(two, model.inner2)
    read(two, model.outer2)
