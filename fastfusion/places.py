"""What all places of one model share: its adapters' configs, its setups and their plans."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import nn

from . import rows
from .composition import AdapterCompositionBlock, fuses
from .configuration import ModelAdaptersConfig
from .context import AdapterSetup, ForwardContext
from .lanes import BoundPlan
from .layer import AdapterLayer
from .lowering import OneOrRows, Plan
from .modules import Adapter, AdapterFusion
from .patching import Architecture, patch
from .patching.architectures import Place

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""Where transformers keeps in a module whether and how it is computed again in the backward."""
_KEPT = 8
"""Other setups than the active one whose plans a model keeps, with their packed weights."""


class Lowered(NamedTuple):
    """A setup, or a setup for each row, as a forward runs it; never changed."""

    setups: tuple[AdapterCompositionBlock | None, ...]
    """Of the rows; or the one of all."""
    needed: Plan
    """The sizes that a batch must have."""
    plans: Mapping[AdapterLayer, BoundPlan]
    """Of every place."""


class _Lock:
    """A lock for the one who holds it already too; a copy of its owner has another one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return _Lock, ()


class _Nested:
    """One context inside another; as often as a backward is run again."""

    def __init__(self, outer: AbstractContextManager, inner: AbstractContextManager):
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)


class ModelAdapters:
    """What all places of one model share.

    Args:
        base_model: the transformers model without its head.
        architecture: its table entry.
        backend: see `init`.
    """

    def __init__(self, base_model: nn.Module, architecture: Architecture, backend: str | None):
        self.config = ModelAdaptersConfig()
        self.backend = backend
        self.model_config = base_model.config
        self.attention_dropout = float(
            getattr(base_model.config, architecture.attention_dropout, 0.0) or 0.0
        )
        self.requires_grad = {name: p.requires_grad for name, p in base_model.named_parameters()}
        self.frozen = False
        self.checkpointing = [
            (module, {name: vars(module)[name] for name in CHECKPOINTING if name in vars(module)})
            for module in base_model.modules()
            if hasattr(module, "gradient_checkpointing")
        ]
        """What `restore` puts back."""
        self.layers, self.done = patch(base_model, architecture, self._make_layer)
        self._lock = _Lock()
        """Held while plans are made, kept and forgotten, so that none outlives its modules."""
        self._kept: OrderedDict[tuple[OneOrRows, tuple[int, ...]], Lowered] = OrderedDict()
        self.active = self.lower(None, ())
        self.routed = self.lower((), ())
        """What `adapter_ids` number."""
        self.is_routed_stale = False
        """Whether modules have changed since then."""

    def _make_layer(self, place: Place) -> AdapterLayer:
        return AdapterLayer(self, place.layer_idx, place.location)

    # -- plans ----------------------------------------------------------------------------------

    def lower(self, setup: OneOrRows, skip_layers: Sequence[int]) -> Lowered:
        """What a setup, or a setup for each row, is at every place.

        Raises:
            ValueError: sizes that contradict each other, or a Fuse without weights at a place.
        """
        setups = setup if isinstance(setup, tuple) else (setup,)
        plans = {layer: layer.lower(setup, skip_layers) for layer in self.layers}
        return Lowered(setups, rows.needed(setup), plans)

    def activate(
        self, setup: AdapterCompositionBlock | None, skip_layers: Sequence[int] = ()
    ) -> None:
        """Lower a setup and, if that goes well, make it the active one; others are forgotten."""
        with self._lock:
            self.active = self.lower(setup, skip_layers)
            self._kept.clear()
            self.config.active_setup = setup
            if self.config.skip_layers != list(skip_layers):
                self.config.skip_layers = list(skip_layers)
                self.is_routed_stale = True

    def update_plans(self) -> None:
        """Lower the active setup again: after a change of modules."""
        # what is being lowered in another thread, perhaps from the old modules, is there before
        with self._lock:
            self.is_routed_stale = True
            self._kept.clear()
            self.activate(self.config.active_setup, self.config.skip_layers)

    def current(self) -> Lowered:
        """What a forward runs whose rows have no setups of their own: a context's, or the active
        one."""
        context = AdapterSetup.get_context()
        return self.active if context is None else self.kept(context.adapter_setup)

    def current_plans(self) -> Mapping[AdapterLayer, BoundPlan]:
        """The plans of `current`."""
        return self.current().plans

    def kept(self, setup: OneOrRows) -> Lowered:
        """As `lower`, with the layers that this forward skips; the last ones are remembered."""
        key = setup, tuple(self.skip_layers)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self.lower(*key)
                if len(self._kept) > _KEPT:
                    # the one that was used longest ago goes, and its packs with it
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def route(self, setups: Sequence[AdapterCompositionBlock | None]) -> list[int]:
        """The numbers of setups among those that were routed; new ones come at the end.

        Raises:
            ValueError: an adapter or fusion has gone that one of the old ones names.
        """
        with self._lock:
            known = tuple(dict.fromkeys((*self.routed.setups, *setups)))
            if self.is_routed_stale or len(known) > len(self.routed.setups):
                self._set_routed(known)
        number = {setup: i for i, setup in enumerate(known)}
        return [number[setup] for setup in setups]

    def reset_routed(self) -> None:
        """Forget the routed setups."""
        with self._lock:
            self._set_routed(())

    def current_routed(self) -> Lowered:
        """The routed setups, with the modules as they are and the layers that this forward skips.

        Raises:
            ValueError: an adapter or fusion has gone that one of them names.
        """
        if self.is_routed_stale:
            with self._lock:
                # another thread may have been first
                if self.is_routed_stale:
                    self._set_routed(self.routed.setups)
        routed = self.routed
        is_usual = list(self.skip_layers) == self.config.skip_layers
        return routed if is_usual else self.kept(routed.setups)

    def _set_routed(self, setups: tuple[AdapterCompositionBlock | None, ...]) -> None:
        try:
            for setup in setups:
                self.check_setup(setup)
        except ValueError as error:
            raise ValueError(f"{error}; a routed setup needs it (see reset_routing)") from None
        self.routed = self.lower(setups, self.config.skip_layers)
        self.is_routed_stale = False

    def recomputation_contexts(
        self, context_fn: Callable[[], tuple[AbstractContextManager, AbstractContextManager]]
    ) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of `torch.utils.checkpoint`: layers computed again find the forward's plans.

        That is in the backward, perhaps in another thread, and under another active setup.

        Args:
            context_fn: another one, whose contexts hold too.
        """
        forward = ForwardContext.get_context()
        if forward is None or self.layers[0] not in forward.plans:
            # the base model by itself
            forward = ForwardContext(plans=self.current_plans())
        first, again = context_fn()
        return first, _Nested(again, forward.silent())

    @property
    def skip_layers(self) -> Sequence[int]:
        """The layers that this forward runs without adapters."""
        context = AdapterSetup.get_context()
        if context is None or context.skip_layers is None:
            return self.config.skip_layers
        return context.skip_layers

    def has_copies(self, place: AdapterLayer) -> bool:
        """Whether a place in front of this one has copied the batch for a Parallel."""
        before = itertools.takewhile(lambda layer: layer is not place, self.layers)
        return any(layer.current_plan().plan.has_channels for layer in before)

    def modules(self, name: str) -> Iterator[tuple[AdapterLayer, Adapter]]:
        """An adapter's modules, place by place."""
        for layer in self.layers:
            if name in layer.adapters:
                yield layer, layer.adapters[name]

    def fusion_modules(self, name: str) -> Iterator[tuple[AdapterLayer, AdapterFusion]]:
        """A fusion's modules, place by place."""
        for layer in self.layers:
            if name in layer.adapter_fusion_layer:
                yield layer, layer.adapter_fusion_layer[name]

    def check_setup(self, setup: AdapterCompositionBlock | None) -> None:
        """Raise a ValueError unless the model has every adapter and fusion of a setup."""
        if setup is None:
            return
        known = ", ".join(self.config.adapters) or "none"
        for name in sorted(setup.flatten()):
            if name not in self.config.adapters:
                raise ValueError(f"setup: expected adapters of the model ({known}); got {name!r}")
        for fuse in fuses(setup):
            if fuse.name not in self.config.fusions:
                fusions = ", ".join(map(repr, self.config.fusions)) or "none"
                raise ValueError(
                    f"setup: expected a fusion of the model ({fusions}); got {fuse.name!r}. "
                    f"Add it first: model.add_adapter_fusion({fuse!r})"
                )
            if fuse.adapter_names != list(self.config.fusion_names[fuse.name]):
                raise ValueError(
                    f"setup: fusion {fuse.name!r} is over "
                    f"{list(self.config.fusion_names[fuse.name])}; got {fuse.adapter_names}"
                )

    def checked_layers(self, skip_layers: Any) -> list[int]:
        """The numbers of layers as a list; raise a ValueError unless the model has all of them."""
        given = list(skip_layers) if isinstance(skip_layers, Iterable) else skip_layers
        last = max(layer.layer_idx for layer in self.layers)
        # a bool is an int too
        if not isinstance(given, list) or not all(
            type(number) is int and 0 <= number <= last for number in given
        ):
            raise ValueError(
                f"skip_layers: expected a list of the model's layer numbers, 0 to {last}; "
                f"got {given!r}"
            )
        return given
