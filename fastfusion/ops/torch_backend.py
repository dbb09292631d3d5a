"""The adapter mixture in plain PyTorch: any device, any floating dtype, no compiler.

`p`, the scores and every sum over columns are taken in at least fp32. Shapes: `T` rows, `H` hidden
size, `N` adapters with bottleneck sizes `d_i`, `D = sum(d_i)`; `w_score` and `w_out` have `D + N`
rows and may have padding rows behind them, zero in `w_out` and ignored in `w_score`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .routing import routing_tables
from .weights import group_weights, layouts, max_scored


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _spread(p: Tensor, sizes: Sequence[int]) -> Tensor:
    """[T, N] -> [T, D]: every adapter's value repeated over its columns."""
    if len(set(sizes)) == 1:
        return p.unsqueeze(-1).expand(-1, -1, sizes[0]).reshape(p.shape[0], sum(sizes))
    return torch.cat([p[:, i : i + 1].expand(-1, d) for i, d in enumerate(sizes)], dim=-1)


def _sum_columns(z: Tensor, sizes: Sequence[int]) -> Tensor:
    """[T, D] -> [T, N]: the sum over each adapter's columns."""
    if len(set(sizes)) == 1:
        return z.view(z.shape[0], len(sizes), sizes[0]).sum(-1)
    return torch.stack([part.sum(-1) for part in z.split(list(sizes), dim=-1)], dim=-1)


def _by_adapter(apply, sizes: Sequence[int], activations: Sequence[int], *tensors: Tensor):
    """`apply(activation, *columns)` for every run of adapters that share a non-linearity."""
    if len(set(activations)) == 1:
        return apply(ACTIVATIONS[activations[0]], *tensors)
    parts = zip(activations, *(t.split(list(sizes), dim=-1) for t in tensors), strict=True)
    return torch.cat([apply(ACTIVATIONS[code], *columns) for code, *columns in parts], dim=-1)


