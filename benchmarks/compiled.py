"""Every kernel compiled for every target, and what its binary says: docs/compiled.json and .md.

    python benchmarks/compiled.py --jobs 2                   # all shapes: an hour
    python benchmarks/compiled.py --named                    # the cases of test_triton_compile.py
    python benchmarks/compiled.py --filter 'gfx950 .* fp32'  # those whose names match

Kernels that the table has already are not compiled again: a run that was stopped goes on. Cases
whose kernels are the same share them. The documentation page has the named cases, one line each.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from binary import Reading, faults, read
from launches import TARGETS, Case, compiled, identity, recorded
from table import table as markdown
from triton import knobs
from triton.errors import TritonError

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "compiled.json"

BERT = ((48,) * 3,)
WIDE = ((48,) * 8,)  # beyond one launch
GROUPS = ((48,) * 3, (48, 24), (48,))
WIDE_GROUPS = ((48,) * 8, (48, 24), (48,))
FEW, SOME = 8, 1024
"""Rows of a decoding step, and of a small batch."""


def _case(op: str, groups: tuple, *flags: str, target: str = "sm_90", **rest: Any) -> Case:
    return Case(target, op, groups, flags=frozenset(flags), **rest)


# The main kernels for each target, and each flag for one.
NAMED: tuple[Case, ...] = (
    *(
        _case(*call, target=target, **rest)
        for target in TARGETS
        for call, rest in (
            (("plain", BERT), {}),
            (("plain", WIDE), {}),
            (("plain", WIDE), {"rows": FEW}),
            (("norm", BERT), {}),
            (("grouped", GROUPS), {}),
        )
    ),
    *(
        _case("plain", WIDE, "backward", target=target)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    ),
    *(_case("plain", BERT, dtype="fp32", target=target) for target in ("sm_90", "gfx942")),
    _case("plain", BERT, "high", dtype="fp32"),
    _case("plain", ((24,) * 4,), hidden=384, target="sm_80"),
    _case("plain", ((48, 24, 16),), "activations", "mask", "temperature", "offset", hidden=1600),
    _case("plain", BERT, "query"),
    _case("plain", ((48, 24),), "inputs", "bare", dtype="fp16"),
    _case("plain", BERT, "unscored", target="gfx942"),
    _case("plain", ((64,) * 64,), "query", hidden=8192),
    _case("plain", WIDE, dtype="fp32"),
    _case("norm", BERT, "ln_before", "save"),
    _case("norm", WIDE, "ln_before", rows=SOME),
    _case("plain", BERT, "backward", "unscored", rows=SOME),
    _case("grouped", GROUPS, "mask", "activations", dtype="fp16"),
    _case("grouped", ((48,) * 3, (48, 24)), "unscored"),
    _case("grouped", WIDE_GROUPS, "mask"),
    _case("grouped", WIDE_GROUPS, "backward"),
    _case("norm", BERT, "backward", "mask"),
    _case("plain", BERT, "backward", "query", "inputs", "activations"),
)  # fmt: skip


# What a kernel's code depends on, each from end to end: dtype, H, size and number of adapters.
SHAPES: tuple[tuple[str, int, int, int], ...] = (
    *(
        ("bf16", 768, size, count)
        for size, count in ((48, 3), (48, 8), (4, 64), (64, 64), (512, 8))
    ),
    *(("bf16", hidden, 48, 8) for hidden in (64, 384, 1600, 8192)),
    ("fp16", 768, 48, 8),
    *(("fp32", 768, size, count) for size, count in ((48, 3), (48, 8), (512, 8))),
)
CALLS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("plain", (), 16384),
    ("plain", (), SOME),
    ("plain", (), FEW),
    ("plain", ("query",), SOME),
    ("norm", ("ln_before",), 16384),
    ("norm", ("ln_before",), SOME),
    ("grouped", (), 16384),
    ("plain", ("backward",), 16384),
    ("plain", ("backward",), SOME),
    ("norm", ("backward",), 16384),
    ("grouped", ("backward",), 16384),
)


def every_case() -> Iterator[Case]:
    """The named ones, and each call for every shape on every target."""
    yield from NAMED
    for target, shape, (op, flags, rows) in product(TARGETS, SHAPES, CALLS):
        dtype, hidden, size, count = shape
        groups = ((size,) * count,)
        if op == "grouped":
            groups += ((size, size // 2), (size,))
        yield _case(op, groups, *flags, target=target, dtype=dtype, hidden=hidden, rows=rows)


class Entry(NamedTuple):
    """What the table has for a kernel."""

    kernel: str
    reading: Reading | None
    """None where it does not compile."""
    faults: list[str]


class Table:
    """docs/compiled.json: entries by kernel, and which kernels the launches of a case are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.triton = found.get("triton", triton.__version__)
        self.kernels: dict[str, Entry] = {}
        self.cases: dict[str, dict[str, str]] = found.get("cases", {})
        for name, (kernel, reading, wrong) in found.get("kernels", {}).items():
            self.kernels[name] = Entry(kernel, reading and Reading(*reading), wrong)

    def __getitem__(self, case: Case) -> list[Entry] | None:
        """The launches of a case; None where the table does not have it."""
        head, _, shape = case.name.rpartition(" ")
        names = self.cases.get(head, {}).get(shape)
        return None if names is None else [self.kernels[name] for name in names.split()]

    def put(self, case: Case, names: list[str]) -> None:
        head, _, shape = case.name.rpartition(" ")
        self.cases.setdefault(head, {})[shape] = " ".join(names)

    def write(self) -> None:
        """One line for a kernel and one for a row of shapes; cases that lack a kernel are left
        out, and kernels of no case."""
        cases = {
            head: {
                shape: names for shape, names in self.cases[head].items()
                if all(name in self.kernels for name in names.split())
            }
            for head in sorted(self.cases)
        }  # fmt: skip
        used = {name for row in cases.values() for names in row.values() for name in names.split()}
        kernels = {name: self.kernels[name] for name in sorted(used)}

        def lines(entries: dict) -> str:
            rows = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
            return "{\n" + ",\n".join(rows) + "\n}"

        made = f'"triton": "{triton.__version__}", "commit": "{commit()}"'
        text = f'{{{made},\n"kernels": {lines(kernels)},\n"cases": {lines(cases)}}}\n'
        scratch = self.path.with_suffix(".part")
        scratch.write_text(text)
        scratch.replace(self.path)


