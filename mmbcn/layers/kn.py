"""Kalman normalization: what a batch shows, filtered with what the layers before let expect.

Paper: Wang, Peng, Luo, Wang, Lin, "Kalman Normalization: Normalizing Internal Representations
Across Network Layers", NeurIPS 2018, https://arxiv.org/abs/1802.03133
As in the authors' code: diagonal statistics, a fixed scalar gain, the transition through the
convolution's own weights, plain BatchNorm in the first layer, and the guard against predictions
that are far off. Ours: the learned transition (the paper's equations with a diagonal R), networks
that are not pre-activation ResNets, and the unbiased variance of a batch in the running estimate.

Shapes: x (N, C, ...); statistics (2, C), the means and the biased variances.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbcn.errors import UsageError
from mmbcn.layers.checks import check_eps, check_input, check_momentum
from mmbcn.layers.groups import check_num_features
from mmbcn.layers.kn_passes import Pass, Passes
from mmbcn.layers.predictions import Convolved, Draw, Expression
from mmbcn.layers.recompute import in_backward
from mmbcn.ops import channel_moments, kalman_norm, update_estimates
from mmbcn.registry import register_norm

TRANSITIONS = ("conv", "linear")
LEARNED = ("transition_weight", "transition_noise")


@register_norm
class KN(nn.BatchNorm2d):
    """Kalman normalization: BatchNorm whose statistics are filtered with a prediction of them.

    In training, with the batch's own biased statistics and those predicted from the layers before:
    ``m = (1 - q) m_pre + q m_obs``; ``v = (1 - q) v_pre + q v_obs + q (1 - q) (m_obs - m_pre)^2``;
    ``y = weight (x - m) / sqrt(v + eps) + bias``. Gradients flow through all of them, and through
    the prediction into the layers before. The running estimates follow m and v (of the batch's
    share in v, the unbiased variance, as in ``nn.BatchNorm2d``), and eval uses nothing else: there
    it *is* a BatchNorm, at its cost, and can be folded into the convolution like one. Names and
    shapes in state dicts are BatchNorm's; those of a learned transition come on top.

    Where the mean over the channels of v_pre / v_obs is 100 or more, the batch's statistics are
    used alone, as in a layer without predecessors: `mmbcn.set_norm`, `mmbcn.convert_norm` and
    `mmbcn.engine.NormRunner` link the layers of a model to theirs, see `mmbcn.layers.link_norms`.
    Each rank uses its own batch. One value per channel (N M = 1) has no variance: such a call uses
    the running estimates, and leaves them as they are.

    The prediction, by ``transition``:

    - ``'conv'``: one synthetic map of values from N(m, v) of the layer before, ReLU, the weights of
      the convolution in between, then the moments. It costs that convolution on one image more;
      behind additions of outputs of convolutions, each of these too, once, back to the first norms.
    - ``'linear'``: ``m_pre = A m``, ``v_pre = diag(A diag(v) A^T) + R`` with learned A (parameter
      ``transition_weight``, starts as the identity) and diagonal R (the exponential of
      ``transition_noise``, starts at 1). They exist, and are in state dicts, once the layer is
      linked; a state dict without them loads, and leaves them as they are.

    A repeated pass (activation checkpointing) draws what the first one drew and updates nothing.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of the *new* value in the running estimates; None: the mean of all.
        q: the gain, in [0, 1]: the weight of what is observed. 0.1 for batches of one or a few
            images; the authors use 0.95 for large ones. 1 is BatchNorm.
        transition: how statistics are predicted, ``'conv'`` or ``'linear'``.

    Shape: (N, C, ...) -> same

    Raises:
        UsageError: it trains where its statistics cannot follow: in a transform of ``torch.func``,
            or under ``nn.DataParallel``.

    Reference: Wang et al. 2018, https://arxiv.org/abs/1802.03133
    """

    _abbr_ = "bn"
    # what each norm of the model is predicted from; one for all, so that copies are not nested
    links: dict[nn.Module, Expression] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        q: float = 0.1,
        transition: str = "conv",
    ) -> None:
        check_num_features(num_features)
        check_eps(eps)
        check_momentum(momentum)
        if isinstance(q, bool) or not isinstance(q, (int, float)) or not 0 <= q <= 1:
            raise ValueError(
                f"q is the weight of the observed statistics, in [0, 1], got {q!r}; "
                "0.1 is for batches of a few images, 0.95 for large ones, and 1 is BatchNorm"
            )
        if transition not in TRANSITIONS:
            raise ValueError(f"transition must be one of {TRANSITIONS}, got {transition!r}")
        super().__init__(num_features, eps, momentum)
        self.q = q
        self.transition = transition
        for name in LEARNED:
            self.register_parameter(name, None)
        self.passes = Passes()

    @property
    def link(self) -> Expression | None:
        """What the statistics are predicted from; None: from nothing, the layer is a BatchNorm."""
        return (self.links or {}).get(self)

    def set_links(self, links: dict[nn.Module, Expression]) -> None:
        """Take the links of a model's norms; before the optimizer is built.

        What a linear transition has learned stays, if it fits.

        Raises:
            ValueError: a linear transition, but no convolution right before.
        """
        link = links.get(self)
        if link is not None and self.transition == "linear":
            if not isinstance(link, Convolved):
                raise ValueError("a linear transition needs a convolution right before the norm")
            weight = torch.eye(self.num_features, link.conv.in_channels).to(self.weight)
            noise = torch.zeros_like(self.weight)
            if getattr(self.transition_weight, "shape", None) != weight.shape:
                for name, value in zip(LEARNED, (weight, noise), strict=True):
                    self.register_parameter(name, nn.Parameter(value, self.weight.requires_grad))
        self.links = links

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (N, C, ...); statistics in float32, the result in x's dtype."""
        check_input(self, x)
        return self._train(x) if self.training else self._with_estimates(x)

    def _with_estimates(self, x: Tensor, estimates: Tensor | None = None) -> Tensor:
        mean, var = (self.running_mean, self.running_var) if estimates is None else estimates
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    @torch._disable_dynamo  # as torch.compiler.disable, which takes seconds to import
    def _train(self, x: Tensor) -> Tensor:
        self._check_surroundings()
        mean, var, count, _ = channel_moments(x)
        known = self.passes.find(mean) if in_backward() else None
        # drawn in a repetition too: the dropout behind it must find the generator as before
        seed = int(torch.randint(1 << 62, ())) if self._draws() else 0
        this = known or Pass(mean, seed, self._sources())
        if count <= 1:
            if known is None:
                this.finish(torch.stack([self.running_mean, self.running_var]), x)
            y = self._with_estimates(x, this.statistics)
        else:
            observed = torch.stack([mean, var])
            affine = self.weight, self.bias, self.q, self.eps
            predicted = self._predict(this, x)
            y, statistics, gain = kalman_norm(x, observed, predicted, *affine, this.settler())
            if known is None:
                y = this.finish(statistics, y)
            if not in_backward():
                self._update(statistics.detach(), gain * var / (count - 1), count)
        if not in_backward():
            self.passes.add(this)
        return y

    def _check_surroundings(self) -> None:
        if torch._C._are_functorch_transforms_active():
            raise UsageError(
                "KN cannot train inside a transform of torch.func: its statistics go from layer to "
                "layer beside the tensors that the transform sees. Use torch.autograd, or eval mode"
            )
        if getattr(self, "_is_replica", False):
            raise UsageError(
                "KN cannot train under nn.DataParallel: replicas do not know their predecessors. "
                "Use DistributedDataParallel"
            )

    def _draws(self) -> bool:
        return self.link is not None and self.transition == "conv"

    def _sources(self) -> dict[nn.Module, Pass | None]:
        norms = self.link.norms() if self.link else ()
        return {norm: norm.passes.latest for norm in norms if norm.training}

    def _predict(self, this: Pass, x: Tensor) -> Tensor | None:
        """The predicted statistics; None where a layer before has not run."""
        if self.link is None or None in this.sources.values():
            return None
        generator = torch.Generator(x.device).manual_seed(this.seed)
        options = dict(generator=generator, device=x.device, dtype=this.key.dtype)

        def statistics(norm: nn.Module) -> Tensor:
            if norm in this.sources:
                return this.sources[norm].give().to(x.device)
            return torch.stack([norm.running_mean, norm.running_var]).to(this.key)

        draw = Draw(statistics, lambda shape: torch.randn(shape, **options))
        if self.transition == "conv":
            return self.link.statistics(draw, tuple(x.shape[2:]))
        mean, var = self.link.of.statistics(draw, tuple(x.shape[2:]))
        weight, noise = self.transition_weight.to(mean), self.transition_noise.to(mean)
        return torch.stack([weight @ mean, weight.square() @ var + noise.exp()])

    @torch.no_grad()
    def _update(self, statistics: Tensor, unbiased: Tensor, count: int) -> None:
        mean, var = statistics
        # update_estimates multiplies by count / (count - 1), for variances of batches
        var = (var + unbiased) * ((count - 1) / count)
        running = self.running_mean, self.running_var, self.num_batches_tracked
        update_estimates(*running, mean, var, count, self.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KN":
        self.passes.clear()  # they would stay behind on the old device or dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Without the links, which lead to the whole model: it brings them along itself."""
        return {name: value for name, value in vars(self).items() if name != "links"}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in LEARNED:  # BatchNorm's have none: the learned transition starts anew
            if getattr(self, name) is not None:
                state_dict.setdefault(prefix + name, getattr(self, name).detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Channels, eps, gain and transition."""
        return f"{self.num_features}, eps={self.eps}, q={self.q}, transition={self.transition!r}"


class HeldLinks:
    """The links of a model's norms, held by the model; its copies link the copied norms."""

    def __init__(self, links: dict[KN, dict[KN, Expression]]) -> None:
        self.links = links

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for norm, links in self.links.items():
            norm.links = links
