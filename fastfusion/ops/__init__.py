"""The ops of the library, as functions and as `torch.ops.fastfusion.*`."""

from .adapter_fusion import PackedWeights, adapter_fusion, adapter_fusion_norm

__all__ = ["PackedWeights", "adapter_fusion", "adapter_fusion_norm"]
