"""What the launches of the backward move through memory, as `benchmarks/bytes.py` counts it.

TRITON_INTERPRET=1 pytest tests/test_bytes_backward.py

bf16, with the tiles that an H100 takes for T = 16384. The expected bytes are those that the
docstrings of `backward.py` and `weight_gradients.py` say.
"""

import functools
import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of Triton's interpreter", allow_module_level=True)

import bytes as counted

from fastfusion.kernels.triton import backend, schedules, weight_gradients
from fastfusion.ops.activations import activation_code

# A plain call whose query is its input. More adapters than there are tiles of 64 columns, two of
# them in two tiles.
ROWS, HIDDEN, ADAPTERS, SIZE = 256, 256, 8, 24
COLUMNS = ADAPTERS * SIZE  # a multiple of 16
USED = COLUMNS + ADAPTERS  # a multiple of 8: w_score and w_out without padding
IN, OUT = ROWS * COLUMNS * 2, ROWS * 208 * 2
"""Of a buffer [T, W], W = 208: what the first launch writes, and the second."""
PARTS = (ADAPTERS + 2) * ROWS * 4
"""Of dp: for each tile that an adapter is in."""
X = ROWS * HIDDEN * 2
WEIGHT_ROW = HIDDEN * 2
ALL_OUTPUTS = ROWS * ADAPTERS * HIDDEN * 2
"""T x N x H numbers."""


class Allocated(TorchDispatchMode):
    """The most bytes that a result within has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.most = max([self.most, *(tensor.untyped_storage().nbytes() for tensor in made)])
        return result


@functools.cache
def launches():
    """The launches by kernel, in order, and the most bytes of a tensor that was made for them."""
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(shape).to(torch.bfloat16)

    grad, x = randn(ROWS, HIDDEN), randn(ROWS, HIDDEN)
    weights = [
        randn(COLUMNS, HIDDEN), randn(COLUMNS),
        randn(USED, HIDDEN), randn(USED),
        randn(USED, HIDDEN), None,
    ]  # fmt: skip
    p = torch.randn(ROWS, ADAPTERS).softmax(-1)
    layout = [SIZE] * ADAPTERS, [activation_code("relu")] * ADAPTERS
    needs = [True, False, True, True, True, False]
    with Allocated() as allocated:
        found = counted.counted(
            lambda: backend.adapter_fusion_backward(
                grad, [x], None, *weights, None, p, *layout, needs
            )
        )
    by_kernel = {}
    for launch in found:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    return by_kernel, allocated.most


def blocks_of(kernel):
    return schedules.schedule(
        f"backward_{kernel}", counted.DTYPE, counted.SM_90, counted.SCHEDULE_ROWS
    )


def row_blocks():
    return ROWS // blocks_of("columns")["BLOCK_T"]


def traffic_of(kernel):
    (launch,) = launches()[0][kernel]
    return launch.traffic


def loaded(moved):
    """By all programs, and with each address once."""
    assert moved.stored == 0
    return moved.loaded, moved.loaded_once


def stored(moved):
    assert moved.loaded == 0
    assert moved.stored == moved.stored_once
    return moved.stored


def test_each_sum_is_a_launch():
    found, _ = launches()
    assert {kernel: len(each) for kernel, each in found.items()} == {
        "adapter_columns_bwd_kernel": 1,
        "adapter_scores_bwd_kernel": 1,
        "adapter_input_bwd_kernel": 1,
        "adapter_weights_bwd_kernel": 3,
        "add_splits_kernel": 5,  # of three weights and two biases
    }


def test_loads_rows_once_for_each_tile_of_columns():
    """x and the output's gradient, and not once for each adapter; later launches but for weights
    have neither."""
    passes = COLUMNS // blocks_of("columns")["BLOCK_D"]
    assert passes < ADAPTERS
    columns = traffic_of("adapter_columns_bwd_kernel")
    for tensor in ("x_ptr", "grad_ptr"):
        assert loaded(columns[tensor]) == (passes * X, X), tensor
    for kernel in ("adapter_scores_bwd_kernel", "adapter_input_bwd_kernel"):
        assert not {"x_ptr", "query_ptr", "grad_ptr"} & traffic_of(kernel).keys()


def test_loads_weights_once_for_each_row_block():
    needed = {
        "adapter_columns_bwd_kernel": {
            "w_down_ptr": COLUMNS,
            "w_score_ptr": COLUMNS,  # the scores themselves are not needed
            "w_out_ptr": USED,
        },
        "adapter_input_bwd_kernel": {
            "w_down_ptr": COLUMNS,
            "w_score_ptr": USED,
        },
    }
    for kernel, weights in needed.items():
        for tensor, rows in weights.items():
            once = rows * WEIGHT_ROW
            moved = traffic_of(kernel)[tensor]
            assert loaded(moved) == (row_blocks() * once, once), (kernel, tensor)


def test_buffers():
    """Three, in the inputs' dtype: written, changed in place, and read by tiles of H."""
    columns = traffic_of("adapter_columns_bwd_kernel")
    for tensor in ("pre_ptr", "t_ptr", "dw_ptr"):
        assert stored(columns[tensor]) == IN, tensor
    assert stored(columns["parts_ptr"]) == PARTS
    scores = traffic_of("adapter_scores_bwd_kernel")
    for tensor in ("pre_ptr", "t_ptr", "dw_ptr"):
        moved = scores[tensor]
        assert moved.loaded == moved.loaded_once == IN, tensor
        assert moved.stored == moved.stored_once == OUT, tensor
    assert scores["parts_ptr"].loaded_once == PARTS
    passes = HIDDEN // blocks_of("input")["BLOCK_H"]
    given = traffic_of("adapter_input_bwd_kernel")
    for tensor, size in (("dpre_ptr", IN), ("dy_ptr", OUT)):
        assert loaded(given[tensor]) == (passes * size, size), tensor
    assert stored(given["out_ptr"]) == X


