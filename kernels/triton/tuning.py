"""Measured entries for the table of schedules: each schedule that given calls ask for is tried with
the blocks around its derived ones.

A schedule is tuned for a dtype's bits and a number of rows, with all calls that ask for it there.
What does not compile, needs more than the device has, spills or errs more than the `torch` backend
allows is left out and reported. The rest is timed, in turn, and the smallest geometric mean over
the calls wins. What a call asks for last is tuned first: a border between schedules is drawn
between tuned ones.

Compiling takes most of the time. It can be done ahead by several processes, which run the
candidates for nothing but Triton's cache on disk; this one finds the kernels there, and no other
process runs while it times.

Nothing is tuned in place: the entries are the result, and nothing changes until a table with them
is written and named (`schedules.ENVIRONMENT_VARIABLE`).
"""

import contextlib
import datetime
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

import triton
from triton.errors import TritonError

from . import machine, schedule_files, schedules
from .candidates import Blocks, candidates
from .processes import Processes
from .tiles import launched
from .tuning_cases import Call, Case, call_of, expected_of

Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]
"""Times in us of calls by name."""

LIMIT = 32
"""Candidates of a schedule."""
GAIN = 0.98
"""What a candidate's time must fall below, of the derived blocks' time: no change for a tie."""
TRIED = 0.8
"""The part of a schedule's time for compiling and checking; the rest is for timing."""
COMPILED = 0.6
"""The part for compiling, where that is done ahead."""


class Unit(NamedTuple):
    """A schedule to tune, and the calls that ask for it."""

    name: str
    bits: int
    num_rows: int
    cases: tuple[Case, ...]

    def __str__(self) -> str:
        return f"{self.name}, {self.bits} bits, {self.num_rows} rows"


class Dropped(NamedTuple):
    """A candidate that was not timed, and why."""

    unit: str
    blocks: Blocks
    reason: str


class Tuned(NamedTuple):
    """What tuning found."""

    entries: tuple[dict[str, Any], ...]
    """Measured, for the front of a table (`schedule_files.refreshed`)."""
    timed: int
    """How many candidates were timed."""
    dropped: tuple[Dropped, ...]
    untried: int
    """How many candidates the time did not allow, in units that were begun."""
    unreached: tuple[str, ...]
    """Units that the time did not allow."""
    failed: tuple[str, ...]
    """Units without a candidate that is right."""


def units_of(cases: Iterable[Case], device: torch.device) -> list[Unit]:
    """What the calls ask for, the last asked first and otherwise in the order of the cases."""
    found: dict[tuple[str, int, int], list[Case]] = {}
    place: dict[str, int] = {}
    for case in cases:
        with schedules.asked() as names:
            _run(call_of(case, device), case, device)
        for i, (name, num_rows) in enumerate(names):
            place[name] = max(i, place.get(name, 0))
            found.setdefault((name, case.dtype.itemsize * 8, num_rows), []).append(case)
    units = [Unit(*key, tuple(cases)) for key, cases in found.items()]
    return sorted(units, key=lambda unit: -place[unit.name])


def _is_derived(entry: dict[str, Any]) -> bool:
    return "origin" not in entry


def _derived(unit: Unit, arch: str) -> tuple[int, float, dict[str, Any]]:
    """The derived entry that serves a unit, behind the rows that it serves.

    Raises:
        ValueError: there is none.
    """
    derived = filter(_is_derived, schedules.table())
    for found in schedule_files.ranges(derived, unit.name, arch, unit.bits):
        if found[0] <= unit.num_rows <= found[1]:
            return found
    raise ValueError(f"schedules: no derived entry for {unit} on {arch}")


def _elsewhere(unit: Unit, arch: str) -> list[Blocks]:
    """The schedule's blocks in all of the table: those for such numbers and for this target first,
    those of the interpreter never."""
    entries = [
        entry
        for entry in schedules.table()
        if unit.name in entry["schedules"]
        and (entry["archs"] != ["interpreter"] or arch == "interpreter")
    ]
    entries.sort(
        key=lambda entry: (
            unit.bits not in entry["bits"],
            not arch.startswith(tuple(entry["archs"])),
        )
    )
    return [entry["blocks"] for entry in entries]


def _entry(unit: Unit, arch: str, blocks: Blocks) -> dict[str, Any]:
    return {"schedules": [unit.name], "archs": [arch], "bits": [unit.bits], "blocks": blocks}


