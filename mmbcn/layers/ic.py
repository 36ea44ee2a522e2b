"""The independent-component layer: batch normalization, then dropout, in front of a weight layer.

Paper: Chen, Chen, Shi, Hsieh, Liao, Zhang, "Rethinking the Usage of Batch Normalization and Dropout
in the Training of Deep Neural Networks", 2019, https://arxiv.org/abs/1905.05928
"""

from numbers import Real

from torch import Tensor, nn
from torch.func import functional_call

from mmbcn.layers.checks import check_eps, check_momentum
from mmbcn.layers.groups import check_num_features
from mmbcn.layers.recompute import in_backward
from mmbcn.registry import register_norm


@register_norm
class IC(nn.Module):
    """``Dropout(BatchNorm(x))``: whitens units and makes them more independent.

    Keeping a share p of the units multiplies correlations between them by p. The layer alone is
    not the method: it belongs immediately before each weight layer, behind the activation, which
    needs networks with another order of layers (`mmbcn.models.ICResNet`, `mmbcn.models.ICASPPHead`,
    ...; ``set_norm(model, 'ic')`` switches to them).

    A recomputed pass (activation checkpointing) updates nothing.

    Args:
        num_features: channels C.
        drop_rate: share of the units (single values, not channels) that are dropped in training.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None: the mean of all.

    Shape: (N, C, H, W) -> same
    """

    _abbr_ = "ic"

    def __init__(
        self,
        num_features: int,
        drop_rate: float = 0.05,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        check_num_features(num_features)
        check_eps(eps)
        check_momentum(momentum)
        super().__init__()
        number = isinstance(drop_rate, Real) and not isinstance(drop_rate, bool)
        if not number or not 0 <= drop_rate < 1:
            raise ValueError(
                f"drop_rate must be a number in [0, 1), got {drop_rate!r}; the paper's is 0.05"
            )
        self.bn = nn.BatchNorm2d(num_features, eps, momentum)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then drop."""
        if not in_backward():
            return self.drop(self.bn(x))
        copies = {name: value.clone() for name, value in self.bn.named_buffers()}
        return self.drop(functional_call(self.bn, copies, (x,)))  # updates the copies
