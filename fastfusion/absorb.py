"""Parameters -> packed weights: the two exact rewritings of AdapterFusion (docs/design.md).

Ordinary differentiable matmuls, so that a training step rebuilds the packs in every forward and
autograd carries the packs' gradients to the parameters. Symbols: `H` hidden size, adapter `i` with
`D_i [d_i, H], b_i` (down) and `U_i [H, d_i], u_i` (up, scaling folded in), the fusion's `Wq, bq,
Wk, bk, Wv`; `D = sum(d_i)`, `N` adapters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import PackedWeights

_ROW_MULTIPLE = 8
"""Ragged widths cost a product 10 %: 291 columns took 3.73 ms, 296 columns 3.32 ms (CPU, fp32)."""


class Bottleneck(NamedTuple):
    """One adapter's parameters."""

    w_down: Tensor
    """[d, H]"""
    b_down: Tensor
    """[d]"""
    w_up: Tensor
    """[H, d]"""
    b_up: Tensor
    """[H]"""
    scaling: Tensor | float
    """[], [1] or [H]"""
    w_norm: Tensor | None
    """[H]: weight of a LayerNorm in front; the packed form reads rows normalised without it."""
    b_norm: Tensor | None
    """[H]"""
    activation: int
    """A code of `fastfusion.ops.activations`."""
    weight: float = 1.0
    """In a sum with constant weights."""


class Attention(NamedTuple):
    """A fusion layer's parameters; None where the config switches a projection off."""

    w_query: Tensor | None
    b_query: Tensor | None
    w_key: Tensor | None
    b_key: Tensor | None
    w_value: Tensor | None


class Parameters(NamedTuple):
    """What makes one mixture: adapters and, under a Fuse, the attention over them."""

    adapters: list[Bottleneck]
    attention: Attention | None

    def tensors(self) -> list[Tensor]:
        """Every parameter, in a fixed order."""
        groups = self.adapters if self.attention is None else [*self.adapters, self.attention]
        return [value for group in groups for value in group if isinstance(value, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Parameters":
        """The same mixture with other values for `tensors()`."""
        values = iter(tensors)

        def replaced(group):
            return type(group)(*(next(values) if isinstance(v, Tensor) else v for v in group))

        adapters = [replaced(adapter) for adapter in self.adapters]
        return Parameters(adapters, self.attention and replaced(self.attention))


def _down(adapters: Sequence[Bottleneck]) -> tuple[Tensor, Tensor]:
    """The down-projections [D, H], [D]: a LayerNorm's weight and bias go into them."""
    weights, biases = [], []
    for adapter in adapters:
        weight, bias = adapter.w_down, adapter.b_down
        if adapter.w_norm is not None:
            weight, bias = weight * adapter.w_norm, bias + weight @ adapter.b_norm
        weights.append(weight)
        biases.append(bias)
    if len(adapters) == 1:
        return weights[0], biases[0]
    return torch.cat(weights), torch.cat(biases)


def _up(adapters: Sequence[Bottleneck]) -> Tensor:
    """The scaled up-projections as rows [D + N, H]: U_1^T .. U_N^T, then u, padded with zeros."""
    factors = [a.scaling if a.weight == 1.0 else a.scaling * a.weight for a in adapters]
    unscaled = [isinstance(factor, float) and factor == 1.0 for factor in factors]
    rows = [
        a.w_up.t() if plain else a.w_up.t() * factor
        for a, factor, plain in zip(adapters, factors, unscaled, strict=True)
    ]
    biases = [
        (a.b_up if plain else a.b_up * factor).unsqueeze(0)
        for a, factor, plain in zip(adapters, factors, unscaled, strict=True)
    ]
    used = sum(row.shape[0] for row in rows) + len(biases)
    padding = rows[0].new_zeros(-used % _ROW_MULTIPLE, rows[0].shape[1])
    return torch.cat([*rows, *biases, padding])


def _shape(adapters: Sequence[Bottleneck]) -> tuple[list[int], list[int]]:
    return [a.w_down.shape[0] for a in adapters], [a.activation for a in adapters]


def pack_sum(adapters: Sequence[Bottleneck]) -> PackedWeights:
    """One adapter, or a sum: `residual + sum_i weight_i (act(x D_i^T + b_i) U_i^T + u_i)`."""
    return PackedWeights(*_down(adapters), None, None, _up(adapters), None, *_shape(adapters))


def pack_absorbed(adapters: Sequence[Bottleneck], attention: Attention) -> PackedWeights:
    """The absorbed form: the fusion's matrices go into the adapters'.

    Semantics (rows `A` are `U_i^T` and `u_i`)::

        K = A @ Wk.T + (bk on the rows u_i)         # so that M, C = K @ Wq and m, c = K @ bq
        w_score, b_score, w_out = K @ Wq, K @ bq, A @ Wv.T

    Returns:
        Weights for a query `h` (the hidden states) and the residual added by the op.
    """
    sizes, activations = _shape(adapters)
    columns, used = sum(sizes), sum(sizes) + len(sizes)
    up = _up(adapters)
    keys = up if attention.w_key is None else up @ attention.w_key.t()
    if attention.b_key is not None:
        is_bias = keys.new_zeros(keys.shape[0], 1)
        is_bias[columns:used] = 1
        keys = keys + is_bias * attention.b_key
    scores = keys if attention.w_query is None else keys @ attention.w_query
    b_score = keys.new_zeros(keys.shape[0])
    if attention.b_query is not None:
        b_score = keys @ attention.b_query
    w_out = up if attention.w_value is None else up @ attention.w_value.t()
    return PackedWeights(*_down(adapters), scores, b_score, w_out, None, sizes, activations)


def pack_factored(adapters: Sequence[Bottleneck]) -> PackedWeights:
    """The factored form: the adapters' own matrices; the caller applies the fusion's to the rows.

    Semantics::

        q = Wq h + bq;  query = Wk^T q;  score_offset = q . bk
        out = residual + Wv @ op(x, query, score_offset, no residual)
    """
    up = _up(adapters)
    zeros = up.new_zeros(up.shape[0])
    return PackedWeights(*_down(adapters), up, zeros, up, None, *_shape(adapters))


def pack(parameters: Parameters, absorbed: bool) -> PackedWeights:
    """The packed weights of a mixture: alone, absorbed or factored."""
    if parameters.attention is None:
        return pack_sum(parameters.adapters)
    if absorbed:
        return pack_absorbed(parameters.adapters, parameters.attention)
    return pack_factored(parameters.adapters)


def prefers_absorbed(rows: int, hidden_size: int, columns: int, recorded: bool) -> bool:
    """Which form is cheaper, by flops and weight bytes (docs/design.md, "Two forms").

    Args:
        rows: T, the token rows of this call.
        hidden_size: H.
        columns: D, the sum of the bottleneck sizes.
        recorded: whether gradients are recorded, so that the packs are rebuilt in this call.
    """
    if recorded:
        return rows >= columns
    return rows > 32 or columns <= 2 * hidden_size
