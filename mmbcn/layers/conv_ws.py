"""Convolution with weight standardization.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization", 2019, https://arxiv.org/abs/1903.10520
Deviation: filters of a single weight are refused, since standardizing would make them zero.
"""

from typing import Any

from torch import Tensor, nn

from mmbcn.ops import standardize_weight
from mmbcn.registry import register_layer


@register_layer
class WSConv2d(nn.Conv2d):
    """2-d convolution on standardized weights: ``conv(x, (W - mean) / sqrt(var + eps))``.

    The parameters are the raw weights, under ``nn.Conv2d``'s names. The default is the formula of
    the authors' released ImageNet backbones.

    Args:
        *args: as in ``nn.Conv2d``.
        eps: small constant of the formula.
        eps_inside: add ``eps`` to the variance (True) or to the standard deviation (False).
        unbiased: unbiased (True) or biased variance.
        **kwargs: as in ``nn.Conv2d``.

    ============================================  ==========  ========
    checkpoint of                                 eps_inside  unbiased
    ============================================  ==========  ========
    the authors' ImageNet backbones (default)     True        True
    the authors' DeepLabV3, mmcv's ``ConvWS``     False       True
    the paper, version 2, eq. 5-7                 True        False
    ============================================  ==========  ========

    Shape: (N, C_in, H, W) -> (N, C_out, H_out, W_out)

    Raises:
        ValueError: a filter has one weight only.

    Reference: Qiao et al. 2019, https://arxiv.org/abs/1903.10520
    """

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        eps_inside: bool = True,
        unbiased: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < 2:
            raise ValueError(
                f"WSConv2d needs filters of at least 2 weights, got shape "
                f"{tuple(self.weight.shape)}: standardizing a single weight makes it zero; "
                "use nn.Conv2d for this layer"
            )
        self.eps = eps
        self.eps_inside = eps_inside
        self.unbiased = unbiased

    def standardized_weight(self) -> Tensor:
        """The weights that the convolution uses."""
        return standardize_weight(self.weight, self.eps, self.eps_inside, self.unbiased)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardized weights."""
        return self._conv_forward(x, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        """nn.Conv2d's, and the formula."""
        formula = f"eps={self.eps}, eps_inside={self.eps_inside}, unbiased={self.unbiased}"
        return f"{super().extra_repr()}, {formula}"