def _run(call: Call, case: Case, device: torch.device) -> tuple[dict[str, torch.Tensor], int] | str:
    """A call's results on this backend, and how many registers its kernels spill; or why there are
    none."""
    try:
        with launched() as kernels:
            results = call("triton", case.dtype)
    except (TritonError, RuntimeError) as error:
        # PyTorch's errors and those of Triton's passes are RuntimeErrors. One that has broken the
        # device is raised again here.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
    return results, sum(kernel.n_spills for kernel in kernels)


def _compile(cases: Sequence[Case], entries: Sequence[dict], device: torch.device) -> None:
    """Fill the cache with the kernels of calls under schedules; what is wrong with them shows in
    the trial, and so does memory that several processes do not have and one has."""
    with schedules.first(*entries), contextlib.suppress(torch.OutOfMemoryError):
        for case in cases:
            _run(call_of(case, device), case, device)


class _Trials:
    """The candidates of a unit: those that passed, with their calls, and those that did not."""

    def __init__(self, unit: Unit, derived: Blocks, arch: str, device: torch.device):
        self.unit = unit
        self.derived = derived
        self.arch = arch
        self.device = device
        self.calls = {case: call_of(case, device) for case in unit.cases}
        self.expected = {case: expected_of(case, call) for case, call in self.calls.items()}
        self.spills: dict[Case, int] = {}
        """Registers, of the derived blocks; these are not dropped for them."""
        self.passed: dict[str, Blocks] = {}
        self.dropped: list[Dropped] = []

    def attempt(self, blocks: Blocks) -> None:
        """Run a candidate on every case, and keep it if nothing is wrong with it."""
        with schedules.first(_entry(self.unit, self.arch, blocks)):
            faults = (self._fault(case, blocks) for case in self.unit.cases)
            fault = next(filter(None, faults), None)
        if fault is None:
            self.passed[json.dumps(blocks)] = blocks
        else:
            self.dropped.append(Dropped(str(self.unit), blocks, fault))

    def _fault(self, case: Case, blocks: Blocks) -> str | None:
        found = _run(self.calls[case], case, self.device)
        if isinstance(found, str):
            return f"{case}: {found}"
        results, spills = found
        if blocks == self.derived:
            self.spills[case] = spills
        if spills > self.spills.get(case, 0):
            return f"{case}: {spills} registers spilled"
        fault = self.expected[case].fault(results)
        return None if fault is None else f"{case}: {fault}"

    def timed(self, timer: Timer) -> dict[str, dict[Case, float]]:
        """Times in us of what passed, by name and case."""
        found: dict[str, dict[Case, float]] = {name: {} for name in self.passed}
        for case in self.unit.cases:
            calls = {name: self._call(blocks, case) for name, blocks in self.passed.items()}
            for name, time_us in timer(calls).items():
                found[name][case] = time_us
        return found

    def _call(self, blocks: Blocks, case: Case) -> Callable[[], object]:
        def call() -> object:
            with schedules.first(_entry(self.unit, self.arch, blocks)):
                return self.calls[case]("triton", case.dtype)

        return call


class _Winner(NamedTuple):
    unit: Unit
    blocks: Blocks
    times_us: dict[Case, float]
    derived_us: dict[Case, float]
    """Empty where the derived blocks were dropped."""


def _winner(trials: _Trials, timer: Timer) -> _Winner:
    times_us = trials.timed(timer)
    means = {
        name: math.exp(sum(map(math.log, times.values())) / len(times))
        for name, times in times_us.items()
    }
    best, derived = min(means, key=means.__getitem__), json.dumps(trials.derived)
    if derived in means and means[best] > GAIN * means[derived]:
        best = derived
    return _Winner(trials.unit, trials.passed[best], times_us[best], times_us.get(derived, {}))


