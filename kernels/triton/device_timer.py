"""Times of calls on a GPU, without the host's."""

import statistics
from collections.abc import Callable, Mapping

import torch

FLUSHED_BYTES = 512 * 2**20
"""More than any last-level cache, MI300X's 256 MiB too."""


class ColdCaches:
    """A GPU whose caches are flushed before each call that is timed."""

    def __init__(self, device: torch.device):
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def time_ms(self, call: Callable[[], object], from_idle: bool = False) -> float:
        """The time between two events around a call.

        A graph is launched while the caches are still being flushed, so that the time is the
        device's alone.

        Args:
            from_idle: wait for the flush, so that the time has the call's launches in it.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        if from_idle:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


class DeviceTimer:
    """Medians in us of calls that are captured in CUDA graphs and replayed in turn, from cold
    caches, so that whatever else the device does falls on all of them."""

    def __init__(self, device: torch.device, rounds: int = 25):
        self.device = device
        self.rounds = rounds
        self.caches = ColdCaches(device)

    def __call__(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The median of each call; what it needs has to be compiled, and its tables made."""
        with torch.cuda.device(self.device):
            # one pool: they are replayed one after the other, and nobody reads their results
            pool = torch.cuda.graph_pool_handle()
            graphs = {}
            for name, call in calls.items():
                torch.cuda.synchronize()
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name], pool=pool):
                    call()
            times_us: dict[str, list[float]] = {name: [] for name in graphs}
            for is_warm in [False] * 2 + [True] * self.rounds:
                for name, graph in graphs.items():
                    time_us = 1e3 * self.caches.time_ms(graph.replay)
                    if is_warm:
                        times_us[name].append(time_us)
        return {name: statistics.median(values) for name, values in times_us.items()}
