"""The table of schedules, and how it is refreshed: with a timer and calls that are made up, in
Triton's interpreter (TRITON_INTERPRET=1) with the real calls, on a GPU with both real.
"""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from fastfusion.kernels.triton import (  # noqa: E402
    schedule_files,
    schedules,
    tiles,
    tuning,
    tuning_cases,
)
from fastfusion.kernels.triton.candidates import LARGEST_WIDTH, candidates  # noqa: E402
from fastfusion.kernels.triton.processes import Processes  # noqa: E402
from fastfusion.kernels.triton.schedule_files import Table  # noqa: E402
from fastfusion.kernels.triton.tuning_cases import Case  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# what no kernel takes part in runs in one process only
kernel_free = pytest.mark.skipif(INTERPRETED, reason="independent of the kernels")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

CPU = torch.device("cpu")
SM_90 = GPUTarget("cuda", 90, 32)
TARGETS = ("interpreter", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
TWO = {
    "BLOCK_T": 32, "BLOCK_D": 32, "BLOCK_K": 32, "BLOCK_H": 64,
    "SWAPPED": False, "FUSED_NORM": False, "columns_num_warps": 4, "num_warps": 4,
    "num_stages": 2,
}  # fmt: skip
ONE = {
    "max_columns": 208, "BLOCK_T": 64, "BLOCK_K": 32, "BLOCK_H": 64,
    "num_warps": 8, "num_stages": 3,
}  # fmt: skip


def entry(name="two_launches", blocks=TWO, arch="sm_90", bits=16, **more):
    return {"schedules": [name], "archs": [arch], "bits": [bits], "blocks": blocks, **more}


def write_raw(path: Path, entries) -> Path:
    path.write_text(json.dumps({"origin": "derived", "entries": entries}))
    return path


# --------------------------------------------------------------------------------------------------
# the table


@kernel_free
def test_the_table_in_the_repository():
    """It is valid, as this code would write it, and has an answer for every call."""
    path = Path(schedules.__file__).with_name("schedules.json")
    table = schedule_files.read(path)
    assert schedule_files.text(table) == path.read_text()
    assert table.origin.startswith("Derived")
    for name in schedule_files.BLOCKS:
        for arch in TARGETS:
            for bits in (16, 32):
                begin = 0
                for first, last, _ in schedule_files.ranges(table.entries, name, arch, bits):
                    assert first == begin
                    begin = last + 1
                assert begin == math.inf


def without(blocks, *names):
    return {name: value for name, value in blocks.items() if name not in names}


@kernel_free
@pytest.mark.parametrize(
    "wrong, field, expected, got",
    [
        (entry(blocks=without(TWO, "BLOCK_D")), "blocks", "'two_launches' exactly", "'BLOCK_H'"),
        (entry(blocks={**TWO, "BLOCK_Q": 16}), "blocks", "'two_launches' exactly", "BLOCK_Q"),
        (entry(blocks={**TWO, "BLOCK_T": 48}), "blocks.BLOCK_T", "a power of two", "48"),
        (entry(blocks={**TWO, "BLOCK_T": 8}), "blocks.BLOCK_T", "from 16 on", "8"),
        (entry(blocks={**TWO, "BLOCK_T": True}), "blocks.BLOCK_T", "a power of two", "True"),
        (entry(blocks={**TWO, "num_warps": 3}), "blocks.num_warps", "a power of two", "3"),
        (entry(blocks={**TWO, "num_stages": 0}), "blocks.num_stages", "from 1 on", "0"),
        (entry(blocks={**TWO, "SWAPPED": 1}), "blocks.SWAPPED", "true or false", "1"),
        (entry(blocks={"max_columns": 0}), "blocks", "'two_launches' exactly", "max_columns"),
        (entry("one_launch", {"max_columns": 64}), "blocks", "'one_launch' exactly", "max_col"),
        (entry("one_launch", {**ONE, "max_columns": -1}), "blocks.max_columns", "from 0", "-1"),
        (entry("three_launches"), "schedules", "'two_launches'", "three_launches"),
        (entry(arch="h100"), "archs", "'sm_'", "h100"),
        ({**entry(), "archs": []}, "archs", "a list", "[]"),
        (entry(bits=8), "bits", "16, 32", "[8]"),
        (entry(max_rows=-1), "max_rows", "from 0 on", "-1"),
        (entry(min_rows=10, max_rows=9), "max_rows", "from 10 on", "9"),
        (entry(rows=9), "as a whole", "no fields but", "'rows'"),
        ({"schedules": ["two_launches"]}, "archs", "a value", "None"),
        ("two_launches", "as a whole", "an object", "two_launches"),
        (entry(origin="measured"), "origin", "an object", "measured"),
        (entry(origin={"gpu": "H100"}), "origin", "no fields but", "gpu"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(wrong, field, expected, got, tmp_path):
    path = write_raw(tmp_path / "wrong.json", [entry(), wrong])
    with pytest.raises(ValueError) as error:
        schedule_files.read(path)
    place, message = str(error.value).split(": expected ", 1)
    assert place == f"{path}, entry 1, {field}"
    wanted, found = message.rsplit("; got ", 1)
    assert expected in wanted and got in found


@kernel_free
@pytest.mark.parametrize("text", ["", "[]", '{"entries": []}', '{"origin": 1, "entries": []}'])
def test_what_is_no_table_is_said(text, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}.*: expected "):
        schedule_files.read(path)


@kernel_free
def test_a_table_is_not_overwritten_by_surprise(tmp_path):
    path, table = tmp_path / "table.json", Table("derived", (entry(),))
    schedule_files.write(path, table)
    before = path.read_bytes()
    other = Table("derived", (entry(blocks={**TWO, "BLOCK_T": 64}),))
    with pytest.raises(FileExistsError):
        schedule_files.write(path, other)
    with pytest.raises(ValueError, match=r"table.json, entry 0, blocks.BLOCK_T"):
        wrong = Table("derived", (entry(blocks={**TWO, "BLOCK_T": 5}),))
        schedule_files.write(path, wrong, overwrite=True)
    assert path.read_bytes() == before
    schedule_files.write(path, other, overwrite=True)
    assert schedule_files.read(path) == other
    assert list(tmp_path.iterdir()) == [path]


@kernel_free
def test_ranges_are_what_schedules_answer():
    entries = [
        entry(min_rows=10, max_rows=20), entry(bits=32), entry(max_rows=15), entry(arch="gfx"),
        entry(min_rows=18),
    ]  # fmt: skip
    found = schedule_files.ranges(entries, "two_launches", "sm_90", 16)
    expected = [(0, 9, 2), (10, 20, 0), (21, math.inf, 4)]
    assert found == [(begin, end, entries[i]) for begin, end, i in expected]


@kernel_free
def test_measured_entries_come_first_and_replace_those_that_they_hide():
    old = [
        entry(origin={}, min_rows=33, max_rows=100),  # hidden
        entry(origin={}, min_rows=33, max_rows=300),  # reached beyond 200
        entry(origin={}, arch="sm_80", max_rows=50),
        entry(max_rows=100),  # derived entries stay
    ]
    new = entry(origin={}, min_rows=20, max_rows=200)
    found = schedule_files.refreshed(Table("derived", tuple(old)), [new])
    assert found == Table("derived", (new, *old[1:]))


@kernel_free
def test_an_entry_is_asked_first_while_it_is_tried():
    def blocks():
        return schedules.schedule("two_launches", torch.bfloat16, SM_90, 1024)

    before, outer, inner = blocks(), {**TWO, "BLOCK_T": 16}, {**TWO, "BLOCK_T": 128}
    assert before not in (outer, inner)
    with schedules.first(entry(blocks=outer)):
        assert blocks() == outer
        with schedules.first(entry(blocks=inner), entry(max_rows=16)):
            assert blocks() == inner
        assert blocks() == outer
        with pytest.raises(RuntimeError), schedules.first(entry(blocks=inner)):
            raise RuntimeError
        with (
            pytest.raises(ValueError, match="entry 0, blocks.BLOCK_T"),
            schedules.first(entry(blocks={**TWO, "BLOCK_T": 3})),
        ):
            pass
        assert blocks() == outer
    assert blocks() == before


@kernel_free
def test_what_calls_ask_for_is_noted():
    def ask(name, rows):
        schedules.schedule(name, torch.bfloat16, SM_90, rows)

    ask("one_launch", 7)
    with schedules.asked() as found:
        ask("one_launch", 7)
        with schedules.asked() as inner:
            ask("two_launches", 7)
        ask("two_launches", 7)
        ask("two_launches", 8)
    ask("two_launches", 9)
    assert found == [("one_launch", 7), ("two_launches", 7), ("two_launches", 8)]
    assert inner == [("two_launches", 7)]


# --------------------------------------------------------------------------------------------------
# candidates


@kernel_free
@pytest.mark.parametrize("name", schedule_files.BLOCKS)
@pytest.mark.parametrize("widths", [[160], [160, 400], [400, 2000]])
def test_candidates_of_every_entry(name, widths):
    for given in schedules.table():
        if name in given["schedules"]:
            elsewhere = [e["blocks"] for e in schedules.table() if name in e["schedules"]]
            found = candidates(name, given["blocks"], elsewhere, widths, 32)
            assert found[0] == given["blocks"]
            assert 4 <= len(found) <= 32
            assert len({json.dumps(blocks, sort_keys=True) for blocks in found}) == len(found)
            for blocks in found:
                schedule_files.check(entry(name, blocks), "a candidate")
            assert found[:4] == candidates(name, given["blocks"], elsewhere, widths, 4)


@kernel_free
def test_a_call_that_no_entry_serves():
    with pytest.raises(ValueError, match="no entry 'two_launches' for sm_90, 64 bits, 5 rows"):
        schedules.schedule("two_launches", torch.float64, SM_90, 5)


@kernel_free
def test_candidates_are_near():
    found = candidates("two_launches_norm", TWO, [], [160], 100)
    changed = [{k for k in TWO if blocks[k] != TWO[k]} for blocks in found[1:]]
    assert {frozenset(keys) for keys in changed} == {
        *(frozenset([name]) for name in TWO),
        frozenset(["BLOCK_T", "columns_num_warps", "num_warps"]),
    }  # fmt: skip
    # without a norm FUSED_NORM says nothing, and a trial of it would be noise
    plain = candidates("two_launches", TWO, [], [160], 100)
    assert all(blocks["FUSED_NORM"] == TWO["FUSED_NORM"] for blocks in plain)


@kernel_free
def test_candidates_on_both_sides_of_a_border():
    def borders(blocks, elsewhere, widths):
        found = candidates("one_launch", blocks, elsewhere, widths, 100)
        return {found["max_columns"] for found in found}

    assert borders(ONE, [], [160, 400]) == {208, 159, 400}
    assert borders(ONE, [], [400, 2 * LARGEST_WIDTH]) == {208, 400}
    assert borders({"max_columns": 0}, [ONE], [160]) == {0, 160}
    # tiles are tried where a call reaches them
    tiled = candidates("one_launch", {"max_columns": 0}, [ONE], [160], 100)
    assert {blocks["BLOCK_T"] for blocks in tiled[1:]} == {32, 64, 128}
    assert candidates("one_launch", {"max_columns": 0}, [], [160], 100) == [{"max_columns": 0}]


# --------------------------------------------------------------------------------------------------
# the search


def as_time(by_blocks):
    """A timer that times nothing, and the names that it was asked for."""
    seen = []

    def timer(calls):
        for call in calls.values():
            call()
        seen.append([json.loads(name) for name in calls])
        return {name: by_blocks(json.loads(name)) for name in calls}

    return timer, seen


class Kernel:
    """A compiled kernel as `tiles.launch` meets it."""

    def __init__(self, spills=0):
        self.n_spills = spills

    def __getitem__(self, grid):
        return lambda **arguments: self


@pytest.fixture
def made_up_calls(monkeypatch):
    """Calls that ask as the real ones do, compute with PyTorch, and go wrong as told to."""
    behaviour = {}

    def call_of(case, device):
        real = tuning_cases.call_of(case, device)

        def call(backend, dtype):
            results = real("torch", dtype)
            if backend == "torch":
                return results
            columns, adapters = sum(case.sizes), len(case.sizes)
            asked = (case.dtype, None, case.num_rows)
            if not schedules.fits_one_launch("one_launch", columns, adapters, *asked):
                blocks = schedules.schedule("two_launches", *asked)
                for (field, value), act in behaviour.items():
                    if blocks[field] == value:
                        results = act(results)
            return results

        return call

    monkeypatch.setattr(tuning, "call_of", call_of)
    return behaviour


def case(rows=8, sizes=(16, 16), op="plain", dtype=torch.float32, hidden=32):
    return Case(op, hidden, sizes, rows, dtype)


WIDE = (96, 96, 96)  # two launches in the interpreter's table too


def tune(cases, timer, minutes=60.0, **more):
    return tuning.tune(cases, CPU, timer, minutes, say=lambda text: None, **more)


def two_launches_of(found):
    return [entry for entry in found.entries if entry["schedules"] == ["two_launches"]]


def derived_of(rows, name="two_launches", dtype=torch.float32):
    return schedules.schedule(name, dtype, None, rows)


@kernel_free
def test_the_fastest_wins(made_up_calls):
    timer, seen = as_time(lambda blocks: 50.0 if blocks["BLOCK_K"] == 64 else 100.0)
    found = tune([case(sizes=WIDE)], timer)
    (entry,) = two_launches_of(found)
    derived = derived_of(8)
    assert entry["blocks"] == {**derived, "BLOCK_K": 64}
    assert (entry["archs"], entry["bits"]) == (["interpreter"], [32])
    assert (entry["min_rows"], entry["max_rows"]) == (5, 40)  # of the derived entry
    origin = entry["origin"]
    assert set(origin) - {"commit"} == set(schedule_files.ORIGIN) - {"commit"}
    assert origin["median_us"] == {"plain 8 x 32, adapters 3 x 96, float32": 50.0}
    assert origin["derived_us"] == {"plain 8 x 32, adapters 3 x 96, float32": 100.0}
    assert seen[0][0] == derived  # in the same rounds as the others
    assert found.timed == sum(map(len, seen)) > 10
    assert found.dropped == found.unreached == found.failed == () and found.untried == 0


@kernel_free
def test_no_change_for_a_tie(made_up_calls):
    timer, _ = as_time(lambda blocks: 99.0 if blocks["BLOCK_K"] == 64 else 100.0)
    (entry,) = two_launches_of(tune([case(sizes=WIDE)], timer))
    assert entry["blocks"] == derived_of(8)
    assert entry["origin"]["median_us"] == entry["origin"]["derived_us"]


@kernel_free
def test_all_calls_of_a_schedule_count(made_up_calls):
    """What is best for one call and far worse for another does not win."""
    first, second = case(sizes=WIDE), case(sizes=(100,) * 4)
    times = {16: {3: 10.0, 4: 900.0}, 64: {3: 60.0, 4: 60.0}}  # by BLOCK_K and adapters

    def timer(calls):
        found = {}
        for name, call in calls.items():
            by_adapters = times.get(json.loads(name).get("BLOCK_K"), {})
            found[name] = by_adapters.get(call()["p"].shape[1], 100.0)
        return found

    (entry,) = two_launches_of(tune([first, second], timer))
    assert entry["blocks"] == {**derived_of(8), "BLOCK_K": 64}
    assert entry["origin"]["median_us"] == {str(first): 60.0, str(second): 60.0}
    assert entry["origin"]["derived_us"] == {str(first): 100.0, str(second): 100.0}


def raising(error):
    def act(results):
        raise error

    return act


def spilling(spills):
    def act(results):
        tiles.launch(Kernel(spills), 1, {"x": results["out"]})
        return results

    return act


def not_a_number(results):
    return {**results, "out": results["out"] * math.nan}


@kernel_free
@pytest.mark.parametrize(
    "act, reason",
    [
        (lambda results: {**results, "out": results["out"] + 1e-3}, "out is wrong: error 1.0e-03"),
        (lambda results: {**results, "p": results["p"].flip(1)}, "p is wrong: error"),
        (not_a_number, "out is wrong: error nan, allowed"),
        (raising(OutOfResources(300_000, 232_448, "shared memory")), "Required: 300000"),
        (raising(RuntimeError("notes\nPassManager::run failed")), "PassManager::run failed"),
        (spilling(12), "12 registers spilled"),
    ],
)
def test_what_is_wrong_is_dropped_and_reported(act, reason, made_up_calls):
    made_up_calls["BLOCK_K", 64] = act
    timer, seen = as_time(lambda blocks: 1.0 if blocks["BLOCK_K"] == 64 else 100.0)
    found = tune([case(sizes=WIDE)], timer)
    assert not any(blocks.get("BLOCK_K") == 64 for blocks in seen[0])
    (entry,) = two_launches_of(found)
    assert entry["blocks"] == derived_of(8)
    dropped = [drop for drop in found.dropped if drop.unit.startswith("two_launches,")]
    assert dropped and all(drop.blocks["BLOCK_K"] == 64 for drop in dropped)
    assert all(reason in drop.reason for drop in dropped)
    assert dropped[0].reason.startswith("plain 8 x 32, adapters 3 x 96, float32: ")


@kernel_free
def test_other_errors_are_not_swallowed(made_up_calls):
    made_up_calls["BLOCK_K", 64] = raising(TypeError("a mistake of ours"))
    timer, _ = as_time(lambda blocks: 1.0)
    with pytest.raises(TypeError, match="a mistake of ours"):
        tune([case(sizes=WIDE)], timer)
    assert schedules.table() == schedules.loaded().entries


@kernel_free
def test_derived_blocks_that_fail_are_replaced(made_up_calls):
    derived = derived_of(8)
    made_up_calls["BLOCK_K", derived["BLOCK_K"]] = raising(RuntimeError("no"))
    timer, _ = as_time(lambda blocks: 1.0)
    (entry,) = two_launches_of(tune([case(sizes=WIDE)], timer))
    assert entry["blocks"]["BLOCK_K"] != derived["BLOCK_K"]
    assert entry["origin"]["derived_us"] == {}


@kernel_free
def test_nothing_right_is_no_entry(made_up_calls):
    made_up_calls["SWAPPED", False] = made_up_calls["SWAPPED", True] = raising(RuntimeError("no"))
    timer, _ = as_time(lambda blocks: 1.0)
    found = tune([case(sizes=WIDE)], timer)
    assert two_launches_of(found) == []
    assert "two_launches, 32 bits, 8 rows" in found.failed


@kernel_free
def test_rows_are_shared_among_what_was_measured(made_up_calls):
    """7 and 30 rows have one derived entry, for 5 to 40; 100 rows have another."""
    timer, _ = as_time(lambda blocks: 1.0)
    found = tune([case(rows, WIDE) for rows in (30, 7, 100)], timer)
    limits = [(e.get("min_rows"), e.get("max_rows")) for e in two_launches_of(found)]
    assert sorted(limits) == [(5, 14), (15, 40), (41, None)]


@kernel_free
@pytest.mark.parametrize("one_launch_us, border", [(50.0, 208), (200.0, 47)])
def test_the_border_is_moved(one_launch_us, border, made_up_calls):
    """Where one launch is slower than two, the border falls below the call that was timed."""
    narrow = case(rows=50)
    assert narrow.width == 48

    def is_one_launch(blocks):
        return blocks.get("max_columns", 0) >= narrow.width

    timer, _ = as_time(lambda blocks: one_launch_us if is_one_launch(blocks) else 100.0)
    (entry,) = tune([narrow], timer).entries
    assert entry["schedules"] == ["one_launch"]
    assert entry["blocks"] == {**derived_of(50, "one_launch"), "max_columns": border}


@kernel_free
def test_what_is_asked_last_is_tuned_first_and_then_in_use(made_up_calls):
    order, in_use = [], []

    def timer(calls):
        order.append("one_launch" if "max_columns" in next(iter(calls)) else "two_launches")
        in_use.append(derived_of(8))
        return {name: 1.0 if json.loads(name).get("BLOCK_K") == 64 else 9.0 for name in calls}

    tune([case(sizes=WIDE)], timer)
    assert order == ["two_launches", "one_launch"]
    assert in_use[0]["BLOCK_K"] == 32 and in_use[1]["BLOCK_K"] == 64
    assert schedules.table() == schedules.loaded().entries


@kernel_free
def test_the_time_is_kept(made_up_calls):
    """A clock that goes on by a second whenever it is looked at, and four units in 30 seconds."""
    seconds = iter(range(1000))
    timer, seen = as_time(lambda blocks: 1.0)
    cases = [case(rows, WIDE) for rows in (8, 100)]
    found = tune(cases, timer, minutes=0.5, clock=lambda: float(next(seconds)))
    assert next(seconds) <= 34
    assert found.timed + found.untried > 60 and 8 < found.timed < 30
    # the derived blocks are always among what is timed
    assert [blocks[0] for blocks in seen[:2]] == [derived_of(8), derived_of(100)]
    assert found.unreached == ()


@kernel_free
def test_what_the_time_does_not_reach_is_reported(made_up_calls):
    """A clock that goes on by 20 seconds: two units have begun after 30."""
    seconds = iter(range(0, 100_000, 20))
    timer, _ = as_time(lambda blocks: 1.0)
    cases = [case(rows, WIDE) for rows in (8, 100)]
    found = tune(cases, timer, minutes=0.5, clock=lambda: float(next(seconds)))
    assert [e["schedules"] for e in found.entries] == [["two_launches"]]
    assert found.unreached == (
        "two_launches, 32 bits, 100 rows",
        "one_launch, 32 bits, 8 rows",
        "one_launch, 32 bits, 100 rows",
    )


# --------------------------------------------------------------------------------------------------
# compiling ahead


class InThisProcess:
    """In place of `Processes`: each call is made here, up to so many of one `run`."""

    def __init__(self, most=math.inf, around=contextlib.nullcontext):
        self.most = most
        self.around = around

    def run(self, function, work, until):
        for count, arguments in enumerate(work):
            if count == self.most:
                return count
            with self.around():
                function(*arguments)
        return len(work)


@kernel_free
def test_processes_take_what_the_time_allows(tmp_path):
    def folders(name):
        return [(str(tmp_path / f"{name}{i}"),) for i in range(5)]

    seconds = iter(range(100))
    with Processes(2, clock=lambda: next(seconds)) as two:
        assert two.run(os.mkdir, [], 0) == 0
        assert two.run(os.mkdir, folders("all"), math.inf) == 5
        assert two.run(os.mkdir, folders("one"), -1) == 1
        until = next(seconds) + 2
        assert two.run(os.mkdir, folders("some"), until) == 3
        assert {path.name for path in tmp_path.iterdir()} == {
            *(f"all{i}" for i in range(5)), "one0", "some0", "some1", "some2",
        }  # fmt: skip
        with pytest.raises(FileExistsError):
            two.run(os.mkdir, folders("one"), math.inf)


@kernel_free
@pytest.mark.parametrize("op", ["plain", "norm", "query", "backward"])
def test_whatever_is_tried_has_been_compiled_ahead(op, monkeypatch, poisoned_empty):
    """For sm_90, by what Triton would compile; nothing is launched, so nothing is right."""
    from launches import TARGETS as GPU_TARGETS
    from launches import identity, recording

    from fastfusion.kernels.triton import backend

    monkeypatch.setattr(backend, "refusal", lambda x, weights: None)
    were_ahead = []
    with recording(GPU_TARGETS["sm_90"]) as launches:

        @contextlib.contextmanager
        def apart():
            were_ahead.extend([False] * (len(launches) - len(were_ahead)))
            yield
            were_ahead.extend([True] * (len(launches) - len(were_ahead)))

        wide = case(rows=64, sizes=(48,) * 8, op=op, dtype=torch.bfloat16, hidden=64)
        found = tune([wide], None, compilers=InThisProcess(around=apart))
    assert len(found.dropped) > 20 and found.untried == 0
    compiled, tried = set(), set()
    for launch, was_ahead in itertools.zip_longest(launches, were_ahead, fillvalue=False):
        (compiled if was_ahead else tried).add(identity(launch))
        assert tried <= compiled
    assert len(tried) > 20


@kernel_free
def test_what_is_not_compiled_in_time_is_not_tried(made_up_calls):
    timer, seen = as_time(lambda blocks: 1.0)
    every = tune([case(sizes=WIDE)], timer).timed
    found = tune([case(sizes=WIDE)], timer, compilers=InThisProcess(most=3))
    assert [len(names) for names in seen[2:]] == [3, 3]
    assert (found.timed, found.untried) == (6, every - 6)
    assert seen[2][0] == derived_of(8)


@kernel_free
@pytest.mark.parametrize("minutes, cases", [(0.0, [case()]), (math.nan, [case()]), (1.0, [])])
def test_what_cannot_be_tuned(minutes, cases):
    with pytest.raises(ValueError, match="minutes|cases"):
        tune(cases, None, minutes)


@kernel_free
@pytest.mark.parametrize(
    "given, name",
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_rows": [16, 0]}, "num_rows"),
        ({"sizes": [[]]}, "sizes"),
        ({"sizes": [[48, -1]]}, "sizes"),
        ({"dtypes": [torch.float64]}, "dtypes"),
        ({"ops": ["conv"]}, "ops"),
    ],
)
def test_cases_that_there_are_not(given, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*; got "):
        tuning_cases.cases(**given)


@kernel_free
def test_a_written_table_is_used(made_up_calls, tmp_path):
    timer, _ = as_time(lambda blocks: 50.0 if blocks.get("BLOCK_K") == 64 else 100.0)
    found = tune([case(rows, WIDE) for rows in (7, 30)], timer)
    path = tmp_path / "tuned.json"
    schedule_files.write(path, schedule_files.refreshed(schedules.loaded(), found.entries))
    program = (
        "import torch; from fastfusion.kernels.triton.schedules import schedule, table;"
        "print([schedule('two_launches', torch.float32, None, n)['BLOCK_K'] for n in (4, 5, 40, 41)"
        "], len(table()))"
    )
    environment = {**os.environ, schedules.ENVIRONMENT_VARIABLE: str(path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    count = len(schedules.table()) + len(found.entries)
    assert run.stdout == f"[32, 64, 64, 32] {count}\n"


# --------------------------------------------------------------------------------------------------
# the real calls


@interpreted
@pytest.mark.parametrize(
    "op, names",
    [
        ("plain", ["one_launch", "two_launches"]),
        ("query", ["one_launch", "two_launches_general"]),
        ("groups", ["one_launch", "two_launches_general"]),
        ("norm", ["one_launch_norm", "two_launches_norm"]),
        ("backward", [f"backward_{part}" for part in ("columns", "scores", "input", "weights")]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_calls_ask_for_their_schedules_and_are_right(op, names, dtype):
    wide = case(rows=37, sizes=WIDE, op=op, dtype=dtype, hidden=48)
    assert [unit.name for unit in tuning.units_of([wide], CPU)] == names[::-1]
    call = tuning_cases.call_of(wide, CPU)
    expected = tuning_cases.expected_of(wide, call)
    results = call("triton", dtype)
    assert expected.fault(results) is None
    # the rule sees an error of a few roundings in a single number
    for name, result in results.items():
        wrong = result.clone()
        wrong.view(-1)[3] += 4 * expected.allowed[name]
        assert expected.allowed[name] < 64 * torch.finfo(dtype).eps * result.abs().max()
        assert f"{name} is wrong" in expected.fault({**results, name: wrong})


@interpreted
def test_real_candidates_are_right():
    """Every candidate of a unit computes the same function."""
    timer, seen = as_time(lambda blocks: 20.0 if blocks.get("BLOCK_H") == 32 else 30.0)
    found = tune([case(rows=6, sizes=(20, 13), op="norm", dtype=torch.bfloat16, hidden=40)], timer)
    assert found.dropped == () and found.failed == ()
    (entry,) = found.entries
    assert entry["schedules"] == ["one_launch_norm"] and entry["blocks"]["BLOCK_H"] == 32
    # one launch and two
    assert {blocks["max_columns"] >= 80 for blocks in seen[0]} == {True, False}


@interpreted
def test_real_candidates_of_the_backward_are_right():
    """Of launches that share row blocks each keeps them, so that no call meets a mixture."""
    timer, seen = as_time(lambda blocks: 20.0 if blocks.get("BLOCK_K") == 64 else 30.0)
    backward = case(rows=6, sizes=(5, 13), op="backward", dtype=torch.bfloat16, hidden=24)
    found = tune([backward], timer)
    assert found.dropped == () and found.failed == ()
    assert {name for e in found.entries for name in e["schedules"]} == {
        name for name in schedule_files.BLOCKS if name.startswith("backward_")
    }
    assert {blocks["BLOCK_T"] for unit in seen for blocks in unit if "BLOCK_T" in blocks} == {32}


@interpreted
def test_row_blocks_that_differ_are_refused():
    backward = case(rows=40, sizes=(20, 13), op="backward")
    blocks = {**derived_of(40, "backward_scores"), "BLOCK_T": 16}
    call = tuning_cases.call_of(backward, CPU)
    with (
        schedules.first(entry("backward_scores", blocks, "interpreter", 32)),
        pytest.raises(ValueError, match="expected one BLOCK_T for 40 rows; got .*'backward_sc"),
    ):
        call("triton", torch.float32)


@pytest.mark.gpu
def test_on_a_gpu():
    from fastfusion.kernels.triton.device_timer import DeviceTimer

    device = torch.device("cuda", torch.cuda.current_device())
    cases = tuning_cases.cases(256, [(32, 32)], [512], [torch.bfloat16])
    found = tuning.tune(cases, device, DeviceTimer(device, rounds=5), minutes=1.0)
    assert found.entries and found.failed == ()
    for measured in found.entries:
        schedule_files.check(measured, "measured")
        assert all(time_us > 0 for time_us in measured["origin"]["median_us"].values())


# --------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def command(monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fastfusion.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})

    return run


@kernel_free
def test_the_schedules_of_a_named_target(command):
    result = command("schedules", "--arch", "sm_90")
    assert result.exit_code == 0
    blocks = schedules.schedule("two_launches", torch.bfloat16, SM_90, 4096)
    told = " ".join(f"{name}={value}" for name, value in blocks.items())
    assert f"  two_launches, 16 bits, 4096.. rows: {told} (derived)\n" in result.output
    assert "gfx" not in result.output


@kernel_free
def test_where_to_write_has_to_be_said(command, tmp_path):
    there = tmp_path / "there.json"
    there.write_text("mine")
    for arguments, message in [
        ([], "neither"),
        (["--output", tmp_path / "new.json", "--in-place"], "both"),
        (["--output", there], "nothing is overwritten"),
        (["--output", tmp_path / "no" / "new.json"], "no directory"),
    ]:
        result = command("tune", *map(str, arguments))
        assert result.exit_code == 2 and message in result.output
    assert list(tmp_path.iterdir()) == [there] and there.read_text() == "mine"


@kernel_free
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_tuning_needs_a_gpu(command, tmp_path):
    result = command("tune", "--output", str(tmp_path / "new.json"))
    assert result.exit_code == 1
    assert "tuning needs a GPU: PyTorch finds none" in result.output
    assert list(tmp_path.iterdir()) == []


@kernel_free
def test_typer_is_asked_for():
    program = "import sys; sys.modules['typer'] = None; import fastfusion.cli"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1 and "pip install 'fastfusion[cli]'" in run.stderr
    assert "Traceback" not in run.stderr
