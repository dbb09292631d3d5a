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
def launches(request):
    """The triton backend as it is, and with every size in two launches, as beyond its border."""
    if request.param == "one launch":
        yield request.param
        return
    schedules = pytest.importorskip("fastfusion.kernels.triton.schedules")
    border = {
        "schedules": ["one_launch", "one_launch_norm"],
        "archs": ["interpreter"],
        "bits": [16, 32],
        "blocks": {"max_columns": 0},
    }
    with schedules.first(border):
        yield request.param
