"""Rows sorted by the group they belong to, and moved there and back.

    torch.ops.fastfusion.routing_tables    ids -> order, offsets, blocks
    torch.ops.fastfusion.gather_rows       out[i] = x[order[i]]
    torch.ops.fastfusion.scatter_rows      out[order[i]] = x[i]

Schema, fake implementation, autograd and the PyTorch implementation stand here. The dispatcher
prefers the extensions' own for tensors on a CPU (`csrc/cpu/routing.cpp`) and on a GPU
(`csrc/cuda/routing.cu`), where they are built. Shapes depend on the arguments' shapes and integers
alone, and on a GPU nothing waits for it: CUDA graphs and `torch.compile` capture all three.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

# the extensions register their implementations when they are loaded
try:
    import fastfusion._C  # noqa: F401
except ImportError:
    pass  # cpp_backend says why
try:
    import fastfusion._C_cuda  # noqa: F401
except ModuleNotFoundError:
    pass
except ImportError as error:
    warnings.warn(f"fastfusion._C_cuda is there, but does not load: {error}", stacklevel=2)

_LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")
_LIBRARY.define(
    "routing_tables(Tensor ids, int num_groups, int block_rows) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("gather_rows(Tensor x, Tensor order) -> Tensor")
_LIBRARY.define("scatter_rows(Tensor x, Tensor order) -> Tensor")


def max_blocks(rows: int, num_groups: int, block_rows: int) -> int:
    """The most blocks that any routing of so many rows has.

    `k` groups that have rows, base rows counted as one, need up to `k + (rows - k) // block_rows`
    blocks, which grows with `k`.
    """
    used = torch.sym_min(rows, num_groups + 1)
    return used + (rows - used) // block_rows


def _tables(ids: Tensor, num_groups: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """`routing_tables` in PyTorch, on any device."""
    if ids.device.type == "cpu":
        outside = ((ids < -1) | (ids >= num_groups)).nonzero()
        if len(outside):
            row = outside[0].item()
            raise RuntimeError(
                f"ids: expected groups from -1 to {num_groups - 1}; got {ids[row]} in row {row}"
            )
    ids = ids.long().clamp(-1, num_groups - 1)
    bins = torch.where(ids < 0, num_groups, ids)
    order = torch.argsort(bins, stable=True)
    counts = bins.new_zeros(num_groups + 1).scatter_add_(0, bins, torch.ones_like(bins))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    blocks_per_bin = -(-counts // block_rows)
    ends = blocks_per_bin.cumsum(0)
    entry = torch.arange(max_blocks(len(ids), num_groups, block_rows), device=ids.device)
    owner = torch.searchsorted(ends, entry, right=True)
    used = owner <= num_groups
    owner = owner.clamp(max=num_groups)
    group = torch.where(used & (owner < num_groups), owner, -1)
    first = offsets[owner] + (entry - (ends - blocks_per_bin)[owner]) * block_rows
    size = (offsets[owner + 1] - first).clamp(max=block_rows)
    blocks = torch.stack([group, first * used, size * used], dim=1)
    return order.int(), offsets.int(), blocks.int()


def _inside(order: Tensor) -> Tensor:
    """Row numbers that exist, as an index."""
    rows = len(order)
    if order.device.type != "cpu":
        return order.long().clamp(0, rows - 1)
    outside = order[(order < 0) | (order >= rows)]
    if len(outside):
        raise RuntimeError(f"order: expected row numbers from 0 to {rows - 1}; got {outside[0]}")
    return order.long()


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """`gather_rows` in PyTorch."""
    return x.contiguous().index_select(0, _inside(order))


def _scatter(x: Tensor, order: Tensor) -> Tensor:
    """`scatter_rows` in PyTorch."""
    return x.new_empty(x.shape).index_copy_(0, _inside(order), x)


for _name, _function in (
    ("routing_tables", _tables),
    ("gather_rows", _gather),
    ("scatter_rows", _scatter),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("fastfusion::routing_tables", lib=_LIBRARY)
def _(ids, num_groups, block_rows):
    def empty(*shape):
        return ids.new_empty(shape, dtype=torch.int32)

    blocks = max_blocks(ids.shape[0], num_groups, block_rows)
    return empty(ids.shape[0]), empty(num_groups + 2), empty(blocks, 3)


def _like(x: Tensor, order: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep_order(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward_gather(ctx, grad):
    return torch.ops.fastfusion.scatter_rows(grad, *ctx.saved_tensors), None


def _backward_scatter(ctx, grad):
    return torch.ops.fastfusion.gather_rows(grad, *ctx.saved_tensors), None


for _name, _backward in (("gather_rows", _backward_gather), ("scatter_rows", _backward_scatter)):
    torch.library.register_fake(f"fastfusion::{_name}", _like, lib=_LIBRARY)
    torch.library.register_autograd(
        f"fastfusion::{_name}", _backward, setup_context=_keep_order, lib=_LIBRARY
    )


class RoutingTables(NamedTuple):
    """Which rows belong to which group, for `R` rows and `G` groups; all int32."""

    order: Tensor
    """[R]: row numbers sorted by group, in the rows' own order inside a group, base rows last."""
    offsets: Tensor
    """[G + 2]: group g owns `order[offsets[g] : offsets[g + 1]]`, base rows are "group" G."""
    blocks: Tensor
    """[max_blocks(R, G, block_rows), 3]: (group or -1, first position in `order`, rows), sorted as
    `order` is; unused entries (-1, 0, 0) at the end."""


