"""Gradients of the mixture between the sub-layer's residual and LayerNorm, the LayerNorm frozen.

The mathematics, per row, with LN' the gradient of a LayerNorm's input:

    g = LN'(grad_out at pre_norm)       x = LN(summed) if ln_before else hidden
    dx, dW = those of the mixture (`backward.py`) for the output's gradient g
    dhidden = g + LN'(dx at summed) if ln_before else g + dx        dinput = dhidden or g

    n = rstd * (u - mean(u))
    LN'(dy at u) = rstd * (dy*gamma - mean(dy*gamma) - n * mean(dy*gamma*n))

A program has whole rows in registers and reads each once: mean and rstd are recomputed from them.
`g + dx` is added in the launch that makes dx. Bytes per row, with e bytes per element: LN' reads
and writes 3*H*e, or 4*H*e with something to add; x = LN(summed) 2*H*e.
"""

from collections.abc import Sequence

from torch import Tensor

import triton
import triton.language as tl

from .backward import adapter_fusion_backward
from .tiles import contiguous_rows, launch, row_schedule


@triton.jit
def _normalised(
    value_ptr, stride_vm, rows, mask_t,
    EPS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The rows with mean 0 and variance 1, zeros behind H, and what they were multiplied with."""
    offs_h = tl.arange(0, BLOCK_H)
    mask = mask_t[:, None] & (offs_h < H)[None, :]
    tile = value_ptr + rows[:, None] * stride_vm + offs_h[None, :]
    value = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / H
    centred = tl.where(mask, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / H + EPS)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    value_ptr,  # [num_rows, H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    out_ptr,  # [num_rows, H]
    num_rows,
    stride_vm,
    EPS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < num_rows
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    normalised, _ = _normalised(value_ptr, stride_vm, rows, mask_t, EPS, H, BLOCK_H)
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    out = normalised * weight[None, :] + bias[None, :]
    out_tile = out_ptr + rows[:, None] * H + offs_h[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_h[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_bwd_kernel(
    grad_ptr,  # [num_rows, H]: of the LayerNorm's output
    value_ptr,  # [num_rows, H]: its input
    weight_ptr,  # [H]
    add_ptr,  # [num_rows, H] to add, or None
    out_ptr,  # [num_rows, H]
    num_rows,
    stride_gm,
    stride_vm,
    EPS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < num_rows
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask = mask_t[:, None] & mask_h[None, :]
    own_rows = rows[:, None] * H + offs_h[None, :]
    normalised, rstd = _normalised(value_ptr, stride_vm, rows, mask_t, EPS, H, BLOCK_H)
    grad_tile = grad_ptr + rows[:, None] * stride_gm + offs_h[None, :]
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    grad = tl.load(grad_tile, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
    mean = tl.sum(grad, axis=1) / H
    slope = tl.sum(grad * normalised, axis=1) / H
    out = rstd[:, None] * (grad - mean[:, None] - normalised * slope[:, None])
    if add_ptr is not None:
        out += tl.load(add_ptr + own_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + own_rows, out.to(out_ptr.dtype.element_ty), mask=mask)


def _row_wise(kernel, value: Tensor, **arguments) -> Tensor:
    """A launch over whole rows of `value`; what it writes."""
    value = contiguous_rows(value)
    num_rows, hidden_size = value.shape
    blocks = row_schedule(hidden_size)
    out = value.new_empty(num_rows, hidden_size)
    arguments = arguments | {
        "value_ptr": value,
        "out_ptr": out,
        "num_rows": num_rows,
        "stride_vm": value.stride(0),
        "H": hidden_size,
        **blocks,
    }
    launch(kernel, triton.cdiv(num_rows, blocks["BLOCK_T"]), arguments)
    return out


def _through_norm(
    grad: Tensor, value: Tensor, weight: Tensor, eps: float, add: Tensor | None = None
) -> Tensor:
    """The gradient of a LayerNorm's input `value`, plus `add`."""
    grad = contiguous_rows(grad)
    return _row_wise(
        layer_norm_bwd_kernel, value, grad_ptr=grad, weight_ptr=weight.contiguous(), add_ptr=add,
        stride_gm=grad.stride(0), EPS=eps,
    )  # fmt: skip


def adapter_fusion_norm_backward(
    grad_out: Tensor,
    hidden: Tensor | None,
    summed: Tensor,
    pre_norm: Tensor,
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
    p: Tensor,
    sizes: Sequence[int],
    activations: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastfusion.ops.torch_backend.adapter_fusion_norm_backward`."""
    needs_x, *needs_weights = needs
    grad = _through_norm(grad_out, pre_norm, ln_weight, ln_eps)
    x = hidden
    if ln_before:
        weight, bias = ln_weight.contiguous(), ln_bias.contiguous()
        x = _row_wise(layer_norm_kernel, summed, weight_ptr=weight, bias_ptr=bias, EPS=ln_eps)
    dx, _, *dweights, _ = adapter_fusion_backward(
        grad, [x], None, w_down, b_down, w_score, b_score, w_out, temperature, mask, p,
        sizes, activations, [needs_x, False, *needs_weights, False],
        add=None if ln_before else grad,
    )  # fmt: skip
    dhidden = dinput = grad_out.new_empty(0)
    if needs_x and ln_before:
        dhidden = _through_norm(dx[0], summed, ln_weight, ln_eps, add=grad)
    elif needs_x:
        dhidden, dinput = dx[0], grad
    return dhidden, dinput, *dweights
