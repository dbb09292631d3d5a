"""The ops at one place, on a GPU: forward, training, decoding, and rows with setups of their own.

`products` are the two bare products [T,H]x[H,2D] and [T,D]x[D,H], `copy` one of [T,H]; both write
into tensors that exist already.
"""

from collections.abc import Callable
from dataclasses import dataclass

import place
import torch
from contenders import LITERAL, MODES, Contender, Measured, Outputs, compare, forward
from device import GPU, DryRun
from torch import Tensor

from fastfusion.absorb import Attention
from fastfusion.ops import PackedWeights, adapter_fusion, adapter_fusion_grouped, stack
from fastfusion.ops.activations import activation_code

Item = Callable[[], dict[str, dict]]
BASES = ("products eager", "products graph", f"{LITERAL} eager", "torch compiled")


@dataclass(frozen=True)
class Shapes:
    """What is measured."""

    hidden: int
    size: int
    adapters: tuple[int, ...]
    """N; the first one is measured in all ways."""
    rows: tuple[int, ...]
    """T; the last one is measured in all dtypes."""
    decoded: tuple[int, ...]
    setups: int
    length: int
    """Rows in a row with the same setup."""
    rounds: int


FULL = Shapes(768, 48, (8, 3, 16), (16384, 1024), (1, 2, 4, 8, 16, 32), 32, 512, rounds=30)
DRY = Shapes(32, 4, (3,), (12,), (1,), 3, 4, rounds=1)


@dataclass(frozen=True)
class Setting:
    """One place: its sizes, dtype and device."""

    device: GPU | DryRun
    shapes: Shapes
    adapters: int
    rows: int
    dtype: torch.dtype

    def literal_modes(self) -> tuple[str, ...]:
        """Compiling takes seconds, so the literal path is compiled for one size."""
        is_first = (self.adapters, self.rows) == (self.shapes.adapters[0], self.shapes.rows[0])
        return MODES if is_first and self.dtype == torch.bfloat16 else ("eager", "graph")

    def title(self, mode: str) -> str:
        return f"N={self.adapters} T={self.rows} {str(self.dtype)[6:]} {mode}"

    def drawn(self, dtype: torch.dtype) -> place.Drawn:
        """The same parameters for every dtype, as `self.dtype` rounds them."""
        drawn = place.parameters(self.adapters, self.shapes.hidden, self.shapes.size)
        return place.to(drawn, self.dtype, dtype, self.device.device)

    def draw(self, seed: int, dtype: torch.dtype) -> Tensor:
        shape = 1, self.rows, self.shapes.hidden
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.dtype).to(dtype).to(self.device.device)

    def floors(self) -> dict[str, Contender]:
        """The bare products and a copy."""
        columns, hidden = self.adapters * self.shapes.size, self.shapes.hidden
        x = self.draw(1, self.dtype)[0]
        w_in, w_out = x.new_ones(hidden, 2 * columns), x.new_ones(columns, hidden)
        w_in.normal_()
        w_out.normal_()
        wide, z, out = (x.new_empty(self.rows, n) for n in (2 * columns, columns, hidden))
        z.normal_()

        def products(x: Tensor) -> Tensor:
            torch.mm(x[0], w_in, out=wide)
            return torch.mm(z, w_out, out=out)

        flops = 6 * self.rows * columns * hidden
        moved = 2 * x.numel() * x.element_size()
        return {
            "products": Contender(products, is_compared=False, flops=flops),
            "copy": Contender(lambda x: out.copy_(x[0]), is_compared=False, moved_bytes=moved),
        }

    def flops(self) -> int:
        """Of the absorbed form's products."""
        columns = self.adapters * (3 * self.shapes.size + 2)
        return 2 * self.rows * self.shapes.hidden * columns

    def compare(
        self, contenders: dict[str, Contender], measured: Measured, truth: Outputs, **other
    ) -> dict[str, dict]:
        options = {"bases": BASES, **other}
        rounds = self.shapes.rounds
        return compare(self.device, contenders, measured, truth, self.dtype, rounds, **options)


