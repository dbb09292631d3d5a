"""The Triton kernels of the backward pass, in the interpreter; beside what every backend is asked.

    TRITON_INTERPRET=1 pytest tests/test_triton_backward.py

`test_adapter_fusion` and `test_grouped` hold the ops' gradients against their definition. Here
stand the sizes, splits and layouts that the kernels treat in ways of their own. The rule for errors
is the one there, with the torch backend in the test's dtype as what may err. `test_launches` has
what a launch must not touch, and its programs in other orders.
"""

from dataclasses import replace
from itertools import product

import pytest
import test_grouped
import torch
from test_adapter_fusion import (
    CASES,
    INTERPRETED,
    NATIVE,
    SIZES,
    Case,
    assert_as_good,
    tensors_of,
    weights_of,
)
from test_grouped import ROWS, WIDE, ids, inputs, packs

from fastfusion.ops import stack, torch_backend
from fastfusion.ops.activations import ACTIVATIONS, activation_code

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fastfusion.kernels.triton import (  # noqa: E402
    backward,
    norm_backward,
    tiles,
    weight_gradients,
)

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="CPU tensors; a GPU has the tests of the ops"),
    pytest.mark.usefixtures("poisoned_empty"),
]
DTYPES = pytest.mark.parametrize("dtype", tiles.DTYPES, ids=lambda dtype: str(dtype)[6:])
NAMES = (
    "dx", "dquery", "dw_down", "db_down", "dw_score", "db_score", "dw_out", "dscore_offset",
)  # fmt: skip


def arguments_of(case: Case, dtype, needs=None) -> list:
    """What `adapter_fusion_backward` gets for a case; by default all that it has is needed."""
    given = tensors_of(case, dtype, "cpu")
    x = [given[f"x{i}"] for i in range(case.inputs)]
    weights = weights_of(case, given)
    *forward, sizes, activations = weights
    rest = (given["mask"], given["score_offset"], sizes, activations)
    p = torch_backend.adapter_fusion(x, given["query"], None, *forward, *rest)[1]
    everything = [True, case.query, True, case.score, True, case.offset and case.score]
    return [
        given["grad"], x, given["query"], *forward, given["mask"], p, sizes, activations,
        everything if needs is None else needs,
    ]  # fmt: skip


def in_double(arguments: list) -> list:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.double, arguments)


def gradients(function, arguments: list) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, function(*arguments), strict=True))


def assert_gradients(case: Case, dtype) -> None:
    """The gradients alone, with the same p for all three."""
    arguments = arguments_of(case, dtype)
    truth = gradients(torch_backend.adapter_fusion_backward, in_double(arguments))
    plain = gradients(torch_backend.adapter_fusion_backward, arguments)
    actual = gradients(backward.adapter_fusion_backward, arguments)
    assert_as_good(actual, plain, truth, dtype)
    for name, value in actual.items():
        assert value.dtype == dtype, name


EVERYTHING = replace(CASES["everything"], activations=("silu", "tanh", "gelu"))


@DTYPES
@pytest.mark.parametrize("inputs", [1, 3], ids=["", "inputs"])
@pytest.mark.parametrize("query", [False, True], ids=["", "query"])
@pytest.mark.parametrize("rows", [1, 70])
def test_every_dtype(rows, query, inputs, dtype):
    # blocks of 32 rows and of 32 columns, and neither of them full
    assert_gradients(replace(EVERYTHING, rows=rows, query=query, inputs=inputs), dtype)


