"""Whole BERTs on a GPU: forward, training step, and tokens one at a time; random weights.

Beside ours run the same weights without adapters (`bare`), on the `reference` and on the `torch`
backend, or `adapters` in place of these two.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from contenders import LITERAL, MODES, Contender, Measured, Outputs, compare
from device import GPU, DryRun
from models import (
    bare_model,
    on_backend,
    ours,
    peer,
    step,
    token_ids,
    train_fusion,
    with_adapters,
)
from torch import Tensor, nn

Item = Callable[[], dict[str, dict]]
PEER = "adapters"
# dropout off: every contender draws its own numbers, and outputs are compared
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Shapes:
    """What is measured."""

    layers: int
    training_layers: int
    config: dict[str, Any]
    """Of the BERT, where it is not BERT-base."""
    adapters: tuple[int, ...]
    batches: tuple[tuple[int, int], ...]
    training: tuple[int, int]
    single_tokens: tuple[int, ...]
    routed: tuple[int, int]
    rounds: int


FULL = Shapes(
    12, 4, {}, (8, 3, 16), ((32, 512), (8, 128)), (32, 128), (1, 8, 32), (32, 128), rounds=15
)
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 32,
}  # fmt: skip
DRY = Shapes(1, 1, TINY, (2,), ((2, 6),), (2, 6), (2,), (3, 4), rounds=1)


@dataclass(frozen=True)
class Setting:
    """Models of one size on one device."""

    device: GPU | DryRun
    shapes: Shapes
    with_peer: bool
    layers: int
    dtype: torch.dtype = torch.bfloat16

    def bare(self) -> nn.Module:
        return bare_model(self.layers, **NO_DROPOUT, **self.shapes.config)

    def to(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Rounded to the setting's dtype, then in this one, so that all have the same numbers."""
        return model.to(self.dtype).to(dtype).to(self.device.device)

    def ids(self, batch: tuple[int, int]) -> Tensor:
        return token_ids(batch, self.shapes.config.get("vocab_size", 30000)).to(self.device.device)

    def models(self, count: int) -> tuple[dict[str, nn.Module], nn.Module]:
        """Models with the same weights by name, and the literal one in fp32."""
        bare = self.bare()
        model = ours(bare, count)
        found = {"bare": bare, "triton": on_backend(model, "triton")}
        if self.with_peer:
            found[PEER] = peer(bare, model)
        else:
            found[LITERAL] = on_backend(model, "reference")
            found["torch"] = on_backend(model, "torch")
        truth = self.to(on_backend(model, "reference"), torch.float32)
        return {name: self.to(each, self.dtype) for name, each in found.items()}, truth


def _forward(ids: Tensor) -> Measured:
    def call(run: Callable) -> Callable[[], Tensor]:
        def forward_call() -> Tensor:
            with torch.no_grad():
                return run(ids)[0]

        return forward_call

    return Measured(call, lambda out: {"out": out})


def _step(ids: Tensor) -> Measured:
    """zero_grad, forward, backward and a step of AdamW on the fusion."""

    def call(run: nn.Module) -> Callable[[], tuple[Tensor, list[nn.Parameter]]]:
        trained = [p for p in run.parameters() if p.requires_grad]
        # all contenders and all their steps start from the same weights: a rate of 0
        own = step(run, trained, ids, lr=0.0)
        return lambda: (own(), trained)

    return Measured(call, _loss_and_gradients)


def _loss_and_gradients(result: tuple[Tensor, list[nn.Parameter]]) -> Outputs:
    loss, trained = result
    return {"loss": loss, "gradients": torch.cat([p.grad.flatten() for p in trained])}


def _compare(
    setting: Setting, models: dict[str, Contender], measured: Measured, truth: Callable
) -> dict[str, dict]:
    plain = PEER if PEER in models else LITERAL
    bases = (f"{plain} eager", f"{plain} compiled", "torch compiled", "bare eager", "bare graph")
    outputs = measured.read(measured.call(truth)())
    rounds, dtype = setting.shapes.rounds, setting.dtype
    return compare(setting.device, models, measured, outputs, dtype, rounds, bases, plain)


def _contenders(models: dict[str, nn.Module], modes: tuple[str, ...]) -> dict[str, Contender]:
    """In some modes; without those that take minutes, or that a contender is not made for."""
    not_in = {LITERAL: ("compiled", "compiled graph"), PEER: ("graph", "compiled graph")}
    return {
        name: Contender(
            model,
            tuple(mode for mode in modes if mode not in not_in.get(name, ())),
            is_compared=name != "bare",
        )
        for name, model in models.items()
    }


