"""Tables of schedules as files: what an entry may hold, reading and writing.

A file is `{"origin": text, "entries": [...]}`, an entry

    schedules   what it is for, names of `BLOCKS`
    archs       targets, by the beginning of their names: "sm_90", "gfx", "interpreter"
    bits        of the inputs' dtype, 16 or 32
    min_rows    the fewest rows of a call; absent: any number
    max_rows    the most; absent: any number
    blocks      what the launcher gives the kernels
    origin      where the blocks were measured, and how long they took; absent: derived
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_ONE_LAUNCH = ("max_columns", "BLOCK_T", "BLOCK_K", "BLOCK_H", "num_warps", "num_stages")
_TWO_LAUNCHES = (
    "BLOCK_T", "BLOCK_D", "BLOCK_K", "BLOCK_H", "SWAPPED", "FUSED_NORM", "columns_num_warps",
    "num_warps", "num_stages",
)  # fmt: skip
BLOCKS: dict[str, tuple[str, ...]] = {
    "one_launch": _ONE_LAUNCH,
    "one_launch_norm": _ONE_LAUNCH,
    "two_launches": _TWO_LAUNCHES,
    "two_launches_norm": _TWO_LAUNCHES,
    "two_launches_general": _TWO_LAUNCHES,
    "backward_columns": ("BLOCK_T", "BLOCK_D", "BLOCK_K", "num_warps", "num_stages"),
    "backward_scores": ("BLOCK_T", "BLOCK_D", "num_warps", "num_stages"),
    "backward_input": ("BLOCK_T", "BLOCK_K", "BLOCK_H", "num_warps", "num_stages"),
    "backward_weights": ("BLOCK_M", "BLOCK_K", "BLOCK_H", "num_warps", "num_stages"),
}
"""The blocks of every schedule. `max_columns: 0`, which no call fits, needs no others."""
SAME_ROWS = ("backward_columns", "backward_scores", "backward_input")
"""Launches over one list of row blocks: their BLOCK_T is the same in every call."""
ARCHS = ("interpreter", "sm_", "gfx")
FIELDS = ("schedules", "archs", "bits", "min_rows", "max_rows", "blocks", "origin")
ORIGIN = ("device", "driver", "torch", "triton", "commit", "date", "median_us", "derived_us")


class Table(NamedTuple):
    origin: str
    """Where the entries without an origin of their own come from."""
    entries: tuple[dict[str, Any], ...]
    """In the order in which they are asked."""


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _block_fault(name: str, value: Any) -> str | None:
    """What a block should have been, or None."""
    if name.startswith("BLOCK_"):
        # a matrix product takes no less
        is_right = _is_count(value, 16) and value & (value - 1) == 0
        return None if is_right else "a power of two from 16 on"
    if name.endswith("num_warps"):
        is_right = _is_count(value, 1) and value <= 32 and value & (value - 1) == 0
        return None if is_right else "a power of two up to 32"
    if name == "num_stages":
        return None if _is_count(value, 1) else "a number from 1 on"
    if name == "max_columns":
        return None if _is_count(value, 0) else "a number from 0 on"
    return None if isinstance(value, bool) else "true or false"


def _is_list_of(value: Any, is_right) -> bool:
    return isinstance(value, list) and value != [] and all(map(is_right, value))


def check(entry: Any, where: str) -> None:
    """Raise a ValueError that names `where`, the field, what was expected and what is there."""

    def expect(is_right: bool, field: str, expected: str, got: Any) -> None:
        if not is_right:
            raise ValueError(f"{where}, {field}: expected {expected}; got {got!r}")

    expect(isinstance(entry, dict), "as a whole", "an object", entry)
    expect(set(entry) <= set(FIELDS), "as a whole", f"no fields but {FIELDS}", sorted(entry))
    for field in ("schedules", "archs", "bits", "blocks"):
        expect(field in entry, field, "a value", None)
    names, archs, bits, blocks = (entry[f] for f in ("schedules", "archs", "bits", "blocks"))
    names_are_right = _is_list_of(names, lambda name: isinstance(name, str) and name in BLOCKS)
    expect(names_are_right, "schedules", f"a list out of {tuple(BLOCKS)}", names)
    archs_are_right = _is_list_of(archs, lambda a: isinstance(a, str) and a.startswith(ARCHS))
    expect(archs_are_right, "archs", f"a list of names that begin with one of {ARCHS}", archs)
    expect(_is_list_of(bits, lambda n: n in (16, 32)), "bits", "a list out of 16, 32", bits)
    least, most = entry.get("min_rows", 0), entry.get("max_rows")
    expect(_is_count(least, 0), "min_rows", "a number from 0 on", least)
    if "max_rows" in entry:
        expect(_is_count(most, least), "max_rows", f"a number from {least} on", most)
    expect(isinstance(blocks, dict), "blocks", "an object", blocks)
    for name in names:
        if blocks == {"max_columns": 0} and "max_columns" in BLOCKS[name]:
            continue
        needed = set(BLOCKS[name])
        expected = f"for {name!r} exactly {sorted(needed)}"
        expect(set(blocks) == needed, "blocks", expected, sorted(blocks))
    for name, value in blocks.items():
        fault = _block_fault(name, value)
        expect(fault is None, f"blocks.{name}", str(fault), value)
    if "origin" in entry:
        origin = entry["origin"]
        expect(isinstance(origin, dict), "origin", "an object", origin)
        expect(set(origin) <= set(ORIGIN), "origin", f"no fields but {ORIGIN}", sorted(origin))


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: it is none; the file, the entry's number and the field are named.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON; {error}") from error
    if not isinstance(found, dict) or set(found) != {"origin", "entries"}:
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: expected an object with 'origin' and 'entries'; got {got}")
    if not isinstance(found["origin"], str):
        raise ValueError(f"{path}, origin: expected a text; got {found['origin']!r}")
    if not isinstance(found["entries"], list):
        raise ValueError(f"{path}, entries: expected a list; got {found['entries']!r}")
    for i, entry in enumerate(found["entries"]):
        check(entry, f"{path}, entry {i}")
    return Table(found["origin"], tuple(found["entries"]))


def text(table: Table) -> str:
    """A file's text: an entry a line, so that a diff shows which changed."""
    lines = ",\n".join("    " + json.dumps(entry) for entry in table.entries)
    return f'{{\n  "origin": {json.dumps(table.origin)},\n  "entries": [\n{lines}\n  ]\n}}\n'


