"""The only room that knows transformers' model code: where adapters sit, and the forwards there."""

from .architectures import ARCHITECTURES, Architecture, architecture_of
from .install import patch, unpatch

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "patch", "unpatch"]
