"""What both schedules of the forward do with a row block: the products over H with a tile of
columns, and the attention over its scores.

A LayerNorm in front is absorbed: with u its input, s a number near the row's mean, and m and r the
mean of u - s and 1 / the standard deviation,

    W LN(u) + b = r (W ((u - s) gamma) - m (W gamma)) + (W beta + b)

so that u is read once, statistics and products coming from the same loop. `W gamma` and
`W beta + b` are one number each for a row of weights (`norms.fold_norm`). Subtracting s first keeps
what the products round as small as the normalised rows, however far from zero the mean is.
"""

import triton
import triton.language as tl

from .tiles import dot_rows


@triton.jit
def row_shift(x_ptr, input_ptr, rows, mask_t, stride_xm, stride_im, H: tl.constexpr):
    """A number near the mean of each row of x + input: the mean of 16 entries, or of all, that are
    far apart, so that large ones in one place do not draw it away."""
    STEP: tl.constexpr = max(H // 16, 1)
    offs_h = tl.arange(0, 16) * STEP
    mask = mask_t[:, None] & (offs_h < H)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_h[None, :], mask=mask, other=0.0)
    input = tl.load(input_ptr + rows[:, None] * stride_im + offs_h[None, :], mask=mask, other=0.0)
    return tl.sum(x.to(tl.float32) + input.to(tl.float32), axis=1) / min(H, 16)


@triton.jit
def _own_columns(columns, offs, mask, i):
    """Which columns are adapter i's."""
    return tl.load(columns + offs * 2, mask=mask, other=-1) == i


