"""What the launches of one place move through memory, as `benchmarks/bytes.py` counts it.

TRITON_INTERPRET=1 pytest tests/test_bytes.py

With the tiles of an H100, bf16, H = 768, d = 48; `ROWS` are two row blocks.
"""

import functools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of Triton's interpreter", allow_module_level=True)

import bytes as counted
from bench_adapter_fusion import ADAPTERS, HIDDEN, SIZE

ROWS, ROW_BLOCKS, BLOCK_D = 128, 2, 64
ROW_TENSOR = ROWS * HIDDEN * 2
FORWARDS = [("forward", adapters) for adapters in ADAPTERS] + [("norm", 8), ("grouped", 8)]


@functools.cache
def launches(name, adapters):
    torch.manual_seed(0)
    return counted.OPS[name](ROWS, adapters)


def of(name, adapters, *tensors):
    """What each launch does to tensors of these names."""
    return [
        launch.traffic[tensor]
        for launch in launches(name, adapters)
        for tensor in tensors
        if tensor in launch.traffic
    ]


@pytest.mark.parametrize("name, adapters", FORWARDS)
def test_rows_cross_device_memory_once(name, adapters):
    """x, the residual and the output: in each launch that has them, and at most in one of them."""
    for tensor in ("x_ptr", "residual_ptr", "out_ptr"):
        (moved,) = of(name, adapters, tensor)
        once = moved.stored_once if tensor == "out_ptr" else moved.loaded_once
        if tensor == "x_ptr" and name == "grouped":
            assert once <= ROW_TENSOR  # base rows have no input
        else:
            assert once == ROW_TENSOR, tensor
    (out,) = of(name, adapters, "out_ptr")
    assert (out.stored, out.loaded) == (ROW_TENSOR, 0)


@pytest.mark.parametrize("name, adapters", FORWARDS)
def test_input_is_loaded_once_for_each_tile_of_columns(name, adapters):
    """And not once for each adapter, of which a tile holds more than one."""
    tiles = -(-adapters * SIZE // BLOCK_D)
    (x,) = of(name, adapters, "x_ptr")
    assert x.loaded <= tiles * ROW_TENSOR
    if adapters > 1:
        assert tiles < adapters or x.loaded == ROW_TENSOR


def test_input_is_loaded_once_where_a_row_block_fits_one_launch():
    (x,) = of("forward", 3, "x_ptr")
    (residual,) = of("forward", 3, "residual_ptr")
    assert x.loaded == residual.loaded == ROW_TENSOR
    assert len(launches("forward", 3)) == 1


@pytest.mark.parametrize("name, adapters", [case for case in FORWARDS if case[0] != "grouped"])
def test_weights_are_loaded_once_for_each_row_block(name, adapters):
    columns, both = adapters * SIZE * HIDDEN * 2, (adapters * SIZE + adapters) * HIDDEN * 2
    for tensor, size in (("w_down_ptr", columns), ("w_score_ptr", both), ("w_out_ptr", both)):
        (moved,) = of(name, adapters, tensor)
        assert (moved.loaded_once, moved.loaded) == (size, ROW_BLOCKS * size), tensor


@pytest.mark.parametrize("name, adapters", FORWARDS)
def test_nothing_is_as_large_as_all_adapters_outputs(name, adapters):
    """T x N x H numbers are nowhere, given or stored."""
    for launch in launches(name, adapters):
        for tensor, moved in launch.traffic.items():
            for size in (moved.size, moved.stored_once):
                assert size < ROWS * adapters * HIDDEN * 2, tensor


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_less_than_the_literal_path(adapters):
    """By far, even for two row blocks, where the weights are most of what is left."""
    literal, _ = counted.literal_bytes(ROWS, adapters)
    moved = [t for launch in launches("forward", adapters) for t in launch.traffic.values()]
    assert 5 * sum(t.loaded_once + t.stored_once for t in moved) < literal


def test_literal_bytes_by_hand():
    """A product reads two matrices and writes one; a view is free, an expanded row counts once."""
    a, b, row = (torch.empty(shape, device="meta") for shape in ((4, 8), (8, 2), (1, 2)))
    with counted.AtenBytes() as moved:
        a @ b
    assert moved.total == 4 * (32 + 16 + 8)
    with counted.AtenBytes() as moved:
        a.t()[2:].detach()
        torch.empty(7, device="meta")
    assert moved.total == 0
    with counted.AtenBytes() as moved:
        row.expand(4, 2).clone()
        (a @ b).add_(1)
    assert moved.total == 4 * (2 + 8) + 4 * (32 + 16 + 8) + 4 * (8 + 8)
