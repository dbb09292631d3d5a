"""The border between one launch and two, and every kernel's tiles: a table, by architecture, dtype
and rows.

The table is `schedules.json` beside this file, or the file that FASTFUSION_SCHEDULES names; each
entry says whether it was derived (from registers, spills and shared memory of compiled code, never
timed) or measured, and where. The first entry that fits a call is taken:

    schedules   what it is for: "one_launch", "one_launch_norm", "two_launches", ...
    archs       targets, by the beginning of their names; "interpreter" among them
    bits        of the inputs' dtype, 16 or 32
    max_rows    the most rows of a call; absent: any number
    blocks      what the launcher gives the kernels
"""

import functools
import json
import os
from pathlib import Path

import torch

import triton
from triton.backends.compiler import GPUTarget

from .tiles import padded

ENVIRONMENT_VARIABLE = "FASTFUSION_SCHEDULES"


@functools.cache
def table() -> tuple[dict, ...]:
    """The entries in the order in which they are asked."""
    path = os.environ.get(ENVIRONMENT_VARIABLE) or Path(__file__).with_name("schedules.json")
    return tuple(json.loads(Path(path).read_text())["entries"])


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
    arch, bits = arch_of(target), dtype.itemsize * 8
    for entry in table():
        if (
            name in entry["schedules"]
            and bits in entry["bits"]
            and arch.startswith(tuple(entry["archs"]))
            and num_rows <= entry.get("max_rows", num_rows)
        ):
            return entry["blocks"]
    raise ValueError(f"schedules: no entry {name!r} for {arch}, {bits} bits, {num_rows} rows")


def column_blocks(columns: int) -> tuple[int, int]:
    """Two blocks that hold the columns (144: 128 and 16; 256 would nearly double the work), or one
    and 0 where two are no narrower."""
    whole = padded(columns)
    first = whole // 2
    if first < 16 or columns - first > first // 2:
        return whole, 0
    return first, padded(columns - first)


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
    return sum(column_blocks(columns)) + padded(adapters) <= blocks["max_columns"]


@functools.cache
def target_of(device: torch.device) -> GPUTarget | None:
    """What the kernel is compiled for on a device; None in the interpreter."""
    if device.type == "cpu":
        return None
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()
