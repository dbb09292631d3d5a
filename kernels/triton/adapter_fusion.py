"""The adapter mixture in one Triton launch, for `adapter_fusion` and `adapter_fusion_norm`.

Where the columns and scores of a row block do not fit one program (`tiles.fits_one_launch`),
`two_launches.py` computes the same, with z and parts of the scores in memory between its launches;
the rest of this text is about the others.

The mathematics, per row, with the columns of all N adapters on one flat axis of `D = sum(sizes)`:

    z = act(W_down x + b_down)          t = M h + m             c = C h + c_0
    s_i = mask_i * (sum_{j in i} z_j t_j + c_i + offset) / temperature
    p = softmax(s)                      out = residual + [p*z ; p] W_out

What is fused: everything of a block of rows. One loop over H fills the accumulators of z, t and c
(where the query is x, one load of x feeds all three), the softmax follows in registers, a second
loop over H writes the output. Sizes may differ without padding: "the sum over an adapter's columns"
and "p spread over its columns" are products with a one-hot [D, N] matrix. Padded adapters score
-inf.

Bytes per row, with e bytes per element: reads H*e (twice that with a query of its own or a
residual, three times with both; N*H*e for one input per adapter) and 4*N of a mask; writes H*e and
4*N of p. Nothing of size [T, D] leaves the registers. Every block of rows reads all weights,
`(2D + N) + (D + N)` rows of H*e bytes, from L2.

Precision: fp32 accumulation; fp32 operands are multiplied in full ("ieee", never tf32). In 16 bits
z and t stay in fp32 from the accumulator on, and the one-hot products take them as a high and a low
bf16 part: 16 bits of mantissa, and fp32's range, which fp16 would not have for z*t.

Determinism: no atomics and no split of a sum over blocks; the same call on the same GPU model gives
the same bits.

The backward pass and the norms around the mixture are PyTorch's here (fused kernels are to follow):
the torch backend's functions recompute z and t from the saved p. The schedule was chosen from
compiled code, not from timings.

One input per adapter: the inputs are stacked to [N, T, H] (one copy), and each is multiplied with
all down-projections, all but its own read as zero: N times the flops of the down product.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from . import two_launches
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
def _adapter_of(offs_d, ENDS: tl.constexpr):
    """The adapter that each column belongs to; columns behind the last go to the last."""
    adapter = tl.zeros(offs_d.shape, tl.int32)
    for i in tl.static_range(1, len(ENDS)):
        adapter += (offs_d >= ENDS[i - 1]).to(tl.int32)
    return adapter


@triton.jit
def _columns_of(offs_d, i: tl.constexpr, ENDS: tl.constexpr, NUM_INPUTS: tl.constexpr):
    """Which columns read input i: adapter i's own, or all of one shared input."""
    if NUM_INPUTS == 1:
        return offs_d < ENDS[len(ENDS) - 1]
    elif i == 0:
        return offs_d < ENDS[0]
    else:
        return (offs_d >= ENDS[i - 1]) & (offs_d < ENDS[i])


@triton.jit
def _code_of(offs_d, ENDS: tl.constexpr, ACTIVATIONS: tl.constexpr):
    """The activation of each column's adapter."""
    code = tl.full(offs_d.shape, ACTIVATIONS[0], tl.int32)
    for i in tl.static_range(1, len(ENDS)):
        code = tl.where(offs_d >= ENDS[i - 1], ACTIVATIONS[i], code)
    return code


