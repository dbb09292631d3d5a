"""The routing ops against plain Python and PyTorch, with the extension and without it.

pytest tests/test_routing.py            # CPU
pytest -m gpu tests/test_routing.py     # CUDA
"""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastfusion.ops import RoutingTables, gather_rows, routing, routing_tables, scatter_rows

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# `torch` calls the PyTorch implementation directly, the others what the dispatcher chooses
PROVIDERS = ["torch", "cpp", pytest.param("cuda", marks=pytest.mark.gpu)]


def device_of(provider: str) -> str:
    return "cuda" if provider == "cuda" else "cpu"


def tables_by(provider: str, ids, num_groups, block_rows) -> RoutingTables:
    if provider == "torch":
        return RoutingTables(*routing._tables(ids, num_groups, block_rows))
    return routing_tables(ids, num_groups, block_rows)


def rows_by(provider: str):
    return (
        (routing._gather, routing._scatter) if provider == "torch" else (gather_rows, scatter_rows)
    )


def expected_tables(ids: list[int], num_groups: int, block_rows: int) -> RoutingTables:
    """The definition: row by row, group by group."""
    order, offsets, blocks = [], [], []
    for group in [*range(num_groups), -1]:
        offsets.append(len(order))
        own = [row for row, other in enumerate(ids) if other == group]
        for start in range(0, len(own), block_rows):
            blocks.append((group, len(order) + start, min(block_rows, len(own) - start)))
        order += own
    offsets.append(len(order))
    used = min(len(ids), num_groups + 1)
    unused = used + (len(ids) - used) // block_rows - len(blocks)
    assert unused >= 0
    blocks += [(-1, 0, 0)] * unused
    as_ints = [torch.tensor(table, dtype=torch.int32) for table in (order, offsets, blocks)]
    return RoutingTables(as_ints[0], as_ints[1], as_ints[2].view(-1, 3))


