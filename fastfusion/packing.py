"""The cache of packed weights for inference, and what makes a pack stale.

A pack is built in fp32 (fp64 for fp32 models) and cast once; while its parameters stay the same it is
used again, and when they change it is refreshed in place, so that CUDA graphs keep their addresses.

A pack is stale when one of its parameters is another object, lies elsewhere in memory, has another
version, or when any `torch.optim` optimizer has made a step since (fused optimizers do not move
versions). `train()`, `eval()`, `to()`, `load_state_dict()` and a recorded forward drop it. Writes
through `.data` leave no trace: call `fastfusion.refresh(model)` after them.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ops import PackedWeights, adapter_fusion, adapter_fusion_norm

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# adds to no optimizer: torch calls it after every step of every optimizer of the process
register_optimizer_step_post_hook(_count_optimizer_step)

_packs: "weakref.WeakValueDictionary[int, Pack]" = weakref.WeakValueDictionary()
_handles = itertools.count()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Pack:
    """The packed weights of one mixture at one place.

    Args:
        build: from the tensors that `weights` is given, in at least fp32, to the packed weights.
        dtype: what the mixture computes in.
    """

    def __init__(self, build: Callable[[Sequence[Tensor]], PackedWeights], dtype: torch.dtype):
        self._build = build
        self._dtype = dtype
        self._weights: PackedWeights | None = None
        self._sources: list[Tensor] = []
        self._state: list[int] = []
        self.handle = next(_handles)
        """What compiled graphs know this pack by."""
        _packs[self.handle] = self

    def weights(self, sources: list[Tensor], temperature: Tensor | None) -> PackedWeights:
        """The packed weights of these parameters, rebuilt if they are stale.

        Args:
            sources: the parameters, in the order that `build` expects.
            temperature: of the fusion, []; not part of the pack, since it moves while training.

        Raises:
            OverflowError: a packed weight is not representable in the parameters' dtype.
        """
        state = [t.data_ptr() for t in sources]
        state += [_version(t) for t in sources]
        state.append(_optimizer_steps)
        stale = state != self._state or any(map(_is_not, sources, self._sources))
        if self._weights is None or stale:
            self._weights = self._refreshed(sources)
            self._sources, self._state = sources, state
        factor = self._weights.temperature
        if factor is not None:
            temperature = factor if temperature is None else temperature * factor
        return self._weights._replace(temperature=temperature)

    def _refreshed(self, sources: list[Tensor]) -> PackedWeights:
        high = sources[0].dtype in (torch.float32, torch.float64)
        precise = torch.float64 if high else torch.float32
        with torch.no_grad(), torch.autocast(sources[0].device.type, enabled=False):
            built = _in_range(self._build([t.to(precise) for t in sources]), self._dtype)
            return _stored(built, self._dtype, into=self._weights)

    def drop(self) -> None:
        """Forget the parameters that the pack was made from; its memory is used again."""
        self._sources, self._state = [], []


def _is_not(a: Tensor, b: Tensor) -> bool:
    return a is not b


def pack_of(handle: int) -> Pack:
    """The pack that a compiled graph was made with."""
    return _packs[handle]


def _in_range(weights: PackedWeights, dtype: torch.dtype) -> PackedWeights:
    """Scale the score weights into fp16's range: scores are linear, the temperature takes the factor."""
    if dtype != torch.float16:
        return weights
    limit = torch.finfo(dtype).max
    for name, tensor in zip(("w_down", "w_out"), (weights.w_down, weights.w_out), strict=True):
        if tensor.abs().max() > limit:
            raise OverflowError(f"{name}: {tensor.abs().max():.3g} is beyond the range of {dtype}")
    if weights.w_score is None or weights.w_score.numel() == 0:
        return weights
    # 16 leaves room for the products with hidden states of norm 4096
    largest = max(weights.w_score.norm(dim=-1).max().item(), weights.b_score.abs().max().item())
    factor = min(1.0, 16.0 / largest) if largest > 0 else 1.0
    if factor == 1.0:
        return weights
    return weights._replace(
        w_score=weights.w_score * factor,
        b_score=weights.b_score * factor,
        temperature=torch.tensor(factor, device=weights.w_score.device),
    )


