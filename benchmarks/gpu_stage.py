"""One stage of gpu.py, in a process of its own that may be killed at any time.

    python benchmarks/gpu_stage.py STAGE --report FILE [--dry-run] [--part I/K] [--skip COUNT]

The report has one JSON object a line: first the names of all items of this part and the packages'
versions, then one line when an item begins and one with its results. Who reads it knows what was
left out, and why.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import parity
import torch
from device import GPU, DryRun, open_device

Items = dict[str, Callable[[], dict[str, Any]]]

TUNING_MINUTES = 0.9
"""On a GPU; the stage also starts, and ends what it has begun."""


def environment(device: GPU | DryRun) -> Items:
    """What every figure depends on."""

    def facts() -> dict[str, Any]:
        found = measure.environment() | device.facts()
        if triton := importlib.util.find_spec("triton"):
            found["triton"] = importlib.import_module(triton.name).__version__
        for name, serves in (("_C", "torch backend on the CPU"), ("_C_cuda", "PyTorch routing")):
            try:
                importlib.import_module(f"fastfusion.{name}")
                found[f"extension{name}"] = "built"
            except ImportError:
                found[f"extension{name}"] = f"absent: {serves}"
        return found

    return {"environment": facts}


def check_parity(device: GPU | DryRun) -> Items:
    """Every kernel in every dtype."""
    # torch.empty gives NaN, so that a result that reads memory nobody wrote shows it
    torch.use_deterministic_algorithms(True, warn_only=True)
    found: Items = {}
    cases = parity.CASES
    if device.is_dry:  # of those that differed in their sizes alone the last one
        cases = {name: case for case, name in {parity.tiny(c): n for n, c in cases.items()}.items()}
    for name, case in cases.items():
        for dtype in parity.DTYPES:
            check = functools.partial(parity.check, case, dtype, device.device)
            found[f"{name} {str(dtype)[6:]}"] = lambda check=check: {"triton": check()}
    rows, groups = (40, 5) if device.is_dry else (65_536, 1000)
    found["routing"] = lambda: {
        "routing": parity.check_routing(rows, groups, 128, device.device),
    }
    return found


def sanitize(device: GPU | DryRun) -> Items:
    """The kernels alone: compute-sanitizer watches this process."""
    found: Items = {}
    for name in parity.SANITIZED:
        exercise = functools.partial(
            parity.exercise, parity.CASES[name], torch.bfloat16, device.device
        )
        found[name] = lambda exercise=exercise: exercise() or {}
    return found


def tune(device: GPU | DryRun) -> Items:
    """Schedules measured here, in a new table that FASTFUSION_TUNED names: of BERT-base's places
    with 3 adapters, and of the mixture of 8; `fastfusion tune` measures all others."""
    from fastfusion.kernels.triton import (
        device_timer,
        processes,
        schedule_files,
        schedules,
        tuning,
        tuning_cases,
    )

    def measured() -> dict[str, Any]:
        if device.is_dry:
            cases = tuning_cases.cases(32, [(4, 4)], [5], [torch.bfloat16])
            count, minutes = 1, 0.2

            def timer(calls):
                return {name: 1e3 * device.timed(call) for name, call in calls.items()}
        else:
            # in this order the mixture's border, far from its columns, is tuned last
            cases = [
                tuning_cases.Case("norm", 768, (48,) * 3, 16384, torch.bfloat16),
                tuning_cases.Case("plain", 768, (48,) * 8, 16384, torch.bfloat16),
            ]
            count, minutes = processes.usable(), TUNING_MINUTES
            timer = device_timer.DeviceTimer(device.device)
        with processes.Processes(count) as compilers:
            found = tuning.tune(
                cases, device.device, timer, minutes, say=lambda told: None, compilers=compilers
            )
        table = schedule_files.refreshed(schedules.loaded(), found.entries)
        schedule_files.write(Path(os.environ["FASTFUSION_TUNED"]), table)
        left_out = list(found.unreached)
        if found.untried:
            left_out.append(f"{found.untried} candidates of other schedules")
        told = {"timed": found.timed, "dropped": len(found.dropped), "entries": found.entries}
        told |= {"left_out": left_out} if left_out else {}
        return {"schedules": told | ({"failed": found.failed} if found.failed else {})}

    return {"schedules": measured}


def time_ops(device: GPU | DryRun) -> Items:
    return importlib.import_module("gpu_ops").items(device)


def time_models(device: GPU | DryRun) -> Items:
    return importlib.import_module("gpu_models").items(device, with_peer=False)


def time_against_peer(device: GPU | DryRun) -> Items:
    importlib.import_module("adapters")  # its absence is an error here, and nowhere else
    return importlib.import_module("gpu_models").items(device, with_peer=True)


STAGES: dict[str, Callable[[GPU | DryRun], Items]] = {
    "environment": environment,
    "parity": check_parity,
    "memcheck": sanitize,
    "racecheck": sanitize,
    "tuning": tune,
    "ops": time_ops,
    "models": time_models,
    "peer": time_against_peer,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("stage", choices=STAGES)
    options.add_argument("--report", type=Path, required=True)
    options.add_argument("--dry-run", action="store_true")
    options.add_argument("--part", default="0/1", help="the items number I, I+K, ...")
    options.add_argument("--skip", type=int, default=0, help="items of the part that have been run")
    arguments = options.parse_args()
    start, step = map(int, arguments.part.split("/"))
    items = STAGES[arguments.stage](open_device(arguments.dry_run))
    names = list(items)[start::step]
    measure.append(arguments.report, {"items": names, "versions": measure.versions()})
    for name in names[arguments.skip :]:
        measure.append(arguments.report, {"began": name})
        began = time.perf_counter()
        results = items[name]()
        measure.append(arguments.report, {"done": name, "results": results})
        print(f"  {time.perf_counter() - began:6.1f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
