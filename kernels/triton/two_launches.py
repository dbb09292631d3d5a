"""The adapter mixture in two Triton launches, where a row block's columns do not fit one program.

The mathematics is that of `adapter_fusion.py`, the same for both ops:

    columns:   z = act(W_down x + b_down)          t = M q + m             c = C q + c_0
               s_i = sum_{j in i} z_j t_j + c_i, in one part for each tile that adapter i is in
    output:    p = softmax(mask * (sum of the parts + offset) / temperature)
               out = residual + [p*z ; p] W_out

The first launch takes a row block and a tile of columns, the second a row block and a tile of H.
The columns of all adapters are one flat axis that the tiles cut anywhere: nothing is padded per
adapter. Between the launches lie z, [T, D] in the inputs' dtype, and the parts of the scores, fp32,
at most `1 + ceil(d / BLOCK_D)` of them for an adapter.

A plain call is a call with one group whose rows lie in order. Groups come with the tables of
`fastfusion.ops.routing`, as in `grouped.py`: a program of either launch takes an entry of the
blocks and reads and writes rows where they lie.

Bytes per row, with e bytes per element: the first launch reads x (and a query of its own)
ceil(D / BLOCK_D) times, from L2 after the first, and writes D*e and the parts; the second reads
these ceil(H / BLOCK_H) times, from L2 after the first, and the residual once, and writes H*e.
Device memory sees x, residual and output once, z written and read.

Precision, determinism: as in `adapter_fusion.py`, but z is rounded to the inputs' dtype before it
is weighed, as the literal formulas do. Tiles are larger from 4096 rows on (`two_launch_schedule`),
so a row's bits may differ between a call of fewer rows and one of more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from fastfusion.ops.routing import routing_tables
from fastfusion.ops.weights import max_scored
from triton.backends.compiler import GPUTarget

from .groups import Start, rows_of, tables, wide_columns, widest
from .tiles import (
    activate,
    add_bias,
    contiguous,
    contiguous_rows,
    dot_one_hot,
    dot_rows,
    launch,
    padded,
    precision,
    two_launch_schedule,
)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def adapter_columns_kernel(
    x_ptr,  # [NUM_INPUTS, num_rows, H]
    query_ptr,  # [num_rows, H], or None: x
    order_ptr,  # [num_rows], or None: rows in order
    blocks_ptr,  # [row blocks, 3], or None
    groups_ptr,  # see `groups.Groups`
    columns_ptr,
    tiles_ptr,
    w_down_ptr,  # [*, H]
    b_down_ptr,
    w_score_ptr,  # [*, H], or None: no group is scored
    b_score_ptr,
    z_ptr,  # [num_rows, stride_zm]
    parts_ptr,  # [parts, num_rows, num_adapters], fp32
    num_rows,
    num_tiles,
    num_adapters,
    stride_xi,
    stride_xm,
    stride_qm,
    stride_zm,
    H: tl.constexpr,
    CODES: tl.constexpr,  # the activations that occur
    NUM_INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,  # the adapters of a tile
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE != tl.float32
    pid = tl.program_id(0)
    tile = pid % num_tiles
    group, rows, mask_t = rows_of(pid // num_tiles, order_ptr, blocks_ptr, num_rows, BLOCK_T)
    if group < 0:
        return
    layout = groups_ptr + group * 8
    down = tl.load(layout)
    score = tl.load(layout + 1)
    column = tl.load(layout + 3)
    first_tile = tl.load(layout + 5)
    D = tl.load(layout + 6)
    if tile * BLOCK_D >= tl.maximum(D, 1):
        return
    first = tl.load(tiles_ptr + (first_tile + tile) * 3)
    count = tl.load(tiles_ptr + (first_tile + tile) * 3 + 1)
    earlier = tl.load(tiles_ptr + (first_tile + tile) * 3 + 2)

    offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    adapter = tl.load(columns_ptr + (column + offs_d) * 2, mask=mask_d, other=-1)
    code = tl.load(columns_ptr + (column + offs_d) * 2 + 1, mask=mask_d, other=CODES[0])
    offs_a = first + tl.arange(0, BLOCK_A)
    mask_a = offs_a < first + count
    # what an adapter's score has beside its columns belongs to its first tile
    starts_here = mask_a & (offs_a >= first + tl.minimum(earlier, 1))
    pre = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    t = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    c = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    own_query: tl.constexpr = (query_ptr is not None) or NUM_INPUTS > 1

    if own_query:
        for i in range(first, first + (count if NUM_INPUTS > 1 else 1)):
            x_input = x_ptr
            own = mask_d
            if NUM_INPUTS > 1:
                x_input += i * tl.cast(stride_xi, tl.int64)
                own = adapter == i
            for k in range(0, H, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_k = offs_k < H
                x_tile = x_input + rows[:, None] * stride_xm + offs_k[None, :]
                x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
                pre = dot_rows(
                    x, w_down_ptr, down + offs_d, own, offs_k, mask_k, pre, H, True, PRECISION
                )
    query_input = x_ptr
    stride_query = stride_xm
    if query_ptr is not None:
        query_input = query_ptr
        stride_query = stride_qm
    if w_score_ptr is not None:
        # groups without attention have no score weights
        mask_m = offs_d < tl.where(score >= 0, D, 0)
        mask_c = starts_here & (offs_a < tl.where(score >= 0, first + count, 0))
        for k in range(0, H, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < H
            x_tile = query_input + rows[:, None] * stride_query + offs_k[None, :]
            x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
            if not own_query:
                pre = dot_rows(
                    x, w_down_ptr, down + offs_d, mask_d, offs_k, mask_k, pre, H, True, PRECISION
                )
            t = dot_rows(
                x, w_score_ptr, score + offs_d, mask_m, offs_k, mask_k, t, H, True, PRECISION
            )
            c = dot_rows(
                x, w_score_ptr, score + D + offs_a, mask_c, offs_k, mask_k, c, H, True, PRECISION
            )
    elif not own_query:
        for k in range(0, H, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < H
            x_tile = query_input + rows[:, None] * stride_query + offs_k[None, :]
            x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
            pre = dot_rows(
                x, w_down_ptr, down + offs_d, mask_d, offs_k, mask_k, pre, H, True, PRECISION
            )

    z = activate(add_bias(pre, b_down_ptr, down + offs_d, mask_d), code, CODES)
    z = tl.where(mask_d[None, :], z, 0.0)
    if w_score_ptr is not None:
        if score >= 0:
            t = add_bias(t, b_score_ptr, score + offs_d, mask_d)
            s = add_bias(c, b_score_ptr, score + D + offs_a, starts_here)
            one_hot = adapter[:, None] == offs_a[None, :]
            s = dot_one_hot(z * t, one_hot, s, SPLIT, PRECISION)
            part = tl.where(offs_a == first, earlier, 0)
            index = (part[None, :] * tl.cast(num_rows, tl.int64) + rows[:, None]) * num_adapters
            mask_ta = mask_t[:, None] & mask_a[None, :]
            tl.store(parts_ptr + index + offs_a[None, :], s, mask=mask_ta)
    # behind the scores: before them it made registers spill on sm_90
    z_tile = z_ptr + rows[:, None] * stride_zm + offs_d[None, :]
    mask_td = mask_t[:, None] & (offs_d < wide_columns(D))[None, :]
    tl.store(z_tile, z.to(DTYPE), mask=mask_td)


@triton.jit(do_not_specialize=["num_rows"])
def adapter_output_kernel(
    z_ptr,  # [num_rows, stride_zm]
    parts_ptr,  # [PARTS, num_rows, num_adapters], or None: p = 1
    residual_ptr,  # [num_rows, H], or None
    order_ptr,  # [num_rows], or None: rows in order
    blocks_ptr,  # [row blocks, 3], or None
    groups_ptr,  # see `groups.Groups`
    columns_ptr,
    adapters_ptr,
    w_out_ptr,  # [*, H]
    temperature_ptr,  # [], or None: 1
    mask_ptr,  # [num_rows, num_scored], or None
    offset_ptr,  # [num_rows], or None
    out_ptr,  # [num_rows, H]
    p_ptr,  # [num_rows, num_scored]
    num_rows,
    num_adapters,
    num_scored,
    stride_rm,
    stride_zm,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE != tl.float32
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    h_tile = pid % H_TILES
    group, rows, mask_t = rows_of(pid // H_TILES, order_ptr, blocks_ptr, num_rows, BLOCK_T)
    offs_h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask_th = mask_t[:, None] & mask_h[None, :]
    offs_n = tl.arange(0, BLOCK_N)
    out_tile = out_ptr + rows[:, None] * H + offs_h[None, :]
    out = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    p = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if residual_ptr is not None:
        residual_tile = residual_ptr + rows[:, None] * stride_rm + offs_h[None, :]
        out += tl.load(residual_tile, mask=mask_th, other=0.0).to(tl.float32)
    if group >= 0:
        layout = groups_ptr + group * 8
        values = tl.load(layout + 2)
        column = tl.load(layout + 3)
        D = tl.load(layout + 6)
        N = tl.load(layout + 7)
        mask_n = offs_n < N
        p += mask_n.to(tl.float32)[None, :]
        if parts_ptr is not None:
            if tl.load(layout + 1) >= 0:
                in_tiles = tl.load(
                    adapters_ptr + tl.load(layout + 4) + offs_n, mask=mask_n, other=0
                )
                s = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
                for i in range(PARTS):
                    index = (i * tl.cast(num_rows, tl.int64) + rows[:, None]) * num_adapters
                    mask_part = mask_t[:, None] & (i < in_tiles)[None, :]
                    s += tl.load(parts_ptr + index + offs_n[None, :], mask=mask_part, other=0.0)
                if offset_ptr is not None:
                    offset = tl.load(offset_ptr + rows, mask=mask_t, other=0.0)
                    s += offset.to(tl.float32)[:, None]
                if mask_ptr is not None:
                    mask_tile = mask_ptr + rows[:, None] * num_scored + offs_n[None, :]
                    mask_tn = mask_t[:, None] & mask_n[None, :]
                    s *= tl.load(mask_tile, mask=mask_tn, other=0.0).to(tl.float32)
                if temperature_ptr is not None:
                    s /= tl.load(temperature_ptr).to(tl.float32)
                s = tl.where(mask_n[None, :], s, float("-inf"))
                e = tl.exp(s - tl.max(s, axis=1)[:, None])
                p = e / tl.sum(e, axis=1)[:, None]
        out = dot_rows(
            p.to(DTYPE), w_out_ptr, values + D + offs_n, mask_n, offs_h, mask_h,
            out, H, False, PRECISION,
        )  # fmt: skip
        for k in range(0, D, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < D
            z_tile = z_ptr + rows[:, None] * stride_zm + offs_k[None, :]
            mask_tk = mask_t[:, None] & (offs_k < wide_columns(D))[None, :]
            z = tl.load(z_tile, mask=mask_tk, other=0.0)
            if parts_ptr is not None:
                adapter = tl.load(columns_ptr + (column + offs_k) * 2, mask=mask_k, other=-1)
                one_hot = adapter[None, :] == offs_n[:, None]
                zeros = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
                spread = dot_one_hot(p, one_hot, zeros, SPLIT, PRECISION)
                z = (z.to(tl.float32) * spread).to(DTYPE)
            out = dot_rows(
                z, w_out_ptr, values + offs_k, mask_k, offs_h, mask_h, out, H, False, PRECISION
            )
        if parts_ptr is not None:
            p = tl.where(tl.load(layout + 1) >= 0, p, 0.0)
    if parts_ptr is not None:
        if h_tile == 0:
            p_tile = p_ptr + rows[:, None] * num_scored + offs_n[None, :]
            tl.store(p_tile, p, mask=mask_t[:, None] & (offs_n < num_scored)[None, :])
    tl.store(out_tile, out.to(DTYPE), mask=mask_th)


def launch_arguments(
    *,
    x: Sequence[Tensor],
    query: Tensor | None,
    residual: Tensor | None,
    groups: Tensor | None,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    score_offset: Tensor | None,
    starts: Sequence[Start],
    counts: Sequence[int],
    sizes: Sequence[int],
    activations: Sequence[int],
    target: GPUTarget | None,
) -> tuple[dict, dict, int]:
    """The arguments of both kernels for a call of either op, and the number of row blocks.

    Args:
        groups: each row's group, or None where all rows have the only one.
        starts: of the groups; `w_down` and `w_score` may be one tensor.
        counts: of adapters.
        target: None in the interpreter.
    """
    num_rows, hidden_size = x[0].shape
    blocks = two_launch_schedule(x[0].dtype, target, num_rows)
    options = {name: blocks[name] for name in ("num_warps", "num_stages")}
    block_t, block_d = blocks["BLOCK_T"], blocks["BLOCK_D"]
    layout = tuple(tuple(part) for part in (starts, counts, sizes, activations))
    found = tables(*layout, block_d, x[0].device)
    order, block_table, row_blocks = None, None, triton.cdiv(num_rows, block_t)
    if groups is not None:
        order, _, block_table = routing_tables(groups, len(counts), block_t)
        row_blocks = len(block_table)
    if len(x) == 1:
        inputs = contiguous_rows(x[0]).unsqueeze(0)
    else:
        inputs = torch.stack(list(x))
    query, residual = contiguous_rows(query), contiguous_rows(residual)
    columns, adapters = widest(sizes, counts)
    num_scored = max_scored(counts, [score >= 0 for _, score, _ in starts])
    is_scored = num_scored > 0
    z = x[0].new_empty(num_rows, -(-columns // 16) * 16)
    parts, p = None, x[0].new_empty([0], dtype=torch.float32)
    if is_scored:
        parts = x[0].new_empty(found.num_parts, num_rows, adapters, dtype=torch.float32)
        p = x[0].new_empty(num_rows, num_scored, dtype=torch.float32)
    elif groups is not None:
        p = x[0].new_empty([num_rows, 0], dtype=torch.float32)
    shared = {
        "z_ptr": z,
        "parts_ptr": parts,
        "order_ptr": order,
        "blocks_ptr": block_table,
        "groups_ptr": found.groups,
        "columns_ptr": found.columns,
        "num_rows": num_rows,
        "num_adapters": adapters,
        "stride_zm": z.stride(0),
        "H": hidden_size,
        "BLOCK_T": block_t,
        "PRECISION": precision(target),
        **options,
    }
    first = shared | {
        "x_ptr": inputs,
        "query_ptr": query,
        "tiles_ptr": found.tiles,
        "w_down_ptr": w_down.contiguous(),
        "b_down_ptr": b_down.contiguous(),
        "w_score_ptr": contiguous(w_score) if is_scored else None,
        "b_score_ptr": contiguous(b_score) if is_scored else None,
        "num_tiles": found.num_tiles,
        "stride_xi": inputs.stride(0),
        "stride_xm": inputs.stride(1),
        "stride_qm": 0 if query is None else query.stride(0),
        "CODES": tuple(sorted(set(activations))),
        "NUM_INPUTS": len(x),
        "BLOCK_D": block_d,
        "BLOCK_A": padded(found.tile_adapters),
        "BLOCK_K": blocks["BLOCK_K"],
    }
    second = shared | {
        "adapters_ptr": found.adapters,
        "residual_ptr": residual,
        "w_out_ptr": w_out.contiguous(),
        "temperature_ptr": temperature,
        "mask_ptr": contiguous(mask),
        "offset_ptr": contiguous(score_offset),
        "out_ptr": x[0].new_empty(num_rows, hidden_size),
        "p_ptr": p,
        "num_scored": num_scored,
        "stride_rm": 0 if residual is None else residual.stride(0),
        "PARTS": found.num_parts,
        "BLOCK_N": padded(adapters),
        "BLOCK_K": blocks["BLOCK_K"],
        "BLOCK_H": blocks["BLOCK_H"],
    }
    return first, second, row_blocks


def run(first: dict, second: dict, row_blocks: int) -> tuple[Tensor, Tensor]:
    """Both launches, with what `launch_arguments` returns; out and p."""
    out, p = second["out_ptr"], second["p_ptr"]
    h_tiles = triton.cdiv(out.shape[1], second["BLOCK_H"])
    launch(adapter_columns_kernel, row_blocks * first["num_tiles"], first)
    launch(adapter_output_kernel, row_blocks * h_tiles, second)
    return out, p
