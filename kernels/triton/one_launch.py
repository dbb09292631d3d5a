"""The adapter mixture in one Triton launch, where a row block's columns fit one program.

The mathematics, per row, with the columns of all N adapters on one flat axis of `D = sum(sizes)`:

    z = act(W_down x + b_down)          t = M q + m             c = C q + c_0
    s_i = mask_i * (sum_{j in i} z_j t_j + c_i + offset) / temperature
    p = softmax(s), or 1                out = residual + [p*z ; p] W_out

and with the norms of `adapter_fusion_norm`, hidden being x and input the residual:

    u = hidden + input      x = LN(u), or hidden      out = LN(u + [p*z ; p] W_out)

What is fused: everything of a block of rows. One loop over H fills the accumulators of z, t and c
(`projections.project`: where the query is x, one load of x feeds all three; a LayerNorm in front is
absorbed), the softmax follows in registers, a second loop over H writes the output. Sizes may
differ without padding: "the sum over an adapter's columns" and "p spread over its columns" are
products with a one-hot [D, N] matrix. Adapters that a group has not score -inf.

A LayerNorm behind needs whole rows: the second loop writes them before the norm (to `pre_norm`
where that is kept, to `out` otherwise), less a number near their mean, which the norm does not see
and which would cost digits, and sums their statistics; a third loop reads them back and normalises.
That is safe though it happens within one launch: a program reads only rows that it wrote itself,
behind a barrier of its threads, which orders their accesses.

Groups of rows (`groups.py`): a program takes an entry of the routing table's blocks: up to BLOCK_T
rows of one group, or base rows, which are their residual. It reads and writes them where they lie.
Where the group's weights begin and how many columns and adapters it has stand in a table on the
device. The compiled code depends on the widest group's blocks, on which activations occur and on
whether any or all groups are scored; so groups in any mixture and number are one launch, which a
CUDA graph captures (after a first call, which compiles and makes the tables). Entries that are not
used return at once. A group narrower than the widest pays for the widest's columns in products, not
in bytes: its loads are masked.

Bytes per row, with e bytes per element: reads H*e (twice that with a query of its own or a
residual, three times with both; N*H*e for one input per adapter), 4 of a row number, 4*N of a mask;
writes H*e and 4*N of p. With norms it reads hidden and input twice, from L2 the second time, and
writes and reads the rows before the norm besides, in L2. Nothing of size [T, D] leaves the
registers. Every block of rows reads its group's weights, `(2D + N) + (D + N)` rows of H*e bytes,
from L2.

Precision: fp32 accumulation; fp32 operands are multiplied in full or in three tf32 products
(`tiles.precision`). In 16 bits z and t stay in fp32 from the accumulator on, and the one-hot
products take them as a high and a low bf16 part: 16 bits of mantissa, and fp32's range, which fp16
would not have for z*t.

Determinism: no atomics and no split of a sum over blocks; the same call on the same GPU model gives
the same bits, and a row's bits do not depend on which rows share its block.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from .groups import row_blocks, rows_of, tables
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
from .norms import normalise_rows
from .projections import attention, normalised, project, row_shift, statistics
from .schedules import column_blocks, schedule
from .tiles import activate, add_bias, dot_one_hot, dot_rows, launch, padded, precision


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


@triton.jit(do_not_specialize=["num_rows"])
def adapter_fusion_kernel(
    x_ptr,  # [NUM_INPUTS, num_rows, H]
    query_ptr,  # [num_rows, H], or None: x
    residual_ptr,  # [num_rows, H], or None
    order_ptr,  # [num_rows], or None: rows in order
    blocks_ptr,  # [row blocks, 3], or None
    groups_ptr,  # see `groups.Groups`
    columns_ptr,
    w_down_ptr,  # [*, H]
    b_down_ptr,
    w_score_ptr,  # [*, H], or None: no group is scored
    b_score_ptr,
    gain_down_ptr,  # of a LayerNorm in front, or None
    gain_score_ptr,
    w_out_ptr,  # [*, H]
    temperature_ptr,  # [], or None: 1
    mask_ptr,  # [num_rows, num_scored], or None
    offset_ptr,  # [num_rows], or None
    ln_weight_ptr,  # [H], or None: no norm
    ln_bias_ptr,
    summed_ptr,  # [num_rows, H], or None: not kept
    pre_norm_ptr,  # [num_rows, H], or None: not kept
    out_ptr,  # [num_rows, H]
    p_ptr,  # [num_rows, num_scored]
    num_rows,
    num_scored,  # adapters in the largest scored group
    ln_eps,
    stride_xi,
    stride_xm,
    stride_qm,
    stride_rm,
    H: tl.constexpr,
    CODES: tl.constexpr,  # the activations that occur
    NUM_INPUTS: tl.constexpr,
    MIXED: tl.constexpr,  # some groups are scored, some are not
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
    SCORED: tl.constexpr = w_score_ptr is not None
    NORM: tl.constexpr = ln_weight_ptr is not None
    NORM_BEFORE: tl.constexpr = gain_down_ptr is not None
    REST: tl.constexpr = BLOCK_R if BLOCK_R > 0 else 16
    group, rows, mask_t = rows_of(tl.program_id(0), order_ptr, blocks_ptr, num_rows, BLOCK_T)
    if group < 0:
        if group == -1:
            _store_base_rows(
                residual_ptr, stride_rm, out_ptr, p_ptr, rows, mask_t, num_scored,
                H, SCORED, BLOCK_T, BLOCK_N, BLOCK_H,
            )  # fmt: skip
        return

    layout = groups_ptr + group * 8
    down = tl.load(layout)
    score = tl.load(layout + 1)
    values = tl.load(layout + 2)
    columns = columns_ptr + tl.load(layout + 3) * 2
    D = tl.load(layout + 6)
    N = tl.load(layout + 7)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_r = BLOCK_D + tl.arange(0, REST)
    mask_r = offs_r < D
    shift = tl.zeros([BLOCK_T], tl.float32)
    if NORM:
        shift = row_shift(x_ptr, residual_ptr, rows, mask_t, stride_xm, stride_rm, H)

    pre, pre_r, t, t_r, c, sums, squares = project(
        x_ptr, query_ptr, residual_ptr, ln_weight_ptr, shift, rows, mask_t,
        stride_xi, stride_xm, stride_qm, stride_rm, w_down_ptr, w_score_ptr, columns,
        down, score, D, offs_d, offs_r, 0, N, offs_n, mask_n,
        H, NUM_INPUTS, MIXED, NORM_BEFORE, BLOCK_T, BLOCK_D, BLOCK_R, BLOCK_N, BLOCK_K, False,
        PRECISION,
    )  # fmt: skip
    mean, rstd = statistics(sums, squares, ln_eps, H)

    if NORM_BEFORE:
        pre = normalised(pre, gain_down_ptr, down + offs_d, mask_d, mean, rstd)
        if BLOCK_R > 0:
            pre_r = normalised(pre_r, gain_down_ptr, down + offs_r, mask_r, mean, rstd)
    code = tl.load(columns + offs_d * 2 + 1, mask=mask_d, other=CODES[0])
    z = activate(add_bias(pre, b_down_ptr, down + offs_d, mask_d), code, CODES)
    if BLOCK_R > 0:
        code_r = tl.load(columns + offs_r * 2 + 1, mask=mask_r, other=CODES[0])
        z_r = activate(add_bias(pre_r, b_down_ptr, down + offs_r, mask_r), code_r, CODES)

    p = tl.zeros([BLOCK_T, BLOCK_N], tl.float32) + mask_n.to(tl.float32)[None, :]
    if SCORED:
        is_scored = True
        if MIXED:
            is_scored = score >= 0
        if is_scored:
            if NORM_BEFORE:
                t = normalised(t, gain_score_ptr, score + offs_d, mask_d, mean, rstd)
                c = normalised(c, gain_score_ptr, score + D + offs_n, mask_n, mean, rstd)
            # columns behind the last are no adapter's
            one_hot = (
                tl.load(columns + offs_d * 2, mask=mask_d, other=-1)[:, None] == offs_n[None, :]
            )
            s = add_bias(c, b_score_ptr, score + D + offs_n, mask_n)
            t = add_bias(t, b_score_ptr, score + offs_d, mask_d)
            s = dot_one_hot(z * t, one_hot, s, SPLIT, PRECISION)
            if BLOCK_R > 0:
                if NORM_BEFORE:
                    t_r = normalised(t_r, gain_score_ptr, score + offs_r, mask_r, mean, rstd)
                own_r = tl.load(columns + offs_r * 2, mask=mask_r, other=-1)
                one_hot_r = own_r[:, None] == offs_n[None, :]
                t_r = add_bias(t_r, b_score_ptr, score + offs_r, mask_r)
                s = dot_one_hot(z_r * t_r, one_hot_r, s, SPLIT, PRECISION)
            p = attention(
                s, offset_ptr, mask_ptr, temperature_ptr, rows, mask_t, offs_n, mask_n, num_scored
            )
            zeros = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            z *= dot_one_hot(p, tl.trans(one_hot), zeros, SPLIT, PRECISION)
            if BLOCK_R > 0:
                zeros_r = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
                z_r *= dot_one_hot(p, tl.trans(one_hot_r), zeros_r, SPLIT, PRECISION)
        p_tile = p_ptr + rows[:, None] * num_scored + offs_n[None, :]
        mask_tn = mask_t[:, None] & (offs_n < num_scored)[None, :]
        tl.store(p_tile, tl.where(is_scored, p, 0.0), mask=mask_tn)

    w = z.to(DTYPE)
    w_p = p.to(DTYPE)
    if BLOCK_R > 0:
        w_r = z_r.to(DTYPE)
    kept_ptr = out_ptr
    if pre_norm_ptr is not None:
        kept_ptr = pre_norm_ptr
    sums = tl.zeros([BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
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
            residual = tl.load(residual_tile, mask=mask_th, other=0.0).to(tl.float32)
            if NORM:
                x_tile = x_ptr + rows[:, None] * stride_xm + offs_h[None, :]
                residual += tl.load(x_tile, mask=mask_th, other=0.0).to(tl.float32)
            if summed_ptr is not None:
                summed_tile = summed_ptr + rows[:, None] * H + offs_h[None, :]
                tl.store(summed_tile, residual.to(DTYPE), mask=mask_th)
            out += residual
        if NORM:
            out = tl.where(mask_h[None, :], out - shift[:, None], 0.0)
            sums += tl.sum(out, axis=1)
            squares += tl.sum(out * out, axis=1)
        kept_tile = kept_ptr + rows[:, None] * H + offs_h[None, :]
        tl.store(kept_tile, out.to(DTYPE), mask=mask_th)
    if NORM:
        mean, rstd = statistics(sums, squares, ln_eps, H)
        normalise_rows(
            kept_ptr, ln_weight_ptr, ln_bias_ptr, out_ptr, rows, mask_t, mean, rstd,
            H, BLOCK_H,
        )  # fmt: skip


def schedule_of(mixture: Mixture) -> str:
    """The name of a call's schedule."""
    return "one_launch" if mixture.norm is None else "one_launch_norm"


