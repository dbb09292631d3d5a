"""The ops of the library, as functions and as `torch.ops.fastfusion.*`."""

from .adapter_fusion import adapter_fusion, adapter_fusion_norm
from .grouped import adapter_fusion_grouped
from .routing import RoutingTables, gather_rows, routing_tables, scatter_rows
from .weights import GroupedWeights, PackedWeights, max_scored, stack

__all__ = [
    "GroupedWeights",
    "PackedWeights",
    "RoutingTables",
    "adapter_fusion",
    "adapter_fusion_grouped",
    "adapter_fusion_norm",
    "gather_rows",
    "max_scored",
    "routing_tables",
    "scatter_rows",
    "stack",
]
