"""A small plain CNN with any norm, or with statistics that are perturbed on purpose."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbcn.analysis.paper.patches import Patches
from mmbcn.norms import convert_norm

_BATCH = 64
_STAGES = 3  # each halves the resolution; widths x 1, 2, 4
_BLOCKS = 2  # convolutions in a stage


def build_network(num_classes: int, width: int, norm: str, seed: int) -> nn.Sequential:
    """Six times conv 3x3, norm, ReLU; global average pooling; a linear classifier.

    Args:
        num_classes: outputs.
        width: channels of the first stage; 2 and 4 times as many in the others.
        norm: one of `mmbcn.norm_names`.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    layers, inside = [], 3
    for stage, block in itertools.product(range(_STAGES), range(_BLOCKS)):
        outside, stride = width * 2**stage, 1 if block else 2
        conv = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
        inside = outside
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, num_classes)]
    return convert_norm(nn.Sequential(*layers), norm)


def perturb_statistics(model: nn.Module, sigma_mu: float, sigma_sigma: float, seed: int) -> None:
    """Let every BatchNorm give its channels other means and stds, for good.

    Channel c gets the mean ``sigma_mu e_c`` and the std ``|1 + sigma_sigma d_c|``, with e and d
    standard normal: spreads over the channels as chosen (of the stds, a little less, as they stay
    positive). They are the norm's affine, which is not trained: else training would undo them.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            means, stds = torch.randn(2, layer.num_features, generator=generator)
            layer.bias.data = sigma_mu * means
            layer.weight.data = (1 + sigma_sigma * stds).abs()
            layer.requires_grad_(False)


def train_epochs(
    model: nn.Module, data: Patches, epochs: int, lr: float, seed: int
) -> Iterator[int]:
    """Train by SGD with momentum, a learning rate that falls to zero as a cosine, and flips.

    Yields the number of epochs done, after each.

    Args:
        model: trained in place.
        data: normalized images and labels.
        epochs: passes over the data.
        lr: the first learning rate.
        seed: of order and flips.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=5e-4)
    batches = len(data.labels) // _BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(data.labels), generator=generator)
        for batch in order[: batches * _BATCH].split(_BATCH):
            images = data.images[batch]
            flipped = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            loss = F.cross_entropy(
                model(torch.where(flipped, images.flip(3), images)), data.labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch + 1


@torch.no_grad()
def accuracy(model: nn.Module, data: Patches) -> float:
    """Share of the images whose class is found."""
    model.eval()
    outputs: list[Tensor] = [model(images) for images in data.images.split(256)]
    return float((torch.cat(outputs).argmax(1) == data.labels).double().mean())