def run(mixture: Mixture, target: GPUTarget | None) -> Outputs:
    """The launch for a call."""
    x = mixture.x[0]
    num_rows, hidden_size = x.shape
    blocks = dict(schedule(schedule_of(mixture), x.dtype, target, num_rows))
    del blocks["max_columns"]
    layout = mixture.layout
    block_d, block_r = column_blocks(layout.columns)
    found = tables(layout, padded(layout.columns), x.device)
    cut = row_blocks(mixture.groups, len(layout.counts), num_rows, blocks["BLOCK_T"])
    outputs = outputs_of(mixture)
    arguments = {
        **row_arguments(mixture),
        **residual_arguments(mixture),
        **weight_arguments(mixture),
        **score_arguments(mixture),
        **norm_arguments(mixture, outputs),
        "order_ptr": cut.order,
        "blocks_ptr": cut.blocks,
        "groups_ptr": found.groups,
        "columns_ptr": found.columns,
        "w_out_ptr": mixture.w_out.contiguous(),
        "out_ptr": outputs.out,
        "p_ptr": outputs.p,
        "num_rows": num_rows,
        "num_scored": layout.num_scored,
        "H": hidden_size,
        "CODES": layout.codes,
        "MIXED": layout.is_mixed,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLOCK_N": padded(layout.adapters),
        "PRECISION": precision(x.dtype, target),
        **blocks,
    }
    launch(adapter_fusion_kernel, cut.count, arguments)
    return outputs
