"""Routing: tables from the rows' groups, and rows moved into that order and back.

    python benchmarks/bench_routing.py --threads 1
    pytest benchmarks/bench_routing.py --benchmark-only

`plain` is `torch.sort(stable=True)`, `bincount` and `cumsum`, which make no block table, and
`index_select`; `torch` is the implementation that serves where the extension is not built. One row
in ten is a base row. Medians and quartiles of interleaved rounds; ratios are medians of the rounds'
own ratios. Outputs agree exactly, or the run stops.
"""

from collections.abc import Callable

import measure
import pytest
import torch

from fastfusion.ops import gather_rows, routing, routing_tables, scatter_rows

BLOCK_ROWS = 128
# rows, groups, numbers in a row: tokens to many groups, and whole sequences to few
SHAPES = {
    "R=65536 G=1000": (65_536, 1000, 48),
    "R=4096 G=16": (4096, 16, 768),
    "R=32 G=8": (32, 8, 128 * 768),
}
MODES = ("tables", "gather", "scatter", "tables+gather+scatter")


def plain_tables(ids: torch.Tensor, groups: int, block_rows: int) -> tuple[torch.Tensor, ...]:
    """order and the groups' ends as one writes them down."""
    bins = torch.where(ids < 0, groups, ids)
    counts = torch.bincount(bins, minlength=groups + 1)
    return torch.sort(bins, stable=True).indices, counts.cumsum(0)


def plain_gather(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, order)


def plain_scatter(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).index_copy_(0, order, x)


PROVIDERS = {
    "plain": (plain_tables, plain_gather, plain_scatter),
    "torch": (routing._tables, routing._gather, routing._scatter),
    "cpp": (routing_tables, gather_rows, scatter_rows),
}


def setup(shape: str, provider: str, mode: str) -> Callable[[], torch.Tensor]:
    """A call to time. Its result is comparable between providers."""
    rows, groups, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, groups, (rows,), generator=generator)
    ids[torch.rand(rows, generator=generator) < 0.1] = -1
    x = torch.randn(rows, width, generator=generator)
    tables, gather, scatter = PROVIDERS[provider]
    order = tables(ids, groups, BLOCK_ROWS)[0]

    def everything() -> torch.Tensor:
        order = tables(ids, groups, BLOCK_ROWS)[0]
        return scatter(gather(x, order), order)

    return {
        "tables": lambda: tables(ids, groups, BLOCK_ROWS)[0],
        "gather": lambda: gather(x, order),
        "scatter": lambda: scatter(x, order),
        "tables+gather+scatter": everything,
    }[mode]


def check_tables(shape: str) -> None:
    """The two implementations agree in all tables, and with what `plain` has of them."""
    rows, groups, _ = SHAPES[shape]
    ids = torch.randint(-1, groups, (rows,), generator=torch.Generator().manual_seed(1))
    ours = routing_tables(ids, groups, BLOCK_ROWS)
    for a, b in zip(ours, routing._tables(ids, groups, BLOCK_ROWS), strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"{shape}: tables differ")
    order, ends = plain_tables(ids, groups, BLOCK_ROWS)
    if not (torch.equal(ours.order, order.int()) and torch.equal(ours.offsets[1:], ends.int())):
        raise SystemExit(f"{shape}: tables differ from plain")


def compare(shape: str, mode: str, rounds: int) -> dict[str, dict]:
    """Interleaved rounds over all providers: times and ratios."""
    calls = {provider: setup(shape, provider, mode) for provider in PROVIDERS}
    expected = calls["plain"]()
    for provider, call in calls.items():
        if not torch.equal(call().to(expected.dtype), expected):
            raise SystemExit(f"{shape} {mode}: {provider} differs from plain")
    times_ms = measure.interleaved(calls, rounds)
    return {
        provider: {
            "ms": measure.quartiles(own),
            "over_plain": measure.ratios(own, times_ms["plain"]),
        }
        for provider, own in times_ms.items()
    }


def main() -> None:
    arguments = measure.parser(__doc__.splitlines()[0], "routing", rounds=50).parse_args()
    record = measure.start(arguments)
    for shape in SHAPES:
        check_tables(shape)
        for mode in MODES:
            results = compare(shape, mode, arguments.rounds)
            print(f"\n{shape}, {mode}: median ms [quartiles], over plain")
            for provider, result in results.items():
                low, middle, high = result["ms"]
                ratio = result["over_plain"][1]
                print(f"  {provider:8s}{middle:10.3f} [{low:.3f}, {high:.3f}]  {ratio:6.2f}x")
            measure.append(arguments.json, {**record, "results": {f"{shape} {mode}": results}})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_routing(benchmark, shape: str, mode: str, provider: str) -> None:
    benchmark.group = f"{shape} {mode}"
    benchmark(setup(shape, provider, mode))


if __name__ == "__main__":
    main()
