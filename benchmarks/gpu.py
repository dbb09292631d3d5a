"""Everything that a GPU can tell, in one command: parity, tuning, benchmarks, a file of results.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --peer-site FOLDER    # with adapters 1.3.0 and transformers 4.57.6
    python benchmarks/gpu.py --dry-run             # without a GPU: does everything run?

Needs an NVIDIA or AMD GPU, a checkout on PYTHONPATH or installed, torch from 2.11, triton from 3.6,
no network and no extension. Every stage has a share of the minutes and runs in processes of its own
(`gpu_stage.py`): one that hangs is ended, one that dies is started again behind the item that it
died in. The results say what was left out, what failed, and what was not run and why. The schedules
that the tuning measured serve the stages behind it, and are left beside the results. A dry run
takes CPU tensors of tiny shapes through Triton's interpreter; its times mean nothing, are marked,
and go to a file only if one is named.

The exit status is 1 if anything failed or disagreed, or was left out of a check or a dry run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.jsonl"
SANITIZER = "compute-sanitizer"
MINUTES = 8.5
MOST_PROCESSES = 16
"""Of one GPU at once: each has a context there, about half a GiB, and tensors of less."""


@dataclass(frozen=True)
class Stage:
    """Part of a run, in one process or in several that share its items."""

    name: str
    share: float
    """Of the time that is left, in the unit of the later stages' shares: seconds of the default
    time, where all stages run and all before have taken all of theirs."""
    processes: int = 1
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str | None = None
    """Why it cannot run here."""
    is_check: bool = False
    """Whether what it leaves out is a fault."""


@dataclass
class Outcome:
    """What a stage's processes reported."""

    results: dict[str, dict] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What there is of it, for the file."""
        parts = {name: value for name, value in vars(self).items() if value}
        return parts.pop("versions", {}) | parts

    def unseen(self) -> list[str]:
        """What there was no time for: items, and parts of items that say so."""
        rows = [row for rows in self.results.values() for row in rows.values()]
        return self.left_out + [part for row in rows for part in row.get("left_out", ())]

    def faults(self) -> list[str]:
        """Titles and rows whose outputs did not agree, or which could not run."""
        return [
            f"{title}: {row}"
            for title, rows in self.results.items()
            for row, result in rows.items()
            if not result.get("agreed", True) or "failed" in result
        ]


def stages(is_dry: bool, peer_site: Path | None) -> list[Stage]:
    """What a run consists of, in order."""
    sanitizers = [
        Stage(
            tool,
            35,
            prefix=(SANITIZER, "--tool", tool, "--error-exitcode", "99"),
            # else PyTorch's allocator would hide what lies outside a tensor
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            not_run=_why_no_sanitizer(is_dry),
            is_check=True,
        )
        for tool in ("memcheck", "racecheck")
    ]
    if peer_site is None:
        peer = Stage("peer", 50, not_run="no --peer-site: a folder with adapters 1.3.0")
    else:
        rest = os.environ.get("PYTHONPATH")
        path = f"{peer_site}{os.pathsep}{rest}" if rest else str(peer_site)
        peer = Stage("peer", 50, environment={"PYTHONPATH": path})
    # a process compiles one kernel after the other, and parity needs hundreds
    processes = 1 if is_dry else min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    return [
        Stage("environment", 40),
        Stage("parity", 130, processes, is_check=True),
        *sanitizers,
        Stage("tuning", 80),
        Stage("ops", 80),
        Stage("models", 60),
        peer,
    ]


def _why_no_sanitizer(is_dry: bool) -> str | None:
    if is_dry:
        return "a dry run has no GPU code to watch"
    return None if shutil.which(SANITIZER) else f"{SANITIZER} is not on the PATH"


class Runner:
    """Runs stages one after the other until the time is over."""

    def __init__(self, minutes: float, is_dry: bool, scratch: Path):
        self.end = time.monotonic() + 60 * minutes
        self.is_dry = is_dry
        self.scratch = scratch
        self.running: set[subprocess.Popen] = set()
        self.is_interrupted = False
        # read when triton is imported; a run on a GPU must not inherit it
        self.environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if is_dry:
            self.environment["TRITON_INTERPRET"] = "1"
        self.tuned = scratch / "schedules.json"
        self.environment["FASTFUSION_TUNED"] = str(self.tuned)

    def run(self, stage: Stage, share: float) -> Outcome:
        """A stage, in its share of the time that is left."""
        if stage.not_run is not None:
            return Outcome(not_run=stage.not_run)
        now = time.monotonic()
        deadline = now + share * (self.end - now)
        outcome = Outcome()
        with ThreadPoolExecutor(stage.processes) as pool:
            parts = range(stage.processes)
            try:
                for part in pool.map(lambda i: self._run_part(stage, i, deadline), parts):
                    outcome.results |= part.results
                    outcome.left_out += part.left_out
                    outcome.failed |= part.failed
                    outcome.versions = part.versions
            except (KeyboardInterrupt, SystemExit):  # sessions of their own: no signal reached them
                self.is_interrupted = True
                for process in list(self.running):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if self.tuned.exists():
            self.environment["FASTFUSION_SCHEDULES"] = str(self.tuned)
        return outcome

    def _run_part(self, stage: Stage, number: int, deadline: float) -> Outcome:
        """One process at a time, the next one behind the item that the last one died in."""
        outcome, names, over = Outcome(), None, 0
        report = self.scratch / f"{stage.name}-{number}.jsonl"
        while names is None or over < len(names):
            report.unlink(missing_ok=True)
            part = ["--part", f"{number}/{stage.processes}", "--skip", str(over)]
            code, errors = self._process(stage, [*part, "--report", str(report)], deadline)
            # the last line has no end if the process was ended while it wrote
            lines = report.read_text().split("\n")[:-1] if report.exists() else []
            began = None
            for entry in map(json.loads, lines):
                names = entry.get("items", names)
                outcome.versions = entry.get("versions", outcome.versions)
                began = entry.get("began", began)
                if "done" in entry:
                    outcome.results[entry["done"]] = entry["results"]
                    began, over = None, over + 1
            if code is None or self.is_interrupted:  # out of time
                outcome.left_out += names[over:] if names is not None else ["all"]
                break
            if code != 0:
                outcome.failed[began or stage.name] = f"exit status {code}: {errors}"
                over += began is not None
            if began is None:
                break
        return outcome

    def _process(
        self, stage: Stage, arguments: list[str], deadline: float
    ) -> tuple[int | None, str]:
        """The exit status, or None where it had to be ended, and the end of what it complained."""
        command = [*stage.prefix, sys.executable, str(HERE / "gpu_stage.py"), stage.name]
        command += [*arguments, *["--dry-run"] * self.is_dry]
        with tempfile.TemporaryFile("w+", errors="replace", dir=self.scratch) as errors:
            process = subprocess.Popen(
                command,
                # a tool that watches the process writes its findings to standard output
                stdout=errors if stage.prefix else None,
                stderr=errors,
                env=self.environment | stage.environment,
                start_new_session=True,  # its compilers are ended with it
            )
            self.running.add(process)
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            self.running.remove(process)
            errors.seek(0)
            return code, "\n".join(errors.read().strip().splitlines()[-40:])


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "adapters").is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder that has adapters in it; got {text}")
    return path


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = float("nan")
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0; got {text}")
    return minutes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--dry-run", action="store_true", help="tiny shapes, no GPU")
    options.add_argument("--peer-site", type=_folder, help="with adapters and its transformers")
    options.add_argument(
        "--output", type=Path, help=f"append here; {RESULTS} by default, nothing in a dry run"
    )
    options.add_argument("--minutes", type=_minutes, default=MINUTES, help="for all together")
    return options.parse_args(arguments)


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output = arguments.output or (None if arguments.dry_run else RESULTS)
    base: dict[str, Any] = {"dry": True} if arguments.dry_run else {}
    records, is_bad = [], False
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(arguments.minutes, arguments.dry_run, Path(scratch))
        planned = stages(arguments.dry_run, arguments.peer_site)
        for i, stage in enumerate(planned):
            print(stage.name, flush=True)
            # what cannot run leaves its share to the others
            shares = [later.share for later in planned[i:] if later.not_run is None]
            outcome = runner.run(stage, stage.share / sum(shares) if stage.not_run is None else 0)
            if stage.name == "environment":
                if "environment" not in outcome.results:
                    print(*outcome.failed.values() or ("out of time",), file=sys.stderr)
                    return 1
                base |= outcome.results.pop("environment")
            if outcome.unseen():
                print(f"  left out, for want of time: {'; '.join(outcome.unseen())}", flush=True)
            records.append({**base, "stage": stage.name, **outcome.record()})
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                with output.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
            is_bad |= bool(outcome.failed or outcome.faults())
            # time may be too short for benchmarks; a kernel that hangs looks the same
            is_bad |= (arguments.dry_run or stage.is_check) and bool(outcome.left_out)
        if output is not None and runner.tuned.exists():
            shutil.copy(runner.tuned, output.with_name(f"{output.stem}-schedules.json"))
    print("\n".join(table.gpu(records)))
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