def assert_same(actual: RoutingTables, expected: RoutingTables) -> None:
    for name, a, b in zip(RoutingTables._fields, actual, expected, strict=True):
        torch.testing.assert_close(
            a.cpu(), b.cpu(), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# rows, groups, rows in a block
SIZES = {
    "no-rows": (0, 3, 4),
    "no-rows-no-groups": (0, 0, 1),
    "no-groups": (5, 0, 2),
    "one-row": (1, 3, 16),
    "one-group": (37, 1, 16),
    "blocks-of-one": (23, 4, 1),
    "even": (64, 4, 16),
    "odd": (257, 7, 13),
    "more-groups-than-rows": (9, 300, 4),
    "block-larger-than-rows": (33, 3, 1000),
    "many": (3000, 97, 64),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", SIZES)
def test_tables(name, dtype, provider):
    rows, groups, block_rows = SIZES[name]
    mixed = torch.randint(-1, groups, (rows,), dtype=dtype)
    for ids in (
        mixed,
        mixed.clamp(min=min(groups - 1, 0)),
        mixed.clamp(max=-1),
        mixed.sort().values,
    ):
        expected = expected_tables(ids.tolist(), groups, block_rows)
        actual = tables_by(provider, ids.to(device_of(provider)), groups, block_rows)
        assert_same(actual, expected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_large(provider):
    """Many rows and groups, skewed: half of the rows in one group, most groups empty."""
    rows, groups, block_rows = 65_536, 1000, 128
    ids = torch.randint(-1, groups, (rows,))
    ids[::2] = 500
    ids[ids % 3 == 1] = -1
    order = torch.sort(torch.where(ids < 0, groups, ids), stable=True).indices
    counts = torch.bincount(ids + 1, minlength=groups + 1).roll(-1)
    actual = tables_by(provider, ids.to(device_of(provider)), groups, block_rows)
    assert torch.equal(actual.order.cpu().long(), order)
    assert torch.equal(actual.offsets.cpu()[1:].long(), counts.cumsum(0))
    group, first, size = actual.blocks.cpu().long().unbind(1)
    used = size > 0
    assert torch.equal(used, used.sort(descending=True).values)
    assert torch.equal(first[used], size.cumsum(0)[used] - size[used])
    assert size.sum() == rows and size.max() <= block_rows
    assert torch.equal(ids[order][first[used]], group[used])
    assert used.sum() == (-(-counts // block_rows)).sum()


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("block_rows", [1, 2, 5])
def test_the_bound_is_tight(rows, block_rows):
    """Some routing fills every block: all bins but one have a single row."""
    groups = 3
    ids = torch.tensor([min(row, groups) for row in range(rows)], dtype=torch.int64)
    ids[ids == groups] = -1
    blocks = routing_tables(ids, groups, block_rows).blocks
    assert len(blocks) == routing.max_blocks(rows, groups, block_rows)
    assert (blocks[:, 2] > 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strided_ids(provider):
    ids = torch.randint(-1, 5, (40, 2), device=device_of(provider))[:, 1]
    assert_same(tables_by(provider, ids, 5, 4), tables_by(provider, ids.clone(), 5, 4))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_same_bits_again(provider):
    ids = torch.randint(-1, 50, (10_000,), device=device_of(provider))
    first = tables_by(provider, ids, 50, 32)
    for _ in range(3):
        assert_same(tables_by(provider, ids, 50, 32), first)


@pytest.mark.gpu
def test_ids_outside_touch_no_other_memory():
    """On a GPU ids are clamped to [-1, G), whatever they are."""
    ids = torch.randint(-(2**62), 2**62, (5000,), device="cuda")
    assert_same(routing_tables(ids, 9, 16), routing_tables(ids.clamp(-1, 8), 9, 16))
    assert_same(routing_tables(ids, 0, 16), routing_tables(ids.clamp(-1, -1), 0, 16))


# --------------------------------------------------------------------------------------------------
# rows


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
SHAPES = [(0, 5), (1, 5), (37,), (37, 1), (37, 5), (37, 3, 8), (37, 0)]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(shape, dtype, provider):
    gather, back = rows_by(provider)
    x = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
    order = torch.randperm(shape[0], dtype=torch.int32)
    expected = torch.empty(shape, dtype=dtype)
    for i, row in enumerate(order.tolist()):
        expected[i] = x[row]
    x, order, expected = (t.to(device_of(provider)) for t in (x, order, expected))
    gathered = gather(x, order)
    assert gathered.is_contiguous() and torch.equal(gathered, expected)
    assert torch.equal(back(gathered, order), x)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(4000, 96), (5, 70_001), (70_000, 3)], ids=str)
def test_many_rows_and_long_ones(shape, offset, provider):
    """More than one thread's share; `offset` moves the rows off 16-byte addresses."""
    gather, back = rows_by(provider)
    storage = torch.randn(shape[0] * shape[1] + offset, device=device_of(provider)).bfloat16()
    x = storage[offset:].view(shape)
    order = torch.randperm(shape[0], device=x.device).int()
    gathered = gather(x, order)
    assert torch.equal(gathered, x[order.long()])
    assert torch.equal(back(gathered, order), x)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_non_contiguous_rows(provider):
    gather, back = rows_by(provider)
    x = torch.randn(6, 9, 4, device=device_of(provider)).transpose(0, 1)
    order = torch.randperm(18, device=x.device).int()[::2].argsort().int()
    assert torch.equal(gather(x, order), x[order.long()])
    assert torch.equal(back(gather(x, order), order), x)


@pytest.mark.parametrize("provider", ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", [gather_rows, scatter_rows])
def test_gradcheck(op, provider):
    x = torch.randn(7, 3, dtype=torch.float64, device=device_of(provider), requires_grad=True)
    order = torch.randperm(7, device=x.device).int()
    assert torch.autograd.gradcheck(lambda t: op(t, order), x)
    assert torch.autograd.gradgradcheck(lambda t: op(t, order), x)
    op(x, order).sum().backward()  # the gradient that comes in is an expanded tensor
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_there_and_back(provider):
    """What routing is for: a function of rows by group gives what it gives row by row."""
    device = device_of(provider)
    gather, back = rows_by(provider)
    ids = torch.randint(-1, 4, (50,), device=device)
    weights = torch.randn(4, 6, 6, device=device)
    x = torch.randn(50, 6, device=device)
    order, _, blocks = tables_by(provider, ids, 4, 8)
    rows = gather(x, order)
    for group, first, size in blocks.tolist():
        if group >= 0:
            rows[first : first + size] = rows[first : first + size] @ weights[group]
    expected = torch.where(
        ids[:, None] < 0, x, torch.einsum("rh,rho->ro", x, weights[ids.clamp(min=0)])
    )
    torch.testing.assert_close(back(rows, order), expected)


# --------------------------------------------------------------------------------------------------
# PyTorch's machinery


@pytest.mark.parametrize("provider", ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_compile(provider):
    device = device_of(provider)
    ids = torch.randint(-1, 5, (30,), device=device)
    torch.library.opcheck(torch.ops.fastfusion.routing_tables.default, (ids, 5, 4))
    torch.library.opcheck(torch.ops.fastfusion.routing_tables.default, (ids.int(), 40, 1))
    order = routing_tables(ids, 5, 4).order
    for op in (torch.ops.fastfusion.gather_rows, torch.ops.fastfusion.scatter_rows):
        for x in (torch.randn(30, 4, device=device, requires_grad=True), ids):
            torch.library.opcheck(op.default, (x, order))


@pytest.mark.parametrize("provider", ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, provider):
    """One graph serves every routing, and every number of rows."""

    def run(x, ids):
        order, offsets, blocks = routing_tables(ids, 6, 8)
        return scatter_rows(gather_rows(x, order).tanh(), order), blocks, offsets

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for rows in (40, 40, 33, 3):
        x = torch.randn(rows, 5, device=device_of(provider), requires_grad=True)
        ids = torch.randint(-1, 6, (rows,), device=x.device)
        out, blocks, offsets = compiled(x, ids)
        assert_same(
            RoutingTables(*routing_tables(ids, 6, 8)[:1], offsets, blocks),
            routing_tables(ids, 6, 8),
        )
        torch.testing.assert_close(out, x.tanh())
        out.sum().backward()
        torch.testing.assert_close(x.grad, 1 - x.detach().tanh() ** 2)
    # fewer rows than groups have another bound of the blocks
    assert counter.frame_count <= 2


@pytest.mark.gpu
def test_cuda_graph():
    """The tables are recomputed by every replay, from the ids that are there then."""
    x, ids = torch.randn(300, 8, device="cuda"), torch.randint(-1, 7, (300,), device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables = routing_tables(ids, 7, 16)
        out = gather_rows(x, tables.order)
    for _ in range(2):
        ids.copy_(torch.randint(-1, 7, (300,), device="cuda"))
        graph.replay()
        expected = routing_tables(ids, 7, 16)
        assert_same(tables, expected)
        assert torch.equal(out, x[expected.order.long()])


def test_meta_shapes():
    ids = torch.empty(70, dtype=torch.int64, device="meta")
    order, offsets, blocks = routing_tables(ids, 5, 16)
    assert (order.shape, offsets.shape, blocks.shape) == ((70,), (7,), (10, 3))
    assert {t.dtype for t in (order, offsets, blocks)} == {torch.int32}
    assert gather_rows(torch.empty(70, 4, device="meta"), order).shape == (70, 4)


def test_the_extension_serves_the_cpu():
    for name in ("routing_tables", "gather_rows", "scatter_rows"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastfusion::{name}", "CPU")


def test_without_the_extension():
    """PyTorch serves: the ops are there, and so are their gradients."""
    code = """
import sys
sys.modules["fastfusion._C"] = None
import torch
from fastfusion.ops import gather_rows, routing_tables
assert not torch._C._dispatch_has_kernel_for_dispatch_key("fastfusion::gather_rows", "CPU")
order, offsets, blocks = routing_tables(torch.tensor([1, -1, 0, 1]), 2, 4)
assert order.tolist() == [2, 0, 3, 1], order
assert offsets.tolist() == [0, 1, 3, 4], offsets
assert blocks.tolist() == [[0, 0, 1], [1, 1, 2], [-1, 3, 1]], blocks
x = torch.randn(4, 3, requires_grad=True)
torch.library.opcheck(torch.ops.fastfusion.gather_rows.default, (x, order))
torch.library.opcheck(torch.ops.fastfusion.scatter_rows.default, (x, order))
gather_rows(x, order)[0].sum().backward()
assert x.grad.sum(1).tolist() == [0, 0, 3, 0], x.grad
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_do_not_change_a_bit(set_threads):
    x = torch.randn(5000, 100)
    order = torch.randperm(5000).int()
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append((gather_rows(x, order), scatter_rows(x, order)))
    for gathered, scattered in results[1:]:
        assert torch.equal(gathered, results[0][0]) and torch.equal(scattered, results[0][1])


# --------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("provider", ["torch", "cpp"])
@pytest.mark.parametrize("bad", [-2, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_an_id_outside_is_named(dtype, bad, provider):
    ids = torch.tensor([0, -1, bad, 2, bad], dtype=dtype)
    with pytest.raises(RuntimeError, match=rf"expected groups from -1 to 2; got {bad} in row 2"):
        tables_by(provider, ids, 3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 2, dtype=torch.int64), 1, 1), r"ids: expected one dimension.*\[2, 2\]"),
        ((torch.zeros(2), 1, 1), r"ids: expected .* int32 or int64; got .*float32"),
        ((torch.zeros(2, dtype=torch.int64), -1, 1), "num_groups: expected 0 or more; got -1"),
        ((torch.zeros(2, dtype=torch.int64), 1, 0), "block_rows: expected 1 or more; got 0"),
    ],
)
def test_table_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        routing_tables(*arguments)
    with pytest.raises(RuntimeError, match=message.split(";")[0].split(".*")[0]):
        torch.ops.fastfusion.routing_tables(*arguments)


@pytest.mark.parametrize("op", [gather_rows, scatter_rows])
@pytest.mark.parametrize(
    "order", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)], ids=str
)
def test_order_errors(order, op):
    with pytest.raises(ValueError, match=r"order: expected .* per row of x \[3, 4\]"):
        op(torch.zeros(3, 4), order)
    with pytest.raises(RuntimeError, match="order: expected int32 and one entry per row"):
        getattr(torch.ops.fastfusion, op.__name__)(torch.zeros(3, 4), order)


@pytest.mark.parametrize("provider", ["torch", "cpp"])
@pytest.mark.parametrize("bad", [-1, 3])
def test_a_row_number_outside_is_named(bad, provider):
    order = torch.tensor([0, 1, bad], dtype=torch.int32)
    for op in rows_by(provider):
        with pytest.raises(RuntimeError, match=f"row numbers from 0 to 2; got {bad}"):
            op(torch.zeros(3, 4), order)


@pytest.mark.gpu
def test_row_numbers_outside_touch_no_other_memory():
    order = torch.tensor([-(2**31), 0, 2**31 - 1, 1], dtype=torch.int32, device="cuda")
    x = torch.arange(4.0, device="cuda")
    assert gather_rows(x, order).tolist() == [0, 0, 3, 1]
    scatter_rows(x, order)
    torch.cuda.synchronize()


def test_group_and_block_sizes_that_would_overflow():
    ids = torch.tensor([0, 1, 0])
    assert_same(routing_tables(ids, 2, 2**63 - 1), routing_tables(ids, 2, 3))
    assert_same(tables_by("torch", ids, 2, 2**63 - 1), routing_tables(ids, 2, 3))
    with pytest.raises(RuntimeError, match="num_groups"):
        torch.ops.fastfusion.routing_tables(ids, 2**31, 4)
