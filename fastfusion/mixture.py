"""Mixtures at one place, bound to their modules: the form, the weights, the call of the op."""

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import absorb
from .modules import Adapter, AdapterFusion
from .ops import (
    GroupedWeights,
    PackedWeights,
    adapter_fusion,
    adapter_fusion_grouped,
    adapter_fusion_norm,
    max_scored,
    stack,
)
from .packing import Pack, PackCache, Part, Weights, autocast_off, rescaled, scaled, upcast
from .rows import can_look_at

if TYPE_CHECKING:
    from .layer import PlaceSettings


_handles = itertools.count()
_packed: "weakref.WeakValueDictionary[int, _Packed]" = weakref.WeakValueDictionary()
"""What compiled graphs know mixtures by."""


class _Packed:
    """What is computed with cached weights: what the parameters are, and how they are packed."""

    def __init__(self, packs: PackCache, settings: "PlaceSettings"):
        self._packs = packs
        self._settings = settings
        self._register()

    def _register(self) -> None:
        self.handle = next(_handles)
        _packed[self.handle] = self

    def __setstate__(self, state: dict) -> None:
        # a copy is an object of its own
        self.__dict__.update(state)
        self._register()

    def tensors(self) -> list[Tensor]:
        """The parameters that the weights are packed from."""
        raise NotImplementedError

    def parts(self, tensors: Sequence[Tensor]) -> list[Part]:
        """What each mixture is packed from, with other values for `tensors()`."""
        raise NotImplementedError

    def pack(self, tensors: Sequence[Tensor], absorbed: bool, is_precise: bool = False) -> Weights:
        """The packed weights with other values for `tensors()`.

        Args:
            tensors: the values.
            absorbed: the form.
            is_precise: whether products are taken, and returned, in more than the tensors' dtype.
        """
        raise NotImplementedError

    def packed_weights(self, absorbed: bool, like: Tensor, tensors: list[Tensor]) -> Weights:
        """The cached weights of a form, for rows of the dtype of `like`."""
        parts = self.parts(tensors)
        return self._pack(absorbed, like).weights(dict(enumerate(parts)), lambda: parts)

    def _pack(self, absorbed: bool, like: Tensor) -> Pack:
        return self._packs.pack(self, (absorbed, like.dtype), self._make_pack, absorbed, like)

    def _make_pack(self, absorbed: bool, like: Tensor) -> Pack:
        _check_like(self.tensors(), like)
        # weak: packs are kept by what they belong to, and go with it
        return Pack(functools.partial(_build, weakref.ref(self), absorbed), like.dtype)

    def _weights_now(
        self, absorbed: bool, like: Tensor, tensors: list[Tensor], mask: Tensor | None
    ) -> Weights:
        # traced code cannot look into the cache, and a mask is there in training alone
        if mask is None and not _is_recorded(tensors) and not torch.compiler.is_compiling():
            return self.packed_weights(absorbed, like, tensors)
        return self._recorded_weights(absorbed, tensors, like)

    def _recorded_weights(self, absorbed: bool, tensors: list[Tensor], like: Tensor) -> Weights:
        """Weights that gradients flow through, in the dtype of `like`."""
        self._packs.drop()
        _check_like(tensors, like)
        with autocast_off(like):
            if like.dtype == torch.float16:
                weights = self.pack([t.float() for t in tensors], absorbed)
                if isinstance(weights, PackedWeights):
                    # products of three matrices leave its range; in groups there are none
                    weights = rescaled(weights)
            else:
                weights = self.pack(tensors, absorbed)
        cast = [
            t.to(like.dtype) if isinstance(t, Tensor) and name != "temperature" else t
            for name, t in weights._asdict().items()
        ]
        return type(weights)(*cast)


