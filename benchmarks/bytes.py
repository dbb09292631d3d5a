"""Bytes that the Triton launches of one place move, by tensor, against the literal path.

    TRITON_INTERPRET=1 python benchmarks/bytes.py

H = 768, d = 48, relu, bf16. A few row blocks run in Triton's interpreter, with the tiles that an
H100 (sm_90) takes for T = 16384, and every access is counted (`instrument.py`): `loaded` and
`stored` over all programs, which is what the L2 cache sees; `loaded_once` and `stored_once` with
each address counted once in a launch, which is what device memory sees where the programs of a row
block run together.

The literal path is the reference, run on the meta device: for each ATen call that is not a view the
bytes of its inputs and outputs, each of them once.

Nothing here is a time. `performance.py` writes the tables of docs/performance.md from the results.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import measure
import place
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if os.environ.get("TRITON_INTERPRET") != "1":
    raise SystemExit("bytes.py: run it with TRITON_INTERPRET=1")

from instrument import Launch, instrumented
from triton.backends.compiler import GPUTarget

from fastfusion.kernels.triton import schedules
from fastfusion.ops import (
    GroupedWeights,
    PackedWeights,
    adapter_fusion,
    adapter_fusion_grouped,
    adapter_fusion_norm,
    stack,
)

SM_90 = GPUTarget("cuda", 90, 32)
SCHEDULE_ROWS = 16384
"""What the tiles are for; the calls have fewer rows, a few row blocks."""
DTYPE = torch.bfloat16
ADAPTERS = (3, 8, 16)


@contextlib.contextmanager
def tiles_of(target: GPUTarget, rows: int) -> Iterator[None]:
    """The kernels' launchers take their schedules as for so many rows on such a GPU."""
    schedule = schedules.schedule

    def on_target(name: str, dtype: torch.dtype, *_) -> dict[str, int]:
        return schedule(name, dtype, target, rows)

    with contextlib.ExitStack() as undone:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastfusion.kernels.triton.") and hasattr(module, "schedule"):
                undone.enter_context(mock.patch.object(module, "schedule", on_target))
        yield


def counted(call: Callable) -> list[Launch]:
    """The launches of a call, with the tiles for `SCHEDULE_ROWS` rows on `SM_90`."""
    with tiles_of(SM_90, SCHEDULE_ROWS), instrumented() as launches:
        call()
    return launches


def weights(adapters: int) -> PackedWeights:
    return place.packed(place.parameters(adapters), DTYPE)


def rows_like(rows: int, count: int) -> list[Tensor]:
    return [torch.randn(rows, place.HIDDEN).to(DTYPE) for _ in range(count)]


def forward(rows: int, adapters: int) -> list[Launch]:
    x, residual = rows_like(rows, 2)
    packed = weights(adapters)
    with torch.no_grad():
        return counted(lambda: adapter_fusion([x], None, residual, packed, backend="triton"))


def forward_norm(rows: int, adapters: int) -> list[Launch]:
    """BERT's place with `original_ln_before`."""
    hidden, residual = rows_like(rows, 2)
    norm = (torch.ones(place.HIDDEN).to(DTYPE), torch.zeros(place.HIDDEN).to(DTYPE), 1e-5, True)
    packed = weights(adapters)

    def call():
        return adapter_fusion_norm(hidden, residual, *norm, packed, backend="triton")

    with torch.no_grad():
        return counted(call)


def grouped_weights(adapters: int) -> GroupedWeights:
    """A fusion of so many adapters, and one adapter alone."""
    single = weights(1)._replace(w_score=None, b_score=None)
    return stack([weights(adapters), single])


def forward_grouped(rows: int, adapters: int) -> list[Launch]:
    """A third of the rows each: the fusion, the single adapter, and none."""
    x, residual = rows_like(rows, 2)
    groups = torch.arange(rows).mul(3).div(rows, rounding_mode="floor").int() - 1
    packed = grouped_weights(adapters)
    with torch.no_grad():
        return counted(
            lambda: adapter_fusion_grouped(x, residual, groups, packed, backend="triton")
        )


def backward(rows: int, adapters: int) -> list[Launch]:
    """Of the input and of all packed weights."""
    x, residual, grad = rows_like(rows, 3)
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    leaves += [t.requires_grad_() for t in weights(adapters)[:5]]
    packed = PackedWeights(*leaves[2:], *weights(adapters)[5:])
    out, _ = adapter_fusion([x], None, residual, packed, backend="triton")
    return counted(lambda: torch.autograd.grad(out, leaves, grad))


OPS = {
    "forward": forward, "backward": backward, "norm": forward_norm, "grouped": forward_grouped,
}  # fmt: skip


class AtenBytes(TorchDispatchMode):
    """Adds up the bytes of inputs and outputs of every ATen call that moves any."""

    def __init__(self):
        super().__init__()
        self.total = 0

    @staticmethod
    def _size(tensor: Tensor) -> int:
        """What an expanded tensor repeats lies in memory once."""
        each = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1
        for size, stride in each:
            count *= size if stride != 0 else min(size, 1)
        return count * tensor.element_size()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]
            for part in ((args, kwargs), result)
        )
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = all(tensor.untyped_storage()._cdata in known for tensor in outputs)
        is_empty = not inputs and "empty" in str(function)
        if function._schema.is_mutable or not (is_view or is_empty):
            self.total += sum(map(self._size, inputs + outputs))
        return result


def literal_bytes(rows: int, adapters: int) -> tuple[int, int]:
    """Of the literal path: forward, and backward of the input and of all parameters."""
    bottlenecks, attention = place.to(place.parameters(adapters), DTYPE)

    def leaf(value):
        return value.to("meta").requires_grad_() if isinstance(value, Tensor) else value

    bottlenecks = [type(each)(*map(leaf, each)) for each in bottlenecks]
    attention = type(attention)(*map(leaf, attention))
    x = torch.empty(1, rows, place.HIDDEN, dtype=DTYPE, device="meta", requires_grad=True)
    with AtenBytes() as forward_bytes:
        out = place.literal((bottlenecks, attention))(x)
    with AtenBytes() as backward_bytes:
        out.backward(torch.empty_like(out))
    return forward_bytes.total, backward_bytes.total


CASES = [
    *((name, adapters) for name in ("forward", "backward") for adapters in ADAPTERS),
    ("norm", 8),
    ("grouped", 8),
]


def as_record(launch: Launch) -> dict:
    traffic = {name: tensor._asdict() for name, tensor in launch.traffic.items()}
    return {**launch._asdict(), "traffic": traffic}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "bytes.jsonl"
    options.add_argument("--json", type=Path, default=default, help="append the results here")
    options.add_argument("--rows", type=int, default=256)
    arguments = options.parse_args()
    rows = arguments.rows
    launches, literal = {}, {}
    for name, adapters in CASES:
        launches[f"{name} N={adapters}"] = [as_record(found) for found in OPS[name](rows, adapters)]
        print(f"{name} N={adapters}: {len(launches[f'{name} N={adapters}'])} launches", flush=True)
    for adapters in ADAPTERS:
        for name, moved in zip(("forward", "backward"), literal_bytes(rows, adapters), strict=True):
            literal[f"{name} N={adapters}"] = moved
    record = {**measure.environment(), "rows": rows, "schedule_rows": SCHEDULE_ROWS}
    record |= {"launches": launches, "literal": literal}
    measure.append(arguments.json, record)


if __name__ == "__main__":
    main()
