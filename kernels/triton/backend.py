"""The "triton" backend of the ops: its functions by name, and what it refuses."""

from torch import Tensor

from fastfusion.ops.weights import GroupedWeights, PackedWeights

from .adapter_fusion import adapter_fusion, adapter_fusion_grouped, adapter_fusion_norm
from .backward import adapter_fusion_backward, adapter_fusion_grouped_backward
from .norm_backward import adapter_fusion_norm_backward
from .tiles import DTYPES, INTERPRETED

__all__ = [
    "adapter_fusion",
    "adapter_fusion_backward",
    "adapter_fusion_grouped",
    "adapter_fusion_grouped_backward",
    "adapter_fusion_norm",
    "adapter_fusion_norm_backward",
    "refusal",
]


def refusal(x: Tensor, weights: PackedWeights | GroupedWeights) -> str | None:
    """Why this backend cannot run a mixture of this input and these weights, or None."""
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return f"it needs a GPU or, on a CPU, TRITON_INTERPRET=1 at import; x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16; x is {x.dtype}"
    for name, weight in weights._asdict().items():
        if not isinstance(weight, Tensor) or name == "temperature":
            continue
        if weight.dtype != x.dtype or weight.device != x.device:
            return f"{name} is {weight.dtype} on {weight.device}, x {x.dtype} on {x.device}"
    return None
