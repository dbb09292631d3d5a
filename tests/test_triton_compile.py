"""The Triton kernels compiled ahead of time, for GPUs that need not be there, and read back.

What is called: `compiled.NAMED`. What is expected of a binary: `binary.faults`.
"""

import functools
import re

import pytest

triton = pytest.importorskip("triton")

from binary import Product, Reading, faults, read, work  # noqa: E402
from compiled import BERT, GROUPS, NAMED, TABLE, WIDE, Entry, Table  # noqa: E402
from launches import Case, Launch, compiled, identity, recorded  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from fastfusion.kernels.triton.tiles import INTERPRETED  # noqa: E402

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(TABLE)


_readings: dict[str, Reading] = {}


def entry(launch: Launch) -> Entry:
    """The launch compiled; kernels that several cases share are read once."""
    kernel = compiled(launch)
    if kernel.hash not in _readings:
        _readings[kernel.hash] = read(kernel)
    reading = _readings[kernel.hash]
    return Entry(launch.kernel.__name__, reading, faults(kernel, reading))


@functools.cache
def kernels(case: Case) -> list[CompiledKernel]:
    return [compiled(launch) for launch in recorded(case)]


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
def test_named(case, table):
    """Nothing is wrong with the binaries, and they are those of docs/compiled.json."""
    found = [entry(launch) for launch in recorded(case)]
    assert found, "nothing was launched"
    assert [f"{one.kernel}: {fault}" for one in found for fault in one.faults] == []
    if table.triton == triton.__version__:
        assert found == table[case], "python benchmarks/compiled.py --named makes the table anew"


def test_as_many_as_there_is_time_for():
    assert len({identity(launch) for case in NAMED for launch in recorded(case)}) <= 120


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 spills"),
        ({"shared": 488 << 10}, "499712 bytes of shared memory of 232448"),
        ({"tensor_columns": 1024}, "1024 tensor columns"),
        ({"blocks": 0}, "not one block fits a multiprocessor"),
        ({"matrix": {"HMMA": 1000}}, "0 HGMMA instructions"),
        ({"matrix": {"HGMMA": 1}}, "1 HGMMA instructions"),
        ({"matrix": {"HGMMA": 1000, "tf32": 1}}, "tf32 where fp32"),
        ({"copies": 0}, "no asynchronous copy"),
        ({"stores": 1}, "1 stores of"),
    ],
)
def test_each_fault_is_seen(change, fault):
    (kernel,) = kernels(Case("sm_90", "plain", BERT))
    (seen,) = faults(kernel, read(kernel)._replace(**change))
    assert seen.startswith(fault)


def test_what_the_compiler_accepts():
    """More shared memory than there is, and spills."""
    (launch,) = recorded(Case("sm_90", "plain", BERT))
    deep = launch._replace(arguments=launch.arguments | {"BLOCK_K": 128, "num_stages": 4})
    wide = launch._replace(arguments=launch.arguments | {"BLOCK_T": 128, "num_warps": 4})
    assert any("shared memory of 232448" in fault for fault in entry(deep).faults)
    assert any("bytes of stack" in fault for fault in entry(wide).faults)


def test_products_of_the_code():
    """Of the kernel's own text and of the functions that it calls, one for each call."""
    (launch,) = recorded(Case("sm_90", "plain", ((128,),)))
    products = work(compiled(launch)).products
    rows, depth = launch.arguments["BLOCK_T"], launch.arguments["BLOCK_K"]
    # z and t; c; scores and weights, each in two parts; the output, from z and from p
    assert products.count(Product(rows, 128, depth, "bf16", "ieee")) == 2
    assert products.count(Product(rows, 16, 128, "bf16", "ieee")) == 2
    assert len(products) == 9


def shorts(kernel: CompiledKernel, kind: str) -> int:
    """Accesses to device memory of two bytes: "load" or "store"."""
    if "ptx" in kernel.asm:
        return len(re.findall(rf"\b{kind[:2]}\.global\S*\.b16\b", kernel.asm["ptx"]))
    return len(re.findall(rf"(?:global|buffer)_{kind}_u?short", kernel.asm["amdgcn"]))


@pytest.mark.parametrize("rows", [16384, 1024])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_z_moves_in_wide_accesses(target, rows):
    """z between two launches is written and read many elements at a time."""
    first, second = kernels(Case(target, "plain", WIDE, rows=rows))
    assert shorts(first, "store") == 0
    assert shorts(second, "load") == 0


# an offset in 32 bits would overflow in a tensor of 2**31 elements
@pytest.mark.parametrize("op, groups", [("plain", BERT), ("grouped", GROUPS), ("plain", WIDE)])
def test_offsets_of_rows_are_wide(op, groups):
    for kernel in kernels(Case("sm_90", op, groups)):
        assert re.search(r"arith\.muli .*tensor<\d+x1xi64>", kernel.asm["ttir"])
        assert not re.search(r"arith\.muli .*tensor<\d+x1xi32>", kernel.asm["ttir"])


@pytest.mark.parametrize("op, groups", [("plain", WIDE), ("grouped", GROUPS)])
def test_offsets_of_rows_are_wide_in_the_backward(op, groups):
    launches = recorded(Case("sm_90", op, groups, flags=frozenset({"backward"})))
    texts = {
        launch.kernel.__name__: compiled(launch).asm["ttir"]
        for launch in launches
        if launch.kernel.__name__.startswith("adapter_")
    }
    assert len(texts) == 4
    for text in texts.values():
        assert re.search(r"arith\.muli .*tensor<\d+x1xi64>", text)
        assert not re.search(r"arith\.muli .*tensor<\d+x1xi32>", text)


def test_backward_is_compiled_once_for_any_number_of_rows():
    """How many shares the sums over rows have depends on their number; the kernels do not."""
    found = {
        frozenset(map(identity, recorded(case)))
        for rows in (4099, 9000, 30000)
        if (case := Case("sm_90", "plain", WIDE, rows=rows, flags=frozenset({"backward"})))
    }
    assert len(found) == 1


def test_grouped_is_compiled_once_for_every_mixture():
    """Neither the number of rows (within a schedule) nor groups beside the widest are constants."""
    mixtures = [(((8, 8), (4,)), 4099), (((8, 8), (4,)), 9000), (((3, 9), (5,), (1,)), 8192)]
    found = {
        tuple(map(identity, recorded(Case("sm_90", "grouped", groups, hidden=64, rows=rows))))
        for groups, rows in mixtures
    }
    assert len(found) == 1


@pytest.mark.parametrize("rows", [1024, 16384])
def test_two_launches_are_compiled_once_for_any_number_of_rows(rows):
    """Of either schedule: a number that 16 divides is not special."""
    one, other = (
        [identity(launch) for launch in recorded(Case("sm_90", "plain", ((128,) * 2,), rows=n))]
        for n in (rows, rows + 1)
    )
    assert one == other
