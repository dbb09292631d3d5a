"""What the forward launches of one place move through memory, as `benchmarks/bytes.py` counts it.

TRITON_INTERPRET=1 pytest tests/test_bytes.py

bf16, H = 768, d = 48, with the tiles that an H100 takes for T = 16384.
"""

import functools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of Triton's interpreter", allow_module_level=True)

import bytes as counted
from bytes import ADAPTERS
from place import HIDDEN, SIZE

ROWS = 256
ROW_TENSOR = ROWS * HIDDEN * 2
ROW_BLOCKS = {
    "adapter_fusion_kernel": ROWS // 64,
    "adapter_columns_kernel": ROWS // 128,
    "adapter_output_kernel": ROWS // 128,
    "fold_norm_kernel": 1,
}
FORWARDS = [("forward", adapters) for adapters in ADAPTERS]
FORWARDS += [("norm", 3), ("norm", 8), ("grouped", 8)]


@functools.cache
def launches(name, adapters):
    torch.manual_seed(0)
    return counted.OPS[name](ROWS, adapters)


def of(name, adapters, *tensors):
    """The launches that have one of these tensors, and what they do to it."""
    return [
        (launch, launch.traffic[tensor])
        for launch in launches(name, adapters)
        for tensor in tensors
        if tensor in launch.traffic
    ]


@pytest.mark.parametrize("name, adapters", FORWARDS)
def test_rows_cross_device_memory_once(name, adapters):
    """x, the residual and the output, in each launch that has them."""
    inputs = of(name, adapters, "x_ptr", "residual_ptr", "input_ptr")
    assert len(inputs) >= 2
    for launch, moved in inputs:
        if name == "grouped" and launch.kernel == "adapter_columns_kernel":
            assert moved.loaded_once < ROW_TENSOR  # base rows have no input
        else:
            assert moved.loaded_once == ROW_TENSOR
        assert moved.stored == 0
    # an output that is normalised is written before, too
    outputs = [moved for _, moved in of(name, adapters, "out_ptr", "kept_ptr") if moved.stored]
    assert all(moved.stored_once == ROW_TENSOR for moved in outputs)
    assert sum(moved.stored for moved in outputs) == ROW_TENSOR * (2 if name == "norm" else 1)
    assert sum(moved.loaded for moved in outputs) == ROW_TENSOR * (1 if name == "norm" else 0)


@pytest.mark.parametrize("name, adapters", FORWARDS)
def test_input_is_loaded_once_for_each_tile_of_columns(name, adapters):
    """And not once for each adapter."""
    for launch, x in of(name, adapters, "x_ptr"):
        passes = 1
        if launch.kernel == "adapter_columns_kernel":
            passes = launch.programs // ROW_BLOCKS[launch.kernel]
            assert passes < adapters or name == "grouped"  # there the table has unused entries
        elif launch.kernel == "adapter_fusion_kernel" and name == "norm":
            passes = 2  # the products' and the sum's
        if name == "norm":  # a number near the mean is that of 16 entries
            assert x.loaded <= (passes + 16 / HIDDEN * passes) * ROW_TENSOR
        elif name == "forward":
            assert x.loaded == passes * ROW_TENSOR
        else:
            assert x.loaded <= passes * ROW_TENSOR  # base rows have no input


def test_input_is_loaded_once_where_a_row_block_fits_one_launch():
    assert len(launches("forward", 3)) == 1
    for _, moved in of("forward", 3, "x_ptr", "residual_ptr"):
        assert moved.loaded == ROW_TENSOR


@pytest.mark.parametrize("name, adapters", [case for case in FORWARDS if case[0] != "grouped"])
def test_weights_are_loaded_once_for_each_row_block(name, adapters):
    columns, both = adapters * SIZE * HIDDEN * 2, (adapters * SIZE + adapters) * HIDDEN * 2
    for tensor, size in (("w_down_ptr", columns), ("w_score_ptr", both), ("w_out_ptr", both)):
        found = of(name, adapters, tensor)
        assert found
        for launch, moved in found:
            # padding has a sum too
            needed = moved.size if launch.kernel == "fold_norm_kernel" else size
            assert moved.loaded_once == needed, tensor
            assert moved.loaded == ROW_BLOCKS[launch.kernel] * needed, tensor


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
