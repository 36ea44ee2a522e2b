"""Weight standardization: every output filter gets zero mean and unit spread.

Paper: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization", 2019, https://arxiv.org/abs/1903.10520
Published variants differ, and checkpoints are not interchangeable between them:

==================================  ===========================================
the authors' ImageNet layers        (W - mean) / sqrt(var_unbiased + eps)
the authors' DeepLabV3, ``ConvWS``  (W - mean) / (std_unbiased + eps)
the paper, version 2, eq. 5-7       (W - mean) / sqrt(var_biased + eps)
==================================  ===========================================
"""

import torch
from torch import Tensor


def standardize_weight(
    weight: Tensor, eps: float = 1e-5, eps_inside: bool = True, unbiased: bool = True
) -> Tensor:
    """Standardize each output filter over its incoming weights.

    Args:
        weight: filters of a convolution.
        eps: added to the variance or to the standard deviation.
        eps_inside: True: ``sqrt(var + eps)``; False: ``sqrt(var) + eps``. The gradient of a
            constant filter is finite in both.
        unbiased: divide the sum of squares by the count minus one instead of the count.

    Shape: (C_out, C_in / groups, ...) -> same
    """
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    var = centred.square().sum(1, keepdim=True) / (flat.shape[1] - int(unbiased))
    if eps_inside:
        spread = torch.sqrt(var + eps)
    else:
        constant = var == 0  # sqrt has an infinite slope there, which times 0 would be NaN
        spread = torch.sqrt(var.masked_fill(constant, 1)).masked_fill(constant, 0) + eps
    return (centred / spread).view_as(weight)
