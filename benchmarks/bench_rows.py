"""A setup for each row: at one place, and in a whole BERT against one adapter and `adapters`.

    python benchmarks/bench_rows.py
    pytest benchmarks/bench_rows.py --benchmark-only

B = 32 rows of S = 128 tokens, H = 768, seq_bn adapters of 48 columns, fp32, evaluation. One place:
the grouped op with 32 adapters, one for each row and shuffled, beside the op with one adapter for
all; and a mixture of 4 Fuse of 4 adapters, 4 single adapters and base rows beside the bare products
of its parts. The model has 4 layers of BERT-base's shape; `adapters` 1.3.0 (where it can be
imported) runs the same rows as a BatchSplit and as a MultiTask. `inactive`: one of 200 loaded
adapters is active, beside a model that has only that one. Before timing, outputs are compared: at
one place with the torch backend in fp64, group by group; of the model with the reference, each row
in a forward of its own; of 200 loaded adapters with one. `adapters`' MultiTask is not compared.

`add_adapter`: 200 adapters are added to a model that has one, not active or active. A round's time
is the median of some consecutive calls, over that of the first ones.

Medians of interleaved rounds with quartiles; ratios are medians of the rounds' own ratios.
"""

import copy
import statistics
import time
from collections.abc import Callable

import bench_model
import measure
import pytest
import torch
from models import adapters, bare_model, forward, on_backend, token_ids, with_adapters
from torch import nn

from fastfusion.ops import PackedWeights, adapter_fusion, adapter_fusion_grouped, stack
from fastfusion.ops.activations import activation_code

if adapters is not None:
    from adapters import composition as peer_composition

ROWS, LENGTH, HIDDEN, SIZE = 32, 128, 768, 48
LAYERS, LOADED = 4, 200
# calls of add_adapter, counted from 1
ADDS = {"1-20": range(1, 21), "90-110": range(90, 111), "181-200": range(181, 201)}
ERROR_LIMIT = 1e-4
TITLES = ("one place", "4 layers", "inactive", "add_adapter")

# what is timed, and the right outputs of what has some to compare, by name
Calls = tuple[dict[str, Callable], dict[str, torch.Tensor]]


def packed(count: int, is_scored: bool) -> PackedWeights:
    """A random mixture of `count` adapters."""
    columns, rows = count * SIZE, count * SIZE + count
    scale = HIDDEN**-0.5
    score = (
        (torch.randn(rows, HIDDEN) * scale * 0.3, torch.zeros(rows)) if is_scored else (None,) * 2
    )
    return PackedWeights(
        torch.randn(columns, HIDDEN) * scale,
        torch.zeros(columns),
        *score,
        torch.randn(rows, HIDDEN) * scale,
        None,
        [SIZE] * count,
        [activation_code("relu")] * count,
    )


