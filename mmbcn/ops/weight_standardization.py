"""Weight standardization: every output filter gets zero mean and unit spread.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization", 2019, https://arxiv.org/abs/1903.10520
Published variants differ, and checkpoints are not interchangeable between them:

==================================  ===========================================
the authors' ImageNet layers        (W - mean) / sqrt(var_unbiased + eps)
the authors' DeepLabV3, ``ConvWS``  (W - mean) / (std_unbiased + eps)
the paper, version 2, eq. 5-7       (W - mean) / sqrt(var_biased + eps)
==================================  ===========================================

All of them are a layer normalization of each filter times a constant of the filter, so both
directions are one call of torch's layer-norm kernel and a product. With ``var = b * var_biased``
(b = n / (n - 1) where unbiased, else 1), the kernel's ``rstd``, and n weights in a filter:

- ``y = rstd * (W - mean) * sqrt(b) / root^2``, where ``root^2`` is b with eps inside the root and
  ``b + sqrt(b) * eps * rstd`` with eps outside
- ``dW = rstd * sqrt(b) / root^2 * (dy - mean(dy) - root^2 / n * y * sum(dy * y))``, which is the
  kernel's backward of an input y with mean 0 and rstd ``root``, times ``rstd * sqrt(b) / root^3``

The backward pass keeps y, which the convolution keeps anyway, and the weights.
"""

import math
from typing import Any

import torch
from torch import Tensor


def standardize_weight(
    weight: Tensor, eps: float = 1e-5, eps_inside: bool = True, unbiased: bool = True
) -> Tensor:
    """Standardize each output filter over its incoming weights.

    Statistics are computed in float32 (float64 for float64 weights); dtype and memory format are
    the weight's. Differentiable any number of times, in reverse and forward mode.

    Args:
        weight: filters of a convolution.
        eps: added to the variance or to the standard deviation.
        eps_inside: True: ``sqrt(var + eps)``; False: ``sqrt(var) + eps``. The gradient of a
            constant filter is finite in both.
        unbiased: divide the sum of squares by the count minus one instead of the count.

    Shape: (C_out, C_in / groups, ...) -> same

    Raises:
        ValueError: a filter has one weight only, or ``weight`` has less than two dimensions.
    """
    if torch.jit.is_scripting():
        return standardize_weight_reference(weight, eps, eps_inside, unbiased)
    else:
        if weight.dim() < 2 or math.prod(weight.shape[1:]) < 2:
            raise ValueError(
                f"standardize_weight expects filters of at least 2 weights, (C_out, C_in, ...), "
                f"got shape {tuple(weight.shape)}: standardizing a single weight makes it zero"
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # compilers fuse it themselves
            return standardize_weight_reference(weight, eps, eps_inside, unbiased)
        channels_last = weight.stride(1) < weight.stride(-1)
        filters = weight.movedim(1, -1) if channels_last else weight
        rows = filters.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        y = _Standardize.apply(rows, eps, eps_inside, unbiased)[0]
        y = y.to(weight.dtype).view(filters.shape)
        return y.movedim(-1, 1) if channels_last else y


def standardize_weight_reference(
    weight: Tensor, eps: float = 1e-5, eps_inside: bool = True, unbiased: bool = True
) -> Tensor:
    """`standardize_weight` in elementary differentiable operations: the readable ground truth."""
    flat = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    centred = flat - flat.mean(1, keepdim=True)
    var = centred.square().sum(1, keepdim=True) / (flat.shape[1] - int(unbiased))
    if eps_inside:
        spread = torch.sqrt(var + eps)
    else:
        constant = var == 0  # sqrt has an infinite slope there, which times 0 would be NaN
        spread = torch.sqrt(var.masked_fill(constant, 1)).masked_fill(constant, 0) + eps
    return (centred / spread).to(weight.dtype).view_as(weight)


class _Standardize(torch.autograd.Function):
    """Rows (filters, n) -> standardized rows, and the kernel's rstd (filters, 1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, eps: float, eps_inside: bool, unbiased: bool
    ) -> tuple[Tensor, Tensor]:
        n = rows.shape[1]
        b = n / (n - 1) if unbiased else 1.0
        floor = torch.finfo(rows.dtype).tiny  # a constant filter becomes zero, never 0 * inf
        inner = max(eps / b, floor) if eps_inside else floor
        centred = rows - rows.mean(1, keepdim=True)  # the kernel loses digits where mean >> spread
        y, _, rstd = torch.native_layer_norm(centred, [n], None, None, inner)
        y.mul_(b**-0.5 if eps_inside else (b**0.5 + eps * rstd).reciprocal_())
        return y, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rows, *ctx.variant = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(rows, *output)
        ctx.save_for_forward(rows, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None, None]:
        return _times_jacobian(grad, *ctx.saved_tensors, *ctx.variant), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        return _times_jacobian(tangent, *ctx.saved_tensors, *ctx.variant), None


def _times_jacobian(
    v: Tensor, rows: Tensor, y: Tensor, rstd: Tensor, eps: float, eps_inside: bool, unbiased: bool
) -> Tensor:
    """The Jacobian of each row times ``v``; it is symmetric, so this is either direction."""
    if torch.is_grad_enabled():  # somebody may differentiate this once more

        def plain(rows: Tensor) -> Tensor:
            return standardize_weight_reference(rows, eps, eps_inside, unbiased)

        return torch.func.vjp(plain, rows)[1](v)[0]
    n = rows.shape[1]
    b = n / (n - 1) if unbiased else 1.0
    root = torch.full_like(rstd, b**0.5) if eps_inside else (b + b**0.5 * eps * rstd).sqrt_()
    v = torch.ops.aten.native_layer_norm_backward(
        v, y, [n], torch.zeros_like(rstd), root, None, None, [True, False, False]
    )[0]
    return v.mul_(rstd * b**0.5 / root**3)
