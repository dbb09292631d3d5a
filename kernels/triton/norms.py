"""The LayerNorms around the mixture, where the mixture's own kernels do not compute them.

    fold_norm        of a LayerNorm in front: W gamma and W beta + b, for `projections.project`
    normalise_rows   of a LayerNorm behind, on rows that the calling program wrote
    layer_norm       of a LayerNorm behind, on rows whose parts several programs wrote; of one in
                     front of few rows, or when its rows are made again in the backward

Bytes: `fold_norm` reads the weights once; `layer_norm` reads and writes H*e a row, or reads 2*H*e
of a sum.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .tiles import ceil_div, contiguous_rows, launch, power_of_two

FOLDED_ROWS = 16
"""Rows of weights that a program of `fold_norm_kernel` sums."""


@triton.jit
def fold_norm_kernel(
    w_down_ptr,  # [rows_down, H]
    b_down_ptr,  # [rows_down]
    w_score_ptr,  # [rows_score, H], or None
    b_score_ptr,
    ln_weight_ptr,  # [H]
    ln_bias_ptr,  # [H]
    gain_down_ptr,  # [rows_down], fp32
    folded_down_ptr,
    gain_score_ptr,  # [rows_score], fp32
    folded_score_ptr,
    rows_down,
    rows_score,
    down_programs,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    w_ptr = w_down_ptr
    b_ptr = b_down_ptr
    gain_ptr = gain_down_ptr
    folded_ptr = folded_down_ptr
    num_rows = rows_down
    if w_score_ptr is not None:
        if block >= down_programs:
            block -= down_programs
            w_ptr = w_score_ptr
            b_ptr = b_score_ptr
            gain_ptr = gain_score_ptr
            folded_ptr = folded_score_ptr
            num_rows = rows_score
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    gain = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    shift = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k in range(0, H, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < H
        gamma = tl.load(ln_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        beta = tl.load(ln_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        w_tile = w_ptr + offs_r[:, None].to(tl.int64) * H + offs_k[None, :]
        w = tl.load(w_tile, mask=mask_r[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        gain += w * gamma[None, :]
        shift += w * beta[None, :]
    bias = tl.load(b_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    tl.store(gain_ptr + offs_r, tl.sum(gain, axis=1), mask=mask_r)
    tl.store(folded_ptr + offs_r, tl.sum(shift, axis=1) + bias, mask=mask_r)


def fold_norm(
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`W gamma` and `W beta + b` of the down-projections, then of the score weights; fp32."""
    rows_down, rows_score = len(b_down), 0 if b_score is None else len(b_score)
    down = w_down.new_empty(2, rows_down, dtype=torch.float32)
    score = w_down.new_empty(2, rows_score, dtype=torch.float32)
    down_programs = ceil_div(rows_down, FOLDED_ROWS)
    arguments = {
        "w_down_ptr": w_down,
        "b_down_ptr": b_down,
        "w_score_ptr": w_score,
        "b_score_ptr": b_score,
        "ln_weight_ptr": ln_weight,
        "ln_bias_ptr": ln_bias,
        "gain_down_ptr": down[0],
        "folded_down_ptr": down[1],
        "gain_score_ptr": score[0],
        "folded_score_ptr": score[1],
        "rows_down": rows_down,
        "rows_score": rows_score,
        "down_programs": down_programs,
        "H": w_down.shape[1],
        "BLOCK_R": FOLDED_ROWS,
        "BLOCK_K": 128,
        "num_warps": 4,
    }
    launch(fold_norm_kernel, down_programs + ceil_div(rows_score, FOLDED_ROWS), arguments)
    return (*down, *((None, None) if b_score is None else score))


@triton.jit
def normalise_rows(
    kept_ptr, ln_weight_ptr, ln_bias_ptr, out_ptr, rows, mask_t, mean, rstd,
    H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out = LN of the rows that this program wrote to `kept_ptr`."""
    tl.debug_barrier()
    for h in range(0, H, BLOCK_H):
        offs_h = h + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        mask_th = mask_t[:, None] & mask_h[None, :]
        tile = rows[:, None] * H + offs_h[None, :]
        x = tl.load(kept_ptr + tile, mask=mask_th, other=0.0).to(tl.float32)
        gamma = tl.load(ln_weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        beta = tl.load(ln_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        x = (x - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
        tl.store(out_ptr + tile, x.to(out_ptr.dtype.element_ty), mask=mask_th)


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    x_ptr,  # [num_rows, H]
    add_ptr,  # [num_rows, H] to add to x, or None
    ln_weight_ptr,  # [H]
    ln_bias_ptr,  # [H]
    out_ptr,  # [num_rows, H]; may be x
    num_rows,
    ln_eps,
    stride_xm,
    stride_am,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask = (rows < num_rows)[:, None] & mask_h[None, :]
    x_tile = x_ptr + rows[:, None] * stride_xm + offs_h[None, :]
    x = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    if add_ptr is not None:
        add_tile = add_ptr + rows[:, None] * stride_am + offs_h[None, :]
        x += tl.load(add_tile, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask_h[None, :], x - (tl.sum(x, axis=1) / H)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + ln_eps)
    gamma = tl.load(ln_weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    beta = tl.load(ln_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    out = x * rstd[:, None] * gamma[None, :] + beta[None, :]
    out_tile = out_ptr + rows[:, None] * H + offs_h[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    ln_eps: float,
    *,
    out: Tensor,
    add: Tensor | None = None,
) -> None:
    """LayerNorm of rows, or of their sum with `add`, written to `out`, which may be `x`."""
    num_rows, hidden_size = x.shape
    x, add = contiguous_rows(x), contiguous_rows(add)
    block_h = power_of_two(hidden_size)
    block_t = max(1, 2048 // block_h)
    arguments = {
        "x_ptr": x,
        "add_ptr": add,
        "ln_weight_ptr": ln_weight,
        "ln_bias_ptr": ln_bias,
        "out_ptr": out,
        "num_rows": num_rows,
        "ln_eps": ln_eps,
        "stride_xm": x.stride(0),
        "stride_am": 0 if add is None else add.stride(0),
        "H": hidden_size,
        "BLOCK_T": block_t,
        "BLOCK_H": block_h,
        "num_warps": max(4, min(16, block_h // 1024)),
    }
    launch(layer_norm_kernel, ceil_div(num_rows, block_t), arguments)
