import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def checked_launches():
    """In Triton's interpreter every access of a kernel is checked: see `instrument.py`."""
    if not INTERPRETED:
        yield
        return
    from instrument import instrumented  # imports triton, which a plain run need not have

    with instrumented():
        yield


@pytest.fixture
def poisoned_empty():
    """`torch.empty` gives NaN, so that a result which reads memory nobody wrote shows it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory acts in this mode only
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["one launch", "two launches"])
def launches(request, monkeypatch):
    """The triton backend as it is, and with every size in two launches, as beyond its border."""
    if request.param == "two launches":
        launcher = pytest.importorskip("fastfusion.kernels.triton.adapter_fusion")
        monkeypatch.setattr(launcher, "fits_one_launch", lambda *sizes: False)
    return request.param
