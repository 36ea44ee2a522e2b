"""A head for another number of classes than the dataset's trains without an error: it is told."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from torch import nn

pytest.importorskip("mmseg")

from mmbcn.engine import LabelCheckHook


@pytest.mark.parametrize(("metainfo", "warned"), [(dict(classes="abc"), True), ({}, False)])
@pytest.mark.parametrize("cascade", [False, True])
def test_other_number_of_classes_is_told(metainfo, warned, cascade):
    model, head = nn.Module(), nn.Module()
    head.num_classes = 19
    model.decode_head = nn.ModuleList([head]) if cascade else head
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo))
    runner = SimpleNamespace(model=model, train_dataloader=loader, logger=Mock())
    LabelCheckHook().before_train(runner)
    assert runner.logger.warning.called == warned
    if warned:
        assert "has 3 classes, but decode_head.num_classes is 19" in str(
            runner.logger.warning.call_args
        )
    head.num_classes = 3
    runner.logger.reset_mock()
    LabelCheckHook().before_train(runner)
    assert not runner.logger.warning.called
