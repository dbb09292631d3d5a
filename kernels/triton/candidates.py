"""Which blocks are worth a trial: those near given ones, and those that serve elsewhere."""

import itertools
from collections.abc import Iterator, Sequence

from .schedule_files import SAME_ROWS

Blocks = dict[str, int]

LARGEST_TILE = 256
LARGEST_WIDTH = 512
"""Twice what any table gives one program: accumulators of more columns do not fit its registers."""


def _steps(name: str, value: int) -> list[int]:
    """A block's neighbouring values."""
    if isinstance(value, bool):
        return [not value]
    if name.startswith("BLOCK_"):
        return [n for n in (value // 2, value * 2) if 16 <= n <= LARGEST_TILE]
    if name.endswith("num_warps"):
        return [n for n in (value // 2, value * 2) if 2 <= n <= 16]
    return [n for n in (value - 1, value + 1) if 1 <= n <= 5]  # num_stages


def _neighbours(schedule: str, blocks: Blocks) -> Iterator[Blocks]:
    """One block changed, or the rows of a tile with the warps that share them."""
    for name, value in blocks.items():
        # without a norm FUSED_NORM says nothing
        if name == "max_columns" or (name == "FUSED_NORM" and not schedule.endswith("_norm")):
            continue
        if name == "BLOCK_T" and schedule in SAME_ROWS:
            continue
        for other in _steps(name, value):
            yield {**blocks, name: other}
    if "BLOCK_T" in blocks and schedule not in SAME_ROWS:
        for rows in _steps("BLOCK_T", blocks["BLOCK_T"]):
            warps = {
                name: value * rows // blocks["BLOCK_T"]
                for name, value in blocks.items()
                if name.endswith("num_warps")
            }
            if all(2 <= n <= 16 for n in warps.values()):
                yield {**blocks, **warps, "BLOCK_T": rows}


def _borders(border: int, widths: Sequence[int]) -> list[int]:
    """Limits that put each of these widths on the other side; the given one comes first."""
    others = (width - 1 if width <= border else width for width in sorted(set(widths)))
    return [border, *(other for other in others if other <= LARGEST_WIDTH)]


def _all(
    schedule: str, blocks: Blocks, elsewhere: Sequence[Blocks], widths: Sequence[int]
) -> Iterator[Blocks]:
    yield blocks
    if "max_columns" not in blocks:
        yield from _neighbours(schedule, blocks)
        for found in elsewhere:
            if schedule not in SAME_ROWS or found["BLOCK_T"] == blocks["BLOCK_T"]:
                yield found
        return
    border = blocks["max_columns"]
    tiled = [found for found in (blocks, *elsewhere) if len(found) > 1]
    for other, found in itertools.product(_borders(border, widths), tiled[:1]):
        yield {**found, "max_columns": other}
    # tiles matter where at least the narrowest call is one launch
    reached = max(border, min(widths))
    if tiled and reached <= LARGEST_WIDTH:
        for found in (*_neighbours(schedule, tiled[0]), *tiled[1:]):
            yield {**found, "max_columns": reached}


def candidates(
    schedule: str,
    blocks: Blocks,
    elsewhere: Sequence[Blocks],
    widths: Sequence[int],
    limit: int,
) -> list[Blocks]:
    """Blocks to try for a schedule, the given ones first.

    Args:
        schedule: its name.
        blocks: what it has.
        elsewhere: what it has on other targets or for other numbers of rows, the nearest first.
        widths: of the calls to serve (`schedules.width`), for `max_columns`.
        limit: the most to return.
    """
    found: list[Blocks] = []
    for blocks_to_try in _all(schedule, blocks, elsewhere, widths):
        if blocks_to_try not in found:
            found.append(blocks_to_try)
        if len(found) == limit:
            break
    return found