def commit() -> str:
    """The commit that the kernels are of."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "kernels", "fastfusion")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _compile(case: Case, index: int, connection: Connection) -> None:
    """A launch of a case, in a process of its own: a compiler that dies takes no other with it."""
    launch = recorded(case)[index]
    name = launch.kernel.__name__
    with tempfile.TemporaryDirectory() as scratch, knobs.cache.scope():
        knobs.cache.dir = scratch
        try:
            kernel = compiled(launch)
        except (RuntimeError, TritonError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            connection.send(Entry(name, None, [f"does not compile: {lines[0][:100]}"]))
            return
        reading = read(kernel)
        connection.send(Entry(name, reading, faults(kernel, reading)))


def compile_all(wanted: dict[str, tuple[Case, int]], table: Table, jobs: int) -> None:
    """Put the entries of these kernels into the table, and write it now and then."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(wanted), {}
    done, written = 0, time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            name = waiting.pop(0)
            process = context.Process(target=_compile, args=(*wanted[name], sender))
            process.start()
            sender.close()
            running[receiver] = name, process
        for receiver in wait(running):
            name, process = running.pop(receiver)
            case, index = wanted[name]
            try:
                entry = receiver.recv()
            except EOFError:
                process.join()
                if process.exitcode > 0:
                    raise RuntimeError(f"{case.name}: not compiled, for the reason above") from None
                kernel = recorded(case)[index].kernel.__name__
                entry = Entry(kernel, None, [f"the compiler died of signal {-process.exitcode}"])
            process.join()
            table.kernels[name] = entry
            done += 1
            text = "; ".join(entry.faults) or "ok"
            print(f"{done}/{len(wanted)} {case.name} {entry.kernel}: {text}", flush=True)
        if time.monotonic() - written > 60:
            table.write()
            written = time.monotonic()
    table.write()


