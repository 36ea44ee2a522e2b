"""The published networks whose checkpoints are to load, stated once more in plain PyTorch.

Key names, shapes and formulas are those of torchvision's ResNet (with GroupNorm: of the GN and
GN + WS networks), of the BCN authors' ImageNet code (``pbn``; an affine of shape (1, G, 1); eps
inside the root) and of their DeepLabV3 (eps outside; ``aspp``). Nothing of mmbcn is used.
"""

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Conv(nn.Conv2d):
    """A convolution on weights standardized by sqrt(var + eps) or (std + eps), or on plain ones."""

    formula = "plain"

    def forward(self, x):
        w = self.weight
        if self.formula != "plain":
            rows = w.flatten(1)
            w = w - rows.mean(1)[:, None, None, None]
            s = rows.std(1)
            d = (s**2 + 1e-5) ** 0.5 if self.formula == "inside" else s + 1e-5
            w = w / d[:, None, None, None]
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvInside(Conv):
    formula = "inside"


class ConvOutside(Conv):
    formula = "outside"


class BatchThenGroup(nn.Module):
    """Batch norm of the channels, group norm behind it, one scale and shift for each group."""

    def __init__(self, channels, stage="pbn"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 32, 1))
        self.bias = nn.Parameter(torch.zeros(1, 32, 1))
        self.stage = stage
        self.add_module(stage, nn.BatchNorm2d(channels))

    def forward(self, x):
        z = getattr(self, self.stage)(x)
        rows = z.reshape(len(z), 32, -1)
        rows = rows - rows.mean(2, keepdim=True)
        rows = rows / (rows.square().mean(2, keepdim=True) + 1e-5).sqrt()
        return (self.weight * rows + self.bias).reshape(x.shape)


def group_norm(channels):
    return nn.GroupNorm(32, channels)


class Basic(nn.Module):
    expansion = 1

    def __init__(self, conv, norm, cin, width, stride, dilation):
        super().__init__()
        self.conv1 = conv(cin, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, conv, norm, cin, width, stride, dilation):
        super().__init__()
        self.conv1 = conv(cin, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.conv3 = conv(width, 4 * width, 1, bias=False)
        self.bn3 = norm(4 * width)
        self.downsample = None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's layout; ``deep`` has a stem of three 3x3 convolutions under ``conv1``."""

    strides, dilations = (1, 2, 2, 2), ((1, 1), (1, 1), (1, 1), (1, 1))  # (first block, others)

    def __init__(self, depth, conv=Conv, norm=nn.BatchNorm2d, deep=False, classes=1000):
        super().__init__()
        block = Basic if depth == 18 else Bottleneck
        if deep:
            layers = [conv(3, 32, 3, 2, 1, bias=False), norm(32), nn.ReLU()]
            layers += [conv(32, 32, 3, 1, 1, bias=False), norm(32), nn.ReLU()]
            self.conv1 = nn.Sequential(*layers, conv(32, 64, 3, 1, 1, bias=False))
        else:
            self.conv1 = conv(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        cin = 64
        for i, count in enumerate(BLOCKS[depth]):
            width, blocks = 64 * 2**i, []
            for j in range(count):
                stride = self.strides[i] if j == 0 else 1
                blocks.append(block(conv, norm, cin, width, stride, self.dilations[i][j > 0]))
                if stride != 1 or cin != width * block.expansion:
                    path = conv(cin, width * block.expansion, 1, stride, bias=False)
                    blocks[-1].downsample = nn.Sequential(path, norm(width * block.expansion))
                cin = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.finish(cin, conv, norm, classes)

    def finish(self, cin, conv, norm, classes):
        self.fc = nn.Linear(cin, classes)

    def stages(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        outputs = []
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            outputs.append(x)
        return outputs


class Aspp(nn.Module):
    rates = (None, 6, 12, 18)

    def __init__(self, cin, conv, norm, classes):
        super().__init__()
        for i, rate in enumerate(self.rates, 1):
            kernel = (1,) if rate is None else (3, 1, rate, rate)
            self.add_module(f"aspp{i}", conv(cin, 256, *kernel, bias=False))
        self.aspp5 = conv(cin, 256, 1, bias=False)
        for i in range(1, 6):
            self.add_module(f"aspp{i}_bn", norm(256))
        self.conv2 = conv(5 * 256, 256, 1, bias=False)
        self.bn2 = norm(256)
        self.conv3 = nn.Conv2d(256, classes, 1)

    def forward(self, x):
        parts = []
        for i in range(1, 6):
            y = x.mean((2, 3), keepdim=True) if i == 5 else x
            y = F.relu(getattr(self, f"aspp{i}_bn")(getattr(self, f"aspp{i}")(y)))
            parts.append(y.expand(-1, -1, *x.shape[2:]))
        return self.conv3(F.relu(self.bn2(self.conv2(torch.cat(parts, 1)))))


class DeepLab(ResNet):
    """The authors' DeepLabV3 at output stride 16, before its last upsampling."""

    strides, dilations = (1, 2, 2, 1), ((1, 1), (1, 1), (1, 1), (1, 2))

    def finish(self, cin, conv, norm, classes):
        self.aspp = Aspp(cin, conv, norm, classes)

    def forward(self, x):
        return self.aspp(self.stages(x)[-1])


def randomize(net, seed=0):
    """Weights, affines and statistics as after a training, in eval mode and float32.

    Filters are of very different sizes, so that it is seen where eps stands.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if not value.is_floating_point():
                value.fill_(100)
            elif value.dim() == 4:
                spread = (2 / value[0].numel()) ** 0.5
                size = 10 ** -(torch.rand(len(value), 1, 1, 1, generator=g))
                noise = torch.randn(value.shape, generator=g) * size + 0.1 * size
                value.copy_(spread * (noise if "aspp.conv3" not in name else noise / size))
            elif name.endswith(("running_var", "weight")):
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
            else:
                value.copy_(0.2 * torch.randn(value.shape, generator=g))
    return net.eval()
