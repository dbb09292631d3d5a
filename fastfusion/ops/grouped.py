"""The op over groups of rows: every row goes through the mixture that its group has.

    torch.ops.fastfusion.adapter_fusion_grouped

One call serves any number of setups, in any order of the rows, base rows among them. The groups'
packed weights lie one behind the other, so that no per-group tensor is an argument.
"""

import torch
from torch import Tensor

from . import backends
from .weights import GroupedWeights, layouts, max_scored

_LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")

_WEIGHTS = "Tensor w_in, Tensor b_in, Tensor w_out, Tensor? mask"
_LAYOUT = "int[] sizes, int[] activations, int[] counts, int[] scored"

_LIBRARY.define(
    f"adapter_fusion_grouped(Tensor x, Tensor? residual, Tensor groups, {_WEIGHTS}, {_LAYOUT}, "
    "str? backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"adapter_fusion_grouped_backward(Tensor grad_out, Tensor x, Tensor groups, {_WEIGHTS}, "
    f"Tensor p, {_LAYOUT}, bool[] needs, str? backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _register(name: str, first_weight: int, behind: int) -> None:
    def implementation(*args):
        *args, backend = args
        layout = args[len(args) - behind - 4 : len(args) - behind]
        weights = GroupedWeights(*args[first_weight : first_weight + 3], *layout)
        return getattr(backends.load(backends.choose(backend, args[0], weights)), name)(*args)

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")


_register("adapter_fusion_grouped", 3, 0)
_register("adapter_fusion_grouped_backward", 3, 1)


@torch.library.register_fake("fastfusion::adapter_fusion_grouped", lib=_LIBRARY)
def _(x, residual, groups, w_in, b_in, w_out, mask, sizes, activations, counts, scored, backend):
    dtype = torch.promote_types(x.dtype, torch.float32)
    p = x.new_empty([x.shape[0], max_scored(counts, scored)], dtype=dtype)
    return x.new_empty(x.shape), p


@torch.library.register_fake("fastfusion::adapter_fusion_grouped_backward", lib=_LIBRARY)
def _(grad_out, x, groups, w_in, b_in, w_out, mask, p, *args):
    needs_x, needs_in, needs_out = args[4]
    wanted = [(x, needs_x), (w_in, needs_in), (b_in, needs_in), (w_out, needs_out)]
    return tuple(grad_out.new_empty(t.shape if need else [0]) for t, need in wanted)


def _setup(ctx, inputs, output):
    x, _, groups, w_in, b_in, w_out, mask, *layout, backend = inputs
    ctx.save_for_backward(x, groups, w_in, b_in, w_out, mask, output[1])
    ctx.layout, ctx.backend = layout, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 12
    needs_x, needs_residual, _, needs_w_in, needs_b_in, needs_out = ctx.needs_input_grad[:6]
    needs_in = needs_w_in or needs_b_in
    dx, dw_in, db_in, dw_out = torch.ops.fastfusion.adapter_fusion_grouped_backward(
        grad_out.contiguous(), *ctx.saved_tensors, *ctx.layout, [needs_x, needs_in, needs_out],
        ctx.backend,
    )  # fmt: skip
    return (
        dx if needs_x else None,
        grad_out if needs_residual else None,
        None,
        dw_in if needs_w_in else None,
        db_in if needs_b_in else None,
        dw_out if needs_out else None,
        *(None,) * 6,
    )


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "adapter_fusion_grouped: gradients of gradients are not supported; use backend='reference'"
    )


torch.library.register_autograd(
    "fastfusion::adapter_fusion_grouped", _backward, setup_context=_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "fastfusion::adapter_fusion_grouped_backward", _refuse_double_backward, lib=_LIBRARY
)


def adapter_fusion_grouped(
    x: Tensor,
    residual: Tensor | None,
    groups: Tensor,
    weights: GroupedWeights,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Every row through the mixture of its group.

    Semantics::

        for g in range(G):                                  # rows of group g, its own weights
            rows = groups == g
            out[rows] = adapter_fusion([x[rows]], None, residual[rows], weights of g)
        out[groups == -1] = residual[groups == -1]          # base rows

    Args:
        x: the rows [T, H], floating.
        residual: [T, H], or None for nothing to add.
        groups: [T], int32: each row's group, from -1 for none to G - 1. On a GPU the values are
            not checked.
        weights: the groups' packed weights, of the dtype and on the device of `x`.
        mask: dropout on the scores, [T, N] with N adapters in the largest scored group.
        backend: "torch", "cpp", "triton", or None to choose.

    Returns:
        out [T, H], and p [T, N] in fp32 (fp64 for fp64 inputs), zero behind a row's own adapters
        and in rows without attention; detached.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run this.
    """
    rows, hidden_size = x.shape
    found = layouts(weights.sizes, weights.counts, weights.scored)
    height_in = max(found[-1].down.stop, 0 if found[-1].score is None else found[-1].score.stop)
    expected = {
        "residual": (residual, [rows, hidden_size]),
        "groups": (groups, [rows]),
        "w_in": (weights.w_in, [height_in, hidden_size]),
        "b_in": (weights.b_in, [height_in]),
        "w_out": (weights.w_out, [found[-1].out.stop, hidden_size]),
        "mask": (mask, [rows, max_scored(weights.counts, weights.scored)]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}; got {list(tensor.shape)}")
    if groups.dtype != torch.int32:
        raise ValueError(f"groups: expected torch.int32; got {groups.dtype}")
    w_in, b_in, w_out, *layout = weights
    return torch.ops.fastfusion.adapter_fusion_grouped(
        x, residual, groups, w_in, b_in, w_out, mask, *layout, backend
    )