@triton.jit
def _adapter_fusion_fwd_kernel(
    x_ptr,  # [NUM_INPUTS, num_rows, H]
    query_ptr,  # [num_rows, H], or None: x
    residual_ptr,  # [num_rows, H], or None
    w_down_ptr,  # [D, H]
    b_down_ptr,  # [D]
    w_score_ptr,  # [>= D + N, H], or None: p = 1
    b_score_ptr,
    w_out_ptr,  # [>= D + N, H]
    temperature_ptr,  # [], or None: 1
    mask_ptr,  # [num_rows, N], or None
    offset_ptr,  # [num_rows], or None
    out_ptr,  # [num_rows, H]
    p_ptr,  # [num_rows, N]
    num_rows,
    stride_xi,
    stride_xm,
    stride_qm,
    stride_rm,
    H: tl.constexpr,
    ENDS: tl.constexpr,  # where each adapter's columns end
    ACTIVATIONS: tl.constexpr,  # the code of each adapter
    CODES: tl.constexpr,  # the distinct codes
    NUM_INPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the first columns, and
    BLOCK_R: tl.constexpr,  # the rest of them, perhaps 0
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = len(ENDS)
    D: tl.constexpr = ENDS[N - 1]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE != tl.float32
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_rows
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

    for k in range(0, H, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < H
        mask_tk = mask_t[:, None] & mask_k[None, :]
        for i in tl.static_range(NUM_INPUTS):
            x_tile = x_ptr + i * tl.cast(stride_xi, tl.int64)
            x_tile += offs_t[:, None] * stride_xm + offs_k[None, :]
            x = tl.load(x_tile, mask=mask_tk, other=0.0)
            own = _columns_of(offs_d, i, ENDS, NUM_INPUTS)
            pre = dot_rows(x, w_down_ptr, offs_d, own, offs_k, mask_k, pre, H, True, PRECISION)
            if BLOCK_R > 0:
                own = _columns_of(offs_r, i, ENDS, NUM_INPUTS)
                pre_r = dot_rows(
                    x, w_down_ptr, offs_r, own, offs_k, mask_k, pre_r, H, True, PRECISION
                )
        if w_score_ptr is not None:
            if query_ptr is not None:
                query_tile = query_ptr + offs_t[:, None] * stride_qm + offs_k[None, :]
                x = tl.load(query_tile, mask=mask_tk, other=0.0)
            t = dot_rows(x, w_score_ptr, offs_d, mask_d, offs_k, mask_k, t, H, True, PRECISION)
            if BLOCK_R > 0:
                t_r = dot_rows(
                    x, w_score_ptr, offs_r, mask_r, offs_k, mask_k, t_r, H, True, PRECISION
                )
            c = dot_rows(x, w_score_ptr, D + offs_n, mask_n, offs_k, mask_k, c, H, True, PRECISION)

    adapter = _adapter_of(offs_d, ENDS)
    code = _code_of(offs_d, ENDS, ACTIVATIONS)
    z = activate(add_bias(pre, b_down_ptr, offs_d, mask_d), code, CODES)
    if BLOCK_R > 0:
        adapter_r = _adapter_of(offs_r, ENDS)
        code_r = _code_of(offs_r, ENDS, ACTIVATIONS)
        z_r = activate(add_bias(pre_r, b_down_ptr, offs_r, mask_r), code_r, CODES)

    p = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if w_score_ptr is not None:
        # t is zero behind the last column, whatever z is there
        s = add_bias(c, b_score_ptr, D + offs_n, mask_n)
        one_hot = adapter[:, None] == offs_n[None, :]
        t = add_bias(t, b_score_ptr, offs_d, mask_d)
        s = dot_one_hot(z * t, one_hot, s, SPLIT, PRECISION)
        if BLOCK_R > 0:
            one_hot_r = adapter_r[:, None] == offs_n[None, :]
            t_r = add_bias(t_r, b_score_ptr, offs_r, mask_r)
            s = dot_one_hot(z_r * t_r, one_hot_r, s, SPLIT, PRECISION)
        if offset_ptr is not None:
            s += tl.load(offset_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float32)[:, None]
        mask_tn = mask_t[:, None] & mask_n[None, :]
        if mask_ptr is not None:
            mask_tile = mask_ptr + offs_t[:, None] * N + offs_n[None, :]
            s *= tl.load(mask_tile, mask=mask_tn, other=0.0).to(tl.float32)
        if temperature_ptr is not None:
            s /= tl.load(temperature_ptr).to(tl.float32)
        s = tl.where(mask_n[None, :], s, float("-inf"))
        e = tl.exp(s - tl.max(s, axis=1)[:, None])
        p = e / tl.sum(e, axis=1)[:, None]
        tl.store(p_ptr + offs_t[:, None] * N + offs_n[None, :], p, mask=mask_tn)
        zeros = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        z *= dot_one_hot(p, tl.trans(one_hot), zeros, SPLIT, PRECISION)
        if BLOCK_R > 0:
            zeros_r = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            z_r *= dot_one_hot(p, tl.trans(one_hot_r), zeros_r, SPLIT, PRECISION)

    w = z.to(DTYPE)
    w_p = p.to(DTYPE)
    if BLOCK_R > 0:
        w_r = z_r.to(DTYPE)
    for h in range(0, H, BLOCK_H):
        offs_h = h + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        mask_th = mask_t[:, None] & mask_h[None, :]
        out = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        out = dot_rows(w, w_out_ptr, offs_d, mask_d, offs_h, mask_h, out, H, False, PRECISION)
        if BLOCK_R > 0:
            out = dot_rows(w_r, w_out_ptr, offs_r, mask_r, offs_h, mask_h, out, H, False, PRECISION)
        if w_score_ptr is not None:
            out = dot_rows(
                w_p, w_out_ptr, D + offs_n, mask_n, offs_h, mask_h, out, H, False, PRECISION
            )
        else:
            for i in tl.static_range(N):
                out = add_bias(out, w_out_ptr + (D + i) * H, offs_h, mask_h)
        if residual_ptr is not None:
            residual_tile = residual_ptr + offs_t[:, None] * stride_rm + offs_h[None, :]
            out += tl.load(residual_tile, mask=mask_th, other=0.0).to(tl.float32)
        out_tile = out_ptr + offs_t[:, None] * H + offs_h[None, :]
        tl.store(out_tile, out.to(DTYPE), mask=mask_th)


def launch_arguments(
    x: Sequence[Tensor],
    query: Tensor | None,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    score_offset: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
    target: GPUTarget | None,
) -> dict:
    """The arguments of `_adapter_fusion_fwd_kernel` for a call of `adapter_fusion`."""
    num_rows, hidden_size = x[0].shape
    out = x[0].new_empty(num_rows, hidden_size)
    p_shape = [0] if w_score is None else [num_rows, len(sizes)]
    p = x[0].new_empty(p_shape, dtype=torch.float32)
    if len(x) == 1:
        inputs = contiguous_rows(x[0]).unsqueeze(0)
    else:
        inputs = torch.stack(list(x))
        query = x[0] if query is None else query
    query, residual = contiguous_rows(query), contiguous_rows(residual)
    block_d, block_r = column_blocks(sum(sizes))
    return {
        "x_ptr": inputs,
        "query_ptr": query,
        "residual_ptr": residual,
        "w_down_ptr": w_down.contiguous(),
        "b_down_ptr": b_down.contiguous(),
        "w_score_ptr": contiguous(w_score),
        "b_score_ptr": contiguous(b_score),
        "w_out_ptr": w_out.contiguous(),
        "temperature_ptr": temperature,
        "mask_ptr": contiguous(mask),
        "offset_ptr": contiguous(score_offset),
        "out_ptr": out,
        "p_ptr": p,
        "num_rows": num_rows,
        "stride_xi": inputs.stride(0),
        "stride_xm": inputs.stride(1),
        "stride_qm": 0 if query is None else query.stride(0),
        "stride_rm": 0 if residual is None else residual.stride(0),
        "H": hidden_size,
        "ENDS": tuple(accumulate(sizes)),
        "ACTIVATIONS": tuple(activations),
        "CODES": tuple(sorted(set(activations))),
        "NUM_INPUTS": len(x),
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLOCK_N": padded(len(sizes)),
        "PRECISION": precision(target),
        **schedule(x[0].dtype, target),
    }


def adapter_fusion(
    x: Sequence[Tensor],
    query: Tensor | None,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    score_offset: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """See `fastfusion.ops.adapter_fusion`."""
    if not fits_one_launch(sum(sizes), len(sizes)):
        start = (0, -1 if w_score is None else 0, 0)
        pair = two_launches.launch_arguments(
            x=x, query=query, residual=residual, groups=None, w_down=w_down, b_down=b_down,
            w_score=w_score, b_score=b_score, w_out=w_out, temperature=temperature, mask=mask,
            score_offset=score_offset, starts=[start], counts=[len(sizes)], sizes=sizes,
            activations=activations, target=target_of(x[0].device),
        )  # fmt: skip
        return two_launches.run(*pair)
    arguments = launch_arguments(
        x, query, residual, w_down, b_down, w_score, b_score, w_out, temperature, mask,
        score_offset, sizes, activations, target_of(x[0].device),
    )  # fmt: skip
    out, p = arguments["out_ptr"], arguments["p_ptr"]
    row_blocks = triton.cdiv(arguments["num_rows"], arguments["BLOCK_T"])
    launch(_adapter_fusion_fwd_kernel, row_blocks, arguments)
    return out, p


def adapter_fusion_norm(
    hidden: Tensor,
    input: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    ln_eps: float,
    ln_before: bool,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    sizes: Sequence[int],
    activations: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastfusion.ops.adapter_fusion_norm`; both norms are PyTorch's around the kernel."""
    norm = ([hidden.shape[-1]], ln_weight, ln_bias, ln_eps)
    summed = hidden + input
    x = F.layer_norm(summed, *norm) if ln_before else hidden
    pre_norm, p = adapter_fusion(
        [x], None, summed, w_down, b_down, w_score, b_score, w_out, temperature, mask, None,
        sizes, activations,
    )  # fmt: skip
    out = F.layer_norm(pre_norm, *norm)
    if save:
        return out, p, summed, pre_norm
    return out, p, out.new_empty(0), out.new_empty(0)