def _project(x: Sequence[Tensor], w_down: Tensor, b_down: Tensor, sizes: Sequence[int]) -> Tensor:
    """The down-projections [T, D] of one shared input or of one input per adapter."""
    if len(x) == 1:
        return F.linear(x[0], w_down, b_down)
    parts = zip(x, w_down.split(list(sizes)), b_down.split(list(sizes)), strict=True)
    return torch.cat([F.linear(*part) for part in parts], dim=-1)


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
    dtype, num_columns, num_adapters = w_down.dtype, sum(sizes), len(sizes)
    acc = _accumulate_dtype(dtype)
    pre = _project(x, w_down, b_down, sizes).to(acc)
    z = _by_adapter(lambda act, u: act.forward(u), sizes, activations, pre)
    if w_score is None:
        p = z.new_empty(0)
        w = torch.cat([z, z.new_ones(z.shape[0], num_adapters)], dim=-1)
    else:
        y = F.linear(x[0] if query is None else query, w_score, b_score).to(acc)
        t, c = y[:, :num_columns], y[:, num_columns : num_columns + num_adapters]
        scores = _sum_columns(z * t, sizes) + c
        if score_offset is not None:
            scores = scores + score_offset.to(acc).unsqueeze(-1)
        if mask is not None:
            scores = scores * mask.to(acc)
        if temperature is not None:
            scores = scores / temperature.to(acc)
        p = torch.softmax(scores, dim=-1)
        w = torch.cat([_spread(p, sizes) * z, p], dim=-1)
    out = w.to(dtype) @ w_out[: num_columns + num_adapters]
    return (out if residual is None else residual + out), p


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
    """Gradients by recomputation of z and t from the inputs and the saved attention `p`.

    Args:
        needs: which of (x, query, the down weights, the score weights, w_out, score_offset).

    Returns:
        dx [len(x), T, H], dquery, dw_down, db_down, dw_score, db_score, dw_out, dscore_offset; an
        empty tensor for each that is not needed.
    """
    needs_x, needs_query, needs_down, needs_score, needs_out, needs_offset = needs
    dtype, num_columns, num_adapters = w_down.dtype, sum(sizes), len(sizes)
    used = num_columns + num_adapters
    acc = _accumulate_dtype(dtype)
    empty = grad_out.new_empty(0)
    dquery = dw_down = db_down = dw_score = db_score = dw_out = doffset = empty

    pre = _project(x, w_down, b_down, sizes).to(acc)
    z = _by_adapter(lambda act, u: act.forward(u), sizes, activations, pre)
    dw = (grad_out @ w_out[:used].t()).to(acc)
    dz, dp = dw[:, :num_columns], dw[:, num_columns:]
    if w_score is None:
        w = torch.cat([z, z.new_ones(z.shape[0], num_adapters)], dim=-1)
        dy = None
    else:
        queries = x[0] if query is None else query
        t = F.linear(queries, w_score[:num_columns], b_score[:num_columns]).to(acc)
        p_columns = _spread(p, sizes)
        w = torch.cat([p_columns * z, p], dim=-1)
        dp = dp + _sum_columns(dz * z, sizes)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        if temperature is not None:
            ds = ds / temperature.to(acc)
        if mask is not None:
            ds = ds * mask.to(acc)
        if needs_offset:
            doffset = ds.sum(-1).to(dtype)
        ds_columns = _spread(ds, sizes)
        dz = p_columns * dz + ds_columns * t
        dy = torch.cat([ds_columns * z, ds], dim=-1).to(dtype)
        if needs_query:
            dquery = dy @ w_score[:used]
        if needs_score:
            dw_score = F.pad(dy.t() @ queries, (0, 0, 0, w_score.shape[0] - used))
            db_score = F.pad(dy.sum(0), (0, w_score.shape[0] - used))
    if needs_out:
        dw_out = F.pad(w.to(dtype).t() @ grad_out, (0, 0, 0, w_out.shape[0] - used))

    dpre = _by_adapter(lambda act, g, u: act.backward(g, u), sizes, activations, dz, pre).to(dtype)
    shared = len(x) == 1
    dx = empty
    if needs_x:
        if shared:
            dx = (dpre @ w_down).unsqueeze(0)
        else:
            parts = zip(dpre.split(list(sizes), -1), w_down.split(list(sizes)), strict=True)
            dx = torch.stack([g @ w for g, w in parts])
        if dy is not None and query is None:
            dx[0] += dy @ w_score[:used]
    if needs_down:
        if shared:
            dw_down = dpre.t() @ x[0]
        else:
            dw_down = torch.cat(
                [g.t() @ x_i for g, x_i in zip(dpre.split(list(sizes), -1), x, strict=True)]
            )
        db_down = dpre.sum(0)
    return dx, dquery, dw_down, db_down, dw_score, db_score, dw_out, doffset


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
    """See `fastfusion.ops.adapter_fusion_norm`; returns out, p and, with `save`, what each
    LayerNorm sees: `hidden + input` with `ln_before`, and its sum with the mixture (otherwise empty
    tensors)."""
    dtype = hidden.dtype
    acc = _accumulate_dtype(dtype)
    norm = ([hidden.shape[-1]], ln_weight.to(acc), ln_bias.to(acc), ln_eps)
    summed = hidden.to(acc) + input
    x = F.layer_norm(summed, *norm).to(dtype) if ln_before else hidden
    mixed, p = adapter_fusion(
        [x], None, None, w_down, b_down, w_score, b_score, w_out, temperature, mask, None,
        sizes, activations,
    )  # fmt: skip
    pre_norm = summed + mixed
    out = F.layer_norm(pre_norm, *norm).to(dtype)
    kept_summed = summed.to(dtype) if save and ln_before else out.new_empty(0)
    return out, p, kept_summed, pre_norm.to(dtype) if save else out.new_empty(0)


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
    """Gradients of `adapter_fusion_norm` for a frozen LayerNorm.

    Args:
        hidden: the adapters' input; None with `ln_before`, where it is recomputed from `summed`.
        summed, pre_norm: of `adapter_fusion_norm` with `save`.
        needs: which of (hidden or input, the down weights, the score weights, w_out).

    Returns:
        dhidden, dinput (empty where it equals dhidden: with `ln_before`), dw_down, db_down,
        dw_score, db_score, dw_out; an empty tensor for each that is not needed.
    """
    aten = torch.ops.aten
    needs_x, *needs_weights = needs
    shape = [pre_norm.shape[-1]]
    only_input = [True, False, False]

    def through_norm(grad: Tensor, value: Tensor) -> Tensor:
        _, mean, rstd = aten.native_layer_norm(value, shape, ln_weight, ln_bias, ln_eps)
        return aten.native_layer_norm_backward(
            grad, value, shape, mean, rstd, ln_weight, ln_bias, only_input
        )[0]

    grad = through_norm(grad_out, pre_norm)
    x = F.layer_norm(summed, shape, ln_weight, ln_bias, ln_eps) if ln_before else hidden
    dx, _, *dweights, _ = adapter_fusion_backward(
        grad, [x], None, w_down, b_down, w_score, b_score, w_out, temperature, mask, p,
        sizes, activations, [needs_x, False, *needs_weights, False],
    )  # fmt: skip
    dhidden, dinput = grad_out.new_empty(0), grad_out.new_empty(0)
    if needs_x and ln_before:
        dhidden = grad + through_norm(dx[0], summed)
    elif needs_x:
        dhidden, dinput = grad + dx[0], grad
    return dhidden, dinput, *dweights


