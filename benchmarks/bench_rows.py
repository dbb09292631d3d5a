"""A setup for each row: at one place, and in a whole BERT against one adapter and `adapters`.

    python benchmarks/bench_rows.py
    pytest benchmarks/bench_rows.py --benchmark-only

B = 32 rows of S = 128 tokens, H = 768, seq_bn adapters of 48 columns, fp32, evaluation. One place:
the grouped op with 32 adapters, one for each row and shuffled, beside the op with one adapter for
all; and a mixture of 4 Fuse of 4 adapters, 4 single adapters and base rows beside the bare products
of its parts. The model has 4 layers of BERT-base's shape; `adapters` 1.3.0 (where it can be
imported) runs the same rows as a BatchSplit, unshuffled, and as a MultiTask. `inactive`: one of 200
loaded adapters is active, beside a model that has only that one. Medians of interleaved rounds with
quartiles; ratios are medians of the rounds' own ratios.
"""

import copy
from collections.abc import Callable

import bench_model
import measure
import pytest
import torch
from torch import nn

import fastfusion
from fastfusion.ops import PackedWeights, adapter_fusion, adapter_fusion_grouped, stack
from fastfusion.ops.activations import activation_code

try:
    import adapters
    from adapters import composition as peer_composition
except ImportError:
    adapters = None

ROWS, LENGTH, HIDDEN, SIZE = 32, 128, 768, 48
LAYERS, LOADED = 4, 200


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


def place_calls() -> dict[str, Callable]:
    """One place: what is compared, by name."""
    torch.manual_seed(0)
    x = torch.randn(ROWS * LENGTH, HIDDEN)
    one, many = packed(1, False), stack([packed(1, False) for _ in range(ROWS)])
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

    return {
        "one adapter": lambda: adapter_fusion([x], None, x, one),
        "32 adapters": lambda: adapter_fusion_grouped(x, x, shuffled, many),
        "mixture's products": products,
        "mixture": lambda: adapter_fusion_grouped(x, x, numbers, mixed),
    }


def with_adapters(bare: nn.Module, count: int) -> nn.Module:
    model = copy.deepcopy(bare)
    fastfusion.init(model)
    for i in range(count):
        model.add_adapter(f"a{i}", "seq_bn")
    model.set_active_adapters("a0")
    return model.eval()


def model_calls(bare: nn.Module) -> dict[str, Callable]:
    """The whole model: what is compared, by name."""
    ids = bench_model.token_ids((ROWS, LENGTH))
    one, many = with_adapters(bare, 1), with_adapters(bare, ROWS)
    names = [f"a{i}" for i in torch.randperm(ROWS).tolist()]
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
        split.set_active_adapters(peer_composition.BatchSplit(*children, batch_sizes=1))
        tasks.set_active_adapters(peer_composition.MultiTask(*children))
        task_ids = torch.tensor([int(name[1:]) for name in names])
        calls["adapters BatchSplit"] = call(split)
        calls["adapters MultiTask"] = call(tasks, task_ids=task_ids)
    return calls


def peer(bare: nn.Module, model: nn.Module) -> nn.Module:
    """The same adapters in `adapters`."""
    other = copy.deepcopy(bare)
    adapters.init(other)
    for name in model.adapters_config.adapters:
        other.add_adapter(name, config="seq_bn")
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def inactive_calls(bare: nn.Module) -> dict[str, Callable]:
    ids = bench_model.token_ids((8, LENGTH))
    models = {f"{n} loaded": with_adapters(bare, n) for n in (1, LOADED)}
    return {name: bench_model.forward(model, ids) for name, model in models.items()}


def main() -> None:
    options = measure.parser(__doc__.splitlines()[0], "rows", rounds=15)
    arguments = options.parse_args()
    record = measure.start(arguments)
    bare = bench_model.bare_model(LAYERS)
    bases = {"mixture": "mixture's products", "mixture's products": "mixture's products"}
    groups = [
        ("one place", place_calls, "one adapter"),
        ("4 layers", lambda: model_calls(bare), "one adapter"),
        ("inactive", lambda: inactive_calls(bare), "1 loaded"),
    ]
    for title, make_calls, base in groups:
        calls = make_calls()
        with torch.no_grad():
            times_ms = measure.interleaved(calls, arguments.rounds)
        results = {
            name: {
                "ms": measure.quartiles(own),
                "over_base": measure.ratios(own, times_ms[bases.get(name, base)]),
                "base": bases.get(name, base),
            }
            for name, own in times_ms.items()
        }
        measure.append(arguments.json, {**record, "results": {title: results}})
        bench_model.show(title, results)


@pytest.mark.parametrize("name", ["one adapter", "32 adapters", "mixture"])
def test_rows(benchmark, name: str) -> None:
    call = place_calls()[name]
    with torch.no_grad():
        benchmark(call)


if __name__ == "__main__":
    main()
