"""ResNet with an independent-component (IC) layer in front of each convolution.

Paper: Chen et al. 2019, https://arxiv.org/abs/1905.05928

Deviations: the first convolution sees the image itself; a convolution in a shortcut is a unit too,
without a ReLU behind it.
"""

from itertools import chain
from typing import Any

from mmseg.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmseg.models.utils import ResLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmbcn.errors import UsageError
from mmbcn.models.ic_units import unit_layers, unit_norm, unit_order
from mmbcn.registry import MODELS


class _ICBlock:
    """A residual block of units: nothing follows the addition."""

    def _reorder(self, unit: str, norm_cfg: dict[str, Any]) -> None:
        self.order = unit_order(unit)
        self.relu = nn.ReLU()  # not in place: the shortcut has the same input
        for conv, name in self._units():
            setattr(self, name, unit_norm(getattr(self, conv), self.order, norm_cfg))
        if self.downsample is not None and self.order[-1] != "norm":
            *pool, conv, _ = self.downsample
            until_conv = unit_layers(conv, self.order, norm_cfg)[: self.order.index("conv") + 1]
            self.downsample = nn.Sequential(*pool, *until_conv)

    def _units(self) -> list[tuple[str, str]]:
        numbers = range(1, 4 if hasattr(self, "conv3") else 3)
        return [(f"conv{i}", getattr(self, f"norm{i}_name")) for i in numbers]

    def _branches(self, x: Tensor) -> Tensor:
        out = x
        for conv, norm in self._units():
            layers = {"act": self.relu, "norm": getattr(self, norm), "conv": getattr(self, conv)}
            for name in self.order:
                out = layers[name](out)
        return out + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the shortcut and the branch."""
        if self.with_cp and x.requires_grad:
            return checkpoint(self._branches, x, use_reentrant=False)
        return self._branches(x)


class ICBasicBlock(_ICBlock, BasicBlock):
    """Two units and a shortcut."""

    def __init__(self, *args: Any, unit: str, norm_cfg: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, norm_cfg=norm_cfg, **kwargs)
        self._reorder(unit, norm_cfg)


class ICBottleneck(_ICBlock, Bottleneck):
    """Three units and a shortcut."""

    def __init__(self, *args: Any, unit: str, norm_cfg: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, norm_cfg=norm_cfg, **kwargs)
        self._reorder(unit, norm_cfg)


@MODELS.register_module()
class ICResNet(ResNet):
    """mmseg's ``ResNet``, made of units of ReLU, IC layer and convolution.

    With ``'relu-ic-conv'``, shortcuts carry sums of raw convolution outputs, and nothing follows
    the additions; so heads have to begin with ReLU and IC layer (`ICASPPHead`, `ICFCNHead`).

    Args:
        unit: ``'relu-ic-conv'``, ``'ic-conv-relu'`` or ``'conv-relu-ic'``.
        norm_cfg: of the layer in front of each convolution.
        zero_init_residual: as for ``ResNet``; off, since in front of a convolution it would stop
            the convolution's gradients.
        **kwargs: as for ``ResNet``; no ``dcn``, no ``plugins``.

    Raises:
        UsageError: the unit is unknown, or an option cannot be had in this order.
    """

    arch_settings = {  # noqa: RUF012 (as in the base class)
        18: (ICBasicBlock, (2, 2, 2, 2)),
        34: (ICBasicBlock, (3, 4, 6, 3)),
        50: (ICBottleneck, (3, 4, 6, 3)),
        101: (ICBottleneck, (3, 4, 23, 3)),
        152: (ICBottleneck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        depth: int,
        unit: str = "relu-ic-conv",
        norm_cfg: dict[str, Any] = dict(type="mmbcn.IC"),  # noqa: B006 (as in the base class)
        zero_init_residual: bool = False,
        **kwargs: Any,
    ) -> None:
        unit_order(unit)
        for option in ("dcn", "plugins"):
            if kwargs.get(option):
                raise UsageError(f"{type(self).__name__} has no {option}")
        self.unit = unit
        super().__init__(depth, norm_cfg=norm_cfg, zero_init_residual=zero_init_residual, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Pack all blocks of a stage."""
        return ResLayer(unit=self.unit, **kwargs)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        super()._make_stem_layer(in_channels, stem_channels)
        if self.deep_stem:
            convs = [layer for layer in self.stem if hasattr(layer, "out_channels")]
        else:
            convs = [self.conv1]
            del self.conv1, self.relu
            delattr(self, self.norm1_name)
        order = unit_order(self.unit)
        units = (unit_layers(c, order, self.norm_cfg, first=c is convs[0]) for c in convs)
        self.stem = nn.Sequential(*chain.from_iterable(units))
        self.deep_stem = True  # forward() and _freeze_stages() use self.stem then


@MODELS.register_module()
class ICResNetV1c(ICResNet):
    """`ICResNet` whose stem has three 3x3 convolutions."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=False, **kwargs)


@MODELS.register_module()
class ICResNetV1d(ICResNet):
    """`ICResNet` with three 3x3 convolutions in the stem, and pooling in shortcuts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=True, **kwargs)
