"""Groups of rows as the kernels see them: tables on the device, and a row block's rows.

A plain call is a call with one group whose rows lie in order.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from fastfusion.ops.routing import routing_tables
from fastfusion.ops.weights import layouts, max_scored

from .once import once
from .tiles import ceil_div


@dataclass(frozen=True, eq=False)
class Layout:
    """How many adapters of which sizes each group has, and where its weights begin.

    One object for each: what follows from it is kept by its identity, whatever its size."""

    sizes: tuple[int, ...]
    activations: tuple[int, ...]
    counts: tuple[int, ...]
    """Of adapters."""
    starts: tuple[tuple[int, int, int], ...]
    """A group's first row of down-projections, of score weights or -1, and of W_out."""

    @cached_property
    def columns(self) -> int:
        """Of the widest group."""
        each = iter(self.sizes)
        return max(sum(itertools.islice(each, count)) for count in self.counts)

    @cached_property
    def adapters(self) -> int:
        """The most that a group has."""
        return max(self.counts)

    @cached_property
    def scored(self) -> tuple[bool, ...]:
        """Whether each group is."""
        return tuple(score >= 0 for _, score, _ in self.starts)

    @cached_property
    def is_mixed(self) -> bool:
        """Whether some groups are scored and some are not."""
        return any(self.scored) and not all(self.scored)

    @cached_property
    def num_scored(self) -> int:
        """Adapters in the largest scored group."""
        return max_scored(self.counts, self.scored)

    @cached_property
    def codes(self) -> tuple[int, ...]:
        """The activations that occur."""
        return tuple(sorted(set(self.activations)))


@once
def _plain_layout(sizes: tuple[int, ...], activations: tuple[int, ...], is_scored: bool) -> Layout:
    return Layout(sizes, activations, (len(sizes),), ((0, 0 if is_scored else -1, 0),))


def plain_layout(sizes: Sequence[int], activations: Sequence[int], is_scored: bool) -> Layout:
    """Of one group, its score weights being a tensor of their own."""
    return _plain_layout(tuple(sizes), tuple(activations), is_scored)


@once
def _grouped_layout(
    sizes: tuple[int, ...],
    activations: tuple[int, ...],
    counts: tuple[int, ...],
    scored: tuple[int, ...],
) -> Layout:
    starts = tuple(
        (part.down.start, -1 if part.score is None else part.score.start, part.out.start)
        for part in layouts(sizes, counts, scored)
    )
    return Layout(sizes, activations, counts, starts)


def grouped_layout(*parts: Sequence[int]) -> Layout:
    """Of sizes, activations, counts and scored, as `adapter_fusion_grouped` takes them."""
    return _grouped_layout(*map(tuple, parts))


class Groups(NamedTuple):
    """Where the weights of groups lie, as tables on the device; a plain call has one group."""

    groups: Tensor
    """[G, 8], int32: a group's `starts`; its first entry in `columns`, `adapters` and `tiles`; how
    many columns and adapters it has."""
    columns: Tensor
    """[columns, 2]: the adapter in its group, the activation."""
    adapters: Tensor
    """[adapters]: in how many tiles its columns are."""
    tiles: Tensor
    """[tiles, 3]: the first adapter in the group, how many, and in how many earlier tiles the first
    one is."""
    num_tiles: int
    """Of the widest group."""
    num_parts: int
    """In how many tiles an adapter is at most."""
    tile_adapters: int
    """How many adapters are in a tile at most."""


def kept_table(entries: list, width: tuple[int, ...], device: torch.device) -> Tensor:
    """An int32 table [entries, *width] to keep for good: a CUDA graph may capture its address.

    Made in a thread of its own: to one that captures a graph, or warms up for it, PyTorch gives
    memory of that graph's, which the graph may use again. Waits for the device.
    """
    with ThreadPoolExecutor(1) as thread:
        table = thread.submit(torch.tensor, entries, dtype=torch.int32, device=device).result()
    return table.reshape(-1, *width)


@once
def tables(layout: Layout, block_d: int, device: torch.device) -> Groups:
    """The tables of a layout; waits for the device."""
    groups, columns, adapters, tiles, most_tiles = [], [], [], [], 0
    each = iter(zip(layout.sizes, layout.activations, strict=True))
    for start, count in zip(layout.starts, layout.counts, strict=True):
        own = list(itertools.islice(each, count))
        num_columns = sum(size for size, _ in own)
        groups.append([*start, len(columns), len(adapters), len(tiles), num_columns, count])
        num_tiles = max(1, ceil_div(num_columns, block_d))
        most_tiles = max(most_tiles, num_tiles)
        found: list[list[tuple[int, int]]] = [[] for _ in range(num_tiles)]
        end = 0
        for i, (size, code) in enumerate(own):
            columns += [[i, code]] * size
            begin, end = end, end + size
            # an adapter without columns still has a score
            first = min(begin // block_d, num_tiles - 1)
            last = max(first, ceil_div(end, block_d) - 1)
            adapters.append(last - first + 1)
            for tile in range(first, last + 1):
                found[tile].append((i, tile - first))
        tiles += [[inside[0][0], len(inside), inside[0][1]] for inside in found]
    parts = [
        kept_table(table, width, device)
        for table, width in ((groups, (8,)), (columns, (2,)), (adapters, ()), (tiles, (3,)))
    ]
    return Groups(*parts, most_tiles, max(adapters), max(tile[1] for tile in tiles))


class RowBlocks(NamedTuple):
    """How rows are cut into blocks of one group each; see `fastfusion.ops.routing_tables`."""

    order: Tensor | None
    """[T], or None: rows in order."""
    offsets: Tensor | None
    blocks: Tensor | None
    count: int


def row_blocks(groups: Tensor | None, num_groups: int, num_rows: int, block_t: int) -> RowBlocks:
    """The blocks of rows with these groups, or of rows that all have the only one (None)."""
    if groups is None:
        return RowBlocks(None, None, None, ceil_div(num_rows, block_t))
    order, offsets, blocks = routing_tables(groups, num_groups, block_t)
    return RowBlocks(order, offsets, blocks, len(blocks))


@triton.jit
def rows_of(pid, order_ptr, blocks_ptr, num_rows, BLOCK_T: tl.constexpr):
    """A row block's group, row numbers and which of them there are; group -1 is that of base rows,
    -2 of an entry that is not used."""
    offs_t = tl.arange(0, BLOCK_T)
    if blocks_ptr is None:
        group = 0
        rows = pid.to(tl.int64) * BLOCK_T + offs_t
        mask_t = rows < num_rows
    else:
        first = tl.load(blocks_ptr + pid * 3 + 1)
        count = tl.load(blocks_ptr + pid * 3 + 2)
        group = tl.where(count > 0, tl.load(blocks_ptr + pid * 3), -2)
        mask_t = offs_t < count
        rows = tl.load(order_ptr + first + offs_t, mask=mask_t, other=0).to(tl.int64)
    return group, rows, mask_t


@triton.jit
def wide_columns(D):
    """The columns that a group of D columns writes, zeros behind D: D comes from memory, and a mask
    that may end at any column would make every access one element wide."""
    return (D + 15) // 16 * 16
