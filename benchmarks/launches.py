"""Calls of the "triton" backend recorded instead of launched, and compiled for GPUs not there.

    for launch in recorded(Case("sm_90", "plain", ((48,) * 3,))):
        compiled(launch)

A case is a call of a backend function; nothing here knows which kernels serve it, with which
arguments. The tensors lie on the CPU and are never written or read, so they cost no memory.
"""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from fastfusion.kernels.triton import backend, schedules, tiles
from fastfusion.ops.activations import activation_code
from fastfusion.ops.weights import layouts, max_scored

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ACTIVATIONS = ("linear", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu")
FLAGS = {
    "backward": "the op's backward function, with every gradient that there is",
    "query": "a query of its own",
    "inputs": "one input for each adapter",
    "mask": "dropout of the attention's scores",
    "temperature": "one that is not 1",
    "offset": "an offset of each row's scores",
    "unscored": "a sum of the adapters, p = 1",
    "bare": "no residual",
    "activations": "all eight, in turn, where otherwise all are relu",
    "ln_before": "of adapter_fusion_norm: the adapters read the normalised sum",
    "save": "of adapter_fusion_norm: what a backward pass needs is kept",
    "high": "torch.set_float32_matmul_precision('high')",
}


@dataclass(frozen=True)
class Case:
    """A call of a backend function."""

    target: str
    """A name in `TARGETS`."""
    op: str
    """"plain", "norm" or "grouped"."""
    groups: tuple[tuple[int, ...], ...]
    """The bottleneck sizes of each group of adapters; of "plain" and "norm" one group."""
    dtype: str = "bf16"
    hidden: int = 768
    rows: int = 16384
    flags: frozenset[str] = frozenset()
    """Of `FLAGS`."""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target: expected one of {list(TARGETS)}, got {self.target!r}")
        if unknown := self.flags - FLAGS.keys():
            raise ValueError(f"flags: expected some of {list(FLAGS)}, got {sorted(unknown)}")

    @property
    def name(self) -> str:
        """All of it in one line."""
        call = " ".join([self.op, *sorted(self.flags)])
        shape = "/".join(map(_shape, self.groups))
        return f"{self.target} {call} {self.dtype} H={self.hidden} T={self.rows} {shape}"


def _shape(sizes: tuple[int, ...]) -> str:
    """3x48 for three of 48 columns, 48+24 for unequal ones."""
    if len(set(sizes)) == 1:
        return f"{len(sizes)}x{sizes[0]}"
    return "+".join(map(str, sizes))


class Launch(NamedTuple):
    """What `tiles.launch` was called with, and for which target."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict[str, Any]
    target: GPUTarget


@contextmanager
def recording(target: GPUTarget) -> Iterator[list[Launch]]:
    """While it lasts, kernels are chosen for `target`, and launches only recorded."""
    launches: list[Launch] = []

    def record(kernel: triton.JITFunction, programs: int, arguments: dict) -> None:
        launches.append(Launch(kernel, programs, arguments, target))

    instead = {tiles.launch: record, schedules.target_of: lambda device: target}
    modules = [
        module for name, module in sys.modules.items()
        if name.startswith("fastfusion.kernels.triton.")
    ]  # fmt: skip
    with ExitStack() as stack:
        for original, function in instead.items():
            name = original.__name__
            for module in modules:
                if vars(module).get(name) is original:
                    stack.enter_context(mock.patch.object(module, name, function))
        yield launches


@contextmanager
def float32_precision(value: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def recorded(case: Case) -> list[Launch]:
    """The launches of a case, in order."""
    calls = {"plain": _call_plain, "norm": _call_norm, "grouped": _call_grouped}
    precision = "high" if "high" in case.flags else "highest"
    with float32_precision(precision), recording(TARGETS[case.target]) as launches:
        calls[case.op](case)
    return launches


def _codes(case: Case, count: int) -> list[int]:
    names = ACTIVATIONS if "activations" in case.flags else ("relu",)
    return [activation_code(names[i % len(names)]) for i in range(count)]


def _empty(case: Case, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[case.dtype])


def _weights(case: Case, sizes: tuple[int, ...]) -> list[Tensor | None]:
    """From w_down to temperature, in the order of `PackedWeights`."""
    columns, padded = sum(sizes), -(-(sum(sizes) + len(sizes)) // 8) * 8
    scored = "unscored" not in case.flags
    return [
        _empty(case, columns, case.hidden),
        _empty(case, columns),
        _empty(case, padded, case.hidden) if scored else None,
        _empty(case, padded) if scored else None,
        _empty(case, padded, case.hidden),
        torch.full([], 1.5) if "temperature" in case.flags else None,
    ]


def _call_plain(case: Case) -> None:
    (sizes,) = case.groups
    x = _empty(case, case.rows, case.hidden)
    inputs = [torch.empty_like(x) for _ in sizes] if "inputs" in case.flags else [x]
    query = torch.empty_like(x) if "query" in case.flags else None
    mask = _empty(case, case.rows, len(sizes)) if "mask" in case.flags else None
    weights, codes = _weights(case, sizes), _codes(case, len(sizes))
    scored = "unscored" not in case.flags
    if "backward" in case.flags:
        p = torch.empty(case.rows, len(sizes)) if scored else torch.empty(0)
        needs = [True, query is not None, True, scored, True, "offset" in case.flags]
        backend.adapter_fusion_backward(
            torch.empty_like(x), inputs, query, *weights, mask, p, sizes, codes, needs
        )
    else:
        residual = None if "bare" in case.flags else torch.empty_like(x)
        offset = _empty(case, case.rows) if "offset" in case.flags else None
        backend.adapter_fusion(inputs, query, residual, *weights, mask, offset, sizes, codes)


def _call_norm(case: Case) -> None:
    (sizes,) = case.groups
    hidden = _empty(case, case.rows, case.hidden)
    norm = [_empty(case, case.hidden), _empty(case, case.hidden), 1e-12]
    ln_before = "ln_before" in case.flags
    mask = _empty(case, case.rows, len(sizes)) if "mask" in case.flags else None
    weights, codes = _weights(case, sizes), _codes(case, len(sizes))
    scored = "unscored" not in case.flags
    if "backward" in case.flags:
        grad, pre_norm = torch.empty_like(hidden), torch.empty_like(hidden)
        summed = torch.empty_like(hidden) if ln_before else hidden.new_empty(0)
        p = torch.empty(case.rows, len(sizes)) if scored else torch.empty(0)
        backend.adapter_fusion_norm_backward(
            grad, None if ln_before else hidden, summed, pre_norm, *norm, ln_before, *weights,
            mask, p, sizes, codes, [True, True, scored, True],
        )  # fmt: skip
    else:
        backend.adapter_fusion_norm(
            hidden, torch.empty_like(hidden), *norm, ln_before, *weights, mask, sizes, codes,
            "save" in case.flags,
        )  # fmt: skip


def _call_grouped(case: Case) -> None:
    """The first group is scored, the others are sums."""
    sizes, counts = tuple(chain(*case.groups)), [len(group) for group in case.groups]
    scored = [int(i == 0 and "unscored" not in case.flags) for i in range(len(counts))]
    last = layouts(sizes, counts, scored)[-1]
    rows_in, rows_out = (last.score or last.down).stop, last.out.stop
    x = _empty(case, case.rows, case.hidden)
    groups = torch.zeros(case.rows, dtype=torch.int32)
    weights = [
        _empty(case, rows_in, case.hidden), _empty(case, rows_in),
        _empty(case, rows_out, case.hidden),
    ]  # fmt: skip
    most = max_scored(counts, scored)
    mask = _empty(case, case.rows, most) if "mask" in case.flags else None
    layout = [sizes, _codes(case, len(sizes)), counts, scored]
    if "backward" in case.flags:
        p = torch.empty(case.rows, most)
        backend.adapter_fusion_grouped_backward(
            torch.empty_like(x), x, groups, *weights, mask, p, *layout, [True] * 3
        )
    else:
        residual = None if "bare" in case.flags else torch.empty_like(x)
        backend.adapter_fusion_grouped(x, residual, groups, *weights, mask, *layout)


class _Device(NamedTuple):
    """A GPU as far as compiling needs one: what a launch asks of Triton's driver."""

    target: GPUTarget
    key: str
    """Triton keeps what it has compiled by device."""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple:
        return tuple(self)

    def get_current_stream(self, device: tuple) -> int:
        return 0


def _warm(launch: Launch, key: str) -> CompiledKernel | None:
    """The launch up to the compiler: Triton itself specialises on the arguments."""
    config = type(triton.runtime.driver)
    with mock.patch.object(config, "active", _Device(launch.target, key)):
        return launch.kernel.warmup(**launch.arguments, grid=(launch.programs,))


def compiled(launch: Launch) -> CompiledKernel:
    """The kernel as this launch compiles it on its target."""
    return _warm(launch, "compiled")


def identity(launch: Launch) -> str:
    """A name for what `compiled` compiles, from sources, arguments and options alone."""
    found: list[str] = []

    def stop(*, compile: dict, **_: Any) -> bool:
        text = launch.kernel.cache_key + compile["specialization_data"] + triton.__version__
        found.append(hashlib.sha256(text.encode()).hexdigest()[:8])
        return True  # there is nothing to compile

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = stop
        _warm(launch, "identity")
    return found[0]