@pytest.mark.parametrize("score", [False, True], ids=["sum", ""])
@pytest.mark.parametrize("inputs", [1, 2], ids=["", "inputs"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, inputs, score):
    """Wide ones, 64 adapters, adapters without columns."""
    inputs = 1 if inputs == 1 else len(sizes)
    case = Case(rows=5, hidden=20, sizes=sizes, mask=True, inputs=inputs, score=score, padding=3)
    assert_gradients(case, torch.float32)


@pytest.mark.parametrize("score", [False, True], ids=["sum", ""])
def test_no_columns_at_all(score):
    assert_gradients(Case(rows=40, sizes=(0, 0), mask=True, score=score), torch.float32)


@pytest.mark.parametrize("name", NATIVE)
def test_derivatives(name):
    """Against PyTorch's, at the kinks too and far out."""

    @triton.jit
    def derivative(x_ptr, out_ptr, CODE: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, tiles.activation_derivative(tl.load(x_ptr + offs), CODE))

    x = torch.cat([torch.linspace(-30, 30, 1021), torch.tensor([0.0, -0.0, 1e-20])])
    out = torch.empty_like(x)
    code = activation_code(name)
    derivative[(1,)](x, out, code, len(x))
    expected = ACTIVATIONS[code].backward(torch.ones_like(x).double(), x.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=2e-6)


@DTYPES
@pytest.mark.parametrize("rows", [0, 65, 200])
def test_splits(rows, dtype, monkeypatch):
    """The rows' sums in several shares are those in one, up to rounding, and zero for no rows."""
    arguments = arguments_of(replace(EVERYTHING, rows=rows), dtype)
    assert weight_gradients.row_splits(200, 1, 1) == 4
    several = gradients(backward.adapter_fusion_backward, arguments)
    again = gradients(backward.adapter_fusion_backward, arguments)
    monkeypatch.setattr(weight_gradients, "SPLIT_ROWS", 1000)
    assert weight_gradients.row_splits(200, 1, 1) == 1
    one = gradients(backward.adapter_fusion_backward, arguments)
    tolerance = 4 * torch.finfo(dtype).eps
    for name, value in several.items():
        assert torch.equal(value, again[name]), name
        largest = one[name].abs().max().item() if one[name].numel() else 0
        torch.testing.assert_close(value, one[name], rtol=0, atol=tolerance * largest)
        if rows == 0:
            assert not value.any(), name


def test_number_of_splits():
    """Of the shape alone."""
    splits = weight_gradients.row_splits
    assert [splits(n, 1, 1) for n in (0, 1, 64, 65, 10**6)] == [1, 1, 1, 2, 32]
    assert [splits(1000, groups, 1) for groups in (1, 4, 100)] == [16, 4, 1]
    # as many programs as a GPU has room for, if rows are enough
    assert [splits(10**6, 1, programs) for programs in (10, 24, 263, 264, 1000)] == [
        27,
        11,
        2,
        1,
        1,
    ]


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)), ids=str)
def test_empty_where_nothing_is_needed(needs):
    x, query, score = needs
    needs = [x, query, not x, score, not score, query]
    case = replace(EVERYTHING, rows=9)
    every = gradients(backward.adapter_fusion_backward, arguments_of(case, torch.float32))
    some = gradients(backward.adapter_fusion_backward, arguments_of(case, torch.float32, needs))
    down, scores = needs[2:4]
    wanted = [x, query, down, down, scores, scores, needs[4], needs[5]]
    for (name, value), is_wanted in zip(some.items(), wanted, strict=True):
        assert torch.equal(value, every[name]) if is_wanted else value.shape == (0,), name


def test_nothing_is_launched_for_nothing(monkeypatch):
    monkeypatch.setattr(backward, "launch", None)
    case = replace(EVERYTHING, rows=9)
    results = backward.adapter_fusion_backward(*arguments_of(case, torch.float32, [False] * 6))
    assert all(value.shape == (0,) for value in results)


# --------------------------------------------------------------------------------------------------
# groups


def grouped_arguments(groups: list[int], kinds, dtype, needs=(True, True, True)) -> list:
    x, _, grad, mask = inputs(len(groups), dtype)
    weights = stack(packs(dtype, groups=kinds, std=0.1))
    rest = (ids(groups), *weights[:3], mask, *weights[3:])
    p = torch_backend.adapter_fusion_grouped(x, None, *rest)[1]
    return [grad, x, *rest[:5], p, *weights[3:], list(needs)]


