"""The ops of the library, as functions and as `torch.ops.fastfusion.*`."""

from .adapter_fusion import PackedWeights, adapter_fusion, adapter_fusion_norm
from .routing import RoutingTables, gather_rows, routing_tables, scatter_rows

__all__ = [
    "PackedWeights",
    "RoutingTables",
    "adapter_fusion",
    "adapter_fusion_norm",
    "gather_rows",
    "routing_tables",
    "scatter_rows",
]
