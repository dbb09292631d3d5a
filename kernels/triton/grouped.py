"""The adapter mixture over groups of rows in one Triton launch, for `adapter_fusion_grouped`.

A call whose widest group does not fit one program (`tiles.fits_one_launch`) goes to
`two_launches.py`, whatever its rows are; the rest of this text is about the others.

The mathematics of a row is that of `adapter_fusion.py` with its group's weights, x as the query and
no temperature; where the group is not scored, p = 1; a base row is its residual, or zero:

    z = act(W_down x + b_down)      s_i = mask_i * (sum_{j in i} z_j (M x + m)_j + (C x + c)_i)
    p = softmax(s), or 1            out = residual + [p*z ; p] W_out

A program takes one entry of the routing table's blocks: up to BLOCK_T rows of one group, or base
rows. It reads and writes them where they lie, at the row numbers in `order`, so that nothing is
gathered before or scattered behind. Where the group's weights begin and how many columns and
adapters it has stand in a table on the device, as do each column's adapter and activation. The
compiled code depends on the widest group's blocks, on which activations occur and on whether any
group is scored; the table is made once for each layout of the weights. So groups in any mixture and
number are one launch, which a CUDA graph captures (after a first call, which compiles and makes the
table), and a new mixture is new contents of `groups`. Entries that are not used return at once.

Bytes per row are those of `adapter_fusion.py`, and 4 of its row number. Every block reads the
weights of its own group, from L2. A group narrower than the widest pays for the widest's columns in
products, not in bytes: its loads are masked.

Precision, determinism: as in `adapter_fusion.py`. Each row is written by one program, and its bits
do not depend on which rows share its block.

The backward pass is PyTorch's, group by group. The schedule was chosen from compiled code, not from
timings.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from fastfusion.ops.routing import routing_tables
from fastfusion.ops.weights import layouts, max_scored
from triton.backends.compiler import GPUTarget

from . import two_launches
from .groups import Start, widest
from .tiles import (
    activate,
    add_bias,
    column_blocks,
    contiguous,
    contiguous_rows,
    dot_one_hot,
    dot_rows,
    fits_one_launch,
    launch,
    padded,
    precision,
    schedule,
    target_of,
)


@triton.jit
def _store_base_rows(
    residual_ptr, stride_rm, out_ptr, p_ptr, rows, mask_t, num_scored,
    H: tl.constexpr, SCORED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out = residual, or zeros; p = 0."""
    if SCORED:
        offs_n = tl.arange(0, BLOCK_N)
        p_tile = p_ptr + rows[:, None] * num_scored + offs_n[None, :]
        mask_tn = mask_t[:, None] & (offs_n < num_scored)[None, :]
        tl.store(p_tile, tl.zeros([BLOCK_T, BLOCK_N], tl.float32), mask=mask_tn)
    for h in range(0, H, BLOCK_H):
        offs_h = h + tl.arange(0, BLOCK_H)
        mask_th = mask_t[:, None] & (offs_h < H)[None, :]
        out = tl.zeros([BLOCK_T, BLOCK_H], out_ptr.dtype.element_ty)
        if residual_ptr is not None:
            residual_tile = residual_ptr + rows[:, None] * stride_rm + offs_h[None, :]
            out = tl.load(residual_tile, mask=mask_th, other=0.0)
        tl.store(out_ptr + rows[:, None] * H + offs_h[None, :], out, mask=mask_th)


