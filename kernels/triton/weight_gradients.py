"""Gradients of weights: sums over the rows of a group of a[row] b[row]^T.

A launch takes a tile of weight rows, a tile of H and a share of the group's rows, which it reads
where they lie, in their order. How many shares there are depends on the shape alone
(`row_splits`), never on the GPU; where there are several, their sums lie in fp32 and a second
launch adds them in their order. No atomics: the same bits every time. fp32 accumulation.

The gradient of a bias is the sum of a alone, taken by the programs of the first tile of H.

Bytes per row, with e bytes per element and a of W columns: W*e and H*e, read ceil(H / BLOCK_H) and
ceil(W / BLOCK_M) times, from L2 after the first; then 4 bytes per share and entry of the weight,
written and read. A bias reads W*e once more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .groups import kept_table, wide_columns
from .once import once
from .tiles import INTERPRETED, ceil_div, launch

# A sum over rows is cut into shares of at least about SPLIT_ROWS of a group's rows, and into no
# more than give PROGRAMS, two for each multiprocessor of the largest GPUs: each share writes and
# reads the whole gradient in fp32. Small in the interpreter, so that tests have several.
SPLIT_ROWS = 64 if INTERPRETED else 512
PROGRAMS = 264


def row_splits(num_rows: int, num_groups: int, programs: int) -> int:
    """How many shares a sum over the rows of each group has, if these are of one size and one share
    is of so many programs."""
    most = ceil_div(num_rows, SPLIT_ROWS * num_groups)
    return max(1, min(most, ceil_div(PROGRAMS, max(1, programs)), 32))


@triton.jit
def _positions(i, last, order_ptr, BLOCK_K: tl.constexpr):
    """The rows at the positions i .. of `order`, and which of them lie before `last`."""
    offs = i + tl.arange(0, BLOCK_K)
    mask = offs < last
    rows = offs.to(tl.int64)
    if order_ptr is not None:
        rows = tl.load(order_ptr + offs, mask=mask, other=0).to(tl.int64)
    return rows, mask


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "height", "num_splits"])
def adapter_weights_bwd_kernel(
    a_ptr,  # [num_rows, stride_a]
    b_ptr,  # [inputs, num_rows, H]
    order_ptr,  # [num_rows], or None: rows in order
    offsets_ptr,  # [groups + 2] into `order`, or None: one group of all rows
    tiles_ptr,  # see `_tiles`
    out_ptr,  # [num_splits, height, H]
    bias_ptr,  # [num_splits, height], or None
    num_rows,
    num_tiles,
    num_splits,
    height,
    stride_a,
    stride_bi,
    stride_bm,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split, i] = sum over a share of the rows of a[row, i] * b[row]."""
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    h_tile = pid % H_TILES
    split = pid // H_TILES // num_tiles
    tile = tiles_ptr + pid // H_TILES % num_tiles * 7
    group = tl.load(tile)
    # of whole sixteens: a wide access can begin there
    offs_m = tl.load(tile + 1) * 16 + tl.arange(0, BLOCK_M)
    begin = tl.load(tile + 2)
    used = tl.load(tile + 3)
    end = tl.load(tile + 4)
    first_row = tl.load(tile + 5)
    b_ptr += tl.load(tile + 6) * tl.cast(stride_bi, tl.int64)
    first = 0
    last = num_rows
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + group)
        last = tl.load(offsets_ptr + group + 1)
    share = tl.cdiv(last - first, num_splits * BLOCK_K) * BLOCK_K
    first += split * share
    last = tl.minimum(first + share, last)

    offs_h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask_m = offs_m < wide_columns(used)
    out = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for i in range(first, last, BLOCK_K):
        rows, mask_k = _positions(i, last, order_ptr, BLOCK_K)
        a_tile = a_ptr + rows[:, None] * stride_a + offs_m[None, :]
        a = tl.load(a_tile, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        b_tile = b_ptr + rows[:, None] * stride_bm + offs_h[None, :]
        b = tl.load(b_tile, mask=mask_k[:, None] & mask_h[None, :], other=0.0)
        out = tl.dot(tl.trans(a), b, out, input_precision=PRECISION)
    # rows of the weight behind the used ones are padding
    out = tl.where((offs_m < used)[:, None], out, 0.0)
    row = split * tl.cast(height, tl.int64) + first_row + offs_m
    own = (offs_m >= begin) & (offs_m < end)
    out_tile = out_ptr + row[:, None] * H + offs_h[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=own[:, None] & mask_h[None, :])
    if bias_ptr is not None:
        if h_tile == 0:
            # a loop of its own: the product's one has nothing to do but to feed the matrix units
            bias = tl.zeros([BLOCK_M], tl.float32)
            for i in range(first, last, BLOCK_K):
                rows, mask_k = _positions(i, last, order_ptr, BLOCK_K)
                a_tile = a_ptr + rows[:, None] * stride_a + offs_m[None, :]
                a = tl.load(a_tile, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
                bias += tl.sum(a.to(tl.float32), axis=0)
            bias = tl.where(offs_m < used, bias, 0.0)
            tl.store(bias_ptr + row, bias.to(bias_ptr.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["num_splits"])
def add_splits_kernel(parts_ptr, out_ptr, size, num_splits, BLOCK: tl.constexpr):
    """out[i] = sum over the splits of parts[split, i], in their order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        part = parts_ptr + split * tl.cast(size, tl.int64) + offs
        total += tl.load(part, mask=offs < size, other=0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < size)


class WeightRows(NamedTuple):
    """Rows of a weight that are sums over the rows of one group."""

    group: int
    begin: int
    """The columns of the left factor that they belong to, and"""
    used: int
    """the end of these."""
    end: int
    """The end of the rows, counted as the columns are: what is behind `used` is padding."""
    first_row: int
    """Where column 0 would lie in the weight."""
    input: int
    """Which right factor."""


@once
def _tiles(parts: tuple[WeightRows, ...], block_m: int, device: torch.device) -> Tensor:
    """[tiles, 7], int32: the group, the first column in sixteens, then as in `WeightRows`."""
    found = [
        [part.group, column // 16, *part[1:]]
        for part in parts
        for column in range(part.begin // 16 * 16, part.end, block_m)
    ]
    return kept_table(found, (7,), device)


def _add_splits(parts: Tensor, out: Tensor) -> None:
    arguments = {
        "parts_ptr": parts,
        "out_ptr": out,
        "size": out.numel(),
        "num_splits": len(parts),
        "BLOCK": 1024,
        "num_warps": 4,
        "num_stages": 3,
    }
    launch(add_splits_kernel, ceil_div(out.numel(), 1024), arguments)


def weight_gradient(
    weight: Tensor,
    bias: Tensor | None,
    products: Sequence[tuple[Tensor, Tensor, Sequence[WeightRows]]],
    *,
    order: Tensor | None,
    offsets: Tensor | None,
    num_groups: int,
    blocks: dict[str, int],
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of a weight and its bias; empty for no bias.

    Args:
        products: factors a [T, W] and b [inputs, T, H] with the rows that are sums of their
            products; each row of the weight is in one of them.
        order, offsets: of `routing_tables`, or None where all rows are in the only group.
        blocks: of the schedule "backward_weights".
    """
    num_rows, hidden_size = products[0][1].shape[1:]
    height = len(weight)
    h_tiles = ceil_div(hidden_size, blocks["BLOCK_H"])
    tiles = [_tiles(tuple(parts), blocks["BLOCK_M"], a.device) for a, _, parts in products]
    splits = row_splits(num_rows, num_groups, sum(map(len, tiles)) * h_tiles)
    dweight = weight.new_empty(height, hidden_size)
    dbias = weight.new_empty(0 if bias is None else height)
    out, bias_out = dweight, dbias
    if splits > 1:
        out = weight.new_empty(splits, height, hidden_size, dtype=torch.float32)
        bias_out = weight.new_empty(splits, len(dbias), dtype=torch.float32)
    for (a, b, _), own in zip(products, tiles, strict=True):
        arguments = {
            "a_ptr": a,
            "b_ptr": b,
            "order_ptr": order,
            "offsets_ptr": offsets,
            "tiles_ptr": own,
            "out_ptr": out,
            "bias_ptr": None if bias is None else bias_out,
            "num_rows": num_rows,
            "num_tiles": len(own),
            "height": height,
            "stride_a": a.stride(0),
            "stride_bi": b.stride(0),
            "stride_bm": b.stride(1),
            "H": hidden_size,
            "num_splits": splits,
            "PRECISION": precision,
            **blocks,
        }
        launch(adapter_weights_bwd_kernel, splits * len(own) * h_tiles, arguments)
    if splits > 1:
        _add_splits(out, dweight)
        _add_splits(bias_out, dbias)
    return dweight, dbias
