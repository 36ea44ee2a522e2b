"""Decode heads with an independent-component (IC) layer in front of each convolution.

Paper: Chen et al. 2019, https://arxiv.org/abs/1905.05928 (which classifies images)
"""

from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import ASPPHead, FCNHead
from torch import Tensor, nn

from mmbcn.models.aspp_head import PointwiseFuseASPPHead
from mmbcn.models.ic_units import unit_layers, unit_order
from mmbcn.registry import MODELS


class _ICHead:
    """Puts the layers of a head in a unit's order, for features of an `ICResNet` of this unit.

    The classifier has its IC layer too, whose dropout stands in for the head's own.

    Args:
        unit: ``'relu-ic-conv'``, ``'ic-conv-relu'`` or ``'conv-relu-ic'``.
        norm_cfg: of the layer in front of each convolution.
        **kwargs: as for the head without IC layers; ``dropout_ratio`` has no effect.

    Raises:
        UsageError: the unit is unknown.
    """

    def __init__(
        self,
        unit: str = "relu-ic-conv",
        norm_cfg: dict[str, Any] = dict(type="mmbcn.IC"),  # noqa: B006 (as in the base class)
        **kwargs: Any,
    ) -> None:
        order = unit_order(unit)
        super().__init__(norm_cfg=norm_cfg, **kwargs)
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, ConvModule):
                    setattr(parent, name, _reordered(child, order))
        before = unit_layers(self.conv_seg, order, norm_cfg)[: order.index("conv")]
        self.before_seg = nn.Sequential(*before)
        self.dropout = None

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Classify each pixel."""
        return super().cls_seg(self.before_seg(feat))


def _reordered(old: ConvModule, order: tuple[str, str, str]) -> ConvModule:
    return ConvModule(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        old.groups,
        conv_cfg=old.conv_cfg,
        norm_cfg=old.norm_cfg,
        act_cfg=old.act_cfg,
        inplace=False,  # branches share their input
        order=order,
    )


@MODELS.register_module()
class ICASPPHead(_ICHead, ASPPHead):
    """mmseg's ``ASPPHead`` for `ICResNet`; see `_ICHead` for its arguments."""


@MODELS.register_module()
class ICFCNHead(_ICHead, FCNHead):
    """mmseg's ``FCNHead`` for `ICResNet`; see `_ICHead` for its arguments."""


@MODELS.register_module()
class ICPointwiseFuseASPPHead(_ICHead, PointwiseFuseASPPHead):
    """`PointwiseFuseASPPHead` for `ICResNet`; see `_ICHead` for its arguments."""
