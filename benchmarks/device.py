"""The device that gpu.py runs on: what it is, its clock and CUDA graphs; a CPU in a dry run."""

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

FLUSHED_BYTES = 512 * 2**20
"""Written between repetitions: more than any last-level cache, MI300X's 256 MiB too."""
PEAKS = {
    # dense bf16 TFLOP/s and GB/s, from the makers' data sheets
    "A100-SXM4-40GB": (312, 1555),
    "A100-SXM4-80GB": (312, 2039),
    "A100 80GB PCIe": (312, 1935),
    "H100 80GB HBM3": (989, 3350),
    "H100 PCIe": (756, 2000),
    "H200": (989, 4800),
    "MI300X": (1307, 5300),
}


class Graph:
    """A call captured in a CUDA graph; calling it replays the graph and gives the same result."""

    def __init__(self, call: Callable):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


class GPU:
    """The first GPU, NVIDIA's or AMD's."""

    is_dry = False
    has_graphs = has_memory_stats = True
    compiler = "inductor"

    def __init__(self):
        if not torch.cuda.is_available():
            raise SystemExit("no GPU that this PyTorch can use; --dry-run needs none")
        self.device = torch.device("cuda", torch.cuda.current_device())

    @functools.cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.device)

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        peaks = [peak for name, peak in PEAKS.items() if name in properties.name]
        return {
            "device": properties.name,
            "architecture": properties.gcnArchName
            if torch.version.hip
            else f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else torch.version.cuda,
            "driver": _driver(),
            "peak_tflops": peaks[0][0] if peaks else None,
            "peak_gb_s": peaks[0][1] if peaks else None,
        }

    def timed(self, call: Callable) -> float:
        """ms between two events around a call, from cold caches.

        A graph is launched while the caches are still being flushed, so that the time is the
        device's alone. Everything else starts on an idle device: the time has its launches in it.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        if not isinstance(call, Graph):
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, call: Callable) -> float:
        """What a call needs beyond what is there when it starts."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


class DryRun:
    """CPU tensors and Triton's interpreter: whether everything runs, not how fast."""

    is_dry = True
    has_graphs = has_memory_stats = False
    compiler = "eager"
    """Traces what inductor would compile."""
    device = torch.device("cpu")

    def facts(self) -> dict[str, Any]:
        return {"device": "none: CPU tensors in Triton's interpreter"}

    def timed(self, call: Callable) -> float:
        return measure.wall_ms(call)


def open_device(is_dry: bool) -> GPU | DryRun:
    return DryRun() if is_dry else GPU()


def _driver() -> str:
    if torch.version.hip:
        amd = Path("/sys/module/amdgpu/version")
        return amd.read_text().strip() if amd.exists() else "unknown"
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else "unknown"
