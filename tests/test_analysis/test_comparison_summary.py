"""Means and tests over the seeds, against numbers computed by hand."""

import math

import pytest

pytest.importorskip("mmseg")

from comparisons import finished

from mmbcn.analysis.comparison.plan import Run
from mmbcn.analysis.comparison.summary import (
    choose_rates,
    conclusion,
    group_runs,
    holm,
    judge,
    paired_p,
)


def results(lr=0.1, **mious):
    """Results of several seeds; None: diverged."""
    found = []
    for norm, values in mious.items():
        for seed, value in enumerate(values):
            run = Run(norm, 2, lr, seed, 10)
            failed = dict(finished(run, 0), status="diverged", reason="the loss is nan")
            found.append(failed if value is None else finished(run, value))
    return found


def verdict(**mious):
    return judge(group_runs(results(**mious)))[0]


def test_mean_and_deviation():
    group = group_runs(results(bn=[20, 22, None, 27]))[0]
    assert group.mean == 23
    assert group.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert [r["run"]["seed"] for r in group.failures] == [2]
    assert group.mean_class_iou() == dict(a=22, b=24, c=None)
    assert group.mean_of("process_bytes") == 2**30
    assert group.mean_of("cuda_bytes") is None
    assert group_runs(results(bn=[20]))[0].std is None


def test_paired_p_is_that_of_the_closed_form():
    """With three pairs, Student's t has 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2)."""
    a, b = {0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0}
    t = 2 / (1 / math.sqrt(3))  # differences 1, 2, 3: mean 2, deviation 1
    expected = 1 - t / math.sqrt(t**2 + 2)
    assert expected == pytest.approx(0.0742, abs=1e-4)
    assert paired_p(a, b) == pytest.approx(expected, rel=1e-12)
    assert paired_p(b, a) == pytest.approx(expected, rel=1e-12)
    assert paired_p({**a, 7: 99.0}, {8: 1.0, **b}) == pytest.approx(expected)  # common seeds only


def test_two_seeds_are_not_tested():
    assert paired_p({0: 1.0, 1: 2.0, 2: 3.0}, {0: 5.0, 1: 6.0}) is None


def test_equal_numbers_do_not_differ():
    assert paired_p({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0}) == 1


def test_holm():
    """By hand: 0.01 * 4; then 0.02 * 3; then 0.03 * 2 = 0.06, as before; then 0.9 * 1."""
    assert holm([0.9, 0.02, 0.01, 0.03]) == pytest.approx([0.9, 0.06, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_p_values_are_corrected_for_all_pairs():
    found = verdict(bn=[10, 11.1, 12], gn=[20, 21, 22.1], bcn=[30, 31.2, 32])
    assert len(found.p) == 3
    alone = paired_p({0: 10, 1: 11.1, 2: 12}, {0: 30, 1: 31.2, 2: 32})
    assert found.p[frozenset(("bn", "bcn"))] == pytest.approx(3 * alone)  # the smallest of three
    assert found.best.norm == "bcn"


def test_conclusion_of_two_seeds_is_that_there_is_none():
    text = conclusion(verdict(bn=[10, 11], bcn=[30, 31]))
    assert text.startswith("bcn has the highest mIoU: 30.50 ± 0.71 (2 seeds). ")
    assert "nothing can be concluded" in text


def test_conclusion_names_what_differs():
    sure = dict(bn=[10, 11.1, 12, 13], bcn=[30, 31.2, 32, 33.1])
    assert conclusion(verdict(**sure)).endswith("differs significantly (p < 0.05) from bn.")
    text = conclusion(verdict(**sure, gn=[29, 33, 31, 32], ln=[1, 2]))
    assert "from bn, not from gn. Not tested, for too few seeds in common: ln." in text
    text = conclusion(verdict(bcn=[30, 31, 32], gn=[29, 33, 30]))
    assert text.endswith("It does not differ significantly from gn.")


def test_conclusion_without_a_rival():
    assert conclusion(verdict(bn=[None], gn=[None])) == "No run came to its end."
    assert conclusion(verdict(bn=[None], gn=[3])).startswith("Only gn came to its end")


def test_failed_runs_are_no_rivals():
    found = verdict(bn=[None, None, None], gn=[1, 2, 3], bcn=[2, 3.1, 4])
    assert list(found.p) == [frozenset(("gn", "bcn"))]
    assert [group.norm for group in found.groups] == ["bn", "gn", "bcn"]


def test_best_rate_counts():
    groups = group_runs(
        results(0.1, bn=[20, 21]) + results(0.2, bn=[30, 31]) + results(0.4, bn=[50, None])
    )
    assert [group.lr for group in choose_rates(groups)] == [0.2]  # 0.4 diverges


def test_batch_sizes_are_judged_apart():
    found = [*results(bn=[1, 2]), finished(Run("bn", 1, 0.1, 0, 10), 5)]
    assert [v.batch_size for v in judge(group_runs(found))] == [1, 2]
