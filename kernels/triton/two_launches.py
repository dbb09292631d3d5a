"""The adapter mixture in two Triton launches: where one program does not hold the columns of a row
block, or row blocks are too few programs.

The mathematics is that of `one_launch.py`, the same for all ops:

    columns:   z = act(W_down x + b_down)          t = M q + m             c = C q + c_0
               s_i = sum_{j in i} z_j t_j + c_i, in one part for each tile that adapter i is in
    output:    p = softmax(mask * (sum of the parts + offset) / temperature)
               out = residual + [p*z ; p] W_out

The first launch takes a row block and a tile of columns, the second a row block and a tile of H.
The columns of all adapters are one flat axis that the tiles cut anywhere: nothing is padded per
adapter. Between the launches lie z, [T, D] in the inputs' dtype, and the parts of the scores, fp32,
at most `1 + ceil(d / BLOCK_D)` of them for an adapter.

A LayerNorm in front is absorbed by the first launch, each program summing the statistics of its
rows; few rows are normalised by a launch before, since the sums of `fold_norm` would read the
weights once more. A LayerNorm behind needs whole rows: with enough row blocks (FUSED_NORM) a
program of the second launch takes all tiles of H, writes its rows before the norm and reads them
back, as in `one_launch.py` and as safe as there; with few, a last launch normalises the rows,
because more programs are worth more than the bytes.

Few rows (decoding; SWAPPED): the weights stand on the M side of the products and the rows on the N
side, column and H tiles are narrow, so that their number is near that of the multiprocessors. The
weights' bytes bound the time; no sum over H is split.

Bytes per row, with e bytes per element: the first launch reads x (and a query of its own) ceil(D /
BLOCK_D) times, from L2 after the first, and writes D*e and the parts; the second reads these ceil(H
/ BLOCK_H) times, from L2 after the first, and the residual once, and writes H*e. Device memory sees
x, residual and output once (twice where few rows are normalised first), z written and read.

Precision, determinism: as in `one_launch.py`, but z is rounded to the inputs' dtype before it is
weighed, as the literal formulas do. Tiles depend on the number of rows (`schedules.json`), so a
row's bits may differ between a call of few rows and one of many.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from .groups import row_blocks, rows_of, tables, wide_columns
from .mixtures import (
    Mixture,
    Outputs,
    norm_arguments,
    outputs_of,
    residual_arguments,
    row_arguments,
    score_arguments,
    weight_arguments,
)
from .norms import layer_norm, normalise_rows
from .projections import attention, normalised, project, row_shift, statistics
from .schedules import schedule
from .tiles import (
    activate,
    add_bias,
    ceil_div,
    contiguous_rows,
    dot_one_hot,
    dot_rows,
    launch,
    padded,
    precision,
)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def adapter_columns_kernel(
    x_ptr,  # [NUM_INPUTS, num_rows, H]
    query_ptr,  # [num_rows, H], or None: x
    input_ptr,  # [num_rows, H]: added to x before a LayerNorm in front, or None
    order_ptr,  # [num_rows], or None: rows in order
    blocks_ptr,  # [row blocks, 3], or None
    groups_ptr,  # see `groups.Groups`
    columns_ptr,
    tiles_ptr,
    w_down_ptr,  # [*, H]
    b_down_ptr,
    w_score_ptr,  # [*, H], or None: no group is scored
    b_score_ptr,
    gain_down_ptr,  # of a LayerNorm in front, or None
    gain_score_ptr,
    ln_weight_ptr,
    z_ptr,  # [num_rows, stride_zm]
    parts_ptr,  # [parts, num_rows, num_adapters], fp32
    num_rows,
    num_tiles,
    num_adapters,
    ln_eps,
    stride_xi,
    stride_xm,
    stride_qm,
    stride_im,
    stride_zm,
    H: tl.constexpr,
    CODES: tl.constexpr,  # the activations that occur
    NUM_INPUTS: tl.constexpr,
    MIXED: tl.constexpr,  # some groups are scored, some are not
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,  # the adapters of a tile
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE != tl.float32
    SCORED: tl.constexpr = w_score_ptr is not None
    NORM: tl.constexpr = gain_down_ptr is not None
    pid = tl.program_id(0)
    tile = pid % num_tiles
    group, rows, mask_t = rows_of(pid // num_tiles, order_ptr, blocks_ptr, num_rows, BLOCK_T)
    if group < 0:
        return
    layout = groups_ptr + group * 8
    down = tl.load(layout)
    score = tl.load(layout + 1)
    columns = columns_ptr + tl.load(layout + 3) * 2
    tile_layout = tiles_ptr + (tl.load(layout + 5) + tile) * 3
    D = tl.load(layout + 6)
    if tile * BLOCK_D >= tl.maximum(D, 1):
        return
    first = tl.load(tile_layout)
    count = tl.load(tile_layout + 1)
    earlier = tl.load(tile_layout + 2)

    offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_a = first + tl.arange(0, BLOCK_A)
    mask_a = offs_a < first + count
    # what an adapter's score has beside its columns belongs to its first tile
    starts_here = mask_a & (offs_a >= first + tl.minimum(earlier, 1))
    shift = tl.zeros([BLOCK_T], tl.float32)
    if NORM:
        shift = row_shift(x_ptr, input_ptr, rows, mask_t, stride_xm, stride_im, H)
    pre, _, t, _, c, sums, squares = project(
        x_ptr, query_ptr, input_ptr, ln_weight_ptr, shift, rows, mask_t,
        stride_xi, stride_xm, stride_qm, stride_im, w_down_ptr, w_score_ptr, columns,
        down, score, D, offs_d, offs_d, first, count, offs_a, starts_here,
        H, NUM_INPUTS, MIXED, NORM, BLOCK_T, BLOCK_D, 0, BLOCK_A, BLOCK_K, SWAPPED, PRECISION,
    )  # fmt: skip
    if NORM:
        mean, rstd = statistics(sums, squares, ln_eps, H)
        pre = normalised(pre, gain_down_ptr, down + offs_d, mask_d, mean, rstd)
    code = tl.load(columns + offs_d * 2 + 1, mask=mask_d, other=CODES[0])
    z = activate(add_bias(pre, b_down_ptr, down + offs_d, mask_d), code, CODES)
    z = tl.where(mask_d[None, :], z, 0.0)
    rounded = z.to(DTYPE)
    if SCORED:
        is_scored = True
        if MIXED:
            is_scored = score >= 0
        if is_scored:
            if NORM:
                t = normalised(t, gain_score_ptr, score + offs_d, mask_d, mean, rstd)
                c = normalised(c, gain_score_ptr, score + D + offs_a, starts_here, mean, rstd)
            t = z * add_bias(t, b_score_ptr, score + offs_d, mask_d)
            s = add_bias(c, b_score_ptr, score + D + offs_a, starts_here)
            adapter = tl.load(columns + offs_d * 2, mask=mask_d, other=-1)
            one_hot = adapter[:, None] == offs_a[None, :]
            s = dot_one_hot(t, one_hot, s, SPLIT, PRECISION)
            part = tl.where(offs_a == first, earlier, 0)
            plane = part * (tl.cast(num_rows, tl.int64) * num_adapters)
            parts = parts_ptr + (rows * num_adapters)[:, None] + (plane + offs_a)[None, :]
            tl.store(parts, s, mask=mask_t[:, None] & mask_a[None, :])
    # behind the scores: before them it made registers spill on sm_90
    z_tile = z_ptr + rows[:, None] * stride_zm + offs_d[None, :]
    mask_td = mask_t[:, None] & (offs_d < wide_columns(D))[None, :]
    tl.store(z_tile, rounded, mask=mask_td)


@triton.jit
def _weights_of(
    parts_ptr, adapters, offset_ptr, mask_ptr, temperature_ptr, rows, mask_t, offs_n, mask_n,
    num_rows, num_adapters, num_scored, PARTS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """p of the rows of a scored group, from the parts of the scores."""
    in_tiles = tl.load(adapters + offs_n, mask=mask_n, other=0)
    s = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i in range(PARTS):
        index = (i * tl.cast(num_rows, tl.int64) + rows[:, None]) * num_adapters
        mask_part = mask_t[:, None] & (i < in_tiles)[None, :]
        s += tl.load(parts_ptr + index + offs_n[None, :], mask=mask_part, other=0.0)
    return attention(
        s, offset_ptr, mask_ptr, temperature_ptr, rows, mask_t, offs_n, mask_n, num_scored
    )


@triton.jit(do_not_specialize=["num_rows"])
def adapter_output_kernel(
    z_ptr,  # [num_rows, stride_zm]
    parts_ptr,  # [PARTS, num_rows, num_adapters], or None: p = 1
    x_ptr,  # [num_rows, H]: added to the residual, or None
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
    ln_weight_ptr,  # [H], or None: no norm here
    ln_bias_ptr,
    summed_ptr,  # [num_rows, H], or None: not kept
    kept_ptr,  # [num_rows, H]: the rows before a norm, less `row_shift`; or out
    out_ptr,  # [num_rows, H]
    p_ptr,  # [num_rows, num_scored]
    num_rows,
    num_adapters,
    num_scored,
    ln_eps,
    stride_xm,
    stride_rm,
    stride_zm,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE != tl.float32
    NORM: tl.constexpr = ln_weight_ptr is not None
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    OWN_TILES: tl.constexpr = H_TILES if NORM else 1
    pid = tl.program_id(0)
    row_block = pid // (H_TILES // OWN_TILES)
    first_tile = pid % (H_TILES // OWN_TILES)
    group, rows, mask_t = rows_of(row_block, order_ptr, blocks_ptr, num_rows, BLOCK_T)
    if group < -1:
        return
    offs_n = tl.arange(0, BLOCK_N)
    p = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    values = 0
    columns = columns_ptr
    D = 0
    N = 0
    if group >= 0:
        layout = groups_ptr + group * 8
        values = tl.load(layout + 2)
        columns += tl.load(layout + 3) * 2
        D = tl.load(layout + 6)
        N = tl.load(layout + 7)
        p += (offs_n < N).to(tl.float32)[None, :]
        if parts_ptr is not None:
            if tl.load(layout + 1) >= 0:
                p = _weights_of(
                    parts_ptr, adapters_ptr + tl.load(layout + 4), offset_ptr, mask_ptr,
                    temperature_ptr, rows, mask_t, offs_n, offs_n < N, num_rows, num_adapters,
                    num_scored, PARTS, BLOCK_T, BLOCK_N,
                )  # fmt: skip
    shift = tl.zeros([BLOCK_T], tl.float32)
    if x_ptr is not None:
        shift = row_shift(x_ptr, residual_ptr, rows, mask_t, stride_xm, stride_rm, H)
    sums = tl.zeros([BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for h_tile in range(first_tile, first_tile + OWN_TILES):
        offs_h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        mask_th = mask_t[:, None] & mask_h[None, :]
        if SWAPPED:
            out = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
        else:
            out = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        out = dot_rows(
            p.to(DTYPE), w_out_ptr, values + D + offs_n, offs_n < N, offs_h, mask_h, out,
            H, False, PRECISION, SWAPPED,
        )  # fmt: skip
        for k in range(0, D, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < D
            z_tile = z_ptr + rows[:, None] * stride_zm + offs_k[None, :]
            mask_tk = mask_t[:, None] & (offs_k < wide_columns(D))[None, :]
            z = tl.load(z_tile, mask=mask_tk, other=0.0)
            if parts_ptr is not None:
                adapter = tl.load(columns + offs_k * 2, mask=mask_k, other=-1)
                one_hot = adapter[None, :] == offs_n[:, None]
                zeros = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
                spread = dot_one_hot(p, one_hot, zeros, SPLIT, PRECISION)
                z = (z.to(tl.float32) * spread).to(DTYPE)
            out = dot_rows(
                z, w_out_ptr, values + offs_k, mask_k, offs_h, mask_h, out,
                H, False, PRECISION, SWAPPED,
            )  # fmt: skip
        if SWAPPED:
            out = tl.trans(out)
        if residual_ptr is not None:
            residual_tile = residual_ptr + rows[:, None] * stride_rm + offs_h[None, :]
            residual = tl.load(residual_tile, mask=mask_th, other=0.0).to(tl.float32)
            if x_ptr is not None:
                x_tile = x_ptr + rows[:, None] * stride_xm + offs_h[None, :]
                residual += tl.load(x_tile, mask=mask_th, other=0.0).to(tl.float32)
            if summed_ptr is not None:
                summed_tile = summed_ptr + rows[:, None] * H + offs_h[None, :]
                tl.store(summed_tile, residual.to(DTYPE), mask=mask_th)
            out += residual
        if x_ptr is not None:
            out = tl.where(mask_h[None, :], out - shift[:, None], 0.0)
            sums += tl.sum(out, axis=1)
            squares += tl.sum(out * out, axis=1)
        tl.store(kept_ptr + rows[:, None] * H + offs_h[None, :], out.to(DTYPE), mask=mask_th)
    if parts_ptr is not None:
        if first_tile == 0:
            scored = False
            if group >= 0:
                scored = tl.load(groups_ptr + group * 8 + 1) >= 0
            p_tile = p_ptr + rows[:, None] * num_scored + offs_n[None, :]
            mask_tn = mask_t[:, None] & (offs_n < num_scored)[None, :]
            tl.store(p_tile, tl.where(scored, p, 0.0), mask=mask_tn)
    if NORM:
        mean, rstd = statistics(sums, squares, ln_eps, H)
        normalise_rows(
            kept_ptr, ln_weight_ptr, ln_bias_ptr, out_ptr, rows, mask_t, mean, rstd,
            H, BLOCK_H,
        )  # fmt: skip


def schedule_of(mixture: Mixture) -> str:
    """The name of a call's schedule: norms, a second loop over H and a branch take registers."""
    if mixture.norm is not None:
        return "two_launches_norm"
    has_own_query = mixture.query is not None or len(mixture.x) > 1
    is_general = has_own_query or mixture.layout.is_mixed
    return "two_launches_general" if is_general else "two_launches"


