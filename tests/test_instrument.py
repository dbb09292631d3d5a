"""The instrumented interpreter on small kernels that do what it is there to see.

TRITON_INTERPRET=1 pytest tests/test_instrument.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of Triton's interpreter", allow_module_level=True)

import instrument
import triton
import triton.language as tl
from instrument import Fault, Traffic, instrumented, reversed_order, shuffled


@triton.jit
def copy_kernel(x_ptr, out_ptr, rows, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = tl.program_id(0) * 2 + tl.arange(0, 2)
    mask = (tile < rows)[:, None] & (offs < COLUMNS)[None, :]
    x = tl.load(x_ptr + tile[:, None] * stride + offs[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + tile[:, None] * 3 + offs[None, :], x, mask=mask)


def copy(x, out, rows, columns=3):
    copy_kernel[(triton.cdiv(rows, 2),)](
        x_ptr=x, out_ptr=out, rows=rows, stride=x.stride(0), COLUMNS=columns, BLOCK=4
    )


@triton.jit
def add_kernel(
    x_ptr, out_ptr, AGAIN: tl.constexpr, SHIFT: tl.constexpr, BARRIER: tl.constexpr = True
):
    """x plus one; then, reading that back, one more."""
    offs = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs + SHIFT) + 1)
    if BARRIER:
        tl.debug_barrier()
    if AGAIN:
        tl.store(out_ptr + offs, tl.load(out_ptr + offs) + 1)


@triton.jit
def one_place_kernel(out_ptr, LANES: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, LANES) * 0, tl.zeros([LANES], tl.float32))


@triton.jit
def atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def test_bytes():
    """The last row block has one row; x is a part of a wider tensor."""
    x, out = torch.randn(5, 8)[:, 2:5], torch.empty(5, 3)
    with instrumented() as launches:
        copy(x, out, 5)
    assert torch.equal(out, x)
    (launch,) = launches
    assert (launch.kernel, launch.programs) == ("copy_kernel", 3)
    assert launch.traffic == {
        "x_ptr": Traffic(60, 60, 0, 0, 60), "out_ptr": Traffic(0, 0, 60, 60, 60)
    }  # fmt: skip


def test_bytes_that_several_programs_load():
    x, out = torch.randn(3), torch.empty(5, 3)
    with instrumented() as launches:
        copy(x.expand(5, 3), out, 5)
    assert launches[0].traffic["x_ptr"][:2] == (60, 12)


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        (6, 3, r"copy_kernel, program 2: loads outside x_ptr \[5, 3\]; 3 elements, the first 40"),
        (5, 4, r"copy_kernel, program 0: loads outside x_ptr \[5, 3\]; 2 elements, the first 3"),
    ],
)
def test_loads_outside(rows, columns, message):
    """Behind the last row, and in memory that belongs to x's storage but is not x."""
    x = torch.randn(9, 8)[1:6, 2:5]
    with instrumented(), pytest.raises(Fault, match=message):
        copy(x, torch.empty(9, 3), rows, columns)


def test_into_a_neighbour():
    """Over the end, into memory that another argument owns, and before the start."""
    buffer = torch.zeros(2, 6, 3)
    x, out = buffer[1], buffer[0, :5]
    message = "program 2: stores outside out_ptr .* first 15 "
    with instrumented(), pytest.raises(Fault, match=message):
        copy(x, out, 6)
    with instrumented(), pytest.raises(Fault, match="loads outside x_ptr .* first -3 "):
        copy_kernel[(1,)](x_ptr=x, out_ptr=out, rows=2, stride=-3, COLUMNS=3, BLOCK=4)


def test_no_argument():
    with instrumented(), pytest.raises(Fault, match="outside out_ptr"):
        copy(torch.randn(2, 3), torch.empty(0), 2)


def test_in_place():
    """A program that loads an element before it stores it."""
    x = torch.zeros(8)
    with instrumented() as launches:
        add_kernel[(2,)](x_ptr=x, out_ptr=x, AGAIN=False, SHIFT=0)
    assert launches[0].traffic["x_ptr"].loaded == launches[0].traffic["out_ptr"].stored == 32


def test_read_back(monkeypatch):
    x, out = torch.zeros(8), torch.zeros(8)
    with instrumented(), pytest.raises(Fault, match="loads what this launch stored in out_ptr"):
        add_kernel[(2,)](x_ptr=x, out_ptr=out, AGAIN=True, SHIFT=0)
    monkeypatch.setitem(instrument.READ_BACK, "add_kernel", "for this test")
    with instrumented():
        add_kernel[(2,)](x_ptr=x, out_ptr=out, AGAIN=True, SHIFT=0)
    with instrumented(), pytest.raises(Fault, match="loads what this launch stored in out_ptr"):
        add_kernel[(2,)](x_ptr=x, out_ptr=out, AGAIN=True, SHIFT=0, BARRIER=False)
    # of other programs it is not safe
    with instrumented(), pytest.raises(Fault, match="program 1: loads what this launch stored in"):
        buffer = torch.zeros(9)
        add_kernel[(2,)](x_ptr=buffer[:8], out_ptr=buffer[1:], AGAIN=False, SHIFT=0)


def test_races():
    """In this order nothing goes wrong; on a GPU the other program may come first."""
    x, out = torch.zeros(9), torch.zeros(9)
    with instrumented(), pytest.raises(Fault, match="program 1: stores what another program loads"):
        add_kernel[(2,)](x_ptr=x, out_ptr=x[:8], AGAIN=False, SHIFT=1)
    with instrumented(), pytest.raises(Fault, match="program 1: stores what another program store"):
        one_place_kernel[(2,)](out_ptr=out, LANES=1)
    with instrumented(), pytest.raises(Fault, match="stores twice at one element of out_ptr"):
        one_place_kernel[(1,)](out_ptr=out, LANES=2)


def test_atomics():
    with instrumented(), pytest.raises(Fault, match="atomic_kernel: an atomic operation"):
        atomic_kernel[(1,)](out_ptr=torch.zeros(1))


@triton.jit
def clock_kernel(out_ptr, clock_ptr):
    """Takes the next number of a clock: a fault, but it shows when a program ran."""
    now = tl.load(clock_ptr)
    tl.store(out_ptr + tl.program_id(0) * 2 + tl.program_id(1), now)
    tl.store(clock_ptr, now + 1)


@pytest.mark.parametrize(
    "order, expected",
    [(range, [0, 1, 2, 3, 4, 5]), (reversed_order, [5, 4, 3, 2, 1, 0]), (shuffled(0), None)],
)
def test_order(order, expected, monkeypatch):
    monkeypatch.setattr(instrument._Run, "load", lambda *_: None)
    monkeypatch.setattr(instrument._Run, "store", lambda *_: None)
    out, clock = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with instrumented(order) as launches:
        clock_kernel[(3, 2)](out_ptr=out, clock_ptr=clock)
    assert launches[0].programs == 6
    if expected is None:
        assert sorted(out.tolist()) == list(range(6)) != out.tolist()
        assert [order(6)[i] for i in out.tolist()] == list(range(6))
    else:
        assert out.tolist() == expected


def test_is_undone():
    with instrumented() as launches:
        pass
    copy(torch.randn(5, 3), torch.empty(5, 3), 5)
    assert not launches
