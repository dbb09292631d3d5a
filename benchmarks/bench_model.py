"""AdapterFusion in a whole BERT: forward over the bare model, training step against `adapters`.

    python benchmarks/bench_model.py
    pytest benchmarks/bench_model.py --benchmark-only

BERT-base shape, fp32, random weights, seq_bn adapters (reduction 16) under one dynamic fusion. The
forward has 12 layers and runs in evaluation mode; the training step has 4 layers and is zero_grad,
forward, backward and a step of AdamW with the adapters frozen. Beside ours runs the literal path
with the same weights: `adapters` where it can be imported (1.3.0, transformers 4.57.6), else the
`reference` backend. The training step also runs without adapters: what the frozen model costs by
itself bounds what any implementation can gain. Medians of interleaved rounds with quartiles; ratios
are medians of the rounds' own ratios.
"""

import copy
from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from models import (
    adapters,
    bare_model,
    forward,
    on_backend,
    ours,
    peer,
    step,
    token_ids,
    train_fusion,
)
from torch import nn

LITERAL = "reference" if adapters is None else "adapters"
ADAPTERS = (3, 8, 16)
FORWARD_SHAPES = ((8, 128), (1, 128), (1, 16))
TRAINING_SHAPES = ((8, 128), (2, 32), (1, 16))
TRAINING_ADAPTERS = (2, 8, 16)


def pair(bare: nn.Module, count: int) -> dict[str, nn.Module]:
    """Ours and the literal path."""
    model = ours(bare, count)
    if adapters is not None:
        return {"fastfusion": model, LITERAL: peer(bare, model)}
    return {"fastfusion": model, LITERAL: on_backend(model, "reference")}


def without_adapters(bare: nn.Module) -> nn.Module:
    """The frozen model, in training, with one scale to train as far down as the lowest fusion."""
    model = copy.deepcopy(bare).requires_grad_(False).train()
    norm = model.encoder.layer[0].output.LayerNorm
    norm.scale = nn.Parameter(torch.ones(()))
    norm.register_forward_hook(lambda norm, _, output: output * norm.scale)
    return model


def training_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One step of the fusion alone."""
    train_fusion(model)
    return step(model, [p for p in model.parameters() if p.requires_grad], ids)


def saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes that a training forward keeps for its backward, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids)[0].square().mean()
    kept = sum(storages.values())
    loss.backward()
    return kept


def compare_forward(shape: tuple[int, int], rounds: int, layers: int, compiled: bool) -> dict:
    bare, ids = bare_model(layers), token_ids(shape)
    models = {"bare": bare}
    for count in ADAPTERS:
        models |= {f"{name} N={count}": model for name, model in pair(bare, count).items()}
    if compiled:
        models |= {f"compiled {k}": torch.compile(v) for k, v in models.items()}
    calls = {name: forward(model, ids) for name, model in models.items()}
    outputs = {name: call() for name, call in calls.items()}
    times_ms = measure.interleaved(calls, rounds)
    results: dict[str, dict[str, Any]] = {}
    for name, own in times_ms.items():
        base = "compiled bare" if name.startswith("compiled") else "bare"
        results[name] = {"ms": measure.quartiles(own)}
        results[name]["over_bare"] = measure.ratios(own, times_ms[base])
        if "N=" in name:
            truth = outputs[f"{LITERAL} {name.split()[-1]}"]
            error = measure.relative_error(outputs[name], truth, limit=1e-4)
            results[name]["relative_error"] = error
    return results


def compare_training(shape: tuple[int, int], rounds: int) -> dict:
    ids, results = token_ids(shape), {}
    for count in TRAINING_ADAPTERS:
        bare = bare_model(layers=4)
        models = pair(bare, count)
        calls = {name: training_step(model, ids) for name, model in models.items()}
        losses = {}
        for name, call in calls.items():
            torch.manual_seed(0)  # dropout draws the same numbers everywhere
            losses[name] = call()
        models["no adapters"] = without_adapters(bare)
        calls["no adapters"] = training_step(models["no adapters"], ids)
        kept = {name: saved_bytes(model, ids) for name, model in models.items()}
        times_ms = measure.interleaved(calls, rounds)
        for name, own in times_ms.items():
            result = results[f"{name} N={count}"] = {"ms": measure.quartiles(own)}
            result["saved_mib"] = round(kept[name] / 2**20, 1)
            if name in losses:
                error = measure.relative_error(losses[name], losses[LITERAL], limit=1e-4)
                result["relative_error_of_the_loss"] = error
            result["literal_over_this"] = measure.ratios(times_ms[LITERAL], own)
    return results


def show(title: str, results: dict[str, dict]) -> None:
    print(f"\n{title}")
    for name, result in results.items():
        rest = {key: value for key, value in result.items() if key != "ms"}
        print(f"  {name:28s}{result['ms'][1]:9.1f} ms  {rest}")


def main() -> None:
    options = measure.parser(__doc__.splitlines()[0], "model", rounds=15)
    options.add_argument("--layers", type=int, default=12, help="of the forward's model")
    options.add_argument("--compile", action="store_true", help="torch.compile of every model too")
    options.add_argument("--only", choices=("forward", "training"))
    arguments = options.parse_args()
    record = measure.start(arguments)
    if arguments.only != "training":
        for batch, length in FORWARD_SHAPES:
            title = f"forward B={batch} S={length}"
            results = compare_forward(
                (batch, length), arguments.rounds, arguments.layers, arguments.compile
            )
            measure.append(arguments.json, {**record, "results": {title: results}})
            show(title, results)
    if arguments.only != "forward":
        for batch, length in TRAINING_SHAPES:
            title = f"training step B={batch} S={length}"
            results = compare_training((batch, length), arguments.rounds)
            measure.append(arguments.json, {**record, "results": {title: results}})
            show(title, results)


@pytest.mark.parametrize("count", ADAPTERS)
@pytest.mark.parametrize("kind", ["forward", "training"])
def test_model(benchmark, kind: str, count: int) -> None:
    model, ids = ours(bare_model(layers=2), count), token_ids((2, 32))
    call = (forward if kind == "forward" else training_step)(model, ids)
    benchmark.group = kind
    benchmark(call)


if __name__ == "__main__":
    main()
