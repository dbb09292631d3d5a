"""Adapter composition on Hugging Face transformers as one fused op.

Names, files and results are those of `adapters` (AdapterHub): moving over is one import line.
"""

from typing import TYPE_CHECKING

from . import composition, configuration, context, flexible, heads, ops
from .composition import Fuse, Stack
from .configuration import *  # noqa: F403
from .configuration import __all__ as _configuration_names
from .context import AdapterSetup, ForwardContext
from .flexible import AutoAdapterModel
from .model import init, refresh, restore

if TYPE_CHECKING:
    from .trainer import AdapterTrainer

__version__ = "0.1.0"

__all__ = [
    "AdapterSetup",
    "AdapterTrainer",
    "AutoAdapterModel",
    "ForwardContext",
    "Fuse",
    "Stack",
    "composition",
    "configuration",
    "context",
    "heads",
    "init",
    "ops",
    "refresh",
    "restore",
    *flexible.CLASS_NAMES,
    *_configuration_names,
]


def __getattr__(name: str):
    if name in flexible.CLASS_NAMES:
        return getattr(flexible, name)
    if name == "AdapterTrainer":
        # its own module, since importing transformers' Trainer takes longer than all the rest
        from .trainer import AdapterTrainer

        return AdapterTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