def _stored(built: PackedWeights, dtype: torch.dtype, into: PackedWeights | None) -> PackedWeights:
    """The pack in the model's dtype: in the buffers of `into` where they fit, else in new ones.

    `w_score` lies right behind `w_down`, so that one product serves both where query and input are one.
    """
    stacks = [("w_down", "w_score"), ("b_down", "b_score"), ("w_out",)]
    stored = {}
    for names in stacks:
        parts = [getattr(built, name) for name in names if getattr(built, name) is not None]
        old = None if into is None else getattr(into, names[0])
        rows = sum(part.shape[0] for part in parts)
        shape = (rows, *parts[0].shape[1:])
        base = None if old is None else old._base
        if base is None or base.shape != shape or (base.dtype, base.device) != (dtype, parts[0].device):
            base = torch.empty(shape, dtype=dtype, device=parts[0].device)
        start = 0
        for name, part in zip(names, parts, strict=False):
            stored[name] = base[start : start + part.shape[0]]
            stored[name].copy_(part)
            start += part.shape[0]
    return built._replace(**stored)


class PackCache:
    """The packs of one place; a copy of a model gets an empty one."""

    def __init__(self) -> None:
        self._packs: dict[Any, Pack] = {}

    def pack(
        self, key: Any, build: Callable[[Sequence[Tensor]], PackedWeights], dtype: torch.dtype
    ) -> Pack:
        """The pack under a key and a dtype, made with `build` at the first call."""
        pack = self._packs.get((key, dtype))
        if pack is None:
            pack = self._packs[key, dtype] = Pack(build, dtype)
        return pack

    def drop(self) -> None:
        """Every pack is rebuilt at its next use."""
        for pack in self._packs.values():
            pack.drop()

    def clear(self) -> None:
        """Free the packs: after a change of the place's modules."""
        self._packs = {}

    def __deepcopy__(self, memo: dict) -> "PackCache":
        return PackCache()

    def __reduce__(self):
        return PackCache, ()


# The packed ops: what a compiled graph calls without gradients. The look-up happens inside, at run
# time, since comparing versions and addresses in traced code would break the graph.

_LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")
_SOURCES = "Tensor[] sources, Tensor? temperature, int num_adapters, int pack, str? backend"
_LIBRARY.define(
    f"adapter_fusion_packed(Tensor[] x, Tensor? query, Tensor? residual, {_SOURCES}) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "adapter_fusion_norm_packed(Tensor hidden, Tensor input, Tensor ln_weight, Tensor ln_bias, "
    f"float ln_eps, bool ln_before, {_SOURCES}) -> (Tensor, Tensor)"
)


def _adapter_fusion_packed(x, query, residual, sources, temperature, num_adapters, pack, backend):
    weights = pack_of(pack).weights(sources, temperature)
    with torch.no_grad():
        return adapter_fusion(x, query, residual, weights, backend=backend)


def _adapter_fusion_norm_packed(
    hidden, input, ln_weight, ln_bias, ln_eps, ln_before, sources, temperature, _, pack, backend
):
    weights = pack_of(pack).weights(sources, temperature)
    norm = (ln_weight, ln_bias, ln_eps, ln_before)
    with torch.no_grad():
        return adapter_fusion_norm(hidden, input, *norm, weights, backend=backend)


def _fake(like: Tensor, num_adapters: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = [like.shape[0], num_adapters] if num_adapters else [0]
    return like.new_empty(like.shape), like.new_empty(shape, dtype=dtype)


for _name, _function, _fake_function in (
    ("adapter_fusion_packed", _adapter_fusion_packed, lambda x, *a: _fake(x[0], a[-3])),
    ("adapter_fusion_norm_packed", _adapter_fusion_norm_packed, lambda x, *a: _fake(x, a[-3])),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastfusion::{_name}", _fake_function, lib=_LIBRARY)
