"""Work for several processes at once, in order, as far as the time goes."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from typing import Any

MOST = 16
"""Of one GPU at once: each has a context there, about half a GiB."""


def usable() -> int:
    """As many processes as there are cores for this one, up to `MOST`."""
    return min(MOST, len(os.sched_getaffinity(0)))


class Processes:
    """Processes that stay until the `with` is left; each imports what it runs when it starts."""

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic):
        self.count = count
        self.clock = clock
        # CUDA does not survive a fork
        self.pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def run(self, function: Callable, work: Iterable[tuple[Any, ...]], until: float) -> int:
        """Call a function with each of these arguments, and wait until all have returned.

        Args:
            function: of a module, as its arguments are pickled.
            until: begin nothing after this time, but the first call.

        Returns:
            How many calls there were, of the first ones.

        Raises:
            What a call raised.
        """
        running: set[Future] = set()
        begun = 0
        for arguments in work:
            # no more than are idle: what waits in the pool could not be called back
            if len(running) == self.count:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
            if begun > 0 and self.clock() > until:
                break
            running.add(self.pool.submit(function, *arguments))
            begun += 1
        for future in as_completed(running):
            future.result()
        return begun
