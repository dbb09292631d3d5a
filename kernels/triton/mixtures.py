"""A call of the forward as both schedules take it, and the arguments that their kernels share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Layout
from .norms import fold_norm
from .tiles import contiguous, contiguous_rows


class Norm(NamedTuple):
    """The LayerNorms around a mixture; see `fastfusion.ops.adapter_fusion_norm`."""

    weight: Tensor
    bias: Tensor
    eps: float
    before: bool
    save: bool
    """Whether what the LayerNorms see is kept for the backward."""


class Mixture(NamedTuple):
    """Rows, weights and layout of a call; see `fastfusion.ops.adapter_fusion` and `..._grouped`."""

    x: Sequence[Tensor]
    query: Tensor | None
    residual: Tensor | None
    """With a norm: the sub-layer's input, which x is added to."""
    groups: Tensor | None
    """Each row's group, or None where all rows have the only one."""
    w_down: Tensor
    b_down: Tensor
    w_score: Tensor | None
    b_score: Tensor | None
    w_out: Tensor
    temperature: Tensor | None
    mask: Tensor | None
    score_offset: Tensor | None
    layout: Layout
    """`w_down` and `w_score` may be one tensor."""
    norm: Norm | None = None


class Outputs(NamedTuple):
    """What the kernels write."""

    out: Tensor
    p: Tensor
    summed: Tensor
    """What the LayerNorm in front sees; empty unless kept."""
    pre_norm: Tensor
    """What the LayerNorm behind sees, less a number for each row; empty unless kept."""


def outputs_of(mixture: Mixture) -> Outputs:
    x, norm = mixture.x[0], mixture.norm
    num_scored = mixture.layout.num_scored
    is_plain = mixture.groups is None and num_scored == 0
    p_shape = [0] if is_plain else [len(x), num_scored]
    keeps = norm is not None and norm.save
    return Outputs(
        x.new_empty(x.shape),
        x.new_empty(p_shape, dtype=torch.float32),
        x.new_empty(x.shape if keeps and norm.before else [0]),
        x.new_empty(x.shape if keeps else [0]),
    )


def row_arguments(mixture: Mixture) -> dict:
    """The rows that the products over H read."""
    if len(mixture.x) == 1:
        inputs, query = contiguous_rows(mixture.x[0]).unsqueeze(0), mixture.query
    else:
        inputs = torch.stack(list(mixture.x))
        query = mixture.x[0] if mixture.query is None else mixture.query
    query = contiguous_rows(query)
    return {
        "x_ptr": inputs,
        "query_ptr": query,
        "stride_xi": inputs.stride(0),
        "stride_xm": inputs.stride(1),
        "stride_qm": 0 if query is None else query.stride(0),
        "NUM_INPUTS": len(mixture.x),
    }


def weight_arguments(mixture: Mixture) -> dict:
    """The weights of the products over H, with a LayerNorm in front folded into their biases."""
    is_scored = any(mixture.layout.scored)
    arguments = {
        "w_down_ptr": mixture.w_down.contiguous(),
        "b_down_ptr": mixture.b_down.contiguous(),
        "w_score_ptr": contiguous(mixture.w_score) if is_scored else None,
        "b_score_ptr": contiguous(mixture.b_score) if is_scored else None,
        "gain_down_ptr": None,
        "gain_score_ptr": None,
    }
    norm = mixture.norm
    if norm is not None and norm.before:
        gain_down, folded_down, gain_score, folded_score = fold_norm(
            *list(arguments.values())[:4], norm.weight, norm.bias
        )
        arguments |= {
            "b_down_ptr": folded_down,
            "b_score_ptr": folded_score,
            "gain_down_ptr": gain_down,
            "gain_score_ptr": gain_score,
        }
    return arguments


def score_arguments(mixture: Mixture) -> dict:
    return {
        "temperature_ptr": mixture.temperature,
        "mask_ptr": contiguous(mixture.mask),
        "offset_ptr": contiguous(mixture.score_offset),
    }


def residual_arguments(mixture: Mixture) -> dict:
    residual = contiguous_rows(mixture.residual)
    return {
        "residual_ptr": residual,
        "stride_rm": 0 if residual is None else residual.stride(0),
    }


def norm_arguments(mixture: Mixture, outputs: Outputs) -> dict:
    norm = mixture.norm
    keeps = norm is not None and norm.save
    return {
        "ln_weight_ptr": None if norm is None else norm.weight,
        "ln_bias_ptr": None if norm is None else norm.bias,
        "ln_eps": 0.0 if norm is None else norm.eps,
        "summed_ptr": outputs.summed if keeps and norm.before else None,
        "pre_norm_ptr": outputs.pre_norm if keeps else None,
    }
