"""The border between one launch and two, and every kernel's tiles: a table, by architecture, dtype
and rows.

The table is `schedules.json` beside this file, or the file that FASTFUSION_SCHEDULES names, read
once; `schedule_files.py` says what it holds. The first entry that fits a call is taken. An entry
was derived (from registers, spills and shared memory of compiled code, never timed) or measured
(`tuning.py`), and then says where.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import triton
from triton.backends.compiler import GPUTarget

from . import schedule_files
from .tiles import padded

ENVIRONMENT_VARIABLE = "FASTFUSION_SCHEDULES"

# Of the process, not of a thread: autograd's threads ask for schedules too.
_first: tuple[dict[str, Any], ...] = ()
_listeners: list[list[tuple[str, int]]] = []


def path_in_use() -> Path:
    """The table's file."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else Path(__file__).with_name("schedules.json")


@functools.cache
def loaded() -> schedule_files.Table:
    """The table as its file has it.

    Raises:
        ValueError: the file is no table.
    """
    return schedule_files.read(path_in_use())


def table() -> tuple[dict[str, Any], ...]:
    """The entries in the order in which they are asked."""
    return (*_first, *loaded().entries)


@contextlib.contextmanager
def first(*entries: dict[str, Any]) -> Iterator[None]:
    """Ask these entries before all others, in every thread; CUDA graphs that were captured before
    keep the schedules that they were captured with.

    Raises:
        ValueError: an entry is wrong.
    """
    global _first
    for i, entry in enumerate(entries):
        schedule_files.check(entry, f"entry {i}")
    before = _first
    _first = (*entries, *before)
    schedule.cache_clear()
    try:
        yield
    finally:
        _first = before
        schedule.cache_clear()


@contextlib.contextmanager
def asked() -> Iterator[list[tuple[str, int]]]:
    """The schedules that calls inside ask for, with their numbers of rows, in the order in which
    each is asked for the first time."""
    found: list[tuple[str, int]] = []
    _listeners.append(found)
    schedule.cache_clear()  # what it holds is not looked up again
    try:
        yield found
    finally:
        _listeners[:] = [listener for listener in _listeners if listener is not found]


def arch_of(target: GPUTarget | None) -> str:
    """A target's name in the table: "sm_90", "gfx942"; None is the interpreter."""
    if target is None:
        return "interpreter"
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@functools.lru_cache(maxsize=1024)
def schedule(
    name: str, dtype: torch.dtype, target: GPUTarget | None, num_rows: int
) -> dict[str, int]:
    """The blocks of the first entry for a call of this dtype and so many rows.

    Raises:
        ValueError: the table has none.
    """
    for listener in _listeners:
        listener.append((name, num_rows))
    arch, bits = arch_of(target), dtype.itemsize * 8
    for entry in table():
        least, most = schedule_files.rows_of(entry)
        if schedule_files.serves(entry, name, arch, bits) and least <= num_rows <= most:
            return entry["blocks"]
    raise ValueError(f"schedules: no entry {name!r} for {arch}, {bits} bits, {num_rows} rows")


def column_blocks(columns: int) -> tuple[int, int]:
    """Two blocks that hold the columns (144: 128 and 16; 256 would nearly double the work), or one
    and 0 where two are no narrower."""
    whole = padded(columns)
    first_block = whole // 2
    if first_block < 16 or columns - first_block > first_block // 2:
        return whole, 0
    return first_block, padded(columns - first_block)


def width(columns: int, adapters: int) -> int:
    """The columns and scores of a row block as one program holds them, up to `max_columns`."""
    return sum(column_blocks(columns)) + padded(adapters)


def fits_one_launch(
    name: str,
    columns: int,
    adapters: int,
    dtype: torch.dtype,
    target: GPUTarget | None,
    num_rows: int,
) -> bool:
    """Whether one program holds the bottlenecks and scores of a row block in registers, and the
    rows are enough programs, in the schedule of this name for one launch."""
    blocks = schedule(name, dtype, target, num_rows)
    return width(columns, adapters) <= blocks["max_columns"]


@functools.cache
def target_of(device: torch.device) -> GPUTarget | None:
    """What the kernel is compiled for on a device; None in the interpreter."""
    if device.type == "cpu":
        return None
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()
