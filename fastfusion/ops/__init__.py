"""The ops of the library, as functions and as `torch.ops.fastfusion.*`."""

from .adapter_fusion import adapter_fusion, adapter_fusion_norm
from .grouped import adapter_fusion_grouped
from .weights import GroupedWeights, PackedWeights, max_scored, stack

__all__ = [
    "GroupedWeights",
    "PackedWeights",
    "adapter_fusion",
    "adapter_fusion_grouped",
    "adapter_fusion_norm",
    "max_scored",
    "stack",
]
