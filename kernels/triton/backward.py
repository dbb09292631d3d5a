"""Gradients of the adapter mixture, of the plain op and of the one over groups of rows.

The mathematics, per row, with g the gradient of the output, dy = [dt ; ds] and w = [p*z ; p] the
row that W_out is multiplied with (p = 1 and no t, s where nothing is scored):

    columns:   pre = W_down x + b_down      t = M q + m      dw = V g      z = act(pre)
               dp_i = sum_{j in i} z_j dw_j + v_i g, in one part for each tile that i is in
    scores:    ds = mask * p * (dp - sum_i p_i dp_i) / temperature         dt = ds * z
               dpre = (p * dw + ds * t) * act'(pre)
    input:     dx = W_down^T dpre, and W_score^T dy for the query, which may be x
    weights:   dW_down = sum over rows of dpre x^T, dW_score of dy q^T, dW_out of w g^T; the biases'
               gradients are the sums of dpre and of dy

One launch for each line and each of the last one's sums. x, q and p are what the forward got and
gave; nothing else was kept. The first launch takes a row block and a tile of columns, the second
the same, the third a row block and a tile of H, the fourth a tile of weight rows, one of H and a
share of the rows. Between them lie three buffers [T, W] in the inputs' dtype, W = D + N rounded
up to 16. The second launch works in place: dpre lies where pre was, dt where t was, p*z where dw
was, and behind the D columns are ds and p. A program of it reads its own elements before it
writes them, and no other program touches them.

A plain call is a call with one group whose rows lie in order; see `two_launches.py`. Base rows have
no part in any sum, and dx = 0.
The weights' sums stand in `weight_gradients.py`. No atomics: the same bits every time.

Precision: fp32 accumulation, as in `two_launches.py`. pre, t, dw and what is made of them are
rounded to the inputs' dtype between the launches, as PyTorch's products are.

Bytes per row (e per element, D rounded up to 16): the first launch reads x, g (and a query of its
own) once from device memory, ceil(D / BLOCK_D) times in all, and writes 3*D*e and the parts; the
second reads these and writes 3*W*e; the third reads (D + W)*e, ceil(H / BLOCK_H) times in all, and
writes H*e. After a layout's first call, which makes tables, nothing waits: CUDA graphs capture all.

One input per adapter: they are stacked to [N, T, H], and the third launch is one for each input.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from fastfusion.ops.weights import layouts

from .groups import (
    Layout,
    grouped_layout,
    plain_layout,
    row_blocks,
    rows_of,
    tables,
    wide_columns,
)
from .once import once
from .schedule_files import SAME_ROWS
from .schedules import schedule, target_of
from .tiles import (
    activate,
    activate_backward,
    add_bias,
    ceil_div,
    contiguous,
    contiguous_rows,
    dot_one_hot,
    dot_rows,
    launch,
    padded,
    precision,
)
from .weight_gradients import WeightRows, weight_gradient


@triton.jit
def _two_products(
    x_ptr, stride_xm, rows, mask_t,
    w_ptr, w_rows, mask_w, acc,
    v_ptr, v_rows, mask_v, acc_v,
    H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x[rows] @ w[w_rows]^T, and the same for v unless `v_ptr` is None; x is read once.

    Without v, `acc_v` is any tensor: Triton 3.6 does not return a None.
    """
    for k in range(0, H, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < H
        x_tile = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        acc = dot_rows(x, w_ptr, w_rows, mask_w, offs_k, mask_k, acc, H, True, PRECISION)
        if v_ptr is not None:
            acc_v = dot_rows(x, v_ptr, v_rows, mask_v, offs_k, mask_k, acc_v, H, True, PRECISION)
    return acc, acc_v


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def adapter_columns_bwd_kernel(
    x_ptr,  # [NUM_INPUTS, num_rows, H]
    query_ptr,  # [num_rows, H], or None: x
    grad_ptr,  # [num_rows, H]
    order_ptr,  # [num_rows], or None: rows in order
    blocks_ptr,  # [row blocks, 3], or None
    groups_ptr,  # see `groups.Groups`
    columns_ptr,
    tiles_ptr,
    w_down_ptr,  # [*, H]
    b_down_ptr,
    w_score_ptr,  # [*, H], or None: no group is scored
    b_score_ptr,
    w_out_ptr,  # [*, H]
    pre_ptr,  # [num_rows, stride_w]
    t_ptr,  # the same
    dw_ptr,  # the same
    parts_ptr,  # of dp: [parts, num_rows, num_adapters], fp32
    num_rows,
    num_tiles,
    num_adapters,
    stride_xi,
    stride_xm,
    stride_qm,
    stride_gm,
    stride_w,
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
    values = tl.load(layout + 2)
    column = tl.load(layout + 3)
    first_tile = tl.load(layout + 5)
    D = tl.load(layout + 6)
    if tile * BLOCK_D >= tl.maximum(D, 1):
        return
    first = tl.load(tiles_ptr + (first_tile + tile) * 3)
    count = tl.load(tiles_ptr + (first_tile + tile) * 3 + 1)

    offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    adapter = tl.load(columns_ptr + (column + offs_d) * 2, mask=mask_d, other=-1)
    own_tile = rows[:, None] * stride_w + offs_d[None, :]
    mask_td = mask_t[:, None] & (offs_d < wide_columns(D))[None, :]
    pre = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    t = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if w_score_ptr is not None:
        # groups without attention have no score weights
        mask_m = offs_d < tl.where(score >= 0, D, 0)
        # stored before the next product: registers hold two accumulators, not three
        if query_ptr is not None:
            t, _ = _two_products(
                query_ptr, stride_qm, rows, mask_t,
                w_score_ptr, score + offs_d, mask_m, t, None, None, None, t,
                H, BLOCK_K, PRECISION,
            )  # fmt: skip
            t = add_bias(t, b_score_ptr, score + offs_d, mask_m)
            tl.store(t_ptr + own_tile, t.to(DTYPE), mask=mask_td)
    if NUM_INPUTS > 1:
        for i in range(first, first + count):
            pre, _ = _two_products(
                x_ptr + i * tl.cast(stride_xi, tl.int64), stride_xm, rows, mask_t,
                w_down_ptr, down + offs_d, adapter == i, pre, None, None, None, pre,
                H, BLOCK_K, PRECISION,
            )  # fmt: skip
    elif (w_score_ptr is None) or (query_ptr is not None):
        pre, _ = _two_products(
            x_ptr, stride_xm, rows, mask_t,
            w_down_ptr, down + offs_d, mask_d, pre, None, None, None, pre,
            H, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        pre, t = _two_products(
            x_ptr, stride_xm, rows, mask_t,
            w_down_ptr, down + offs_d, mask_d, pre, w_score_ptr, score + offs_d, mask_m, t,
            H, BLOCK_K, PRECISION,
        )  # fmt: skip
    pre = add_bias(pre, b_down_ptr, down + offs_d, mask_d)
    tl.store(pre_ptr + own_tile, pre.to(DTYPE), mask=mask_td)
    if (w_score_ptr is not None) and (query_ptr is None):
        t = add_bias(t, b_score_ptr, score + offs_d, mask_m)
        tl.store(t_ptr + own_tile, t.to(DTYPE), mask=mask_td)

    dw = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if w_score_ptr is None:
        dw, _ = _two_products(
            grad_ptr, stride_gm, rows, mask_t,
            w_out_ptr, values + offs_d, mask_d, dw, None, None, None, dw,
            H, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        earlier = tl.load(tiles_ptr + (first_tile + tile) * 3 + 2)
        offs_a = first + tl.arange(0, BLOCK_A)
        mask_a = offs_a < first + count
        # what an adapter's dp has beside its columns belongs to its first tile
        starts_here = mask_a & (offs_a >= first + tl.minimum(earlier, 1))
        dp = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
        dw, dp = _two_products(
            grad_ptr, stride_gm, rows, mask_t,
            w_out_ptr, values + offs_d, mask_d, dw, w_out_ptr, values + D + offs_a, starts_here, dp,
            H, BLOCK_K, PRECISION,
        )  # fmt: skip
        if score >= 0:
            code = tl.load(columns_ptr + (column + offs_d) * 2 + 1, mask=mask_d, other=CODES[0])
            one_hot = adapter[:, None] == offs_a[None, :]
            dp = dot_one_hot(activate(pre, code, CODES) * dw, one_hot, dp, SPLIT, PRECISION)
            part = tl.where(offs_a == first, earlier, 0)
            index = (part[None, :] * tl.cast(num_rows, tl.int64) + rows[:, None]) * num_adapters
            mask_ta = mask_t[:, None] & mask_a[None, :]
            tl.store(parts_ptr + index + offs_a[None, :], dp, mask=mask_ta)
    tl.store(dw_ptr + own_tile, dw.to(DTYPE), mask=mask_td)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def adapter_scores_bwd_kernel(
    pre_ptr,  # [num_rows, stride_w]; becomes dpre
    t_ptr,  # the same, or None: no group is scored; becomes [dt, ds]
    dw_ptr,  # the same; becomes [p*z, p]
    parts_ptr,  # [PARTS, num_rows, num_adapters]
    p_ptr,  # [num_rows, num_scored]
    order_ptr,  # [num_rows], or None: rows in order
    blocks_ptr,  # [row blocks, 3], or None
    groups_ptr,  # see `groups.Groups`
    columns_ptr,
    adapters_ptr,
    temperature_ptr,  # [], or None: 1
    mask_ptr,  # [num_rows, num_scored], or None
    doffset_ptr,  # [num_rows], or None
    num_rows,
    num_tiles,
    num_adapters,
    num_scored,
    stride_w,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = pre_ptr.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE != tl.float32
    pid = tl.program_id(0)
    tile = pid % num_tiles
    group, rows, mask_t = rows_of(pid // num_tiles, order_ptr, blocks_ptr, num_rows, BLOCK_T)
    if group < 0:
        return
    layout = groups_ptr + group * 8
    column = tl.load(layout + 3)
    D = tl.load(layout + 6)
    N = tl.load(layout + 7)
    if tile * BLOCK_D >= D + N:
        return
    offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    code = tl.load(columns_ptr + (column + offs_d) * 2 + 1, mask=mask_d, other=CODES[0])
    own_tile = rows[:, None] * stride_w + offs_d[None, :]
    # what the launch before wrote
    mask_in = mask_t[:, None] & (offs_d < wide_columns(D))[None, :]
    mask_out = mask_t[:, None] & (offs_d < wide_columns(D + N))[None, :]
    pre = tl.load(pre_ptr + own_tile, mask=mask_in, other=0.0).to(tl.float32)
    dz = tl.load(dw_ptr + own_tile, mask=mask_in, other=0.0).to(tl.float32)
    # behind the columns, v_i is multiplied with p_i alone
    ones = tl.where((offs_d >= D) & (offs_d < D + N), 1.0, 0.0)
    w = tl.where(mask_d[None, :], activate(pre, code, CODES), ones[None, :])
    if t_ptr is not None:
        if tl.load(layout + 1) >= 0:
            offs_n = tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            mask_tn = mask_t[:, None] & mask_n[None, :]
            row_n = rows[:, None] * num_scored + offs_n[None, :]
            p = tl.load(p_ptr + row_n, mask=mask_tn, other=0.0)
            in_tiles = tl.load(adapters_ptr + tl.load(layout + 4) + offs_n, mask=mask_n, other=0)
            dp = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            for i in range(PARTS):
                index = (i * tl.cast(num_rows, tl.int64) + rows[:, None]) * num_adapters
                mask_part = mask_t[:, None] & (i < in_tiles)[None, :]
                dp += tl.load(parts_ptr + index + offs_n[None, :], mask=mask_part, other=0.0)
            ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
            if temperature_ptr is not None:
                ds /= tl.load(temperature_ptr).to(tl.float32)
            if mask_ptr is not None:
                ds *= tl.load(mask_ptr + row_n, mask=mask_tn, other=0.0).to(tl.float32)
            if doffset_ptr is not None:
                if tile == 0:
                    tl.store(doffset_ptr + rows, tl.sum(ds, axis=1).to(DTYPE), mask=mask_t)
            adapter = tl.load(columns_ptr + (column + offs_d) * 2, mask=mask_d, other=-1)
            adapter = tl.where(mask_d, adapter, offs_d - D)
            one_hot = adapter[None, :] == offs_n[:, None]
            zeros = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            p_columns = dot_one_hot(p, one_hot, zeros, SPLIT, PRECISION)
            ds_columns = dot_one_hot(ds, one_hot, zeros, SPLIT, PRECISION)
            t = tl.load(t_ptr + own_tile, mask=mask_in, other=0.0).to(tl.float32)
            dz = p_columns * dz + ds_columns * t
            tl.store(t_ptr + own_tile, (ds_columns * w).to(DTYPE), mask=mask_out)
            w = p_columns * w
    dpre = tl.where(mask_d[None, :], activate_backward(dz, pre, code, CODES), 0.0)
    tl.store(pre_ptr + own_tile, dpre.to(DTYPE), mask=mask_out)
    tl.store(dw_ptr + own_tile, w.to(DTYPE), mask=mask_out)


@triton.jit(do_not_specialize=["num_rows", "begin", "end"])
def adapter_input_bwd_kernel(
    dpre_ptr,  # [num_rows, stride_w], or None
    dy_ptr,  # the same, or None
    add_ptr,  # [num_rows, H] to add, or None
    order_ptr,  # [num_rows], or None: rows in order
    blocks_ptr,  # [row blocks, 3], or None
    groups_ptr,  # see `groups.Groups`
    w_down_ptr,  # [*, H]
    w_score_ptr,  # [*, H]
    out_ptr,  # [num_rows, H]
    num_rows,
    begin,  # the columns that read this input
    end,
    stride_w,
    stride_am,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    group, rows, mask_t = rows_of(pid // H_TILES, order_ptr, blocks_ptr, num_rows, BLOCK_T)
    offs_h = pid % H_TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask_th = mask_t[:, None] & mask_h[None, :]
    out = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    if group >= 0:
        layout = groups_ptr + group * 8
        D = tl.load(layout + 6)
        if dpre_ptr is not None:
            down = tl.load(layout)
            last = tl.minimum(D, end)
            # a row's tile begins where a wide access can
            for k in range(begin // 16 * 16, last, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                own = (offs_k >= begin) & (offs_k < last)
                mask_tk = mask_t[:, None] & (offs_k < wide_columns(D))[None, :]
                tile = dpre_ptr + rows[:, None] * stride_w + offs_k[None, :]
                dpre = tl.load(tile, mask=mask_tk, other=0.0)
                out = dot_rows(
                    dpre, w_down_ptr, down + offs_k, own, offs_h, mask_h, out, H, False, PRECISION
                )
        if dy_ptr is not None:
            score = tl.load(layout + 1)
            used = tl.where(score >= 0, D + tl.load(layout + 7), 0)
            for k in range(0, used, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_tk = mask_t[:, None] & (offs_k < wide_columns(used))[None, :]
                tile = dy_ptr + rows[:, None] * stride_w + offs_k[None, :]
                dy = tl.load(tile, mask=mask_tk, other=0.0)
                out = dot_rows(
                    dy, w_score_ptr, score + offs_k, offs_k < used, offs_h, mask_h, out, H, False,
                    PRECISION,
                )  # fmt: skip
    if add_ptr is not None:
        add_tile = add_ptr + rows[:, None] * stride_am + offs_h[None, :]
        out += tl.load(add_tile, mask=mask_th, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * H + offs_h[None, :], out.to(DTYPE), mask=mask_th)


class _Mixture(NamedTuple):
    """What the gradients are products of, and what their launches share."""

    dpre: Tensor
    """[T, W]"""
    dy: Tensor | None
    """[T, W]; None where nothing is scored."""
    w: Tensor
    """[T, W]"""
    doffset: Tensor | None
    """[T]"""
    row_blocks: int
    inputs: dict
    """What all launches for inputs are called with."""
    sums: dict
    """What all launches for weights are."""


def _mixture(
    *,
    grad_out: Tensor,
    inputs: Tensor,
    query: Tensor | None,
    groups: Tensor | None,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    p: Tensor,
    layout: Layout,
    needs_offset: bool,
) -> _Mixture:
    """The first two launches.

    Args:
        inputs: [1 or N, T, H].
        query: None where it is the only input.
        groups: each row's group, or None where all rows have the only one.
        layout: `w_down` and `w_score` may be one tensor.
    """
    num_rows, hidden_size = grad_out.shape
    dtype, device = grad_out.dtype, grad_out.device
    target = target_of(device)
    blocks = {
        kernel: schedule(f"backward_{kernel}", dtype, target, num_rows)
        for kernel in ("columns", "scores", "input", "weights")
    }
    of_rows = {name: blocks[name.removeprefix("backward_")]["BLOCK_T"] for name in SAME_ROWS}
    if len(set(of_rows.values())) > 1:
        raise ValueError(f"schedules: expected one BLOCK_T for {num_rows} rows; got {of_rows}")
    block_t, block_d = blocks["columns"]["BLOCK_T"], blocks["columns"]["BLOCK_D"]
    found = tables(layout, block_d, device)
    cut = row_blocks(groups, len(layout.counts), num_rows, block_t)
    adapters = layout.adapters
    width = ceil_div(layout.columns + adapters, 16) * 16
    is_scored = any(layout.scored)
    pre, dw = grad_out.new_empty(num_rows, width), grad_out.new_empty(num_rows, width)
    t, parts, doffset = None, None, None
    if is_scored:
        t = grad_out.new_empty(num_rows, width)
        parts = grad_out.new_empty(found.num_parts, num_rows, adapters, dtype=torch.float32)
    if needs_offset:
        doffset = grad_out.new_empty(num_rows)
    rows = {
        "order_ptr": cut.order,
        "blocks_ptr": cut.blocks,
        "groups_ptr": found.groups,
        "num_rows": num_rows,
    }
    shared = rows | {
        "pre_ptr": pre,
        "t_ptr": t,
        "dw_ptr": dw,
        "parts_ptr": parts,
        "columns_ptr": found.columns,
        "num_adapters": adapters,
        "stride_w": width,
        "CODES": layout.codes,
        "PRECISION": precision(dtype, target),
    }
    first = shared | {
        "x_ptr": inputs,
        "query_ptr": query,
        "grad_ptr": grad_out,
        "tiles_ptr": found.tiles,
        "w_down_ptr": w_down.contiguous(),
        "b_down_ptr": b_down.contiguous(),
        "w_score_ptr": contiguous(w_score) if is_scored else None,
        "b_score_ptr": contiguous(b_score) if is_scored else None,
        "w_out_ptr": w_out.contiguous(),
        "num_tiles": found.num_tiles,
        "stride_xi": inputs.stride(0),
        "stride_xm": inputs.stride(1),
        "stride_qm": 0 if query is None else query.stride(0),
        "stride_gm": grad_out.stride(0),
        "H": hidden_size,
        "NUM_INPUTS": len(inputs),
        "BLOCK_A": padded(found.tile_adapters),
        **blocks["columns"],
    }
    launch(adapter_columns_bwd_kernel, cut.count * found.num_tiles, first)
    num_tiles = ceil_div(width, blocks["scores"]["BLOCK_D"])
    second = shared | {
        "p_ptr": p.contiguous() if is_scored else None,
        "adapters_ptr": found.adapters,
        "temperature_ptr": temperature,
        "mask_ptr": contiguous(mask) if is_scored else None,
        "doffset_ptr": doffset,
        "num_tiles": num_tiles,
        "num_scored": p.shape[-1],
        "PARTS": found.num_parts,
        "BLOCK_N": padded(adapters),
        **blocks["scores"],
    }
    launch(adapter_scores_bwd_kernel, cut.count * num_tiles, second)
    third = rows | {
        "stride_w": width,
        "H": hidden_size,
        "PRECISION": precision(dtype, target),
        **blocks["input"],
    }
    sums = {
        "order": cut.order,
        "offsets": cut.offsets,
        "num_groups": len(layout.counts),
        "blocks": blocks["weights"],
        "precision": precision(dtype, target),
    }
    return _Mixture(pre, t, dw, doffset, cut.count, third, sums)


def _input_gradient(
    mixture: _Mixture,
    out: Tensor,
    dpre: Tensor | None,
    dy: Tensor | None,
    w_down: Tensor,
    w_score: Tensor | None,
    begin: int = 0,
    end: int = 0,
    add: Tensor | None = None,
) -> None:
    """Writes out = dpre[:, begin:end] W_down[begin:end] + dy W_score + add, each if it is there."""
    arguments = mixture.inputs | {
        "dpre_ptr": dpre,
        "dy_ptr": dy,
        "add_ptr": add,
        "w_down_ptr": w_down.contiguous(),
        "w_score_ptr": contiguous(w_score),
        "out_ptr": out,
        "begin": begin,
        "end": end,
        "stride_am": 0 if add is None else add.stride(0),
    }
    tiles = ceil_div(out.shape[1], arguments["BLOCK_H"])
    launch(adapter_input_bwd_kernel, mixture.row_blocks * tiles, arguments)


def adapter_fusion_backward(
    grad_out: Tensor,
    x: Sequence[Tensor],
    query: Tensor | None,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    p: Tensor,
    sizes: Sequence[int],
    activations: Sequence[int],
    needs: Sequence[bool],
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastfusion.ops.torch_backend.adapter_fusion_backward`.

    Args:
        add: [T, H] to add to the first input's gradient.
    """
    needs_x, needs_query, needs_down, needs_score, needs_out, needs_offset = needs
    empty = grad_out.new_empty(0)
    dx = dquery = dw_down = db_down = dw_score = db_score = dw_out = doffset = empty
    if not any(needs):
        return dx, dquery, dw_down, db_down, dw_score, db_score, dw_out, doffset
    columns = sum(sizes)
    used = columns + len(sizes)
    grad_out, query = contiguous_rows(grad_out), contiguous_rows(query)
    if len(x) == 1:
        inputs, ends = contiguous_rows(x[0]).unsqueeze(0), [columns]
    else:
        inputs, ends = torch.stack(list(x)), list(itertools.accumulate(sizes))
    is_query = query is None  # the first input
    if len(x) > 1 and is_query:
        query = inputs[0]
    mixture = _mixture(
        grad_out=grad_out, inputs=inputs, query=query, groups=None, w_down=w_down, b_down=b_down,
        w_score=w_score, b_score=b_score, w_out=w_out, temperature=temperature, mask=mask, p=p,
        layout=plain_layout(sizes, activations, w_score is not None), needs_offset=needs_offset,
    )  # fmt: skip
    own = list(zip([0, *ends], ends, strict=False))  # the columns that read each input
    if needs_x:
        dx = grad_out.new_empty(inputs.shape)
        for i, (begin, end) in enumerate(own):
            dy, more = (mixture.dy if is_query else None, add) if i == 0 else (None, None)
            _input_gradient(mixture, dx[i], mixture.dpre, dy, w_down, w_score, begin, end, more)
    if needs_query:
        dquery = grad_out.new_empty(grad_out.shape)
        _input_gradient(mixture, dquery, None, mixture.dy, w_down, w_score)
    if needs_down:
        parts = [WeightRows(0, begin, end, end, 0, i) for i, (begin, end) in enumerate(own)]
        products = [(mixture.dpre, inputs, parts)]
        dw_down, db_down = weight_gradient(w_down, b_down, products, **mixture.sums)
    if needs_score:
        queries = inputs[:1] if query is None else query.unsqueeze(0)
        products = [(mixture.dy, queries, [WeightRows(0, 0, used, len(w_score), 0, 0)])]
        dw_score, db_score = weight_gradient(w_score, b_score, products, **mixture.sums)
    if needs_out:
        parts = [WeightRows(0, 0, used, len(w_out), 0, 0)]
        products = [(mixture.w, grad_out.unsqueeze(0), parts)]
        dw_out, _ = weight_gradient(w_out, None, products, **mixture.sums)
    if needs_offset:
        doffset = mixture.doffset
    return dx, dquery, dw_down, db_down, dw_score, db_score, dw_out, doffset


@once
def _weight_rows(layout: Layout) -> tuple[tuple[WeightRows, ...], ...]:
    """Of the down-projections, the score weights and W_out of all groups."""
    down, score, out = [], [], []
    for g, part in enumerate(layouts(layout.sizes, layout.counts, layout.scored)):
        columns = part.down.stop - part.down.start
        used, height = columns + layout.counts[g], part.out.stop - part.out.start
        down.append(WeightRows(g, 0, columns, columns, part.down.start, 0))
        if part.score is not None:
            score.append(WeightRows(g, 0, used, height, part.score.start, 0))
        out.append(WeightRows(g, 0, used, height, part.out.start, 0))
    return tuple(down), tuple(score), tuple(out)


def adapter_fusion_grouped_backward(
    grad_out: Tensor,
    x: Tensor,
    groups: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    mask: Tensor | None,
    p: Tensor,
    sizes: Sequence[int],
    activations: Sequence[int],
    counts: Sequence[int],
    scored: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastfusion.ops.torch_backend.adapter_fusion_grouped_backward`."""
    needs_x, needs_in, needs_out = needs
    empty = grad_out.new_empty(0)
    dx = dw_in = db_in = dw_out = empty
    if not any(needs):
        return dx, dw_in, db_in, dw_out
    layout = grouped_layout(sizes, activations, counts, scored)
    grad_out, inputs = contiguous_rows(grad_out), contiguous_rows(x).unsqueeze(0)
    mixture = _mixture(
        grad_out=grad_out, inputs=inputs, query=None, groups=groups, w_down=w_in, b_down=b_in,
        w_score=w_in, b_score=b_in, w_out=w_out, temperature=None, mask=mask, p=p, layout=layout,
        needs_offset=False,
    )  # fmt: skip
    if needs_x:
        dx = x.new_empty(x.shape)
        end = sum(sizes)
        _input_gradient(mixture, dx, mixture.dpre, mixture.dy, w_in, w_in, 0, end)
    down, score, out = _weight_rows(layout)
    if needs_in:
        products = [(mixture.dpre, inputs, down)]
        if score:
            products.append((mixture.dy, inputs, score))
        dw_in, db_in = weight_gradient(w_in, b_in, products, **mixture.sums)
    if needs_out:
        products = [(mixture.w, grad_out.unsqueeze(0), out)]
        dw_out, _ = weight_gradient(w_out, None, products, **mixture.sums)
    return dx, dw_in, db_in, dw_out