def _rows_of(groups: Tensor, count: int) -> list[Tensor]:
    """The row numbers of each group; waits for their device."""
    order, offsets, _ = routing_tables(groups, count, 1)
    return list(order.split(offsets.diff().tolist()))[:count]


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
    """See `fastfusion.ops.adapter_fusion_grouped`: one call of `adapter_fusion` for each group."""
    out = torch.zeros_like(x) if residual is None else residual.clone()
    p = x.new_zeros(x.shape[0], max_scored(counts, scored), dtype=_accumulate_dtype(x.dtype))
    parts = layouts(sizes, counts, scored)
    for part, rows in zip(parts, _rows_of(groups, len(counts)), strict=True):
        weights = group_weights(part, w_in, b_in, w_out, sizes, activations)
        count = len(weights.sizes)
        own = None if residual is None else residual[rows]
        own_mask = None if mask is None or part.score is None else mask[rows, :count]
        own_out, own_p = adapter_fusion(
            [x[rows]], None, own, *weights[:6], own_mask, None, *weights[6:]
        )
        out[rows] = own_out
        if part.score is not None:
            p[rows, :count] = own_p
    return out, p


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
    """Gradients by `adapter_fusion_backward` for each group.

    Args:
        needs: which of (x, w_in and b_in, w_out).

    Returns:
        dx, dw_in, db_in, dw_out; an empty tensor for each that is not needed.
    """
    needs_x, needs_in, needs_out = needs
    wanted = [(x, needs_x), (w_in, needs_in), (b_in, needs_in), (w_out, needs_out)]
    dx, dw_in, db_in, dw_out = (
        torch.zeros_like(t) if need else grad_out.new_empty(0) for t, need in wanted
    )
    parts = layouts(sizes, counts, scored)
    for part, rows in zip(parts, _rows_of(groups, len(counts)), strict=True):
        weights = group_weights(part, w_in, b_in, w_out, sizes, activations)
        count = len(weights.sizes)
        is_scored = part.score is not None
        own_mask = mask[rows, :count] if mask is not None and is_scored else None
        own_p = p[rows, :count] if is_scored else p.new_empty(0)
        own_dx, _, dw_down, db_down, dw_score, db_score, own_dw_out, _ = adapter_fusion_backward(
            grad_out[rows], [x[rows]], None, *weights[:6], own_mask, own_p, *weights[6:],
            [needs_x, False, needs_in, needs_in and is_scored, needs_out, False],
        )  # fmt: skip
        if needs_x:
            dx[rows] = own_dx[0]
        if needs_in:
            dw_in[part.down], db_in[part.down] = dw_down, db_down
            if is_scored:
                dw_in[part.score], db_in[part.score] = dw_score, db_score
        if needs_out:
            dw_out[part.out] = own_dw_out
    return dx, dw_in, db_in, dw_out