def routing_tables(ids: Tensor, num_groups: int, block_rows: int) -> RoutingTables:
    """Sort rows by their group and cut every group into blocks of at most `block_rows` rows.

    Semantics::

        order = torch.sort(where(ids < 0, num_groups, ids), stable=True).indices
        offsets = [0, *cumsum(bincount(ids))]                # base rows counted behind the groups
        blocks = [(g, first, min(block_rows, offsets[g + 1] - first))
                  for g in groups for first in range(offsets[g], offsets[g + 1], block_rows)]

    Args:
        ids: [R], int32 or int64: the group of each row, -1 for a base row, which is in no group.
            On a GPU ids are not checked, which would need to wait for it: those below -1 count as
            -1 and those above the last group as the last group. Check them where they are made.
        num_groups: how many groups there are; some may be empty and have no block then.
        block_rows: rows in a block, from 1.

    Returns:
        The tables, on the device of `ids`; the same bits every time.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: an id outside [-1, num_groups) on a CPU.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids: expected one dimension of int32 or int64; got {list(ids.shape)} {ids.dtype}"
        )
    if num_groups < 0:
        raise ValueError(f"num_groups: expected 0 or more; got {num_groups}")
    if block_rows < 1:
        raise ValueError(f"block_rows: expected 1 or more; got {block_rows}")
    return RoutingTables(*torch.ops.fastfusion.routing_tables(ids, num_groups, block_rows))


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows in the order of `order`: `out[i] = x[order[i]]`.

    Args:
        x: [R, ...], any dtype.
        order: [R], int32: a permutation of the rows, as `routing_tables` makes it.

    Returns:
        [R, ...], contiguous. Its backward is `scatter_rows`.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: a row number outside [0, R) on a CPU; on a GPU the nearest inside is taken.
    """
    _check_order(x, order)
    return torch.ops.fastfusion.gather_rows(x, order)


def scatter_rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows back from the order of `order`: `out[order[i]] = x[i]`.

    Args:
        x: [R, ...], any dtype.
        order: [R], int32: a permutation of the rows, as `routing_tables` makes it.

    Returns:
        [R, ...], contiguous. Its backward is `gather_rows`.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: a row number outside [0, R) on a CPU; on a GPU the nearest inside is taken.
    """
    _check_order(x, order)
    return torch.ops.fastfusion.scatter_rows(x, order)


def _check_order(x: Tensor, order: Tensor) -> None:
    if x.dim() == 0 or order.dtype != torch.int32 or list(order.shape) != [x.shape[0]]:
        raise ValueError(
            f"order: expected int32 and one entry per row of x {list(x.shape)}; "
            f"got {list(order.shape)} {order.dtype}"
        )
