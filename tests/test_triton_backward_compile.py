"""The Triton kernels of the backward pass compiled ahead of time, as in `test_triton_compile`."""

import re

import pytest
import torch

pytest.importorskip("triton")

import test_triton_compile  # noqa: E402
from test_triton_compile import (  # noqa: E402
    GFX942,
    MATRIX_UNITS,
    SHARED,
    SM_90,
    compiled_for,
    registers_and_stack,
)

from fastfusion.kernels.triton import backward  # noqa: E402

pytestmark = test_triton_compile.pytestmark
bf16, fp32 = torch.bfloat16, torch.float32


def recorded(monkeypatch, target, function, *arguments, **keywords) -> dict[str, tuple]:
    """The launches of `function` on `target`: kernels and arguments, by name."""
    found = {}

    def record(kernel, programs, launch_arguments):
        name, i = kernel.fn.__name__, 2
        while name in found:
            name, i = f"{kernel.fn.__name__}_{i}", i + 1
        found[name] = (kernel, launch_arguments)

    monkeypatch.setattr(backward, "launch", record)
    monkeypatch.setattr(backward, "target_of", lambda device: target)
    function(*arguments, **keywords)
    return found


def plain(monkeypatch, target, dtype, hidden, sizes, rows, inputs=1, query=False, mask=False):
    columns, adapters = sum(sizes), len(sizes)

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype)

    x, p = empty(rows, hidden), torch.empty(rows, adapters)
    weights = [
        empty(columns, hidden), empty(columns), empty(columns + adapters, hidden),
        empty(columns + adapters), empty(columns + adapters, hidden), torch.tensor(1.0),
    ]  # fmt: skip
    dropout = empty(rows, adapters) if mask else None
    return recorded(
        monkeypatch, target, backward.adapter_fusion_backward, x, [x] * inputs,
        x if query else None, *weights, dropout, p, sizes, [1] * adapters,
        [True, query, True, True, True, True],
    )  # fmt: skip
