"""Results that are made once and kept."""

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
# One for all: what is made is small, and nothing that is made this way asks for another.
_lock = threading.Lock()


def once(make: Callable[..., Result]) -> Callable[..., Result]:
    """`functools.cache` that gives all threads the same result: a second one, which a first caller
    had and the cache has not, would be freed while a GPU or a CUDA graph still reads it."""
    kept = functools.cache(make)

    @functools.wraps(make)
    def get(*args) -> Result:
        with _lock:
            return kept(*args)

    get.cache_clear = kept.cache_clear
    return get