def write(path: Path, table: Table, overwrite: bool = False) -> None:
    """Write a file; one that is there is replaced whole or not at all.

    Raises:
        ValueError: an entry is wrong, and the file is as it was.
        FileExistsError: there is one, and `overwrite` is false.
    """
    for i, entry in enumerate(table.entries):
        check(entry, f"{path}, entry {i}")
    if not overwrite:
        with path.open("x") as file:
            file.write(text(table))
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text(table))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def rows_of(entry: dict[str, Any]) -> tuple[int, float]:
    """The fewest and the most rows of an entry."""
    return entry.get("min_rows", 0), entry.get("max_rows", float("inf"))


def serves(entry: dict[str, Any], name: str, arch: str, bits: int) -> bool:
    """Whether an entry is for a schedule, a target and a dtype, with some number of rows."""
    return (
        name in entry["schedules"]
        and bits in entry["bits"]
        and arch.startswith(tuple(entry["archs"]))
    )


def ranges(
    entries: Iterable[dict[str, Any]], name: str, arch: str, bits: int
) -> list[tuple[int, float, dict[str, Any]]]:
    """The numbers of rows, from and to, and the entry that is the first to fit them."""
    fitting = [entry for entry in entries if serves(entry, name, arch, bits)]
    limits = {0, *(n for least, most in map(rows_of, fitting) for n in (least, most + 1))}
    begins = sorted(limits - {float("inf")})
    found: list[tuple[int, float, dict[str, Any]]] = []
    for begin, after in zip(begins, [*begins[1:], float("inf")], strict=True):
        for entry in fitting:
            least, most = rows_of(entry)
            if least <= begin <= most:
                if found and found[-1][2] is entry:
                    begin = found.pop()[0]
                found.append((begin, after - 1, entry))
                break
    return found


def refreshed(table: Table, measured: Sequence[dict[str, Any]]) -> Table:
    """The table with measured entries in front of all others, and without the earlier measured
    ones that no call would reach any more."""

    def is_hidden(old: dict[str, Any]) -> bool:
        least, most = rows_of(old)
        return "origin" in old and any(
            set(old["schedules"]) <= set(new["schedules"])
            and set(old["bits"]) <= set(new["bits"])
            and all(arch.startswith(tuple(new["archs"])) for arch in old["archs"])
            and rows_of(new)[0] <= least
            and most <= rows_of(new)[1]
            for new in measured
        )

    return Table(table.origin, (*measured, *(e for e in table.entries if not is_hidden(e))))
