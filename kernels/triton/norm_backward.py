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
from .norms import layer_norm
from .tiles import ceil_div, contiguous_rows, launch, power_of_two


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
    ln_eps,
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
    value_tile = value_ptr + rows[:, None] * stride_vm + offs_h[None, :]
    value = tl.load(value_tile, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(mask_h[None, :], value - (tl.sum(value, axis=1) / H)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(value * value, axis=1) / H + ln_eps)
    normalised = value * rstd[:, None]
    grad_tile = grad_ptr + rows[:, None] * stride_gm + offs_h[None, :]
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    grad = tl.load(grad_tile, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
    mean = tl.sum(grad, axis=1) / H
    slope = tl.sum(grad * normalised, axis=1) / H
    out = rstd[:, None] * (grad - mean[:, None] - normalised * slope[:, None])
    if add_ptr is not None:
        out += tl.load(add_ptr + own_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + own_rows, out.to(out_ptr.dtype.element_ty), mask=mask)


def _through_norm(
    grad: Tensor, value: Tensor, weight: Tensor, eps: float, add: Tensor | None = None
) -> Tensor:
    """The gradient of a LayerNorm's input `value`, plus `add`."""
    grad, value = contiguous_rows(grad), contiguous_rows(value)
    num_rows, hidden_size = value.shape
    block_h = power_of_two(hidden_size)
    block_t = max(1, 2048 // block_h)
    out = value.new_empty(num_rows, hidden_size)
    arguments = {
        "grad_ptr": grad,
        "value_ptr": value,
        "weight_ptr": weight.contiguous(),
        "add_ptr": add,
        "out_ptr": out,
        "num_rows": num_rows,
        "stride_gm": grad.stride(0),
        "stride_vm": value.stride(0),
        "ln_eps": eps,
        "H": hidden_size,
        "BLOCK_T": block_t,
        "BLOCK_H": block_h,
        # 16 elements of a tensor per thread of NVIDIA's
        "num_warps": min(16, max(4, block_h // 512)),
    }
    launch(layer_norm_bwd_kernel, ceil_div(num_rows, block_t), arguments)
    return out


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
        x = summed.new_empty(summed.shape)
        layer_norm(summed, ln_weight.contiguous(), ln_bias.contiguous(), ln_eps, out=x)
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