def inference(setting: Setting) -> dict[str, dict]:
    """The forward on packed weights, as the inference cache keeps them."""
    x = setting.draw(1, setting.dtype)
    pack = place.packed(setting.drawn(setting.dtype), setting.dtype)
    contenders = setting.floors() | {
        LITERAL: Contender(place.literal(setting.drawn(setting.dtype)), setting.literal_modes()),
        "torch": Contender(place.mixture(pack, "torch"), MODES),
        "triton": Contender(place.mixture(pack, "triton"), flops=setting.flops()),
    }
    truth = place.literal(setting.drawn(torch.float64))(setting.draw(1, torch.float64))
    return setting.compare(contenders, forward(x), {"out": truth})


def inference_norm(setting: Setting) -> dict[str, dict]:
    """The tail of a BERT sub-layer: the same between the model's residual and LayerNorm."""
    x, summand = (setting.draw(seed, setting.dtype) for seed in (1, 2))
    pack = place.packed(setting.drawn(setting.dtype), setting.dtype)
    literal = place.literal_norm(setting.drawn(setting.dtype), summand)
    contenders = setting.floors() | {
        LITERAL: Contender(literal, setting.literal_modes()),
        "torch": Contender(place.mixture_norm(pack, summand, "torch"), MODES),
        "triton": Contender(place.mixture_norm(pack, summand, "triton"), flops=setting.flops()),
    }
    exact = place.literal_norm(setting.drawn(torch.float64), setting.draw(2, torch.float64))
    truth = exact(setting.draw(1, torch.float64))
    return setting.compare(contenders, forward(x), {"out": truth})


def decoding(setting: Setting) -> dict[str, dict]:
    """A few rows, where the weights' bytes are the floor."""
    x = setting.draw(1, setting.dtype)
    pack = place.packed(setting.drawn(setting.dtype), setting.dtype)
    weights = sum(t.numel() * t.element_size() for t in pack[:5])
    contenders = setting.floors() | {
        LITERAL: Contender(place.literal(setting.drawn(setting.dtype))),
        "torch": Contender(place.mixture(pack, "torch")),
        "triton": Contender(place.mixture(pack, "triton"), moved_bytes=weights),
    }
    truth = place.literal(setting.drawn(torch.float64))(setting.draw(1, torch.float64))
    return setting.compare(contenders, forward(x), {"out": truth})


def training(setting: Setting) -> dict[str, dict]:
    """Forward and backward with the adapters frozen: gradients of the input and the fusion.

    The packs are built from the parameters in every call, as in a training step.
    """

    def recorded(dtype: torch.dtype) -> tuple[Tensor, place.Drawn]:
        bottlenecks, attention = setting.drawn(dtype)
        attention = Attention(*(t.requires_grad_() for t in attention))
        return setting.draw(1, dtype).requires_grad_(), (bottlenecks, attention)

    def step(x: Tensor, drawn: place.Drawn) -> Measured:
        seed = setting.draw(3, x.dtype)

        def call(run: Callable) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: torch.autograd.grad(run(x), (x, *drawn[1]), seed)

        return Measured(call, _gradients)

    x, drawn = recorded(setting.dtype)
    contenders = {
        LITERAL: Contender(place.literal(drawn), setting.literal_modes()),
        "torch": Contender(place.trained_mixture(drawn, "torch"), MODES),
        "triton": Contender(place.trained_mixture(drawn, "triton")),
    }
    exact_x, exact = recorded(torch.float64)
    truth = _gradients(step(exact_x, exact).call(place.literal(exact))())
    return setting.compare(contenders, step(x, drawn), truth)


def _gradients(grads: tuple[Tensor, ...]) -> Outputs:
    """Of the parameters as one: that of bk is zero but for rounding."""
    dx, *rest = grads
    return {"dx": dx, "parameters": torch.cat([grad.flatten() for grad in rest])}


def _random_pack(setting: Setting, count: int, is_scored: bool, generator) -> PackedWeights:
    """A random mixture of `count` adapters."""
    hidden, size = setting.shapes.hidden, setting.shapes.size
    columns, rows = count * size, count * size + count

    def normal(*shape: int, std: float) -> Tensor:
        values = torch.randn(*shape, generator=generator) * std
        return values.to(setting.dtype).to(setting.device.device)

    narrow = hidden**-0.5
    scores = (normal(rows, hidden, std=0.3 * narrow), normal(rows, std=0.1))
    return PackedWeights(
        normal(columns, hidden, std=narrow),
        normal(columns, std=0.1),
        *(scores if is_scored else (None, None)),
        normal(rows, hidden, std=size**-0.5),
        None,
        [size] * count,
        [activation_code("relu")] * count,
    )


