"""What a launch of the Triton kernels must not depend on or touch, per op, in the interpreter.

TRITON_INTERPRET=1 pytest tests/test_launches.py

All interpreter tests run instrumented (`conftest.checked_launches`): no access outside a tensor, no
load of what the launch stored, no two programs at one element. Here the programs run in other
orders, and a pattern around all memory that a call allocates stays as it was.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of Triton's interpreter", allow_module_level=True)

import test_grouped as grouped
from instrument import instrumented, reversed_order, shuffled
from test_adapter_fusion import (
    CASES,
    WEIGHTS,
    Case,
    norm_tensors_of,
    on,
    run,
    run_norm,
    tensors_of,
    weights_of,
)

from fastfusion.kernels.triton.groups import Layout, tables
from fastfusion.kernels.triton.weight_gradients import WeightRows, _tiles
from fastfusion.ops import (
    GroupedWeights,
    adapter_fusion_grouped,
    adapter_fusion_norm,
    backends,
    stack,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "launches")

# several row blocks and tiles, the last of each in parts
PLAIN = {
    "everything": replace(CASES["everything"], rows=70, sizes=(20, 7, 13)),
    "inputs": replace(CASES["inputs-query"], rows=70),
    "single": replace(CASES["single"], rows=130, hidden=72),
}
NORM = Case(rows=70, hidden=40, sizes=(20, 7, 13), mask=True, temperature=1.5)
GROUPS = grouped.ROWS["shuffled"]


def norm(ln_before):
    given = norm_tensors_of(NORM, torch.bfloat16, "cpu")

    def op(*args, **kwargs):
        return adapter_fusion_norm(*args, **kwargs, backend="triton")

    return lambda: run_norm(op, NORM, given, ln_before, ["x0", "residual", *WEIGHTS])


def groups():
    x, residual, grad, mask = grouped.inputs(len(GROUPS), torch.bfloat16)
    weights = stack(grouped.packs(torch.bfloat16))

    def call():
        leaves = [t.detach().requires_grad_() for t in (x, residual, *weights[:3])]
        given = GroupedWeights(*leaves[2:], *weights[3:])
        out, p = adapter_fusion_grouped(
            *leaves[:2], grouped.ids(GROUPS), given, mask=mask, backend="triton"
        )
        return {"out": out, "p": p, **dict(enumerate(torch.autograd.grad(out, leaves, grad)))}

    return call


def plain(name):
    given = tensors_of(PLAIN[name], torch.bfloat16, "cpu")
    return lambda: run(on("triton"), PLAIN[name], given)


CALLS = {
    **{name: lambda name=name: plain(name) for name in PLAIN},
    "norm-after": lambda: norm(False),
    "norm-before-and-after": lambda: norm(True),
    "grouped": groups,
}


@pytest.mark.parametrize("name", CALLS)
def test_any_order_of_programs_gives_the_same_bits(name):
    """Forward and backward."""
    call = CALLS[name]()
    with instrumented() as launches:
        expected = call()
    assert max(launch.programs for launch in launches) >= 2
    for order in (reversed_order, shuffled(0)):
        with instrumented(order):
            results = call()
        for key, value in expected.items():
            assert torch.equal(results[key], value), key


# --------------------------------------------------------------------------------------------------
# guards


class Guards(TorchDispatchMode):
    """Every tensor that is allocated within has a pattern before and behind it."""

    SIZE, PATTERN = 4096, 77  # more elements than a block of rows and columns; exact in all dtypes
    FACTORIES = {
        torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_like.default, torch.ops.aten.zeros.default,
        torch.ops.aten.new_zeros.default, torch.ops.aten.zeros_like.default,
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.guarded: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function not in self.FACTORIES or made.numel() == 0:
            return made
        whole = torch.full([made.numel() + 2 * self.SIZE], self.PATTERN, dtype=made.dtype)
        self.guarded.append(whole)
        return whole[self.SIZE : -self.SIZE].view(made.shape).copy_(made)

    def holds(self, tensor: torch.Tensor) -> bool:
        storages = [whole.untyped_storage().data_ptr() for whole in self.guarded]
        return tensor.untyped_storage().data_ptr() in storages

    def check(self) -> None:
        for whole in self.guarded:
            for guard in (whole[: self.SIZE], whole[-self.SIZE :]):
                changed = int((guard != self.PATTERN).sum())
                assert changed == 0, f"{changed} elements written beside {len(whole)} of a tensor"


def test_guards_see_a_store():
    for place in (-1, 6):
        with Guards() as guards:
            made = torch.zeros(2, 3)
        assert guards.holds(made)
        guards.check()
        made.as_strided([1], [1], made.storage_offset() + place).fill_(0)
        with pytest.raises(AssertionError, match="1 elements written beside"):
            guards.check()


def plain_arguments(name):
    case = PLAIN[name]
    given = tensors_of(case, torch.bfloat16, "cpu")
    *weights, sizes, activations = weights_of(case, given)
    x = [given[f"x{i}"] for i in range(case.inputs)]
    forward = (x, given["query"], given["residual"], *weights, given["mask"])
    return given, forward, (given["score_offset"], sizes, activations)


@pytest.mark.parametrize("name", PLAIN)
def test_guards_around_the_op(name):
    given, forward, rest = plain_arguments(name)
    backend = backends.load("triton")
    with Guards() as guards:
        out, p = backend.adapter_fusion(*forward, *rest)
    guards.check()
    assert guards.holds(out)
    x, query, _, *weights = forward
    scored = weights[2] is not None
    needs = [True, query is not None and scored, True, scored, True, scored]
    with Guards() as guards:
        backend.adapter_fusion_backward(given["grad"], x, query, *weights, p, *rest[1:], needs)
    guards.check()


@pytest.mark.parametrize("ln_before", [False, True], ids=["after", "before-and-after"])
def test_guards_around_the_op_with_norms(ln_before):
    given = norm_tensors_of(NORM, torch.bfloat16, "cpu")
    *weights, sizes, activations = weights_of(NORM, given)
    norms = (given["ln_weight"], given["ln_bias"], 1e-5, ln_before)
    backend = backends.load("triton")
    with Guards() as guards:
        out, p, summed, pre_norm = backend.adapter_fusion_norm(
            given["x0"], given["residual"], *norms, *weights, given["mask"], sizes, activations,
            True,
        )  # fmt: skip
    guards.check()
    assert all(map(guards.holds, (out, p, pre_norm)))
    assert guards.holds(summed) if ln_before else summed.numel() == 0
    hidden = None if ln_before else given["x0"]
    with Guards() as guards:
        backend.adapter_fusion_norm_backward(
            given["grad"], hidden, summed, pre_norm, *norms, *weights, given["mask"], p, sizes,
            activations, [True] * 4,
        )  # fmt: skip
    guards.check()


@pytest.mark.parametrize("rows", ["in-order", "shuffled", "one", "all-base"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_guards_around_the_grouped_op(rows, with_residual):
    x, residual, grad, mask = grouped.inputs(len(grouped.ROWS[rows]), torch.bfloat16)
    groups = grouped.ids(grouped.ROWS[rows])
    *weights, sizes, activations, counts, scored = stack(grouped.packs(torch.bfloat16))
    layout = (sizes, activations, counts, scored)
    backend = backends.load("triton")
    with Guards() as guards:
        out, p = backend.adapter_fusion_grouped(
            x, residual if with_residual else None, groups, *weights, mask, *layout
        )
    guards.check()
    assert guards.holds(out) and guards.holds(p)
    with Guards() as guards:
        backend.adapter_fusion_grouped_backward(
            grad, x, groups, *weights, mask, p, *layout, [True] * 3
        )
    guards.check()


class Operators(TorchDispatchMode):
    """Notes the operators of its thread."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_tables_that_are_kept_are_made_in_another_thread():
    """What a thread allocates while it warms up or captures a CUDA graph is that graph's."""
    layout = Layout((31, 5, 7), (1, 1, 0), (3,), ((0, 0, 0),))
    with Operators() as operators:
        found = tables.__wrapped__(layout, 16, torch.device("cpu"))
        tiles = _tiles.__wrapped__((WeightRows(0, 0, 46, 46, 0, 0),), 32, torch.device("cpu"))
    assert operators.names == {"aten::view"}
    assert found.adapters.tolist() == [2, 2, 1]
    assert tiles[:, 1].tolist() == [0, 2]
