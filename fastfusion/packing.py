"""The cache of packed weights for inference, and what makes a pack stale.

A pack is built in fp32 (fp64 for fp32 models) and cast once; while its parameters stay the same it
is used again, and when they change it is refreshed in place: CUDA graphs keep their addresses.

A pack is stale when one of its parameters is another object, lies elsewhere in memory, has another
version, or when any `torch.optim` optimizer has made a step since (fused optimizers do not move
versions). `train()`, `eval()`, `to()`, `load_state_dict()` and a recorded forward drop it. Writes
through `.data` leave no trace: call `fastfusion.refresh(model)` after them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ops import PackedWeights

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# adds to no optimizer: torch calls it after every step of every optimizer of the process
register_optimizer_step_post_hook(_count_optimizer_step)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # tensors made in inference mode have none
        return [-1 if t.is_inference() else t._version for t in tensors]


def autocast_off(like: Tensor) -> AbstractContextManager:
    """Products of weights are taken in the weights' own precision."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


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
        # kept alive, so that no other tensor can get one of their ids
        self._sources: list[Tensor] = []
        self._state: list[int] = []

    def weights(self, sources: list[Tensor], temperature: Tensor | None) -> PackedWeights:
        """The packed weights of these parameters, rebuilt if they are stale.

        Args:
            sources: the parameters, in the order that `build` expects.
            temperature: of the fusion, []; not part of the pack, since it moves while training.

        Raises:
            OverflowError: a packed weight is not representable in the parameters' dtype.
        """
        state = [*map(id, sources), *map(Tensor.data_ptr, sources), *_versions(sources)]
        state.append(_optimizer_steps)
        if self._weights is None or state != self._state:
            self._weights = self._refreshed(sources)
            self._sources, self._state = sources, state
        factor = self._weights.temperature
        if factor is not None:
            temperature = factor if temperature is None else temperature * factor
        return self._weights._replace(temperature=temperature)

    def _refreshed(self, sources: list[Tensor]) -> PackedWeights:
        high = sources[0].dtype in (torch.float32, torch.float64)
        precise = torch.float64 if high else torch.float32
        with torch.no_grad(), autocast_off(sources[0]):
            built = _in_range(self._build([t.to(precise) for t in sources]), self._dtype)
            return _stored(built, self._dtype, into=self._weights)

    def drop(self) -> None:
        """Forget the parameters that the pack was made from; its memory is used again."""
        self._sources, self._state = [], []


def _in_range(weights: PackedWeights, dtype: torch.dtype) -> PackedWeights:
    """Scale the score weights into fp16's range: scores are linear, so the temperature pays."""
    if dtype != torch.float16:
        return weights
    limit = torch.finfo(dtype).max
    for name, tensor in zip(("w_down", "w_out"), (weights.w_down, weights.w_out), strict=True):
        if (tensor.abs() > limit).any():
            raise OverflowError(
                f"{name}: the product of the adapters' and the fusion's matrices reaches "
                f"{tensor.abs().max():.3g}, beyond the range of {dtype}"
            )
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

    `w_score` lies right behind `w_down`: one product serves both where query and input are one.
    """
    stacks = [("w_down", "w_score"), ("b_down", "b_score"), ("w_out",)]
    stored = {}
    for names in stacks:
        parts = [getattr(built, name) for name in names if getattr(built, name) is not None]
        old = None if into is None else getattr(into, names[0])
        rows = sum(part.shape[0] for part in parts)
        shape = (rows, *parts[0].shape[1:])
        base = None if old is None else old._base
        if (
            base is None
            or base.shape != shape
            or (base.dtype, base.device) != (dtype, parts[0].device)
        ):
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

    def pack(self, key: Any, make: Callable[..., Pack], *args: Any) -> Pack:
        """The pack under a key, made by `make(*args)` at the first call."""
        pack = self._packs.get(key)
        if pack is None:
            pack = self._packs[key] = make(*args)
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
