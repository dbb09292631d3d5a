"""One place of AdapterFusion with random parameters: the literal formulas, and the op on packs."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion import reference
from fastfusion.absorb import Attention, Bottleneck, pack_absorbed
from fastfusion.configuration import AdapterFusionConfig, SeqBnConfig
from fastfusion.ops import PackedWeights, adapter_fusion, adapter_fusion_norm
from fastfusion.ops.activations import activation_code

HIDDEN, SIZE = 768, 48
ADAPTER_CONFIG = SeqBnConfig(reduction_factor=HIDDEN // SIZE)
FUSION_CONFIG = AdapterFusionConfig()

Drawn = tuple[list[Bottleneck], Attention]


def parameters(adapters: int, hidden_size: int = HIDDEN, size: int = SIZE) -> Drawn:
    """Random parameters whose scores are of the order of one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    bottlenecks = [
        Bottleneck(
            normal(size, hidden_size, scale=hidden_size**-0.5),
            normal(size, scale=0.1),
            normal(hidden_size, size, scale=size**-0.5),
            normal(hidden_size, scale=0.1),
            1.0,
            None,
            None,
            activation_code(ADAPTER_CONFIG["non_linearity"]),
        )
        for _ in range(adapters)
    ]
    square = functools.partial(normal, hidden_size, hidden_size, scale=hidden_size**-0.5)
    bias = functools.partial(normal, hidden_size, scale=0.1)
    return bottlenecks, Attention(square() * 0.3, bias(), square() * 0.3, bias(), square())


def to(drawn: Drawn, *where: torch.dtype | torch.device) -> Drawn:
    """The same parameters, rounded to a dtype or on another device."""
    for target in where:
        bottlenecks = [Bottleneck(*(t.to(target) for t in b[:4]), *b[4:]) for b in drawn[0]]
        drawn = bottlenecks, Attention(*(t.to(target) for t in drawn[1]))
    return drawn


def literal(drawn: Drawn) -> Callable:
    """The reference's path: a loop over the adapters, then attention over their stacked outputs.

    The residual is the input, or a tensor of its own.
    """
    bottlenecks, attention = drawn
    names = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    adapters = [dict(zip(names, bottleneck[:4], strict=True)) for bottleneck in bottlenecks]
    names = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    fusion = dict(zip(names, attention, strict=True))

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        up = torch.stack(
            [reference.adapter_up(x, adapter, ADAPTER_CONFIG, 1.0) for adapter in adapters], dim=2
        )
        residual = x if residual is None else residual
        return reference.adapter_fusion(x, up, residual, fusion, FUSION_CONFIG)[0]

    return run


def literal_norm(drawn: Drawn, input: Tensor) -> Callable:
    """The literal formulas between the residual `input` and LayerNorms, as `seq_bn` has them."""
    fused = literal(drawn)

    def run(x: Tensor) -> Tensor:
        summed = x + input
        return F.layer_norm(fused(F.layer_norm(summed, x.shape[-1:]), summed), x.shape[-1:])

    return run


def mixture(weights: PackedWeights, backend: str) -> Callable:
    """The op on packed weights."""

    def run(x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        return adapter_fusion([rows], None, rows, weights, backend=backend)[0].view_as(x)

    return run


def mixture_norm(weights: PackedWeights, input: Tensor, backend: str) -> Callable:
    """The op with the sub-layer's residual and LayerNorms around it, as `seq_bn` has them."""
    hidden_size = input.shape[-1]
    norm = input.new_ones(hidden_size), input.new_zeros(hidden_size), 1e-5, True
    summand = input.view(-1, hidden_size)

    def run(x: Tensor) -> Tensor:
        rows = x.view(-1, hidden_size)
        return adapter_fusion_norm(rows, summand, *norm, weights, backend=backend)[0].view_as(x)

    return run


def trained_mixture(drawn: Drawn, backend: str) -> Callable:
    """The op on weights that are packed in every call, so that the parameters get gradients."""

    def run(x: Tensor) -> Tensor:
        return mixture(pack_absorbed(*drawn), backend)(x)

    return run


def packed(drawn: Drawn, dtype: torch.dtype) -> PackedWeights:
    """Packed in fp64 and cast once, the score weights directly behind the down weights, as the
    inference cache does it."""
    weights = pack_absorbed(*to(drawn, torch.float64))
    weights = PackedWeights(*(t if t is None else t.to(dtype) for t in weights[:6]), *weights[6:])
    stacked = torch.cat([weights.w_down, weights.w_score])
    w_down, w_score = stacked.split([weights.w_down.shape[0], weights.w_score.shape[0]])
    return weights._replace(w_down=w_down, w_score=w_score)