def inference(setting: Setting, count: int, batch: tuple[int, int], modes: tuple) -> dict:
    models, truth = setting.models(count)
    contenders = _contenders(models, modes)
    return _compare(setting, contenders, _forward(setting.ids(batch)), truth)


def training(setting: Setting, count: int, batch: tuple[int, int], modes: tuple) -> dict:
    models, truth = setting.models(count)
    del models["bare"]  # trains nothing
    for model in (*models.values(), truth):
        train_fusion(model)
    contenders = _contenders(models, modes)
    return _compare(setting, contenders, _step(setting.ids(batch)), truth)


def one_setup_a_row(setting: Setting, batch: tuple[int, int], modes: tuple) -> dict[str, dict]:
    """Every row of the batch has an adapter of its own; `one adapter` serves all rows."""
    rows, _ = batch
    model = with_adapters(setting.bare(), rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    names = [f"a{i}" for i in order.tolist()]

    def by_number(backend: str, dtype: torch.dtype) -> Callable:
        own = setting.to(on_backend(model, backend), dtype)
        return functools.partial(own, adapter_ids=own.routing(names))

    one = setting.to(on_backend(with_adapters(setting.bare(), 1), "triton"), setting.dtype)
    contenders = {
        LITERAL: Contender(by_number("reference", setting.dtype), ("eager",)),
        "triton": Contender(by_number("triton", setting.dtype), modes),
        "one adapter": Contender(one, modes, is_compared=False),
    }
    truth = by_number("reference", torch.float32)
    return _compare(setting, contenders, _forward(setting.ids(batch)), truth)


def place(setting: Setting, count: int, batch: tuple[int, int], modes: tuple) -> dict[str, dict]:
    """One place of the models, as their layers call it: residual and LayerNorm included."""
    models, truth = setting.models(count)
    shape = *batch, truth.config.hidden_size
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    hidden, input = (t.to(setting.dtype).to(setting.device.device) for t in drawn)

    def run_of(model: nn.Module) -> Callable[[Tensor], tuple[Tensor]]:
        output = model.encoder.layer[0].output
        is_peer = hasattr(output, "bottleneck_layer_forward")
        run = output.bottleneck_layer_forward if is_peer else output.adapter_layers[0].forward
        dtype = next(model.parameters()).dtype
        summand = input.to(dtype)
        return lambda x: (run(x.to(dtype), summand, output.LayerNorm),)

    del models["bare"]
    contenders = {
        name: Contender(run_of(model), ("eager", "compiled") if name == PEER else modes)
        for name, model in models.items()
    }
    return _compare(setting, contenders, _forward(hidden), run_of(truth))


def items(device: GPU | DryRun, with_peer: bool) -> dict[str, Item]:
    """What is measured, by title; first what says most and what needs no compiling."""
    shapes = DRY if device.is_dry else FULL
    single, short, whole = (
        Setting(device, shapes, with_peer, layers)
        for layers in (1, shapes.training_layers, shapes.layers)
    )
    first, *others = shapes.adapters
    largest, trained = shapes.batches[0], shapes.training
    found: dict[str, Item] = {}

    def add(text: str, function: Callable, setting: Setting, *sizes, modes: tuple) -> None:
        *count, (rows, length) = sizes
        title = " ".join([text, *(f"N={n}" for n in count), f"B={rows}", f"S={length}"])
        title += ", against adapters" if with_peer else ""
        found[title] = functools.partial(function, setting, *sizes, modes)

    add("place of a model", place, single, first, largest, modes=MODES)
    for batch in (*shapes.batches, *((rows, 1) for rows in shapes.single_tokens)):
        add("model forward", inference, whole, first, batch, modes=("eager", "graph"))
    add("training step", training, short, first, trained, modes=("eager",))
    if not with_peer:
        text = "model forward, one adapter a row"
        add(text, one_setup_a_row, whole, shapes.routed, modes=("eager", "graph"))
    modes = ("eager", "compiled", "compiled graph")
    add("compiled model forward", inference, whole, first, largest, modes=modes)
    add("compiled training step", training, short, first, trained, modes=("eager", "compiled"))
    for count in others:
        add("model forward", inference, whole, count, largest, modes=("eager", "graph"))
        add("training step", training, short, count, trained, modes=("eager",))
    return found