@pytest.mark.parametrize(
    "index, rows, columns, with_bias",
    [
        (0, COLUMNS, IN, True),
        (1, USED, OUT, True),
        (2, USED, OUT, False),
    ],
    ids=["down", "score", "out"],
)
def test_sums_of_weights(index, rows, columns, with_bias):
    """Each factor once for each tile of the other; the sums of shares go through memory in fp32."""
    blocks = blocks_of("weights")
    h_tiles = HIDDEN // blocks["BLOCK_H"]
    tiles = math.ceil(rows / blocks["BLOCK_M"])
    splits = weight_gradients.row_splits(ROWS, 1, tiles * h_tiles)
    assert splits > 1
    launch = launches()[0]["adapter_weights_bwd_kernel"][index]
    passes = h_tiles + with_bias  # the bias has a loop of its own
    assert loaded(launch.traffic["a_ptr"]) == (passes * columns, columns)
    assert loaded(launch.traffic["b_ptr"]) == (tiles * X, X)
    shares = splits * rows * HIDDEN * 4
    assert stored(launch.traffic["out_ptr"]) == shares
    added = launches()[0]["add_splits_kernel"][(0, 2, 4)[index]]
    assert loaded(added.traffic["parts_ptr"]) == (shares, shares)
    assert stored(added.traffic["out_ptr"]) == rows * WEIGHT_ROW
    if with_bias:
        assert stored(launch.traffic["bias_ptr"]) == splits * rows * 4


def test_makes_nothing_as_large_as_all_adapters_outputs():
    """T x N x H numbers are nowhere, given or allocated."""
    found, most = launches()
    sizes = [t.size for each in found.values() for launch in each for t in launch.traffic.values()]
    assert 0 < most < ALL_OUTPUTS
    assert max(sizes) < ALL_OUTPUTS