@triton.jit
def _adapter_fusion_grouped_fwd_kernel(
    x_ptr,  # [num_rows, H]
    residual_ptr,  # [num_rows, H], or None
    order_ptr,  # [num_rows]: rows sorted by group
    blocks_ptr,  # [grid, 3]: group or -1, first position in `order`, rows
    groups_ptr,  # [num_groups, 6]: see `_tables`
    columns_ptr,  # [columns of all groups, 2]: adapter in its group, activation
    w_in_ptr,  # [*, H]
    b_in_ptr,  # [*]
    w_out_ptr,  # [*, H]
    mask_ptr,  # [num_rows, num_scored], or None
    out_ptr,  # [num_rows, H]
    p_ptr,  # [num_rows, num_scored]
    num_scored,  # adapters in the largest scored group
    stride_xm,
    stride_rm,
    H: tl.constexpr,
    CODES: tl.constexpr,  # the activations that occur
    SCORED: tl.constexpr,  # whether any group is
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the first columns of the widest group, and
    BLOCK_R: tl.constexpr,  # the rest of them, perhaps 0
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE != tl.float32
    block = blocks_ptr + tl.program_id(0) * 3
    group = tl.load(block)
    first = tl.load(block + 1)
    num_rows = tl.load(block + 2)
    if num_rows == 0:
        return
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_rows
    rows = tl.load(order_ptr + first + offs_t, mask=mask_t, other=0).to(tl.int64)
    if group < 0:
        _store_base_rows(
            residual_ptr, stride_rm, out_ptr, p_ptr, rows, mask_t, num_scored,
            H, SCORED, BLOCK_T, BLOCK_N, BLOCK_H,
        )  # fmt: skip
        return

    layout = groups_ptr + group * 6
    down = tl.load(layout)
    score = tl.load(layout + 1)
    values = tl.load(layout + 2)
    first_column = tl.load(layout + 3)
    D = tl.load(layout + 4)
    N = tl.load(layout + 5)
    scored = (score >= 0) & SCORED
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    pre = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    t = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    c = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if BLOCK_R > 0:
        offs_r = BLOCK_D + tl.arange(0, BLOCK_R)
        mask_r = offs_r < D
        pre_r = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        t_r = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)

    # two loops: inside one, a branch would keep the loads of M and C out of the pipeline
    if scored:
        for k in range(0, H, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < H
            x_tile = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
            x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
            pre = dot_rows(
                x, w_in_ptr, down + offs_d, mask_d, offs_k, mask_k, pre, H, True, PRECISION
            )
            t = dot_rows(x, w_in_ptr, score + offs_d, mask_d, offs_k, mask_k, t, H, True, PRECISION)
            if BLOCK_R > 0:
                pre_r = dot_rows(
                    x, w_in_ptr, down + offs_r, mask_r, offs_k, mask_k, pre_r, H, True, PRECISION
                )
                t_r = dot_rows(
                    x, w_in_ptr, score + offs_r, mask_r, offs_k, mask_k, t_r, H, True, PRECISION
                )
            c = dot_rows(
                x, w_in_ptr, score + D + offs_n, mask_n, offs_k, mask_k, c, H, True, PRECISION
            )
    else:
        for k in range(0, H, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < H
            x_tile = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
            x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
            pre = dot_rows(
                x, w_in_ptr, down + offs_d, mask_d, offs_k, mask_k, pre, H, True, PRECISION
            )
            if BLOCK_R > 0:
                pre_r = dot_rows(
                    x, w_in_ptr, down + offs_r, mask_r, offs_k, mask_k, pre_r, H, True, PRECISION
                )

    column = columns_ptr + (first_column + offs_d) * 2
    code = tl.load(column + 1, mask=mask_d, other=CODES[0])
    z = activate(add_bias(pre, b_in_ptr, down + offs_d, mask_d), code, CODES)
    if BLOCK_R > 0:
        column_r = columns_ptr + (first_column + offs_r) * 2
        code_r = tl.load(column_r + 1, mask=mask_r, other=CODES[0])
        z_r = activate(add_bias(pre_r, b_in_ptr, down + offs_r, mask_r), code_r, CODES)

    p = tl.zeros([BLOCK_T, BLOCK_N], tl.float32) + mask_n.to(tl.float32)[None, :]
    if scored:
        # columns behind the last are no adapter's
        one_hot = tl.load(column, mask=mask_d, other=-1)[:, None] == offs_n[None, :]
        s = add_bias(c, b_in_ptr, score + D + offs_n, mask_n)
        t = add_bias(t, b_in_ptr, score + offs_d, mask_d)
        s = dot_one_hot(z * t, one_hot, s, SPLIT, PRECISION)
        if BLOCK_R > 0:
            one_hot_r = tl.load(column_r, mask=mask_r, other=-1)[:, None] == offs_n[None, :]
            t_r = add_bias(t_r, b_in_ptr, score + offs_r, mask_r)
            s = dot_one_hot(z_r * t_r, one_hot_r, s, SPLIT, PRECISION)
        if mask_ptr is not None:
            mask_tile = mask_ptr + rows[:, None] * num_scored + offs_n[None, :]
            mask_tn = mask_t[:, None] & mask_n[None, :]
            s *= tl.load(mask_tile, mask=mask_tn, other=0.0).to(tl.float32)
        s = tl.where(mask_n[None, :], s, float("-inf"))
        e = tl.exp(s - tl.max(s, axis=1)[:, None])
        p = e / tl.sum(e, axis=1)[:, None]
        zeros = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        z *= dot_one_hot(p, tl.trans(one_hot), zeros, SPLIT, PRECISION)
        if BLOCK_R > 0:
            zeros_r = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            z_r *= dot_one_hot(p, tl.trans(one_hot_r), zeros_r, SPLIT, PRECISION)
    if SCORED:
        p_tile = p_ptr + rows[:, None] * num_scored + offs_n[None, :]
        mask_tn = mask_t[:, None] & (offs_n < num_scored)[None, :]
        tl.store(p_tile, tl.where(scored, p, 0.0), mask=mask_tn)

    w = z.to(DTYPE)
    w_p = p.to(DTYPE)
    if BLOCK_R > 0:
        w_r = z_r.to(DTYPE)
    for h in range(0, H, BLOCK_H):
        offs_h = h + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        mask_th = mask_t[:, None] & mask_h[None, :]
        out = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        out = dot_rows(
            w, w_out_ptr, values + offs_d, mask_d, offs_h, mask_h, out, H, False, PRECISION
        )
        if BLOCK_R > 0:
            out = dot_rows(
                w_r, w_out_ptr, values + offs_r, mask_r, offs_h, mask_h, out, H, False, PRECISION
            )
        out = dot_rows(
            w_p, w_out_ptr, values + D + offs_n, mask_n, offs_h, mask_h, out, H, False, PRECISION
        )
        if residual_ptr is not None:
            residual_tile = residual_ptr + rows[:, None] * stride_rm + offs_h[None, :]
            out += tl.load(residual_tile, mask=mask_th, other=0.0).to(tl.float32)
        out_tile = out_ptr + rows[:, None] * H + offs_h[None, :]
        tl.store(out_tile, out.to(DTYPE), mask=mask_th)


def starts(sizes: Sequence[int], counts: Sequence[int], scored: Sequence[int]) -> list[Start]:
    """Where the parts of each group begin."""
    return [
        (part.down.start, -1 if part.score is None else part.score.start, part.out.start)
        for part in layouts(sizes, counts, scored)
    ]


# Kept for good: a CUDA graph may have captured their addresses.
@functools.cache
def _tables(
    sizes: tuple[int, ...],
    activations: tuple[int, ...],
    counts: tuple[int, ...],
    scored: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The layout of `GroupedWeights` as the kernel reads it; waits for the device.

    Returns:
        groups [G, 6]: a group's first row of down-projections in w_in, of score weights there or
        -1, and in w_out; its first row in `columns`; how many columns and adapters it has.
        columns [sum(sizes), 2]: the adapter in its group, the activation.
    """
    groups, columns = [], []
    found = starts(sizes, counts, scored)
    for part, start in zip(layouts(sizes, counts, scored), found, strict=True):
        own = sizes[part.adapters]
        groups.append([*start, len(columns), sum(own), len(own)])
        for i, (size, code) in enumerate(zip(own, activations[part.adapters], strict=True)):
            columns += [[i, code]] * size
    return tuple(
        torch.tensor(table, dtype=torch.int32, device=device) for table in (groups, columns)
    )


def launch_arguments(
    x: Tensor,
    residual: Tensor | None,
    groups: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    mask: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
    counts: Sequence[int],
    scored: Sequence[int],
    target: GPUTarget | None,
) -> dict:
    """The arguments of `_adapter_fusion_grouped_fwd_kernel` for a call of the op."""
    layout = tuple(tuple(part) for part in (sizes, activations, counts, scored))
    group_table, column_table = _tables(*layout, x.device)
    blocks = schedule(x.dtype, target)
    order, _, block_table = routing_tables(groups, len(counts), blocks["BLOCK_T"])
    x, residual = contiguous_rows(x), contiguous_rows(residual)
    columns, adapters = widest(sizes, counts)
    block_d, block_r = column_blocks(columns)
    num_scored = max_scored(counts, scored)
    return {
        "x_ptr": x,
        "residual_ptr": residual,
        "order_ptr": order,
        "blocks_ptr": block_table,
        "groups_ptr": group_table,
        "columns_ptr": column_table,
        "w_in_ptr": w_in.contiguous(),
        "b_in_ptr": b_in.contiguous(),
        "w_out_ptr": w_out.contiguous(),
        "mask_ptr": contiguous(mask),
        "out_ptr": x.new_empty(x.shape),
        "p_ptr": x.new_empty([len(x), num_scored], dtype=torch.float32),
        "num_scored": num_scored,
        "stride_xm": x.stride(0),
        "stride_rm": 0 if residual is None else residual.stride(0),
        "H": x.shape[1],
        "CODES": tuple(sorted(set(activations))),
        "SCORED": num_scored > 0,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLOCK_N": padded(adapters),
        "PRECISION": precision(target),
        **blocks,
    }


def adapter_fusion_grouped(
    x: Tensor,
    residual: Tensor | None,
    groups: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    mask: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
    counts: Sequence[int],
    scored: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """See `fastfusion.ops.adapter_fusion_grouped`."""
    if not fits_one_launch(*widest(sizes, counts)):
        pair = two_launches.launch_arguments(
            x=[x], query=None, residual=residual, groups=groups, w_down=w_in, b_down=b_in,
            w_score=w_in, b_score=b_in, w_out=w_out, temperature=None, mask=mask,
            score_offset=None, starts=starts(sizes, counts, scored), counts=counts, sizes=sizes,
            activations=activations, target=target_of(x.device),
        )  # fmt: skip
        return two_launches.run(*pair)
    arguments = launch_arguments(
        x, residual, groups, w_in, b_in, w_out, mask, sizes, activations, counts, scored,
        target_of(x.device),
    )  # fmt: skip
    out, p = arguments["out_ptr"], arguments["p_ptr"]
    launch(_adapter_fusion_grouped_fwd_kernel, len(arguments["blocks_ptr"]), arguments)
    return out, p
