import pytest


@pytest.fixture
def camvid(tmp_path):
    """24 training and 4 validation scenes in CamVid's layout, in 7 of the 11 classes."""
    from mmbcn.datasets import write_shapes

    write_shapes(tmp_path / "camvid", "camvid", 24, 4, size=(48, 64))
    return tmp_path / "camvid"