def run(mixture: Mixture, target: GPUTarget | None) -> Outputs:
    """The launches for a call."""
    x, norm = mixture.x[0], mixture.norm
    num_rows, hidden_size = x.shape
    blocks = dict(schedule(schedule_of(mixture), x.dtype, target, num_rows))
    fused_norm = blocks.pop("FUSED_NORM") and norm is not None
    block_d, block_h = blocks.pop("BLOCK_D"), blocks.pop("BLOCK_H")
    columns_num_warps = blocks.pop("columns_num_warps")
    layout = mixture.layout
    found = tables(layout, block_d, x.device)
    cut = row_blocks(mixture.groups, len(layout.counts), num_rows, blocks["BLOCK_T"])
    outputs = outputs_of(mixture)
    residual = residual_arguments(mixture)
    norms = norm_arguments(mixture, outputs)
    # 16 columns: what `wide_columns` rounds to
    z = x.new_empty(num_rows, ceil_div(layout.columns, 16) * 16)
    parts = None
    if any(layout.scored):
        parts = x.new_empty(found.num_parts, num_rows, layout.adapters, dtype=outputs.p.dtype)
    shared = {
        "z_ptr": z,
        "parts_ptr": parts,
        "order_ptr": cut.order,
        "blocks_ptr": cut.blocks,
        "groups_ptr": found.groups,
        "columns_ptr": found.columns,
        "num_rows": num_rows,
        "num_adapters": layout.adapters,
        "ln_eps": norms["ln_eps"],
        "stride_zm": z.stride(0),
        "H": hidden_size,
        "PRECISION": precision(x.dtype, target),
        **blocks,
    }
    read = mixture
    if norm is not None and norm.before and blocks["SWAPPED"]:
        # folding the norm into the weights would read them once more
        normed = x.new_empty(x.shape)
        layer_norm(x, norm.weight, norm.bias, norm.eps, out=normed, add=mixture.residual)
        read = mixture._replace(x=[normed], norm=None)
    is_absorbed = read.norm is not None and read.norm.before
    first = {
        **shared,
        **row_arguments(read),
        **weight_arguments(read),
        "input_ptr": residual["residual_ptr"] if is_absorbed else None,
        "ln_weight_ptr": norms["ln_weight_ptr"] if is_absorbed else None,
        "tiles_ptr": found.tiles,
        "num_tiles": found.num_tiles,
        "stride_im": residual["stride_rm"],
        "CODES": layout.codes,
        "MIXED": layout.is_mixed,
        "BLOCK_D": block_d,
        "BLOCK_A": padded(found.tile_adapters),
        "num_warps": columns_num_warps,
    }
    kept = outputs.out if norm is None or not norm.save else outputs.pre_norm
    hidden = None if norm is None else contiguous_rows(x)
    second = {
        **shared,
        **residual,
        **score_arguments(mixture),
        "x_ptr": hidden,
        "stride_xm": 0 if hidden is None else hidden.stride(0),
        "adapters_ptr": found.adapters,
        "w_out_ptr": mixture.w_out.contiguous(),
        "ln_weight_ptr": norms["ln_weight_ptr"] if fused_norm else None,
        "ln_bias_ptr": norms["ln_bias_ptr"] if fused_norm else None,
        "summed_ptr": norms["summed_ptr"],
        "kept_ptr": kept,
        "out_ptr": outputs.out,
        "p_ptr": outputs.p,
        "num_scored": layout.num_scored,
        "PARTS": found.num_parts,
        "BLOCK_N": padded(layout.adapters),
        "BLOCK_H": block_h,
    }
    launch(adapter_columns_kernel, cut.count * found.num_tiles, first)
    h_tiles = 1 if fused_norm else ceil_div(hidden_size, block_h)
    launch(adapter_output_kernel, cut.count * h_tiles, second)
    if norm is not None and not fused_norm:
        layer_norm(kept, norm.weight, norm.bias, norm.eps, out=outputs.out)
    return outputs
