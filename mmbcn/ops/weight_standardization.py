"""Weight standardization: every output filter gets zero mean and unit spread.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization", 2019, https://arxiv.org/abs/1903.10520
Published variants differ, and checkpoints are not interchangeable between them:

==================================  ===========================================
the authors' ImageNet layers        (W - mean) / sqrt(var_unbiased + eps)
the authors' DeepLabV3, ``ConvWS``  (W - mean) / (std_unbiased + eps)
the paper, version 2, eq. 5-7       (W - mean) / sqrt(var_biased + eps)
==================================  ===========================================

All of them are a layer normalization of each filter times a constant of the filter, so each
direction is one call of torch's layer-norm kernel and a product. With n weights in a filter,
``var = b * var_biased`` (b = n / (n - 1) where unbiased, else 1), the kernel's ``rstd``, and
``t = sqrt(b)`` where eps is inside the root, else ``sqrt(b) + eps * rstd``:

- ``y = rstd / t * (W - mean)``
- ``dW = rstd / t * (dy - mean(dy) - sqrt(b) * t / n * y * sum(dy * y))``: the kernel's backward for
  an input y of mean 0 and rstd ``root = sqrt(sqrt(b) * t)``, times ``rstd / t / root``

The backward pass keeps the weights, and y, which the convolution keeps anyway. On GPUs, Triton
kernels compute the same.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mmbcn.ops.backend import has_kernels

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def standardize_weight(
    weight: Tensor, eps: float = 1e-5, eps_inside: bool = True, unbiased: bool = True
) -> Tensor:
    """Standardize each output filter over its incoming weights.

    Statistics are computed in float32 (float64 for float64 weights); dtype and memory format are
    the weight's. Differentiable any number of times, and by ``torch.func``'s transforms.

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
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return standardize_weight_reference(weight, eps, eps_inside, unbiased)
    else:
        if weight.dim() < 2 or math.prod(weight.shape[1:]) < 2:
            raise ValueError(
                f"standardize_weight expects filters of at least 2 weights, (C_out, C_in, ...), "
                f"got shape {tuple(weight.shape)}: standardizing a single weight makes it zero"
            )
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return standardize_weight_reference(weight, eps, eps_inside, unbiased)
        return _Standardize.apply(weight, eps, eps_inside, unbiased)


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
    """The fused form, for eager execution: compilers and tracers fuse the plain one themselves."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, eps_inside: bool, unbiased: bool) -> Tensor:
        ctx.variant = eps, eps_inside, unbiased
        ctx.kernels = weight.numel() > 0 and has_kernels(weight)
        if ctx.kernels:
            from mmbcn.ops import triton_weight_standardization as kernels

            y, factors = kernels.standardize(weight, *ctx.variant)
            ctx.save_for_backward(weight, y, factors, None)
            return y
        channels_last = weight.stride(1) < weight.stride(-1)
        w = _in_memory_order(weight, channels_last)
        filter_shape = w.shape[1:]
        n = math.prod(filter_shape)
        b = n / (n - 1) if unbiased else 1.0
        floor = torch.finfo(w.dtype).tiny  # a constant filter becomes zero, never 0 * inf
        inner = max(eps / b, floor) if eps_inside else floor
        mean = w.mean(tuple(range(1, w.dim())), keepdim=True)
        centred = w - mean  # the kernel alone loses digits where mean >> spread
        y, _, rstd = torch.native_layer_norm(centred, filter_shape, None, None, inner)
        t = None if eps_inside else torch.add(b**0.5, rstd, alpha=eps)
        y.div_(b**0.5 if t is None else t)
        ctx.save_for_backward(weight, y, rstd, t)
        ctx.b, ctx.channels_last = b, channels_last
        return _in_weight_order(y, weight, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, y, rstd, t = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody may differentiate this once more
            _, vjp = torch.func.vjp(lambda w: standardize_weight_reference(w, *ctx.variant), weight)
            return vjp(grad)[0], None, None, None
        if ctx.kernels:
            from mmbcn.ops import triton_weight_standardization as kernels

            return kernels.gradient(grad, y, rstd, *ctx.variant), None, None, None
        if t is None:
            root, scale = torch.full_like(rstd, ctx.b**0.5), rstd / ctx.b
        else:
            root = (t * ctx.b**0.5).sqrt_()
            scale = (rstd / t).div_(root)
        dy, mean = _in_memory_order(grad, ctx.channels_last), torch.zeros_like(rstd)
        dw, _, _ = _layer_norm_backward(
            dy, y, y.shape[1:], mean, root, None, None, [True, False, False]
        )
        return _in_weight_order(dw.mul_(scale), weight, ctx.channels_last), None, None, None


def _in_memory_order(values: Tensor, channels_last: bool) -> Tensor:
    """Filters whose weights are in the order of the memory, in float32 or float64."""
    values = values.movedim(1, -1) if channels_last else values
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _in_weight_order(values: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    """The way back, in the weight's dtype."""
    values = values if values.dtype == weight.dtype else values.to(weight.dtype)
    return values.movedim(-1, 1) if channels_last else values
