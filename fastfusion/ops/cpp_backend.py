"""The adapter mixture in C++ on a CPU, fp32 and bf16 (`csrc/cpu/adapter_fusion.cpp`).

The functions have the signatures of `torch_backend`. What is done here: layouts and dtypes. The
extension wants contiguous tensors, and the small vectors (biases, LayerNorm, mask, temperature) in
fp32. bf16 tensors go in as they are where the processor multiplies bf16, and are widened to fp32
where PyTorch's bf16 products would be several times slower than its fp32 ones.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .routing import routing_tables
from .weights import GroupedWeights, PackedWeights

try:
    import fastfusion._C  # noqa: F401  registers torch.ops.fastfusion.*_cpu
except ImportError as error:
    raise ImportError(
        "fastfusion._C is not built: it needs torch >= 2.13 and a C++ compiler when fastfusion is "
        f"installed (torch is {torch.__version__}; {error})"
    ) from error

_OPS = torch.ops.fastfusion


def refusal(x: Tensor, weights: PackedWeights | GroupedWeights) -> str | None:
    """Why this backend cannot run a mixture of this input and these weights, or None."""
    if x.device.type != "cpu":
        return f"it needs tensors on the CPU; got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it needs float32 or bfloat16; got {x.dtype}"
    for name, weight in weights._asdict().items():
        if not isinstance(weight, Tensor) or name == "temperature":
            continue
        if weight.dtype != x.dtype or weight.device != x.device:
            return (
                f"it needs {name} like the input ({x.dtype} on {x.device}); "
                f"got {weight.dtype} on {weight.device}"
            )
    return None


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this processor has bf16 products (AVX512-bf16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float32 or multiplies_bf16() else torch.float32


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _packed(
    dtype: torch.dtype,
    w_down: Tensor,
    b_down: Tensor,
    w_score: Tensor | None,
    b_score: Tensor | None,
    w_out: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    single = torch.float32
    return (
        _as(w_down, dtype),
        _as(b_down, single),
        _as(w_score, dtype),
        _as(b_score, single),
        _as(w_out, dtype),
        _as(temperature, single),
        _as(mask, single),
    )


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
    dtype = _compute_dtype(x[0].dtype)
    out, p = _OPS.adapter_fusion_cpu(
        [_as(x_i, dtype) for x_i in x],
        _as(query, dtype),
        _as(residual, dtype),
        *_packed(dtype, w_down, b_down, w_score, b_score, w_out, temperature, mask),
        _as(score_offset, torch.float32),
        sizes,
        activations,
    )
    return out.to(x[0].dtype), p


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `torch_backend.adapter_fusion_backward`."""
    dtype = _compute_dtype(x[0].dtype)
    gradients = _OPS.adapter_fusion_backward_cpu(
        _as(grad_out, dtype),
        [_as(x_i, dtype) for x_i in x],
        _as(query, dtype),
        *_packed(dtype, w_down, b_down, w_score, b_score, w_out, temperature, mask),
        _as(p, torch.float32),
        sizes,
        activations,
        *needs,
    )
    return tuple(gradient.to(grad_out.dtype) for gradient in gradients)


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
    """See `torch_backend.adapter_fusion_norm`."""
    dtype = _compute_dtype(hidden.dtype)
    out, p, summed, pre_norm = _OPS.adapter_fusion_norm_cpu(
        _as(hidden, dtype),
        _as(input, dtype),
        _as(ln_weight, torch.float32),
        _as(ln_bias, torch.float32),
        ln_eps,
        ln_before,
        *_packed(dtype, w_down, b_down, w_score, b_score, w_out, temperature, mask),
        sizes,
        activations,
        save,
    )
    return out.to(hidden.dtype), p, summed.to(hidden.dtype), pre_norm.to(hidden.dtype)


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
    """See `torch_backend.adapter_fusion_norm_backward`."""
    dtype = _compute_dtype(pre_norm.dtype)
    gradients = _OPS.adapter_fusion_norm_backward_cpu(
        _as(grad_out, dtype),
        _as(hidden, dtype),
        _as(summed, dtype),
        _as(pre_norm, dtype),
        _as(ln_weight, torch.float32),
        _as(ln_bias, torch.float32),
        ln_eps,
        ln_before,
        *_packed(dtype, w_down, b_down, w_score, b_score, w_out, temperature, mask),
        _as(p, torch.float32),
        sizes,
        activations,
        *needs,
    )
    return tuple(gradient.to(grad_out.dtype) for gradient in gradients)


def _block_rows(rows: int) -> int:
    """Rows of one block: its products run on one thread, so that blocks must be enough for all."""
    return max(32, min(256, rows // 16))


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
    dtype, single = _compute_dtype(x.dtype), torch.float32
    out, p = _OPS.adapter_fusion_grouped_cpu(
        _as(x, dtype),
        _as(residual, dtype),
        *routing_tables(groups, len(counts), _block_rows(len(x))),
        _as(w_in, dtype),
        _as(b_in, single),
        _as(w_out, dtype),
        _as(mask, single),
        sizes,
        activations,
        counts,
        scored,
    )
    return out.to(x.dtype), p


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
    """See `torch_backend.adapter_fusion_grouped_backward`."""
    dtype, single = _compute_dtype(x.dtype), torch.float32
    gradients = _OPS.adapter_fusion_grouped_backward_cpu(
        _as(grad_out, dtype),
        _as(x, dtype),
        *routing_tables(groups, len(counts), _block_rows(len(x))),
        _as(w_in, dtype),
        _as(b_in, single),
        _as(w_out, dtype),
        _as(mask, single),
        _as(p, single),
        sizes,
        activations,
        counts,
        scored,
        *needs,
    )
    return tuple(gradient.to(grad_out.dtype) for gradient in gradients)