HEAD = """# Compiled kernels

Written by `benchmarks/compiled.py` from its table, `compiled.json`: the cases that
`tests/test_triton_compile.py` compiles, read from their binaries. No GPU was needed, and nothing
here was timed. Shared memory is in KB of a block, tensor memory in columns of 512, blocks are those
that fit a multiprocessor at once.

"""


def faulty(table: Table) -> list[str]:
    """The kernels of the table that have a fault, each with the first of its cases."""
    first: dict[str, str] = {}
    for head, row in table.cases.items():
        for shape, names in row.items():
            for name in names.split():
                first.setdefault(name, f"{head} {shape}")
    used = {name: table.kernels[name] for name in first if name in table.kernels}
    wrong = [
        [first[name], entry.kernel, "; ".join(entry.faults)]
        for name, entry in used.items()
        if entry.faults
    ]
    cases = sum(map(len, table.cases.values()))
    text = f"The table has {len(used)} kernels of {cases} cases, {len(wrong)} with a fault."
    return [text, "", *markdown(["", "kernel", "faults"], sorted(wrong))]


def page(table: Table) -> str:
    """docs/compiled.md: the named cases, and what is wrong in all others."""
    header = [
        "", "kernel", "registers", "stack", "shared", "tensor", "matrix", "copies", "stores",
        "warps", "blocks", "faults",
    ]  # fmt: skip
    rows = []
    for case in NAMED:
        entries = table[case]
        if entries == []:
            entries = [Entry("", None, ["nothing was launched"])]
        for entry in entries or []:
            cells = [""] * 9
            if entry.reading is not None:
                r = entry.reading
                matrix = " ".join(f"{n} {kind}" for kind, n in r.matrix.items() if kind != "tf32")
                cells = [
                    r.registers, r.stack, f"{r.shared / 1024:.0f}", r.tensor_columns or "", matrix,
                    r.copies, r.stores, r.warps, r.blocks,
                ]  # fmt: skip
            rows.append([case.name, entry.kernel, *map(str, cells), "; ".join(entry.faults)])
    made = [f"Triton {table.triton}, commit {commit()}."]
    return HEAD + "\n".join([*markdown(header, rows), *faulty(table), *made]) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=TABLE)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--named", action="store_true", help="only the named cases")
    options.add_argument("--filter", default="", help="only cases whose name matches this regex")
    arguments = options.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    table = Table(arguments.output)
    if table.triton != triton.__version__ or not (arguments.named or arguments.filter):
        table.cases = {}
    wanted: dict[str, tuple[Case, int]] = {}
    for case in NAMED if arguments.named else every_case():
        if not re.search(arguments.filter, case.name):
            continue
        names = [identity(launch) for launch in recorded(case)]
        if not names:
            print(f"{case.name}: nothing was launched")
        table.put(case, names)
        wanted |= {name: (case, index) for index, name in enumerate(names)}
    if not wanted:
        options.error(f"--filter: expected a part of some case's name; got {arguments.filter!r}")
    missing = {name: where for name, where in wanted.items() if name not in table.kernels}
    print(f"{len(wanted)} kernels, {len(missing)} to compile", flush=True)
    compile_all(missing, table, arguments.jobs)
    arguments.output.with_suffix(".md").write_text(page(table))
    if failed := sum(table.kernels[name].reading is None for name in wanted):
        raise SystemExit(f"{failed} kernels do not compile")


if __name__ == "__main__":
    main()
