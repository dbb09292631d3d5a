"""The device that gpu.py runs on: what it is, its clock and CUDA graphs; a CPU in a dry run."""

import functools
from collections.abc import Callable
from typing import Any

import measure
import torch
from peaks import PEAKS

from fastfusion.kernels.triton import machine
from fastfusion.kernels.triton.device_timer import ColdCaches


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
    def _caches(self) -> ColdCaches:
        return ColdCaches(self.device)

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
            "driver": machine.driver(),
            "peak_tflops": round(peaks[0].flops / 1e12, 1) if peaks else None,
            "peak_gb_s": round(peaks[0].bytes / 1e9) if peaks else None,
        }

    def timed(self, call: Callable) -> float:
        """ms from cold caches: of a graph the device's alone, of everything else launches too."""
        return self._caches.time_ms(call, from_idle=not isinstance(call, Graph))

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
