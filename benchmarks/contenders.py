"""Contenders that compute the same on one device: eager, compiled and as CUDA graphs, interleaved.

A result has, beside its times, whether its outputs agreed: its error against the truth in higher
precision may be twice that of a plain computation in the same dtype, plus a rounding.
"""

import gc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import measure
import torch
from device import GPU, DryRun, Graph
from torch import Tensor

Outputs = dict[str, Tensor]

MODES = ("eager", "compiled", "graph", "compiled graph")
LITERAL = "reference"
LARGEST_ERROR = 0.1
"""Where even the plain computation errs as much, agreement would say nothing."""


class Contender(NamedTuple):
    """One way to compute, and how it is run."""

    run: Callable
    modes: tuple[str, ...] = ("eager", "graph")
    """Of `MODES`."""
    is_compared: bool = True
    """False: another function, there for its time."""
    flops: int | None = None
    moved_bytes: int | None = None


class Measured(NamedTuple):
    """What is timed of a contender's `run`, compiled or not."""

    call: Callable[[Callable], Callable]
    """From a `run` to a call without arguments."""
    read: Callable[[object], Outputs]
    """From such a call's result to what is compared."""


def forward(x: Tensor) -> Measured:
    """`run(x)` without gradients."""

    def call(run: Callable) -> Callable[[], Tensor]:
        def forward_call() -> Tensor:
            with torch.no_grad():
                return run(x)

        return forward_call

    return Measured(call, lambda out: {"out": out})


def _first_line(reason: Exception) -> str:
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0] if lines else ''}"


def error(outputs: Outputs, truth: Outputs) -> float:
    """The largest relative distance of any output; NaN if any is."""
    distances = [measure.distance(outputs[name], truth[name]) for name in truth]
    return torch.tensor(distances, dtype=torch.float64).max().item()


def compare(
    device: GPU | DryRun,
    contenders: Mapping[str, Contender],
    measured: Measured,
    truth: Outputs,
    dtype: torch.dtype,
    rounds: int,
    bases: tuple[str, ...],
    plain: str = LITERAL,
) -> dict[str, dict]:
    """Interleaved rounds over all contenders in all their modes.

    Args:
        contenders: by name.
        truth: the outputs in higher precision.
        dtype: what the contenders compute in.
        bases: over whose times the others' are taken, if they can run: contender and mode.
        plain: the contender whose eager error is the measure of the others'.

    Returns:
        For each contender and mode: ms and ratios at 20 %, 50 % and 80 %, the peak memory of an
        eager or compiled call, the error and whether it agreed; or why it could not run.
    """
    gc.collect()  # models of the item before hang in cycles, and compiled code counts
    torch.compiler.reset()  # towards the limit of recompiling
    calls: dict[str, Callable] = {}
    results: dict[str, dict] = {}
    owners: dict[str, Contender] = {}
    compiled: dict[str, Callable] = {}
    # graphs last: a capture that fails may leave the stream in a bad state
    for mode in MODES:
        for name, contender in contenders.items():
            if mode not in contender.modes or ("graph" in mode and not device.has_graphs):
                continue
            title, run = f"{name} {mode}", contender.run
            if mode.startswith("compiled"):
                options = {"backend": device.compiler, "dynamic": False}
                run = compiled.setdefault(name, torch.compile(run, **options))
            try:
                call, results[title] = _first_call(device, contender, run, mode, measured, truth)
            # one that cannot run here is a result, by its name, and no reason to lose the others
            except Exception as reason:
                results[title] = {"failed": _first_line(reason)}
            else:
                calls[title], owners[title] = call, contender
    _judge(results, results[f"{plain} eager"], dtype)
    warmup = 0 if device.is_dry else 3
    times_ms = measure.interleaved(calls, rounds, warmup, device.timed)
    for title, own in times_ms.items():
        results[title]["ms"] = measure.twenty_eighty(own)
        for base in bases:
            if base in times_ms:
                pairs = zip(own, times_ms[base], strict=True)
                results[title][f"over {base}"] = measure.twenty_eighty([a / b for a, b in pairs])
        results[title] |= _rates(owners[title], results[title]["ms"][1])
    return results


def _first_call(
    device: GPU | DryRun,
    contender: Contender,
    run: Callable,
    mode: str,
    measured: Measured,
    truth: Outputs,
) -> tuple[Callable, dict[str, float]]:
    """The call to time, its error and its memory."""
    call, result = measured.call(run), {}
    if mode.endswith("graph"):
        call = Graph(call)
    outputs = measured.read(call())
    if contender.is_compared:
        result["relative_error"] = float(f"{error(outputs, truth):.1e}")
    if not mode.endswith("graph") and device.has_memory_stats:
        result["peak_mib"] = device.peak_mib(call)
    return call, result


def _judge(results: dict[str, dict], plain: dict, dtype: torch.dtype) -> None:
    """Say of each result whether it agreed; of none, if `plain` itself could not run."""
    for result in results.values():
        if "relative_error" in plain and "relative_error" in result:
            allowed = 2 * plain["relative_error"] + torch.finfo(dtype).eps / 2
            result["agreed"] = result["relative_error"] <= min(allowed, LARGEST_ERROR)


def _rates(contender: Contender, ms: float) -> dict[str, float]:
    rates = {}
    if contender.flops is not None:
        rates["tflops"] = round(contender.flops / ms / 1e9, 2)
    if contender.moved_bytes is not None:
        rates["gb_s"] = round(contender.moved_bytes / ms / 1e6, 1)
    return rates
