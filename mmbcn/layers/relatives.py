"""The plain relatives that the named normalizations need and torch lacks in this form."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmbcn.layers.checks import check_eps
from mmbcn.layers.groups import resolve_num_groups
from mmbcn.layers.init_guard import apply_keeping_alive
from mmbcn.registry import register_norm


@register_norm
class AutoGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that finds its own number of groups.

    Args:
        num_features: channels C.
        num_groups: an int, or ``'auto'``: 32 where it divides C and leaves two channels a group,
            else the largest divisor below that does.
        eps: added to the variance.

    Shape: (N, C, ...) -> same

    Reference: Wu and He 2018, https://arxiv.org/abs/1803.08494
    """

    _abbr_ = "gn"

    def __init__(self, num_features: int, num_groups: int | str = "auto", eps: float = 1e-5):
        check_eps(eps)
        super().__init__(resolve_num_groups(num_groups, num_features), num_features, eps)


@register_norm
class AffineInstanceNorm(nn.GroupNorm):
    """Instance normalization with affine: each channel of each sample by its own statistics.

    One value per channel (DeepLabV3's image pooling) gives the bias; ``nn.InstanceNorm2d`` raises.

    Args:
        num_features: channels C.
        eps: added to the variance.

    Shape: (N, C, ...) -> same

    Reference: Ulyanov, Vedaldi and Lempitsky 2016, https://arxiv.org/abs/1607.08022
    """

    _abbr_ = "in"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        check_eps(eps)
        super().__init__(num_features, num_features, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; the functional form has no check that refuses one value per channel."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


@register_norm
class FrozenBN(nn.Module):
    """BatchNorm with fixed statistics and affine: buffers only, nothing trains, in any mode.

    State-dict names are ``nn.BatchNorm2d``'s, so checkpoints of BN networks load.

    Args:
        num_features: channels C.
        eps: added to the variance.

    Shape: (N, C, ...) -> same
    """

    _abbr_ = "bn"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        check_eps(eps)
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def apply(self, fn: Callable[[nn.Module], None]) -> "FrozenBN":
        """Apply ``fn``, but never let an initializer leave a weight of zero: it could not grow."""
        apply_keeping_alive(super().apply, fn, lambda: [self.weight])
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalize with the stored statistics."""
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            False,
            0.0,
            self.eps,
            torch.backends.cudnn.enabled,
        )

    def extra_repr(self) -> str:
        """Channels and eps."""
        return f"{self.num_features}, eps={self.eps}"


@register_norm
class NoNorm(nn.Module):
    """Stands where a norm would and uses no statistics: y[c] = weight x[c] + bias[c].

    One factor for all channels. Where a norm ends a residual branch and starts at zero (mmseg's
    ``zero_init_residual``), blocks begin as identities: this is how residual networks train without
    normalization.

    Args:
        num_features: channels C.
        eps: not used; builders of norms pass it.

    Shape: (N, C, ...) -> same

    Reference: Zhang, Dauphin and Ma 2019, https://arxiv.org/abs/1901.09321 (factors and biases);
    De and Smith 2020, https://arxiv.org/abs/2002.10444 (a zero at the end of each branch)
    """

    _abbr_ = "bn"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return x * self.weight + self.bias.view(-1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        """Channels."""
        return f"{self.num_features}"