@triton.jit
def _accumulate(
    x_ptr, query_ptr, input_ptr, ln_weight_ptr, shift, rows, mask_t,
    stride_xi, stride_xm, stride_qm, stride_im, w_down_ptr, w_score_ptr, columns, down, score, D,
    offs_d, offs_r, first, count, offs_a, mask_a,
    H: tl.constexpr, NUM_INPUTS: tl.constexpr, SCORED: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`project` for a group that is scored, or for one that is not."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    OWN_QUERY: tl.constexpr = (query_ptr is not None) or NUM_INPUTS > 1
    REST: tl.constexpr = BLOCK_R if BLOCK_R > 0 else 16
    if SWAPPED:
        pre = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
        t = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
        c = tl.zeros([BLOCK_A, BLOCK_T], tl.float32)
        pre_r = tl.zeros([REST, BLOCK_T], tl.float32)
        t_r = tl.zeros([REST, BLOCK_T], tl.float32)
    else:
        pre = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        t = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        c = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
        pre_r = tl.zeros([BLOCK_T, REST], tl.float32)
        t_r = tl.zeros([BLOCK_T, REST], tl.float32)
    sums = tl.zeros([BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    mask_d = offs_d < D
    mask_r = offs_r < D

    if OWN_QUERY:
        for i in range(first, first + (count if NUM_INPUTS > 1 else 1)):
            x_input = x_ptr
            own = mask_d
            own_r = mask_r
            if NUM_INPUTS > 1:
                x_input += i * tl.cast(stride_xi, tl.int64)
                own = _own_columns(columns, offs_d, mask_d, i)
                own_r = _own_columns(columns, offs_r, mask_r, i)
            for k in range(0, H, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_k = offs_k < H
                x_tile = x_input + rows[:, None] * stride_xm + offs_k[None, :]
                x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
                pre = dot_rows(
                    x, w_down_ptr, down + offs_d, own, offs_k, mask_k, pre,
                    H, True, PRECISION, SWAPPED,
                )  # fmt: skip
                if BLOCK_R > 0:
                    pre_r = dot_rows(
                        x, w_down_ptr, down + offs_r, own_r, offs_k, mask_k, pre_r,
                        H, True, PRECISION, SWAPPED,
                    )  # fmt: skip
    if SCORED or not OWN_QUERY:
        query_input = x_ptr
        stride_query = stride_xm
        if query_ptr is not None:
            query_input = query_ptr
            stride_query = stride_qm
        for k in range(0, H, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < H
            mask_tk = mask_t[:, None] & mask_k[None, :]
            x_tile = query_input + rows[:, None] * stride_query + offs_k[None, :]
            x = tl.load(x_tile, mask=mask_tk, other=0.0)
            if NORM:
                input_tile = input_ptr + rows[:, None] * stride_im + offs_k[None, :]
                u = x.to(tl.float32) + tl.load(input_tile, mask=mask_tk, other=0.0).to(tl.float32)
                u = tl.where(mask_k[None, :], u - shift[:, None], 0.0)
                sums += tl.sum(u, axis=1)
                squares += tl.sum(u * u, axis=1)
                gamma = tl.load(ln_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
                x = (u * gamma[None, :]).to(DTYPE)
            if not OWN_QUERY:
                pre = dot_rows(
                    x, w_down_ptr, down + offs_d, mask_d, offs_k, mask_k, pre,
                    H, True, PRECISION, SWAPPED,
                )  # fmt: skip
                if BLOCK_R > 0:
                    pre_r = dot_rows(
                        x, w_down_ptr, down + offs_r, mask_r, offs_k, mask_k, pre_r,
                        H, True, PRECISION, SWAPPED,
                    )  # fmt: skip
            if SCORED:
                t = dot_rows(
                    x, w_score_ptr, score + offs_d, mask_d, offs_k, mask_k, t,
                    H, True, PRECISION, SWAPPED,
                )  # fmt: skip
                if BLOCK_R > 0:
                    t_r = dot_rows(
                        x, w_score_ptr, score + offs_r, mask_r, offs_k, mask_k, t_r,
                        H, True, PRECISION, SWAPPED,
                    )  # fmt: skip
                c = dot_rows(
                    x, w_score_ptr, score + D + offs_a, mask_a, offs_k, mask_k, c,
                    H, True, PRECISION, SWAPPED,
                )  # fmt: skip
    if SWAPPED:
        pre, t, c = tl.trans(pre), tl.trans(t), tl.trans(c)
        pre_r, t_r = tl.trans(pre_r), tl.trans(t_r)
    return pre, pre_r, t, t_r, c, sums, squares


@triton.jit
def project(
    x_ptr, query_ptr, input_ptr, ln_weight_ptr, shift, rows, mask_t,
    stride_xi, stride_xm, stride_qm, stride_im, w_down_ptr, w_score_ptr, columns, down, score, D,
    offs_d, offs_r, first, count, offs_a, mask_a,
    H: tl.constexpr, NUM_INPUTS: tl.constexpr, MIXED: tl.constexpr, NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The accumulators of a group's columns `offs_d` and `offs_r` (if BLOCK_R > 0) and of its
    adapters `offs_a`, without biases.

    Args:
        input_ptr, ln_weight_ptr, shift: of a LayerNorm in front (NORM), of x + input.
        columns: the group's first entry in the table of columns.
        first, count: the adapters whose columns these are.
        MIXED: some groups are scored and some are not.
        SWAPPED: weights on the M side of the products, for few rows.

    Returns:
        pre, pre_r, t, t_r, c, and the sums over a row of u - s and of its square.
    """
    SCORED: tl.constexpr = w_score_ptr is not None
    # the branch stands outside the loop: inside, it would keep the loads of M out of the pipeline
    if MIXED:
        if score >= 0:
            pre, pre_r, t, t_r, c, sums, squares = _accumulate(
                x_ptr, query_ptr, input_ptr, ln_weight_ptr, shift, rows, mask_t,
                stride_xi, stride_xm, stride_qm, stride_im, w_down_ptr, w_score_ptr, columns,
                down, score, D, offs_d, offs_r, first, count, offs_a, mask_a,
                H, NUM_INPUTS, True, NORM, BLOCK_T, BLOCK_D, BLOCK_R, BLOCK_A, BLOCK_K, SWAPPED,
                PRECISION,
            )  # fmt: skip
        else:
            pre, pre_r, t, t_r, c, sums, squares = _accumulate(
                x_ptr, query_ptr, input_ptr, ln_weight_ptr, shift, rows, mask_t,
                stride_xi, stride_xm, stride_qm, stride_im, w_down_ptr, w_score_ptr, columns,
                down, score, D, offs_d, offs_r, first, count, offs_a, mask_a,
                H, NUM_INPUTS, False, NORM, BLOCK_T, BLOCK_D, BLOCK_R, BLOCK_A, BLOCK_K, SWAPPED,
                PRECISION,
            )  # fmt: skip
    else:
        pre, pre_r, t, t_r, c, sums, squares = _accumulate(
            x_ptr, query_ptr, input_ptr, ln_weight_ptr, shift, rows, mask_t,
            stride_xi, stride_xm, stride_qm, stride_im, w_down_ptr, w_score_ptr, columns,
            down, score, D, offs_d, offs_r, first, count, offs_a, mask_a,
            H, NUM_INPUTS, SCORED, NORM, BLOCK_T, BLOCK_D, BLOCK_R, BLOCK_A, BLOCK_K, SWAPPED,
            PRECISION,
        )  # fmt: skip
    return pre, pre_r, t, t_r, c, sums, squares


@triton.jit
def attention(
    s, offset_ptr, mask_ptr, temperature_ptr, rows, mask_t, offs_n, mask_n, num_scored
):  # fmt: skip
    """p of a row block, from the sums of its scores."""
    if offset_ptr is not None:
        s += tl.load(offset_ptr + rows, mask=mask_t, other=0.0).to(tl.float32)[:, None]
    if mask_ptr is not None:
        mask_tile = mask_ptr + rows[:, None] * num_scored + offs_n[None, :]
        mask_tn = mask_t[:, None] & mask_n[None, :]
        s *= tl.load(mask_tile, mask=mask_tn, other=0.0).to(tl.float32)
    if temperature_ptr is not None:
        s /= tl.load(temperature_ptr).to(tl.float32)
    s = tl.where(mask_n[None, :], s, float("-inf"))
    e = tl.exp(s - tl.max(s, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def statistics(sums, squares, ln_eps, H: tl.constexpr):
    """The mean of u - s and 1 / the standard deviation of each row."""
    mean = sums / H
    return mean, tl.rsqrt(tl.maximum(squares / H - mean * mean, 0.0) + ln_eps)


@triton.jit
def normalised(acc, gain_ptr, offs, mask, mean, rstd):
    """The accumulator of (u - s) gamma as that of LN(u), but for what beta adds."""
    gain = tl.load(gain_ptr + offs, mask=mask, other=0.0)
    return (acc - mean[:, None] * gain[None, :]) * rstd[:, None]
