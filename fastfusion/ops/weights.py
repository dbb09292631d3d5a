"""The packed weights that the ops take: of one mixture, and of several as groups."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedWeights(NamedTuple):
    """A mixture's weights as the ops take them; `D = sum(sizes)`, `N = len(sizes)`.

    `w_score` and `w_out` may have rows beyond `D + N`, zero in `w_out`: widths that are a multiple
    of eight are faster.
    """

    w_down: Tensor
    """[D, H]: the adapters' down-projections, one below the other."""
    b_down: Tensor
    """[D]"""
    w_score: Tensor | None
    """[D + N, H]: M_1 .. M_N, then C. None: every adapter has weight 1."""
    b_score: Tensor | None
    """[D + N]: m_1 .. m_N, then c."""
    w_out: Tensor
    """[D + N, H]: V_1^T .. V_N^T, then v."""
    temperature: Tensor | None
    """[]: what the scores are divided by; None is 1."""
    sizes: list[int]
    """The bottleneck sizes d_i."""
    activations: list[int]
    """One code of `fastfusion.ops.activations` per adapter."""


class GroupedWeights(NamedTuple):
    """The packed weights of G groups, one behind the other; see `PackedWeights` for a group's own.

    A group with `D` columns and `N` adapters has `R = D + N` rows in `w_out`, rounded up to a
    multiple of 8, and in `w_in` its `D` down-projections followed, if it is scored, by `R` rows of
    score weights.
    """

    w_in: Tensor
    """[rows, H]"""
    b_in: Tensor
    """[rows]"""
    w_out: Tensor
    """[rows, H]"""
    sizes: list[int]
    """The bottleneck sizes of all adapters."""
    activations: list[int]
    """One code of `fastfusion.ops.activations` for each adapter."""
    counts: list[int]
    """How many adapters each group has."""
    scored: list[int]
    """1 for attention over a group's adapters, 0 for a sum of them."""


class GroupLayout(NamedTuple):
    """Where one group's parts lie in `GroupedWeights`."""

    adapters: slice
    down: slice
    """Of `w_in`."""
    score: slice | None
    """Of `w_in`."""
    out: slice
    """Of `w_out`."""


def layouts(
    sizes: Sequence[int], counts: Sequence[int], scored: Sequence[int]
) -> tuple[GroupLayout, ...]:
    """Where the groups' parts lie."""
    return _layouts(tuple(sizes), tuple(counts), tuple(scored))


@functools.lru_cache(maxsize=256)
def _layouts(
    sizes: tuple[int, ...], counts: tuple[int, ...], scored: tuple[int, ...]
) -> tuple[GroupLayout, ...]:
    found, adapter, row_in, row_out = [], 0, 0, 0
    for count, is_scored in zip(counts, scored, strict=True):
        columns = sum(sizes[adapter : adapter + count])
        rows = -(-(columns + count) // 8) * 8
        score = row_in + columns
        end = score + rows * is_scored
        found.append(
            GroupLayout(
                slice(adapter, adapter + count),
                slice(row_in, score),
                slice(score, end) if is_scored else None,
                slice(row_out, row_out + rows),
            )
        )
        adapter, row_in, row_out = adapter + count, end, row_out + rows
    return tuple(found)


def stack(packs: Sequence[PackedWeights]) -> GroupedWeights:
    """The weights of several mixtures as groups, in their order; differentiable.

    Raises:
        ValueError: a mixture with a temperature.
    """
    w_in: list[Tensor] = []
    b_in: list[Tensor] = []
    w_out: list[Tensor] = []
    sizes = [size for pack in packs for size in pack.sizes]
    counts = [len(pack.sizes) for pack in packs]
    scored = [int(pack.w_score is not None) for pack in packs]
    for pack, layout in zip(packs, layouts(sizes, counts, scored), strict=True):
        if pack.temperature is not None:
            raise ValueError("temperature: expected None in every group")
        rows = layout.out.stop - layout.out.start
        w_in.append(pack.w_down)
        b_in.append(pack.b_down)
        if pack.w_score is not None:
            w_in.append(_padded(pack.w_score, rows))
            b_in.append(_padded(pack.b_score, rows))
        w_out.append(_padded(pack.w_out, rows))
    activations = [code for pack in packs for code in pack.activations]
    joined = (torch.cat(w_in), torch.cat(b_in), torch.cat(w_out))
    return GroupedWeights(*joined, sizes, activations, counts, scored)


def _padded(weight: Tensor, rows: int) -> Tensor:
    if weight.shape[0] == rows:
        return weight
    return torch.cat([weight, weight.new_zeros(rows - weight.shape[0], *weight.shape[1:])])


def group_weights(
    layout: GroupLayout,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    sizes: Sequence[int],
    activations: Sequence[int],
) -> PackedWeights:
    """One group's weights, as views."""
    score = layout.score
    return PackedWeights(
        w_in[layout.down],
        b_in[layout.down],
        None if score is None else w_in[score],
        None if score is None else b_in[score],
        w_out[layout.out],
        None,
        list(sizes[layout.adapters]),
        list(activations[layout.adapters]),
    )


def max_scored(counts: Sequence[int], scored: Sequence[int]) -> int:
    """N of the largest group with attention, or 0."""
    return max([0, *(n for n, is_scored in zip(counts, scored, strict=True) if is_scored)])
