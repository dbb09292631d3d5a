"""Which code runs an op: the choice by device, dtype and activations, and why not another."""

import functools
import importlib
import logging
import warnings
from types import ModuleType

from torch import Tensor

from .activations import ACTIVATIONS, NATIVE_ACTIVATIONS
from .weights import GroupedWeights, PackedWeights

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "torch", "cpp", "triton")
"""`reference` runs the literal formulas in the layer itself; the others are backends of the op."""

_MODULES = {
    "torch": "fastfusion.ops.torch_backend",
    "cpp": "fastfusion.ops.cpp_backend",
    "triton": "fastfusion.kernels.triton.backend",
}


@functools.cache
def load(backend: str) -> ModuleType:
    """The module that implements the ops for a backend."""
    return importlib.import_module(_MODULES[backend])


@functools.cache
def missing(backend: str) -> str | None:
    """Why a backend cannot be loaded here, or None."""
    try:
        load(backend)
    except ImportError as error:
        return str(error)
    return None


def check_name(backend: str | None) -> None:
    """Raise a ValueError unless `backend` is None or one of `BACKENDS`."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {BACKENDS}; got {backend!r}")


def _refusal(backend: str, x: Tensor, weights: PackedWeights | GroupedWeights) -> str | None:
    """Why a backend other than `torch` cannot run this call, or None."""
    if reason := missing(backend):
        return reason
    for code in weights.activations:
        if code >= NATIVE_ACTIVATIONS:
            return f"it has no {ACTIVATIONS[code].name}"
    return load(backend).refusal(x, weights)


@functools.cache
def _warn_without_extension() -> None:
    if reason := missing("cpp"):
        warnings.warn(f"{reason}; the torch backend serves instead.", stacklevel=2)


@functools.cache
def _note(preferred: str, reason: str) -> None:
    logger.debug("the torch backend runs what %s cannot: %s", preferred, reason)


def choose(backend: str | None, x: Tensor, weights: PackedWeights | GroupedWeights) -> str:
    """The backend to run with.

    Raises:
        ValueError: `backend` was asked for by name and cannot run this call.
    """
    if backend == "torch":
        return backend
    if backend is not None:
        check_name(backend)
        if reason := _refusal(backend, x, weights):
            raise ValueError(f"backend: {backend!r} cannot run this: {reason}")
        return backend
    preferred = "cpp" if x.device.type == "cpu" else "triton"
    if preferred == "cpp":
        _warn_without_extension()
    reason = _refusal(preferred, x, weights)
    if reason is not None:
        _note(preferred, reason)
        return "torch"
    return preferred
