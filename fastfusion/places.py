"""What all places of one model share: its adapters' configs, its setups and their plans."""

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from . import rows
from .composition import AdapterCompositionBlock, fuses
from .configuration import ModelAdaptersConfig
from .context import AdapterSetup
from .layer import AdapterLayer, RoutedSetups
from .modules import Adapter, AdapterFusion
from .patching import Architecture, patch
from .patching.architectures import Place

_routing = threading.RLock()
"""Held while a model's table of routed setups is read, lowered and set."""


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
        self.needed = rows.needed(None)
        self.routed = RoutedSetups((), self.needed)
        self.is_routed_stale = False
        """Whether modules have changed since the routed setups were lowered."""
        self.layers, self.done = patch(base_model, architecture, self._make_layer)

    def _make_layer(self, place: Place) -> AdapterLayer:
        return AdapterLayer(self, place.layer_idx, place.location)

    def activate(
        self, setup: AdapterCompositionBlock | None, skip_layers: Sequence[int] = ()
    ) -> None:
        """Lower a setup at every place and, if that goes well, make it the active one."""
        needed = rows.needed(setup)
        plans = [layer.lower(setup, skip_layers) for layer in self.layers]
        for layer, plan in zip(self.layers, plans, strict=True):
            layer.activate(plan)
        self.config.active_setup, self.needed = setup, needed
        if self.config.skip_layers != list(skip_layers):
            self.config.skip_layers = list(skip_layers)
            self.is_routed_stale = True

    def update_plans(self) -> None:
        """Lower the active setup again: after a change of modules."""
        self.is_routed_stale = True
        self.activate(self.config.active_setup, self.config.skip_layers)

    def route(self, setups: Sequence[AdapterCompositionBlock | None]) -> list[int]:
        """The numbers of setups among those that were routed; new ones come at the end."""
        with _routing:
            known = tuple(dict.fromkeys((*self.routed.setups, *setups)))
            if self.is_routed_stale or len(known) > len(self.routed.setups):
                self._set_routed(known)
        number = {setup: i for i, setup in enumerate(known)}
        return [number[setup] for setup in setups]

    def reset_routed(self) -> None:
        """Forget the routed setups."""
        with _routing:
            self._set_routed(())

    def current_routed(self) -> RoutedSetups:
        """The routed setups with the modules as they are.

        Raises:
            ValueError: an adapter or fusion has gone that one of them names.
        """
        if self.is_routed_stale:
            with _routing:
                self._set_routed(self.routed.setups)
        return self.routed

    def _set_routed(self, setups: tuple[AdapterCompositionBlock | None, ...]) -> None:
        for setup in setups:
            self.check_setup(setup)
        needed = rows.needed_rows(setups)
        plans = [layer.lower_rows(setups, self.config.skip_layers) for layer in self.layers]
        for layer, plan in zip(self.layers, plans, strict=True):
            layer.routed_plan = plan
        self.routed, self.is_routed_stale = RoutedSetups(setups, needed), False

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
            if fuse.fused_names != list(self.config.fusion_names[fuse.name]):
                raise ValueError(
                    f"setup: fusion {fuse.name!r} is over "
                    f"{list(self.config.fusion_names[fuse.name])}; got {fuse.fused_names}"
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
