"""The cache of packed weights for inference, and what makes a pack stale.

Products of matrices are taken in fp32 (fp64 for fp32 models) and cast once. While its parameters
stay the same a pack is used again, and when they change it is refreshed in place: CUDA graphs keep
their addresses. Of a pack for groups of rows, only the groups that a forward uses are looked at.

A pack is stale when one of its parameters is another object, lies elsewhere in memory, has another
version, when a fixed scaling has another value, or when any `torch.optim` optimizer has made a step
since (fused optimizers do not move versions). `train()`, `eval()`, `to()`, `load_state_dict()` and
a recorded forward drop it. Writes through `.data` leave no trace: call `fastfusion.refresh(model)`
after them.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ops import GroupedWeights, PackedWeights

Weights = PackedWeights | GroupedWeights

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


class Part(NamedTuple):
    """What a pack, or one group of it, is made from."""

    tensors: Sequence[Tensor]
    """The parameters."""
    constants: Sequence[Any]
    """What else is read."""

    def state(self) -> list[Any]:
        """What differs once the packed weights are stale."""
        state = [*map(id, self.tensors), *map(Tensor.data_ptr, self.tensors)]
        return [*state, *_versions(self.tensors), *self.constants, _optimizer_steps]


class Pack:
    """The packed weights of one mixture at one place, or of a group of them.

    Args:
        build: from the tensors of all parts to the packed weights, in their dtype or a wider one.
        dtype: what the mixture computes in.
    """

    def __init__(self, build: Callable[[Sequence[Tensor]], Weights], dtype: torch.dtype):
        self._build = build
        self._dtype = dtype
        self._weights: Weights | None = None
        # kept alive, so that nothing else can get one of their ids or addresses
        self._sources: list[Any] = []
        self._is_lent = False
        self._states: list[list[Any]] = []

    def weights(self, used: Mapping[int, Part], parts: Callable[[], list[Part]]) -> Weights:
        """The packed weights, rebuilt if those that are used now are stale.

        Args:
            used: some of the parts by their numbers: others are not looked at.
            parts: all of them.

        Raises:
            OverflowError: a packed weight is not representable in the parameters' dtype.
        """
        states = self._states
        if not states or any(states[i] != part.state() for i, part in used.items()):
            found = parts()
            sources = [tensor for part in found for tensor in part.tensors]
            # before they are read: a write from now on makes the pack stale again
            states = [part.state() for part in found]
            self._weights = self._refreshed(sources)
            self._sources = [*sources, *(t.untyped_storage() for t in sources)]
            self._states, self._is_lent = states, False
        # a recorded forward may keep the pack for its backward: the next refresh leaves it alone
        self._is_lent |= torch.is_grad_enabled()
        return self._weights

    def _refreshed(self, sources: list[Tensor]) -> Weights:
        # a pack made in inference mode could not serve a recorded forward later
        with torch.inference_mode(False), torch.no_grad(), autocast_off(sources[0]):
            built = self._build(sources)
            if self._dtype == torch.float16:
                _check_range(built)
                # a group has no temperature, and so no scores in fp16
                built = rescaled(built) if isinstance(built, PackedWeights) else built
            return _stored(built, self._dtype, into=None if self._is_lent else self._weights)

    def drop(self) -> None:
        """Forget the parameters that the pack was made from; its memory is used again."""
        self._sources, self._states = [], []


def upcast(tensor: Tensor) -> Tensor:
    """For products whose result is kept: in twice the precision, at least fp32."""
    high = tensor.dtype in (torch.float32, torch.float64)
    return tensor.to(torch.float64 if high else torch.float32)


def _check_range(weights: Weights) -> None:
    """Refuse by name what fp16 cannot hold, instead of infinities at run time."""
    limit = torch.finfo(torch.float16).max
    for name in ("w_down", "w_in", "w_out"):
        tensor = getattr(weights, name, None)
        if tensor is not None and (tensor.abs() > limit).any():
            raise OverflowError(
                f"{name}: the product of the adapters' and the fusion's matrices reaches "
                f"{tensor.abs().max():.3g}, beyond the range of float16"
            )


def scaled(temperature: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """A temperature times a pack's factor; None is 1."""
    if temperature is None or factor is None:
        return factor if temperature is None else temperature
    return temperature * factor


def rescaled(weights: PackedWeights) -> PackedWeights:
    """Bring the score weights into fp16's range: scores are linear, so the temperature pays.

    Returns:
        The weights with `temperature` a factor for the fusion's own, at most 1.
    """
    if weights.w_score is None or weights.w_score.numel() == 0:
        return weights
    # 16 leaves room for the products with hidden states of norm 4096
    norms = weights.w_score.detach().norm(dim=-1).max()
    factor = 16.0 / torch.maximum(norms, weights.b_score.detach().abs().max()).clamp(min=16.0)
    return weights._replace(
        w_score=weights.w_score * factor,
        b_score=weights.b_score * factor,
        temperature=factor.to(torch.float32),
    )


_STACKS = {
    # `w_score` right behind `w_down`: one product serves both where query and input are one
    PackedWeights: (("w_down", "w_score"), ("b_down", "b_score"), ("w_out",)),
    GroupedWeights: (("w_in",), ("b_in",), ("w_out",)),
}


def _stored(built: Weights, dtype: torch.dtype, into: Weights | None) -> Weights:
    """The pack in the model's dtype: in the buffers of `into` where they fit, else in new ones."""
    stored = {}
    for names in _STACKS[type(built)]:
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
            if isinstance(built, GroupedWeights) and parts[0].dtype == dtype:
                # `stack` has just made it
                stored[names[0]] = parts[0][:]
                continue
            base = torch.empty(shape, dtype=dtype, device=parts[0].device)
        start = 0
        for name, part in zip(names, parts, strict=False):
            stored[name] = base[start : start + part.shape[0]]
            stored[name].copy_(part)
            start += part.shape[0]
    return built._replace(**stored)


class PackCache:
    """The packs of one place, by the mixture that they belong to; they go with it.

    A copy of a model gets an empty cache.
    """

    def __init__(self) -> None:
        self._packs: weakref.WeakKeyDictionary[Any, dict[Any, Pack]] = weakref.WeakKeyDictionary()

    def pack(self, owner: Any, key: Any, make: Callable[..., Pack], *args: Any) -> Pack:
        """The owner's pack under a key, made by `make(*args)` at the first call."""
        packs = self._packs.setdefault(owner, {})
        pack = packs.get(key)
        if pack is None:
            pack = packs[key] = make(*args)
        return pack

    def drop(self) -> None:
        """Every pack is rebuilt at its next use."""
        # keyrefs() copies at once: other threads may add packs
        for reference in self._packs.keyrefs():
            owner = reference()
            packs = {} if owner is None else self._packs.get(owner, {})
            for pack in list(packs.values()):
                pack.drop()

    def __deepcopy__(self, memo: dict) -> "PackCache":
        return PackCache()

    def __reduce__(self):
        return PackCache, ()
