"""The CUDA extension, where it is built: loaded without a GPU, and read without running it.

FASTFUSION_CUDA=1 python setup.py build_ext --inplace && pytest tests/test_cuda_module.py
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import fastfusion.ops  # noqa: F401  defines the ops

triton = pytest.importorskip("triton")
module = pytest.importorskip("fastfusion._C_cuda")

ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}  # those of setup.py
# one of each for int32 and int64 ids; copies for five widths, to and from
KERNELS = {
    "count_rows": 2,
    "scan_chunks": 1,
    "scan_bins": 1,
    "place_rows": 2,
    "cut_blocks": 1,
    "copy_rows": 10,
}


@pytest.mark.parametrize("name", ["routing_tables", "gather_rows", "scatter_rows"])
def test_the_ops_are_registered(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastfusion::{name}", "CUDA")


def test_nothing_spills():
    """Every kernel is there for every architecture, and has no stack, which is where spills go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", module.__file__]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for architecture, section in re.findall(r"arch = (sm_\d+)(.*?)(?=arch = |\Z)", usage, re.S):
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", section)
        for name, registers, stack in kernels:
            assert stack == "0", f"{architecture} {name}: {stack} bytes of stack"
            # 256 threads of 64 registers: four thread blocks on a multiprocessor
            assert int(registers) <= 64, f"{architecture} {name}: {registers} registers"
        counts = {kernel: sum(kernel in name for name, *_ in kernels) for kernel in KERNELS}
        if kernels:
            found[architecture] = counts
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert set(found) == ARCHITECTURES
    assert found and all(counts == KERNELS for counts in found.values()), found
