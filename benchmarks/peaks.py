"""What GPUs can do at most, from their makers' data sheets."""

from typing import NamedTuple


class Peak(NamedTuple):
    flops: float
    """Dense bf16 products a second, the sums in fp32."""
    bytes: float
    """To and from device memory, a second."""
    source: str


_A100, _H100 = "NVIDIA A100 Tensor Core GPU data sheet", "NVIDIA H100 Tensor Core GPU data sheet"
_HALF = "half of the figure with sparsity"
PEAKS = {
    "A100-SXM4-40GB": Peak(312e12, 1.555e12, f"{_A100}, A100 40GB SXM"),
    "A100-SXM4-80GB": Peak(312e12, 2.039e12, f"{_A100}, A100 80GB SXM"),
    "A100 80GB PCIe": Peak(312e12, 1.935e12, f"{_A100}, A100 80GB PCIe"),
    "H100 80GB HBM3": Peak(989.5e12, 3.35e12, f"{_H100}, H100 SXM, {_HALF}"),
    "H100 PCIe": Peak(756.5e12, 2e12, f"{_H100}, H100 PCIe, {_HALF}"),
    "H200": Peak(989.5e12, 4.8e12, f"NVIDIA H200 Tensor Core GPU data sheet, {_HALF}"),
    "MI300X": Peak(1307.4e12, 5.3e12, "AMD Instinct MI300X data sheet"),
}
"""By a part of the name that PyTorch gives the device."""
