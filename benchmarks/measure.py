"""What the benchmarks share: interleaved rounds, quartiles, the machine, and a file of results."""

import argparse
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4)]


def twenty_eighty(values: list[float]) -> list[float]:
    """The 20 % point, the median and the 80 % point; of one value, that value three times."""
    if len(values) == 1:
        return [round(values[0], 4)] * 3
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return [round(tenths[i], 4) for i in (1, 4, 7)]


def wall_ms(call: Callable) -> float:
    """How long a call takes that returns when its work is done."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    calls: Mapping[str, Callable],
    rounds: int,
    warmup: int = 2,
    timed: Callable[[Callable], float] = wall_ms,
) -> dict[str, list]:
    """Times in ms by name. Every round times each call once, in turn, so that whatever else the
    machine does falls on all of them."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times_ms[name].append(timed(call))
    return times_ms


def ratios(times_ms: list[float], others_ms: list[float]) -> list[float]:
    """Quartiles of the rounds' own ratios."""
    return quartiles([a / b for a, b in zip(times_ms, others_ms, strict=True)])


def commit() -> str:
    """The checkout's, or "unknown" where it is no repository or there is no git."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    found = {}
    for package in ("torch", "triton", "transformers", "adapters"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }


def distance(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """The distance of two results over the size of the truth."""
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()


def relative_error(actual: torch.Tensor, truth: torch.Tensor, limit: float) -> float:
    """`distance`, to two digits.

    Raises:
        SystemExit: it is above `limit`: what is not the same is not compared.
    """
    error = distance(actual, truth)
    if not error <= limit:
        raise SystemExit(f"outputs differ: relative error {error:.1e}, allowed {limit:.1e}")
    return float(f"{error:.1e}")


def parser(description: str, name: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    default = Path(__file__).parent / "results" / f"{name}.jsonl"
    options.add_argument("--json", type=Path, default=default, help="append the results here")
    options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--threads", type=int, default=2)
    return options


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Set the threads; the record that the results go into."""
    torch.set_num_threads(arguments.threads)
    return {**environment(), "rounds": arguments.rounds}


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a file with one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
