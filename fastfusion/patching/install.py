"""Putting adapter places into a model's modules, and taking them out again.

Only instances change: a module gets a forward of its own, child modules for the adapters, and the
list `adapter_layers`. Its class, its parameters and their state-dict keys stay.
"""

import types
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layer import AdapterLayer
from .architectures import Architecture, Place
from .forwards import copy_masks

_CHILDREN = ("adapters", "adapter_fusion_layer")


class Patch(NamedTuple):
    """What `patch` changed."""

    places: list[Place]
    forwards: list[tuple[nn.Module, Callable | None]]
    """Each module with a replaced forward, and the forward of its own that it had before."""
    hooks: list[RemovableHandle]


def patch(
    base_model: nn.Module, architecture: Architecture, make_layer: Callable[[Place], AdapterLayer]
) -> tuple[list[AdapterLayer], Patch]:
    """Put an adapter layer at every place of a base model.

    Args:
        base_model: a transformers model without its head.
        architecture: its table entry.
        make_layer: from a place to its adapter layer.

    Raises:
        ValueError: a module has children of the names that adapters use; nothing is changed.
    """
    places = list(architecture.places(base_model))
    for place in places:
        taken = _CHILDREN if place.container is None else (place.container,)
        for name in (*taken, "adapter_layers"):
            if hasattr(place.host, name):
                raise ValueError(
                    f"model: {type(place.host).__name__} has an attribute {name!r} already; "
                    "was it patched by another adapter library?"
                )
    layers = []
    for place in places:
        layer = make_layer(place)
        parent = place.host
        if place.container is not None:
            parent = nn.Module()
            place.host.add_module(place.container, parent)
        for name in _CHILDREN:
            parent.add_module(name, getattr(layer, name))
        place.host.__dict__.setdefault("adapter_layers", []).append(layer)
        layers.append(layer)
    forwards = []
    for module, function in architecture.forwards(base_model):
        forwards.append((module, module.__dict__.get("forward")))
        module.forward = types.MethodType(function, module)
    hooks = [
        module.register_forward_pre_hook(copy_masks, with_kwargs=True)
        for module in architecture.masked(base_model)
    ]
    return layers, Patch(places, forwards, hooks)


def unpatch(done: Patch) -> None:
    """Undo `patch`."""
    for hook in done.hooks:
        hook.remove()
    for module, forward in done.forwards:
        if forward is None:
            del module.__dict__["forward"]
        else:
            module.forward = forward
    for place in done.places:
        place.host.__dict__.pop("adapter_layers", None)
        for name in _CHILDREN if place.container is None else (place.container,):
            delattr(place.host, name)