def _in_fp64(pack: PackedWeights) -> PackedWeights:
    return PackedWeights(*(t if t is None else t.double() for t in pack[:6]), *pack[6:])


def one_setup_a_row(setting: Setting, is_mixed: bool) -> dict[str, dict]:
    """Every `length` rows have a setup: an adapter of their own, or a Fuse, an adapter or none.

    `group by group` is the torch backend; `one adapter` serves all rows.
    """
    shapes, device = setting.shapes, setting.device.device
    generator = torch.Generator().manual_seed(0)
    if is_mixed:
        parts = [(4, True)] * 4 + [(1, False)] * 4
    else:
        parts = [(1, False)] * shapes.setups
    packs = [_random_pack(setting, count, scored, generator) for count, scored in parts]
    sequences = setting.rows // shapes.length
    kinds = len(packs) + 1 if is_mixed else len(packs)  # with base rows
    numbers = torch.randperm(sequences, generator=generator) % kinds - (kinds - len(packs))
    groups = numbers.repeat_interleave(shapes.length).int()
    indices = [(groups == number).nonzero().squeeze(1).to(device) for number in range(len(packs))]
    groups = groups.to(device)
    weights = stack(packs)
    matrices = [[w for w in (p.w_down, p.w_score, p.w_out) if w is not None] for p in packs]
    flops = sum(
        2 * len(index) * weight.numel()
        for index, own in zip(indices, matrices, strict=True)
        for weight in own
    )

    def group_by_group(packs: list[PackedWeights]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            out = x[0].clone()
            for pack, index in zip(packs, indices, strict=True):
                rows = x[0][index]
                out[index] = adapter_fusion([rows], None, rows, pack, backend="torch")[0]
            return out

        return run

    def grouped(x: Tensor) -> Tensor:
        return adapter_fusion_grouped(x[0], x[0], groups, weights, backend="triton")[0]

    def one_adapter(x: Tensor) -> Tensor:
        return adapter_fusion([x[0]], None, x[0], single, backend="triton")[0]

    single = _random_pack(setting, 1, False, generator)
    x = setting.draw(1, setting.dtype)
    contenders = {
        "group by group": Contender(group_by_group(packs)),
        "triton": Contender(grouped, flops=flops),
        "one adapter": Contender(one_adapter, is_compared=False),
    }
    exact = group_by_group([_in_fp64(pack) for pack in packs])
    truth = exact(setting.draw(1, torch.float64))
    bases = ("one adapter eager", "one adapter graph", "group by group eager")
    return setting.compare(
        contenders, forward(x), {"out": truth}, bases=bases, plain="group by group"
    )


def items(device: GPU | DryRun) -> dict[str, Item]:
    """What is measured, by title; first what says most."""
    shapes = DRY if device.is_dry else FULL
    most, least, bf16 = shapes.rows[0], shapes.rows[-1], torch.bfloat16
    found: dict[str, Item] = {}

    def add(function: Callable, mode: str, adapters: int, rows: int, dtype=bf16, **kwargs) -> None:
        setting = Setting(device, shapes, adapters, rows, dtype)
        found[setting.title(mode)] = lambda: function(setting, **kwargs)

    first = shapes.adapters[0]
    for rows in shapes.rows:
        add(inference, "forward", first, rows)
    add(inference_norm, "forward with LayerNorm", first, most)
    add(training, "training", first, most)
    add(one_setup_a_row, "one adapter a row", 1, most, is_mixed=False)
    add(one_setup_a_row, "mixed rows", 4, most, is_mixed=True)
    for rows in shapes.decoded:
        add(decoding, "decoding", first, rows)
    for adapters in shapes.adapters[1:]:
        add(inference, "forward", adapters, most)
        add(training, "training", adapters, most)
    for dtype in (torch.float16, torch.float32):
        add(inference, "forward", first, least, dtype)
    for adapters in shapes.adapters:
        add(training, "training", adapters, least)
        add(inference, "forward", adapters, least)
    return found