def _measured(winners: Sequence[_Winner], arch: str, facts: dict[str, str]) -> list[dict[str, Any]]:
    """An entry for each winner. Those that had the same derived entry share its rows: each has
    those nearest to its own, by their ratio."""
    shared: dict[tuple, list[_Winner]] = {}
    for winner in winners:
        begin, end, _ = _derived(winner.unit, arch)
        shared.setdefault((winner.unit.name, winner.unit.bits, begin, end), []).append(winner)
    entries = []
    for (_, _, begin, end), together in shared.items():
        together.sort(key=lambda winner: winner.unit.num_rows)
        rows = [winner.unit.num_rows for winner in together]
        ends = [math.isqrt(a * b) for a, b in itertools.pairwise(rows)] + [end]
        for last, winner in zip(ends, together, strict=True):
            limits: dict[str, int] = {"min_rows": begin} if begin > 0 else {}
            if last != float("inf"):
                limits["max_rows"] = int(last)
                begin = int(last) + 1
            origin = {
                **facts,
                "median_us": {str(case): round(t, 2) for case, t in winner.times_us.items()},
                "derived_us": {str(case): round(t, 2) for case, t in winner.derived_us.items()},
            }
            entry = _entry(winner.unit, arch, winner.blocks)
            entries.append({**entry, **limits, "origin": origin})
    return entries


def facts(device: torch.device) -> dict[str, str]:
    """Where something is measured, for an entry's origin."""
    found = {
        "device": "interpreter",
        "driver": "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "driver": machine.driver()}
    if commit := machine.commit():
        found["commit"] = commit
    return found


def tune(
    cases: Sequence[Case],
    device: torch.device,
    timer: Timer,
    minutes: float,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], object] = print,
    compilers: Processes | None = None,
) -> Tuned:
    """Tune the schedules that calls ask for, on a device.

    Args:
        cases: the calls; their order is that of tuning where time is short.
        device: a GPU, or the CPU in Triton's interpreter.
        timer: `device_timer.DeviceTimer`, on a GPU.
        minutes: begin nothing after so long; what is left is shared among the units that are left.
        clock: seconds that pass.
        say: what each unit's result is told to.
        compilers: processes that compile ahead; without them each kernel is compiled when it is
            first tried.

    Raises:
        ValueError: minutes that are not positive, no cases, or one that there is not.
    """
    if not minutes > 0:
        raise ValueError(f"minutes: expected a positive number; got {minutes}")
    if not cases:
        raise ValueError("cases: expected at least one; got none")
    arch = schedules.arch_of(schedules.target_of(device))
    end = clock() + 60 * minutes
    winners: list[_Winner] = []
    dropped: list[Dropped] = []
    unreached: list[str] = []
    failed: list[str] = []
    timed = untried = 0
    if compilers is not None:
        compilers.run(_compile, [([case], [], device) for case in cases], end)
    units = units_of(cases, device)
    for i, unit in enumerate(units):
        began = clock()
        if began >= end:
            unreached.append(str(unit))
            continue
        share = (end - began) / (len(units) - i)
        derived = _derived(unit, arch)[2]["blocks"]
        widths = [case.width for case in unit.cases]
        to_try = candidates(unit.name, derived, _elsewhere(unit, arch), widths, LIMIT)
        in_use = _in_use(winners, arch)
        if compilers is not None:
            work = [(unit.cases, [_entry(unit, arch, b), *in_use], device) for b in to_try]
            compiled = compilers.run(_compile, work, began + COMPILED * share)
            untried += len(to_try) - compiled
            to_try = to_try[:compiled]
        with schedules.first(*in_use):
            trials = _Trials(unit, derived, arch, device)
            for done, blocks in enumerate(to_try):
                if done > 0 and clock() > began + TRIED * share:
                    untried += len(to_try) - done
                    break
                trials.attempt(blocks)
            dropped += trials.dropped
            timed += len(trials.passed)
            if not trials.passed:
                failed.append(str(unit))
                say(f"{unit}: no candidate is right")
                continue
            winner = _winner(trials, timer)
        winners.append(winner)
        say(_told(winner, len(trials.passed), len(trials.dropped)))
    entries = _measured(winners, arch, facts(device))
    return Tuned(tuple(entries), timed, tuple(dropped), untried, tuple(unreached), tuple(failed))


def _in_use(winners: Sequence[_Winner], arch: str) -> list[dict[str, Any]]:
    """Entries of what was found so far, each for its own number of rows."""
    entries = []
    for winner in winners:
        n = winner.unit.num_rows
        entries.append({**_entry(winner.unit, arch, winner.blocks), "min_rows": n, "max_rows": n})
    return entries


def _told(winner: _Winner, passed: int, dropped: int) -> str:
    times = ", ".join(
        f"{time_us:.1f} us" + (f" (derived {before:.1f})" if before else "")
        for case, time_us in winner.times_us.items()
        for before in [winner.derived_us.get(case)]
    )
    return f"{winner.unit}: {passed} timed, {dropped} dropped; {times}; {json.dumps(winner.blocks)}"
