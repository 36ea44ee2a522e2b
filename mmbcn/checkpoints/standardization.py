"""Weight standardization of checkpoints: by which formula, and the exact change to another.

Published formulas differ in where eps stands and in the variance. Scaling a raw filter changes
nothing but the weight of eps, so raw weights for one formula can be rescaled, filter by filter,
into raw weights that give the same standardized filters under another. With centred weights W of
deviation s (its square the unbiased variance; c = 1, or (n - 1)/n for the biased one) and the
denominator d of the checkpoint's formula, the raw weights for the model's are a W with

    a = sqrt(eps / (d^2 - c s^2))       eps inside the root
    a = eps / (d - sqrt(c) s)           eps outside

and the standardized weights W/d themselves where the model does not standardize.
"""

import ast
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmbcn.layers import WSConv2d


class Formula(NamedTuple):
    """The arguments of `WSConv2d` that say how weights are standardized."""

    eps: float = 1e-5
    eps_inside: bool = True
    unbiased: bool = True

    def __str__(self) -> str:
        variance = "var" if self.unbiased else "biased var"
        inside = f"sqrt({variance} + {self.eps:g})"
        return inside if self.eps_inside else f"(sqrt({variance}) + {self.eps:g})"


AUTHORS_IMAGENET = Formula(eps_inside=True)
AUTHORS_DEEPLAB = Formula(eps_inside=False)  # mmcv's ConvWS and the published GN + WS networks too


def formula_of(conv: nn.Module) -> Formula | None:
    """The formula of a built convolution; None: it does not standardize."""
    if isinstance(conv, WSConv2d):
        return Formula(conv.eps, conv.eps_inside, conv.unbiased)
    return Formula(conv.eps, eps_inside=False) if type(conv).__name__ == "ConvWS2d" else None


def formula_in_config(tree: ast.AST) -> Formula | None:
    """The formula of the first standardizing ``conv_cfg`` in the syntax tree of a config."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.keyword) and node.arg == "conv_cfg"):
            continue
        for call in ast.walk(node.value):
            if isinstance(call, ast.Call):
                options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
                kind = str(options.pop("type", "")).rpartition(".")[2]
                known = {k: v for k, v in options.items() if k in Formula._fields}
                if kind == "WSConv2d":
                    return Formula(**known)
                if kind == "ConvWS":
                    return Formula(known.get("eps", 1e-5), eps_inside=False)
    return None


def formula_by_origin(state: Mapping[str, Tensor], name: str) -> Formula | None:
    """The formula of a checkpoint without a config, by its origin; None: unknown, or none at all.

    Args:
        state: the authors' networks are known by their group affine of shape (1, G, 1).
        name: of the file; GN + WS networks cannot be known by anything else.
    """
    if any(v.dim() == 3 and v.shape[::2] == (1, 1) for v in state.values()):
        return AUTHORS_DEEPLAB if any("aspp." in key for key in state) else AUTHORS_IMAGENET
    return AUTHORS_DEEPLAB if "gn_ws" in name.lower().replace("-", "_") else None


def change_formula(weight: Tensor, theirs: Formula, ours: Formula | None) -> Tensor | None:
    """Raw weights which under ``ours`` are what ``weight`` is under ``theirs``.

    Args:
        weight: (C_out, ...), raw weights.
        theirs: the formula that they were trained with.
        ours: the model's; None: it does not standardize.

    Returns:
        The weights, same shape and dtype; None where no raw weights give that (only where the
        model's variance is the larger one).
    """
    flat = weight.detach().double().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    count = flat.shape[1]
    s2 = flat.square().sum(1, keepdim=True) / (count - 1)

    def variance(formula: Formula) -> Tensor:
        return s2 if formula.unbiased else s2 * ((count - 1) / count)

    root = variance(theirs)
    d = (root + theirs.eps).sqrt() if theirs.eps_inside else root.sqrt() + theirs.eps
    if ours is None:
        scale = 1 / d
    else:
        root = variance(ours)
        gap = d.square() - root if ours.eps_inside else d - root.sqrt()
        scale = (ours.eps / gap).sqrt() if ours.eps_inside else ours.eps / gap
        if not torch.isfinite(scale).all() or (gap <= 0).any():
            return None
    return (flat * scale).reshape(weight.shape).to(weight.dtype)
