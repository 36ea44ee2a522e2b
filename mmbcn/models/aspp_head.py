"""The ASPP head of the BCN authors' DeepLabV3 code, whose branches are fused by a 1x1 convolution.

Paper: Chen, Papandreou, Schroff, Adam 2017, https://arxiv.org/abs/1706.05587, section 3.3 (1x1)
"""

from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import ASPPHead

from mmbcn.registry import MODELS


@MODELS.register_module()
class PointwiseFuseASPPHead(ASPPHead):
    """mmseg's ``ASPPHead`` with a 1x1 instead of a 3x3 convolution behind the concatenation.

    Args:
        **kwargs: as for ``ASPPHead``.

    Shape: list of (N, C_in, H, W) -> (N, num_classes, H, W)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bottleneck = ConvModule(
            (len(self.dilations) + 1) * self.channels,
            self.channels,
            1,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )
