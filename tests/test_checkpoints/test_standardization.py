"""Raw weights for one formula become raw weights for another: the same standardized filters."""

import itertools

import pytest
import torch

from mmbcn.checkpoints.standardization import Formula, change_formula


def standardized(weight, formula):
    """Stated once more, filter by filter."""
    if formula is None:
        return weight
    rows = []
    for row in weight.flatten(1):
        row = row - row.sum() / row.numel()
        var = (row**2).sum() / (row.numel() - (1 if formula.unbiased else 0))
        inside = formula.eps_inside
        rows.append(row / ((var + formula.eps) ** 0.5 if inside else var**0.5 + formula.eps))
    return torch.stack(rows).reshape(weight.shape)


FORMULAS = [Formula(*f) for f in itertools.product((1e-5, 1e-3), (True, False), (True, False))]


@pytest.mark.parametrize("ours", [None, *FORMULAS], ids=str)
@pytest.mark.parametrize("theirs", FORMULAS, ids=str)
def test_change_is_exact_or_refused(theirs, ours):
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3, 1e-2, 0.1, 1.0]).double().reshape(4, 1, 1, 1)
    weight = sizes * (torch.randn(4, 3, 3, 3, generator=g).double() + 0.5)
    expected = standardized(weight, theirs)
    changed = change_formula(weight, theirs, ours)
    if changed is not None:
        torch.testing.assert_close(standardized(changed, ours), expected, rtol=1e-7, atol=1e-9)
        assert changed.dtype == weight.dtype
        return
    # refused: a standardized filter has, for no raw weights, a deviation as large as theirs
    n = weight[0].numel()
    largest = 1.0 if ours.unbiased else (n / (n - 1)) ** 0.5
    assert (expected.flatten(1).std(1) >= largest).any()
