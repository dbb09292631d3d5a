"""The library's two ops: a mixture of bottlenecks, alone and with the sub-layer's norms around it.

    torch.ops.fastfusion.adapter_fusion        out = residual + sum_i p_i (V_i z_i + v_i)
    torch.ops.fastfusion.adapter_fusion_norm   the same between the model's residual and LayerNorm

Schema, fake implementation, autograd and the call of the backend stand here; the mathematics is in
the backends. Weights arrive packed (`fastfusion.absorb`); the same op serves AdapterFusion in its
absorbed and its factored form and, without score weights, a single adapter.
"""

import torch
from torch import Tensor

from . import backends
from .activations import ACTIVATIONS
from .weights import PackedWeights

_LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")

_WEIGHTS = (
    "Tensor w_down, Tensor b_down, Tensor? w_score, Tensor? b_score, Tensor w_out, "
    "Tensor? temperature, Tensor? mask"
)
_TAIL = "int[] sizes, int[] activations"

_LIBRARY.define(
    f"adapter_fusion(Tensor[] x, Tensor? query, Tensor? residual, {_WEIGHTS}, "
    f"Tensor? score_offset, {_TAIL}, str? backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "adapter_fusion_backward(Tensor grad_out, Tensor[] x, Tensor? query, "
    f"{_WEIGHTS}, Tensor p, {_TAIL}, bool[] needs, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "adapter_fusion_norm(Tensor hidden, Tensor input, Tensor ln_weight, Tensor ln_bias, "
    f"float ln_eps, bool ln_before, {_WEIGHTS}, {_TAIL}, bool save, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "adapter_fusion_norm_backward(Tensor grad_out, Tensor? hidden, Tensor summed, Tensor pre_norm, "
    "Tensor ln_weight, Tensor ln_bias, float ln_eps, bool ln_before, "
    f"{_WEIGHTS}, Tensor p, {_TAIL}, bool[] needs, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _register(name: str, first_weight: int, behind: int) -> None:
    """The op runs the function of its name in the backend that its arguments choose.

    Args:
        first_weight: which argument is `w_down`.
        behind: how many arguments stand between `activations` and `backend`.
    """

    def implementation(*args):
        *args, backend = args
        sizes, activations = args[len(args) - behind - 2 : len(args) - behind]
        weights = PackedWeights(*args[first_weight : first_weight + 6], sizes, activations)
        like = args[0][0] if isinstance(args[0], list) else args[0]
        return getattr(backends.load(backends.choose(backend, like, weights)), name)(*args)

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")


_register("adapter_fusion", 3, 0)
_register("adapter_fusion_backward", 3, 1)
_register("adapter_fusion_norm", 6, 1)
_register("adapter_fusion_norm_backward", 8, 1)


def _expect_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and list(tensor.shape) != list(shape):
        raise ValueError(f"{name}: expected {list(shape)}; got {list(tensor.shape)}")


def _check(rows: int, weights: tuple, sizes: list[int], activations: list[int]) -> int:
    """Raise a ValueError unless the weights fit each other; returns the hidden size.

    Args:
        weights: w_down, b_down, w_score, b_score, w_out, temperature, mask.
    """
    w_down, b_down, w_score, b_score, w_out, temperature, mask = weights
    columns, adapters, hidden_size = sum(sizes), len(sizes), w_down.shape[-1]
    if not sizes or min(sizes) < 0:
        raise ValueError(f"sizes: expected one or more sizes from 0; got {sizes}")
    if len(activations) != adapters or not all(0 <= a < len(ACTIVATIONS) for a in activations):
        raise ValueError(
            f"activations: expected {adapters} codes below {len(ACTIVATIONS)}; got {activations}"
        )
    _expect_shape("w_down", w_down, columns, hidden_size)
    _expect_shape("b_down", b_down, columns)
    for name, weight in (("w_score", w_score), ("w_out", w_out)):
        if weight is not None:
            # padding rows may follow
            _expect_shape(name, weight, max(columns + adapters, weight.shape[0]), hidden_size)
    if w_score is not None:
        _expect_shape("b_score", b_score, w_score.shape[0])
    _expect_shape("temperature", temperature)
    _expect_shape("mask", mask, rows, adapters)
    return hidden_size


def _attention_like(x: Tensor, w_score: Tensor | None, sizes: list[int]) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = [0] if w_score is None else [x.shape[0], len(sizes)]
    return x.new_empty(shape, dtype=dtype)


@torch.library.register_fake("fastfusion::adapter_fusion", lib=_LIBRARY)
def _(x, query, residual, *args):
    *weights, score_offset, sizes, activations, backend = args
    return x[0].new_empty(x[0].shape), _attention_like(x[0], weights[2], sizes)


@torch.library.register_fake("fastfusion::adapter_fusion_norm", lib=_LIBRARY)
def _(hidden, input, ln_weight, ln_bias, ln_eps, ln_before, *args):
    *weights, sizes, activations, save, backend = args
    p = _attention_like(hidden, weights[2], sizes)
    summed = hidden.new_empty(hidden.shape if save and ln_before else [0])
    pre_norm = hidden.new_empty(hidden.shape if save else [0])
    return hidden.new_empty(hidden.shape), p, summed, pre_norm


def _weight_grads_like(like: Tensor, w_down, b_down, w_score, b_score, w_out, needs) -> list:
    needs_down, needs_score, needs_out = needs
    pairs = [(w_down, needs_down), (b_down, needs_down), (w_score, needs_score)]
    pairs += [(b_score, needs_score), (w_out, needs_out)]
    return [
        like.new_empty(w.shape) if need and w is not None else like.new_empty(0)
        for w, need in pairs
    ]


@torch.library.register_fake("fastfusion::adapter_fusion_backward", lib=_LIBRARY)
def _(grad_out, x, query, *args):
    *weights, _, _, p, sizes, activations, needs, backend = args
    needs_x, needs_query, *needs_weights, needs_offset = needs
    rows, hidden_size = grad_out.shape
    dx = grad_out.new_empty([len(x), rows, hidden_size] if needs_x else [0])
    dquery = grad_out.new_empty([rows, hidden_size] if needs_query else [0])
    doffset = grad_out.new_empty([rows] if needs_offset else [0])
    return dx, dquery, *_weight_grads_like(grad_out, *weights, needs_weights), doffset


@torch.library.register_fake("fastfusion::adapter_fusion_norm_backward", lib=_LIBRARY)
def _(grad_out, hidden, summed, pre_norm, ln_weight, ln_bias, ln_eps, ln_before, *args):
    *weights, _, _, p, sizes, activations, needs, backend = args
    needs_x, *needs_weights = needs
    dhidden = grad_out.new_empty(grad_out.shape if needs_x else [0])
    dinput = grad_out.new_empty(grad_out.shape if needs_x and not ln_before else [0])
    return dhidden, dinput, *_weight_grads_like(grad_out, *weights, needs_weights)


def _given(needed: bool, grad: Tensor) -> Tensor | None:
    return grad if needed else None


def _setup_adapter_fusion(ctx, inputs, output):
    x, query, residual, *weights, _, sizes, activations, backend = inputs
    ctx.num_inputs = len(x)
    ctx.save_for_backward(*x, query, *weights, output[1])
    ctx.sizes, ctx.activations, ctx.backend = sizes, activations, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_adapter_fusion(ctx, grad_out, _):
    num_inputs = ctx.num_inputs
    needs_x, needs_query, needs_residual, *needs_weights = ctx.needs_input_grad[:8]
    needs_offset = ctx.needs_input_grad[10]
    *saved, p = ctx.saved_tensors
    x, query, weights = saved[:num_inputs], saved[num_inputs], saved[num_inputs + 1 :]
    any_x = any(needs_x) if isinstance(needs_x, (list, tuple)) else needs_x
    if weights[2] is None:  # a single adapter looks at neither
        needs_query = needs_offset = False
    needs_down, needs_score = any(needs_weights[:2]), any(needs_weights[2:4])
    needs = [any_x, needs_query, needs_down, needs_score, needs_weights[4], needs_offset]
    if grad_out is None:
        return [None] * num_inputs, *(None,) * 13
    dx, dquery, *dweights, doffset = torch.ops.fastfusion.adapter_fusion_backward(
        grad_out.contiguous(), x, query, *weights, p, ctx.sizes, ctx.activations, needs, ctx.backend
    )
    dx_list = list(dx.unbind(0)) if any_x else [None] * num_inputs
    return (
        dx_list,
        _given(needs_query, dquery),
        _given(needs_residual, grad_out),
        *map(_given, needs_weights, dweights),
        None,
        None,
        _given(needs_offset, doffset),
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "fastfusion::adapter_fusion",
    _backward_adapter_fusion,
    setup_context=_setup_adapter_fusion,
    lib=_LIBRARY,
)


def _setup_adapter_fusion_norm(ctx, inputs, output):
    hidden, input, ln_weight, ln_bias, ln_eps, ln_before, *rest = inputs
    *weights, sizes, activations, save, backend = rest
    _, p, summed, pre_norm = output
    kept_hidden = None if ln_before else hidden
    ctx.save_for_backward(kept_hidden, summed, pre_norm, ln_weight, ln_bias, *weights, p)
    ctx.ln_eps, ctx.ln_before = ln_eps, ln_before
    ctx.sizes, ctx.activations, ctx.backend = sizes, activations, backend
    ctx.mark_non_differentiable(p, summed, pre_norm)
    ctx.set_materialize_grads(False)


def _backward_adapter_fusion_norm(ctx, grad_out, *_):
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise RuntimeError(
            "adapter_fusion_norm: ln_weight and ln_bias must not require gradients; "
            "use adapter_fusion between two torch.nn.functional.layer_norm calls to train them"
        )
    if grad_out is None:
        return (None,) * 17
    needs_hidden, needs_input = ctx.needs_input_grad[:2]
    needs_weights = ctx.needs_input_grad[6:11]
    hidden, summed, pre_norm, ln_weight, ln_bias, *weights, p = ctx.saved_tensors
    needs = [
        needs_hidden or needs_input,
        any(needs_weights[:2]),
        any(needs_weights[2:4]),
        needs_weights[4],
    ]
    dhidden, dinput, *dweights = torch.ops.fastfusion.adapter_fusion_norm_backward(
        grad_out.contiguous(), hidden, summed, pre_norm, ln_weight, ln_bias, ctx.ln_eps,
        ctx.ln_before, *weights, p, ctx.sizes, ctx.activations, needs, ctx.backend,
    )  # fmt: skip
    return (
        _given(needs_hidden, dhidden),
        _given(needs_input, dhidden if ctx.ln_before else dinput),
        *(None,) * 4,
        *map(_given, needs_weights, dweights),
        *(None,) * 6,
    )


torch.library.register_autograd(
    "fastfusion::adapter_fusion_norm",
    _backward_adapter_fusion_norm,
    setup_context=_setup_adapter_fusion_norm,
    lib=_LIBRARY,
)


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "adapter_fusion: gradients of gradients are not supported; use backend='reference'"
    )


for _name in ("adapter_fusion_backward", "adapter_fusion_norm_backward"):
    torch.library.register_autograd(f"fastfusion::{_name}", _refuse_double_backward, lib=_LIBRARY)


def adapter_fusion(
    x: list[Tensor],
    query: Tensor | None,
    residual: Tensor | None,
    weights: PackedWeights,
    *,
    mask: Tensor | None = None,
    score_offset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A mixture of bottleneck adapters, weighted by attention over them.

    Semantics, with the rows of `weights` named as there (`q` is `query`, or `x` where it is None)::

        z_i = act_i(x_i @ D_i.T + b_i)                            # [T, d_i]
        s_i = mask_i * ((z_i * (q @ M_i.T + m_i)).sum(-1) + q @ C_i + c_i + score_offset)
        p   = softmax(s / temperature)                            # [T, N]; 1 without score weights
        out = residual + sum_i p_i * (z_i @ V_i.T + v_i)          # [T, H]

    Args:
        x: the adapters' inputs [T, H], floating: one for all of them or one for each.
        query: [T, H], or None for `x[0]`.
        residual: [T, H], or None for nothing to add.
        weights: the packed weights, of the inputs' dtype and device.
        mask: dropout on the scores, [T, N], already divided by the survival probability.
        score_offset: [T], added to each score of a row before the mask.
        backend: "torch", "cpp", "triton", or None to choose by device, dtype and activations.

    Returns:
        out [T, H], and p [T, N] in fp32 (fp64 for fp64 inputs; empty without score weights). The
        gradient flows through `out`; `p` is detached.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run this.

    Source: Pfeiffer et al. 2021, section 3.2; the rewriting is derived in docs/design.md.
    """
    if len(x) not in (1, len(weights.sizes)):
        raise ValueError(f"x: expected 1 or {len(weights.sizes)} tensors; got {len(x)}")
    rows = x[0].shape[0]
    hidden_size = _check(rows, (*weights[:6], mask), weights.sizes, weights.activations)
    for i, x_i in enumerate(x):
        _expect_shape(f"x[{i}]", x_i, rows, hidden_size)
    _expect_shape("query", query, rows, hidden_size)
    _expect_shape("residual", residual, rows, hidden_size)
    _expect_shape("score_offset", score_offset, rows)
    *tensors, sizes, activations = weights
    args = (x, query, residual, *tensors, mask, score_offset, sizes, activations)
    if _runs_eagerly():
        return backends.load(backends.choose(backend, x[0], weights)).adapter_fusion(*args)
    return torch.ops.fastfusion.adapter_fusion(*args, backend)


def adapter_fusion_norm(
    hidden: Tensor,
    input: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    ln_eps: float,
    ln_before: bool,
    weights: PackedWeights,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`adapter_fusion` with the sub-layer's residual and LayerNorm around it, in one pass.

    Semantics::

        s = hidden + input
        x = layer_norm(s) if ln_before else hidden
        out = layer_norm(s + mixture(x))           # the same LayerNorm at both places

    Args:
        hidden: the sub-layer's output [T, H].
        input: the sub-layer's input [T, H].
        ln_weight, ln_bias: [H], both frozen.
        ln_eps: the LayerNorm's epsilon.
        ln_before: whether the adapters read the normalised sum (`original_ln_before`).
        weights, mask, backend: as in `adapter_fusion`.

    Returns:
        out [T, H] and p [T, N], as `adapter_fusion`.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run this.

    Source: `adapters` 1.3.0, methods/modeling.py: pre_forward and post_forward.
    """
    rows = hidden.shape[0]
    hidden_size = _check(rows, (*weights[:6], mask), weights.sizes, weights.activations)
    _expect_shape("hidden", hidden, rows, hidden_size)
    _expect_shape("input", input, rows, hidden_size)
    _expect_shape("ln_weight", ln_weight, hidden_size)
    _expect_shape("ln_bias", ln_bias, hidden_size)
    *tensors, sizes, activations = weights
    args = (hidden, input, ln_weight, ln_bias, ln_eps, ln_before, *tensors, mask)
    if _runs_eagerly():
        module = backends.load(backends.choose(backend, hidden, weights))
        outputs = module.adapter_fusion_norm(*args, sizes, activations, False)
    else:
        # what a backward would need; a graph that is being traced asks for it too
        save = torch.is_grad_enabled()
        outputs = torch.ops.fastfusion.adapter_fusion_norm(*args, sizes, activations, save, backend)
    return outputs[0], outputs[1]


def _runs_eagerly() -> bool:
    """Nothing to record and nothing to trace: call the backend without the dispatcher's cost."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())