def spread_over_tokens(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.repeat_interleave(LENGTH).int()


def group_by_group(
    x: torch.Tensor, groups: torch.Tensor, packs: list[PackedWeights]
) -> torch.Tensor:
    """The grouped op with `x` as the residual: every group's rows by themselves, in fp64."""
    x = x.double()
    out = x.clone()
    for number, pack in enumerate(packs):
        rows = groups == number
        exact = PackedWeights(*(t if t is None else t.double() for t in pack[:6]), *pack[6:])
        out[rows] = adapter_fusion([x[rows]], None, x[rows], exact, backend="torch")[0]
    return out


def place_calls() -> Calls:
    """One place."""
    torch.manual_seed(0)
    x = torch.randn(ROWS * LENGTH, HIDDEN)
    one, own = packed(1, False), [packed(1, False) for _ in range(ROWS)]
    many = stack(own)
    shuffled = spread_over_tokens(torch.randperm(ROWS))
    parts = [packed(4, True) for _ in range(4)] + [packed(1, False) for _ in range(4)]
    mixed, numbers = (
        stack(parts),
        spread_over_tokens(torch.arange(ROWS)[torch.randperm(ROWS)] % 9 - 1),
    )
    operands = []
    for i, part in enumerate(parts):
        w_in = part.w_down if part.w_score is None else torch.cat([part.w_down, part.w_score])
        rows = part.w_out.shape[0]
        operands.append((x[numbers == i], w_in.t(), torch.randn(1, rows), part.w_out))

    def products() -> list[torch.Tensor]:
        return [(x_i @ w_in, y.expand(len(x_i), -1) @ w_out) for x_i, w_in, y, w_out in operands]

    calls = {
        "one adapter": lambda: adapter_fusion([x], None, x, one)[0],
        "32 adapters": lambda: adapter_fusion_grouped(x, x, shuffled, many)[0],
        "mixture's products": products,
        "mixture": lambda: adapter_fusion_grouped(x, x, numbers, mixed)[0],
    }
    truths = {
        "one adapter": group_by_group(x, torch.zeros(len(x)), [one]),
        "32 adapters": group_by_group(x, shuffled, own),
        "mixture": group_by_group(x, numbers, parts),
    }
    return calls, truths


def row_by_row(model: nn.Module, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    """The reference, each row in a forward of its own with its adapter active."""
    literal, outputs = on_backend(model, "reference"), []
    for row, name in zip(ids.split(1), names, strict=True):
        literal.set_active_adapters(name)
        outputs.append(forward(literal, row)())
    return torch.cat(outputs)


def model_calls(bare: nn.Module) -> Calls:
    """The whole model."""
    ids = token_ids((ROWS, LENGTH))
    one, many = with_adapters(bare, 1), with_adapters(bare, ROWS)
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    names = [f"a{i}" for i in shuffled.tolist()]
    numbers = many.routing(names)

    def call(model: nn.Module, **kwargs) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return model(ids, **kwargs)[0]

        return run

    calls = {
        "bare": call(bare),
        "one adapter": call(one),
        "32 adapters by name": call(many, adapter_names=names),
        "32 adapters by number": call(many, adapter_ids=numbers),
    }
    if adapters is not None:
        children = [f"a{i}" for i in range(ROWS)]
        split, tasks = (peer(bare, many) for _ in range(2))
        split.set_active_adapters(peer_composition.BatchSplit(*names, batch_sizes=1))
        tasks.set_active_adapters(peer_composition.MultiTask(*children))
        calls["adapters BatchSplit"] = call(split)
        calls["adapters MultiTask"] = call(tasks, task_ids=shuffled)
    routed = row_by_row(many, ids, names)
    # adapters' MultiTask takes the pre step of seq_bn twice, residual and LayerNorm: other numbers
    others = ("bare", "one adapter", "adapters MultiTask")
    truths = {name: routed for name in calls if name not in others}
    return calls, truths | {"one adapter": row_by_row(one, ids, ["a0"] * ROWS)}


def peer(bare: nn.Module, model: nn.Module) -> nn.Module:
    """The same adapters in `adapters`."""
    other = copy.deepcopy(bare)
    adapters.init(other)
    for name in model.adapters_config.adapters:
        other.add_adapter(name, config="seq_bn")
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def inactive_calls(bare: nn.Module) -> Calls:
    ids = token_ids((8, LENGTH))
    models = {f"{n} loaded": with_adapters(bare, n) for n in (1, LOADED)}
    calls = {name: forward(model, ids) for name, model in models.items()}
    return calls, {f"{LOADED} loaded": calls["1 loaded"]()}


def add_times(bare: nn.Module, active: bool) -> list[float]:
    """The time in ms of each of the calls of `add_adapter`."""
    model = with_adapters(bare, 1)
    if not active:
        model.set_active_adapters(None)
    times_ms = []
    for i in range(LOADED):
        start = time.perf_counter()
        model.add_adapter(f"b{i}", "seq_bn")
        times_ms.append((time.perf_counter() - start) * 1e3)
    return times_ms


def compare_adds(bare: nn.Module, rounds: int) -> dict[str, dict]:
    """What an adapter costs to add, with few and with many there."""
    times_ms: dict[str, list[float]] = {}
    for _ in range(rounds):
        for kind, active in (("none active", False), ("one active", True)):
            own = add_times(bare, active)
            for title, calls in ADDS.items():
                median = statistics.median(own[i - 1] for i in calls)
                times_ms.setdefault(f"{kind}, {title}", []).append(median)
    results = {}
    for name, own in times_ms.items():
        base = f"{name.partition(',')[0]}, {next(iter(ADDS))}"
        over = measure.ratios(own, times_ms[base])
        results[name] = {"ms": measure.quartiles(own), "over_base": over, "base": base}
    return results


def compare(
    make_calls: Callable[[], Calls], base: str, bases: dict[str, str], rounds: int
) -> dict[str, dict]:
    """Times over those of `base`, or of the call that `bases` names instead."""
    calls, truths = make_calls()
    results: dict[str, dict] = {}
    with torch.no_grad():
        errors = {
            name: measure.relative_error(calls[name](), truth, limit=ERROR_LIMIT)
            for name, truth in truths.items()
        }
        times_ms = measure.interleaved(calls, rounds)
    for name, own in times_ms.items():
        own_base = bases.get(name, base)
        over = measure.ratios(own, times_ms[own_base])
        results[name] = {"ms": measure.quartiles(own), "over_base": over, "base": own_base}
        if name in errors:
            results[name]["relative_error"] = errors[name]
    return results


def main() -> None:
    options = measure.parser(__doc__.splitlines()[0], "rows", rounds=15)
    options.add_argument("--only", choices=TITLES)
    arguments = options.parse_args()
    record = measure.start(arguments)
    bare = bare_model(LAYERS)
    bases = {"mixture": "mixture's products", "mixture's products": "mixture's products"}
    rounds = arguments.rounds
    groups = {
        "one place": lambda: compare(place_calls, "one adapter", bases, rounds),
        "4 layers": lambda: compare(lambda: model_calls(bare), "one adapter", {}, rounds),
        "inactive": lambda: compare(lambda: inactive_calls(bare), "1 loaded", {}, rounds),
        "add_adapter": lambda: compare_adds(bare, rounds),
    }
    for title, run in groups.items():
        if arguments.only not in (None, title):
            continue
        results = run()
        measure.append(arguments.json, {**record, "results": {title: results}})
        bench_model.show(title, results)


@pytest.mark.parametrize("name", ["one adapter", "32 adapters", "mixture"])
def test_rows(benchmark, name: str) -> None:
    call = place_calls()[0][name]
    with torch.no_grad():
        benchmark(call)


if __name__ == "__main__":
    main()