def grouped_gradients(function, arguments: list) -> dict[str, torch.Tensor]:
    return dict(zip(("dx", "dw_in", "db_in", "dw_out"), function(*arguments), strict=True))


@DTYPES
@pytest.mark.parametrize("rows", [*ROWS, "wide"])
def test_groups(rows, dtype):
    """Empty groups have gradients of zero, and so have base rows."""
    kinds = WIDE if rows == "wide" else test_grouped.GROUPS
    groups = test_grouped.random_groups(150, len(WIDE)) if rows == "wide" else ROWS[rows]
    arguments = grouped_arguments(groups, kinds, dtype)
    doubled = in_double(arguments)
    doubled[2] = arguments[2]
    truth = grouped_gradients(torch_backend.adapter_fusion_grouped_backward, doubled)
    plain = grouped_gradients(torch_backend.adapter_fusion_grouped_backward, arguments)
    actual = grouped_gradients(backward.adapter_fusion_grouped_backward, arguments)
    assert_as_good(actual, plain, truth, dtype)
    assert not actual["dx"][ids(groups) < 0].any()
    assert actual["dx"].dtype == actual["dw_in"].dtype == dtype


def test_groups_in_any_order_and_in_shares(monkeypatch):
    """The rows' order does not change a row's gradient, nor do shares the sums."""
    monkeypatch.setattr(weight_gradients, "SPLIT_ROWS", 8)
    groups = ROWS["shuffled"]
    arguments = grouped_arguments(groups, test_grouped.GROUPS, torch.float32)
    assert weight_gradients.row_splits(len(groups), len(test_grouped.GROUPS), 1) == 3
    first = grouped_gradients(backward.adapter_fusion_grouped_backward, arguments)
    again = grouped_gradients(backward.adapter_fusion_grouped_backward, arguments)
    order = torch.randperm(len(groups))
    moved = [
        value[order] if isinstance(value, torch.Tensor) and i in (0, 1, 2, 6, 7) else value
        for i, value in enumerate(arguments)
    ]
    other = grouped_gradients(backward.adapter_fusion_grouped_backward, moved)
    assert torch.equal(other["dx"], first["dx"][order])
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        if name != "dx":
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


def test_groups_only_what_is_needed():
    every = grouped_arguments(ROWS["shuffled"], test_grouped.GROUPS, torch.float32)
    expected = grouped_gradients(backward.adapter_fusion_grouped_backward, every)
    for x, w_in, w_out in product([False, True], repeat=3):
        arguments = [*every[:-1], [x, w_in, w_out]]
        results = grouped_gradients(backward.adapter_fusion_grouped_backward, arguments)
        for (name, value), wanted in zip(results.items(), [x, w_in, w_in, w_out], strict=True):
            assert torch.equal(value, expected[name]) if wanted else value.shape == (0,), name


# --------------------------------------------------------------------------------------------------
# norms


@DTYPES
@pytest.mark.parametrize("with_add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("hidden", [1, 37, 300, 5000])
def test_layer_norm(hidden, with_add, dtype):
    """Far from zero too: the variance is that of the centred row."""
    grad, value, add = torch.randn(3, 11, hidden)
    value = 20 + 3 * value
    weight = 1 + torch.randn(hidden) / 3
    given = {"grad": grad, "value": value, "weight": weight, "add": add}
    given = {name: tensor.to(dtype) for name, tensor in given.items()}

    def reference(grad, value, weight, add):
        value.requires_grad_()
        out = torch.nn.functional.layer_norm(value, [hidden], weight, None, 1e-5)
        (dvalue,) = torch.autograd.grad(out, value, grad)
        return {"dvalue": dvalue + add if with_add else dvalue}

    truth = reference(**{name: tensor.double() for name, tensor in given.items()})
    plain = reference(**{name: tensor.clone() for name, tensor in given.items()})
    arguments = [given[name] for name in ("grad", "value", "weight")]
    actual = norm_backward._through_norm(*arguments, 1e-5, add=given["add"] if with_add else None)
    assert_as_good({"dvalue": actual}, plain, truth, dtype)
