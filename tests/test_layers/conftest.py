"""Runs the layers' tests twice: as users do (plain code on small tensors), and fused."""

import pytest

ON_BOTH = ("test_bcn", "test_kn", "test_recompute", "test_state")


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in ON_BOTH:
        metafunc.fixturenames.insert(0, "backend")
        metafunc.parametrize("backend", ["auto", "aten"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def backend(request):
    """The value of MMBCN_BACKEND."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMBCN_BACKEND", request.param)
        yield request.param