class Mixture(_Packed):
    """A single adapter, or several under constant weights or a fusion layer, at one place.

    Made when a setup is activated, so that a forward only gathers parameters and calls the op.

    Args:
        adapters: in the fusion's order.
        fusion: the fusion layer, or None.
        weights: one for each adapter; None: one adapter with weight 1, or the fusion's attention.
        packs: the place's packed weights.
        settings: `backend`, as for `fastfusion.init`.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        fusion: AdapterFusion | None,
        weights: Sequence[float] | None,
        packs: PackCache,
        settings: "PlaceSettings",
    ):
        super().__init__(packs, settings)
        self.adapters = list(adapters)
        self.fusion = fusion
        self.weights = weights
        self._columns = sum(adapter.bottleneck_size for adapter in adapters)
        last = adapters[-1].config
        reads_sum = fusion is None or not (
            fusion.config["query_before_ln"] and last["original_ln_before"]
        )
        self._shape_takes_norm = (
            reads_sum
            and weights is None
            and not last["is_parallel"]
            and last["residual_before_ln"] is True
            and last["original_ln_after"]
            and not any(adapter.config["ln_before"] for adapter in adapters)
        )

    @property
    def config(self):
        """The pre step, the post step and the norms of a mixture are those of its last adapter."""
        return self.adapters[-1].config

    @property
    def residual_share(self) -> float:
        """What of the residual is in a sum with constant weights: parallel adapters add none."""
        pairs = zip(self.weights, self.adapters, strict=True)
        return sum(w for w, a in pairs if not a.config["is_parallel"])

    def tensors(self) -> list[Tensor]:
        tensors: list[Tensor] = []
        for adapter in self.adapters:
            tensors += adapter.tensors()
        if self.fusion is not None:
            tensors += self.fusion.tensors()
        return tensors

    def _parameters(self) -> absorb.Parameters:
        attention = None if self.fusion is None else self.fusion.attention()
        adapters = [adapter.bottleneck() for adapter in self.adapters]
        if self.weights is not None:
            adapters = [a._replace(weight=w) for a, w in zip(adapters, self.weights, strict=True)]
        return absorb.Parameters(adapters, attention)

    def part(self) -> Part:
        """What the mixture is packed from."""
        return self.parts(self.tensors())[0]

    def parts(self, tensors: Sequence[Tensor]) -> list[Part]:
        # fixed scalings are no tensors
        scalings = [adapter.__dict__.get("scaling") for adapter in self.adapters]
        return [Part(tensors, scalings)]

    def pack(
        self, tensors: Sequence[Tensor], absorbed: bool, is_precise: bool = False
    ) -> PackedWeights:
        if is_precise and self._takes_products():
            tensors = list(map(upcast, tensors))
        return absorb.pack(self._parameters().with_tensors(tensors), absorbed)

    def _takes_products(self) -> bool:
        if self.fusion is not None or self.weights is not None:
            return True
        scalings = [adapter.scaling for adapter in self.adapters]
        is_scaled = any(isinstance(factor, Tensor) or factor != 1.0 for factor in scalings)
        return is_scaled or any(adapter.config["ln_before"] for adapter in self.adapters)

    def is_absorbed(self, hidden: Tensor) -> bool:
        """Whether the op computes the whole mixture; else the fusion's matrices stay outside.

        Args:
            hidden: [..., H], the rows of this call.
        """
        if self.fusion is None:
            return True
        if not self.fusion.is_absorbable():
            return False
        recorded = torch.is_grad_enabled() and _is_recorded(self.tensors())
        hidden_size = hidden.shape[-1]
        rows = hidden.numel() // hidden_size
        return absorb.prefers_absorbed(rows, hidden_size, self._columns, recorded)

    def takes_norm(self, hidden: Tensor, layer_norm: nn.Module | None) -> bool:
        """Whether the model's residual and LayerNorm around the mixture go into the op.

        Args:
            hidden: [..., H], what the place reads.
            layer_norm: the model's.
        """
        if not self._shape_takes_norm or type(layer_norm) is not nn.LayerNorm:
            return False
        if layer_norm._forward_hooks or layer_norm._forward_pre_hooks or layer_norm._backward_hooks:
            return False
        weight, bias = layer_norm.weight, layer_norm.bias
        if weight is None or bias is None or weight.dtype != hidden.dtype:
            return False
        if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
            return False
        if _autocast_dtype(hidden) is not None:
            return False
        return self.is_absorbed(hidden)

    def run(
        self,
        inputs: list[Tensor],
        query: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The mixture and its attention.

        Args:
            inputs: [..., H], one for all adapters or one for each.
            query: [..., H], or None for `inputs[0]`.
            residual: [..., H], or None.
            mask: dropout on the scores, [..., N].

        Returns:
            [..., H] and [..., N] (empty for a single adapter).

        Raises:
            ValueError: the adapters' dtype or device is not that of the inputs.
        """
        *batch, hidden_size = inputs[0].shape
        dtype = compute_dtype(inputs[0])

        x = [_rows(t, dtype) for t in inputs]
        query, residual, mask = (_rows(t, dtype) for t in (query, residual, mask))
        tensors = self.tensors()
        if self.is_absorbed(x[0]):
            out, p = self._call(True, tensors, x, query, residual, mask, None)
        else:
            out, p = self._run_factored(tensors, x, query, residual, mask)
        return out.view(*batch, hidden_size), _attention(p, batch, inputs[0].dtype)

    def run_norm(
        self, hidden: Tensor, input: Tensor, layer_norm: nn.LayerNorm, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The mixture with the model's residual and LayerNorm around it; see `takes_norm`.

        Args:
            hidden, input: [..., H], the sub-layer's output and input.
            layer_norm: the model's.
            mask: dropout on the scores, [..., N].

        Returns:
            [..., H] and [..., N] (empty for a single adapter).
        """
        *batch, hidden_size = hidden.shape
        rows = (hidden.reshape(-1, hidden_size), input.reshape(-1, hidden_size))
        ln_before = self.config["original_ln_before"]
        norm = (layer_norm.weight, layer_norm.bias, layer_norm.eps, ln_before)
        if mask is not None:
            mask = mask.reshape(-1, mask.shape[-1])
        tensors = self.tensors()
        if _looks_up_in_graph(mask):
            packed = self._packed_arguments(True, tensors)
            out, p = torch.ops.fastfusion.adapter_fusion_norm_packed(*rows, *norm, *packed)
        else:
            weights = self._weights(True, tensors, rows[0], mask)
            backend = self._settings.backend
            out, p = adapter_fusion_norm(*rows, *norm, weights, mask=mask, backend=backend)
        return out.view(*batch, hidden_size), _attention(p, batch, hidden.dtype)

    def _run_factored(self, tensors, x, query, residual, mask) -> tuple[Tensor, Tensor]:
        """The fusion's matrices on the rows: query' = Wk^T (Wq h + bq) in front, Wv behind."""
        attention, config = self.fusion.attention(), self.fusion.config
        query = x[0] if query is None else query
        if attention.w_query is not None:
            query = F.linear(query, attention.w_query, attention.b_query)
        offset = None
        if attention.w_key is not None:
            # the same for every adapter, so it matters under dropout alone; but a recorded bias
            # must get a gradient of zeros, not none
            if mask is not None or _is_recorded(tensors):
                offset = query @ attention.b_key
            query = query @ attention.w_key
        first = residual if config["residual_before"] else None
        if first is not None and mask is not None:
            shared = (query * first).sum(-1)
            offset = shared if offset is None else offset + shared
        out, p = self._call(False, tensors, x, query, first, mask, offset)
        if attention.w_value is not None:
            out = F.linear(out, attention.w_value)
        return (out if first is not None else out + residual), p

    def _call(self, absorbed, tensors, x, query, residual, mask, offset) -> tuple[Tensor, Tensor]:
        if _looks_up_in_graph(mask):
            packed = self._packed_arguments(absorbed, tensors)
            return torch.ops.fastfusion.adapter_fusion_packed(x, query, residual, *packed)
        weights = self._weights(absorbed, tensors, x[0], mask)
        return adapter_fusion(
            x, query, residual, weights,
            mask=mask, score_offset=offset, backend=self._settings.backend,
        )  # fmt: skip

    def _weights(
        self, absorbed: bool, tensors: list[Tensor], like: Tensor, mask: Tensor | None
    ) -> PackedWeights:
        weights = self._weights_now(absorbed, like, tensors, mask)
        temperature = None if self.fusion is None else self.fusion.temperature
        return weights._replace(temperature=scaled(temperature, weights.temperature))

    def _packed_arguments(self, absorbed: bool, tensors: list[Tensor]) -> tuple:
        temperature = None if self.fusion is None else self.fusion.temperature
        count = 0 if self.fusion is None else len(self.adapters)
        return tensors, temperature, count, self.handle, absorbed, self._settings.backend


class MixtureGroup(_Packed):
    """Several mixtures at one place, each for rows of its own, in one call of the op.

    Args:
        mixtures: those that `lanes.obstacle` finds nothing against.
        packs, settings: as for `Mixture`.
    """

    def __init__(self, mixtures: Sequence[Mixture], packs: PackCache, settings: "PlaceSettings"):
        super().__init__(packs, settings)
        self.mixtures = list(mixtures)

    def tensors(self) -> list[Tensor]:
        return [tensor for mixture in self.mixtures for tensor in mixture.tensors()]

    def parts(self, tensors: Sequence[Tensor]) -> list[Part]:
        parts, start = [], 0
        for mixture in self.mixtures:
            end = start + len(mixture.tensors())
            parts += mixture.parts(tensors[start:end])
            start = end
        return parts

    def pack(
        self, tensors: Sequence[Tensor], absorbed: bool, is_precise: bool = False
    ) -> GroupedWeights:
        parts = zip(self.mixtures, self.parts(tensors), strict=True)
        return stack([mixture.pack(part.tensors, absorbed, is_precise) for mixture, part in parts])

    def run(
        self, x: Tensor, residual: Tensor | None, groups: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Every row through its mixture.

        Args:
            x: [B, S, H], what all of them read.
            residual: [B, S, H], or None; where no mixture runs, the result.
            groups: [B * S], int32, the number of each row's mixture, or -1.
            mask: dropout on the scores, [B, S, N].

        Returns:
            [B, S, H] and the attention [B, S, N], zero behind a row's own adapters.
        """
        shape = x.shape
        dtype = compute_dtype(x)

        x, residual, mask = (_rows(t, dtype) for t in (x, residual, mask))
        backend = self._settings.backend
        if _looks_up_in_graph(mask):
            width = max_scored(*self._counts())
            out, p = torch.ops.fastfusion.adapter_fusion_grouped_packed(
                x, residual, groups, self.tensors(), width, self.handle, backend
            )
        else:
            weights = self._weights_of(groups, x, mask)
            out, p = adapter_fusion_grouped(
                x, residual, groups, weights, mask=mask, backend=backend
            )
        return out.view(shape), p.view(*shape[:-1], p.shape[-1])

    def _weights_of(self, groups: Tensor, like: Tensor, mask: Tensor | None) -> Weights:
        """The weights, in which the groups of some rows are not stale."""
        if mask is not None or torch.is_grad_enabled() or not can_look_at(groups):
            return self._weights_now(True, like, self.tensors(), mask)
        # a large table may have many others
        numbers = [number for number in groups.unique().tolist() if number >= 0]
        used = {number: self.mixtures[number].part() for number in numbers}
        return self._pack(True, like).weights(used, lambda: self.parts(self.tensors()))

    def _counts(self) -> tuple[list[int], list[int]]:
        return (
            [len(mixture.adapters) for mixture in self.mixtures],
            [int(mixture.fusion is not None) for mixture in self.mixtures],
        )

    @property
    def dropout(self) -> float:
        """Of the scores, in training; the largest of the fusions'."""
        fusions = [mixture.fusion for mixture in self.mixtures if mixture.fusion is not None]
        return max([0.0, *(f.dropout for f in fusions if f.training)])


def _rows(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1]).to(dtype)


def _build(owner: "weakref.ref[_Packed]", absorbed: bool, tensors: Sequence[Tensor]) -> Weights:
    return owner().pack(tensors, absorbed, is_precise=True)


def _autocast_dtype(like: Tensor) -> torch.dtype | None:
    """What autocast computes in on this device, or None where it is off."""
    device = like.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def compute_dtype(like: Tensor) -> torch.dtype:
    """What a mixture of such rows is computed in."""
    return _autocast_dtype(like) or like.dtype


def _is_recorded(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _looks_up_in_graph(mask: Tensor | None) -> bool:
    return mask is None and torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _check_like(tensors: list[Tensor], like: Tensor) -> None:
    autocast = _autocast_dtype(like) is not None
    for tensor in tensors:
        if tensor.device != like.device or (tensor.dtype != like.dtype and not autocast):
            raise ValueError(
                f"adapters: expected {like.dtype} on {like.device}, as the hidden states are; got "
                f"{tensor.dtype} on {tensor.device} (see adapter_to and adapter_fusion_to)"
            )


def _attention(p: Tensor, batch: list[int], dtype: torch.dtype) -> Tensor:
    return p.view(*batch, p.shape[-1]).to(dtype) if p.dim() == 2 else p


# The packed ops: what a compiled graph calls without gradients. The cache is looked up inside, at
# run time, since comparing versions and addresses in traced code would break the graph.

_LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")
_PACKED = (
    "Tensor[] tensors, Tensor? temperature, int num_adapters, int mixture, bool absorbed, "
    "str? backend"
)
_LIBRARY.define(
    f"adapter_fusion_packed(Tensor[] x, Tensor? query, Tensor? residual, {_PACKED}) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "adapter_fusion_norm_packed(Tensor hidden, Tensor input, Tensor ln_weight, Tensor ln_bias, "
    f"float ln_eps, bool ln_before, {_PACKED}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "adapter_fusion_grouped_packed(Tensor x, Tensor? residual, Tensor groups, Tensor[] tensors, "
    "int max_scored, int mixture, str? backend) -> (Tensor, Tensor)"
)


def _looked_up(mixture, absorbed, like, tensors, temperature):
    weights = _packed[mixture].packed_weights(absorbed, like, tensors)
    return weights._replace(temperature=scaled(temperature, weights.temperature))


@torch.library.impl(_LIBRARY, "adapter_fusion_packed", "CompositeExplicitAutograd")
def _(x, query, residual, tensors, temperature, _, mixture, absorbed, backend):
    weights = _looked_up(mixture, absorbed, x[0], tensors, temperature)
    with torch.no_grad():
        return adapter_fusion(x, query, residual, weights, backend=backend)


@torch.library.impl(_LIBRARY, "adapter_fusion_norm_packed", "CompositeExplicitAutograd")
def _(hidden, input, *args):
    *norm, tensors, temperature, _, mixture, absorbed, backend = args
    weights = _looked_up(mixture, absorbed, hidden, tensors, temperature)
    with torch.no_grad():
        return adapter_fusion_norm(hidden, input, *norm, weights, backend=backend)


@torch.library.impl(_LIBRARY, "adapter_fusion_grouped_packed", "CompositeExplicitAutograd")
def _(x, residual, groups, tensors, _, mixture, backend):
    weights = _packed[mixture].packed_weights(True, x, tensors)
    with torch.no_grad():
        return adapter_fusion_grouped(x, residual, groups, weights, backend=backend)


def _fake_packed(like: Tensor, num_adapters: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = [like.shape[0], num_adapters] if num_adapters else [0]
    return like.new_empty(like.shape), like.new_empty(shape, dtype=dtype)


@torch.library.register_fake("fastfusion::adapter_fusion_packed", lib=_LIBRARY)
def _(x, query, residual, tensors, temperature, num_adapters, *_):
    return _fake_packed(x[0], num_adapters)


@torch.library.register_fake("fastfusion::adapter_fusion_norm_packed", lib=_LIBRARY)
def _(hidden, input, weight, bias, eps, before, tensors, temperature, num_adapters, *_):
    return _fake_packed(hidden, num_adapters)


@torch.library.register_fake("fastfusion::adapter_fusion_grouped_packed", lib=_LIBRARY)
def _(x, residual, groups, tensors, max_scored, *_):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty([x.shape[0], max_scored], dtype=dtype)
