"""The calls that schedules are tuned with: random, but as large as a model's, and checked."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfusion.ops import (
    PackedWeights,
    adapter_fusion,
    adapter_fusion_grouped,
    adapter_fusion_norm,
    backends,
    stack,
)
from fastfusion.ops.activations import activation_code

from .schedules import width
from .tiles import DTYPES

OPS = ("plain", "norm", "query", "groups", "backward")
# both sum the same terms in another order; a call of few terms has no error in plain PyTorch
FACTOR, ROUNDINGS = 2, 4


class Case(NamedTuple):
    """A call of the forward, or of the backward."""

    op: str
    """ "plain"; "norm", LayerNorms around the mixture; "query", one of its own; "groups", rows with
    the fusion and rows with its first adapter alone; "backward", the gradients of "plain"."""
    hidden_size: int
    sizes: tuple[int, ...]
    num_rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = f"{len(self.sizes)} x {self.sizes[0]}"
        if len(set(self.sizes)) > 1:
            sizes = "+".join(map(str, self.sizes))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.num_rows} x {self.hidden_size}, adapters {sizes}, {dtype}"

    @property
    def width(self) -> int:
        return width(sum(self.sizes), len(self.sizes))


def cases(
    hidden_size: int = 768,
    sizes: Sequence[Sequence[int]] = ((48,) * 3, (48,) * 8),
    num_rows: Sequence[int] = (16384, 1024, 32, 16),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    ops: Sequence[str] = OPS,
) -> list[Case]:
    """Every combination; the defaults are BERT-base's with 3 and 8 adapters.

    Raises:
        ValueError: a size or a number of rows that is not positive, a dtype or an op that there is
            not.
    """
    for name, numbers in (("hidden_size", [hidden_size]), ("num_rows", num_rows)):
        if any(number < 1 for number in numbers):
            raise ValueError(f"{name}: expected positive numbers; got {list(numbers)}")
    for each in sizes:
        if len(each) == 0 or any(size < 1 for size in each):
            raise ValueError(f"sizes: expected lists of positive numbers; got {list(each)}")
    for name, given, known in (("dtypes", dtypes, DTYPES), ("ops", ops, OPS)):
        if unknown := [value for value in given if value not in known]:
            raise ValueError(f"{name}: expected some of {known}; got {unknown}")
    return [
        Case(op, hidden_size, tuple(each), rows, dtype)
        for dtype in dtypes
        for rows in num_rows
        for each in sizes
        for op in ops
    ]


Call = Callable[[str, torch.dtype], dict[str, Tensor]]
"""The results by name on a backend, computed in a dtype from the same numbers."""
GRADIENTS = ("dx", "dquery", "dw_down", "db_down", "dw_score", "db_score", "dw_out", "doffset")
NEEDED = (True, False, True, True, True, False)
"""What a backward computes: of x, query, the down weights, the score weights, w_out, an offset."""


def call_of(case: Case, device: torch.device) -> Call:
    """The call on random inputs of the order of one, as are its scores."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return (std * values).to(case.dtype)

    rows, hidden_size, columns = case.num_rows, case.hidden_size, sum(case.sizes)
    scores = columns + len(case.sizes)
    narrow = hidden_size**-0.5
    x, residual = randn(rows, hidden_size), randn(rows, hidden_size)
    query = randn(rows, hidden_size) if case.op == "query" else None
    gamma, beta = 1 + randn(hidden_size, std=0.1), randn(hidden_size, std=0.1)
    ids = torch.randint(2, (rows,), generator=generator, device=device, dtype=torch.int32)
    parameters = (
        randn(columns, hidden_size, std=narrow),
        randn(columns, std=0.1),
        randn(scores, hidden_size, std=narrow * max(case.sizes) ** -0.5),
        randn(scores, std=0.1),
        randn(scores, hidden_size, std=max(case.sizes) ** -0.5),
    )
    first = case.sizes[0]
    sizes, codes = list(case.sizes), [activation_code("relu")] * len(case.sizes)

    def in_dtype(dtype: torch.dtype) -> tuple:
        tensors = [None if t is None else t.to(dtype) for t in (x, residual, query, gamma, beta)]
        fusion = PackedWeights(*(t.to(dtype) for t in parameters), None, sizes, codes)
        if case.op == "backward":
            _, p = adapter_fusion([tensors[0]], None, None, fusion, backend="torch")
            return *tensors, fusion, p
        if case.op != "groups":
            return *tensors, fusion, None
        w_out = torch.cat([fusion.w_out[:first], fusion.w_out[columns : columns + 1]])
        alone = PackedWeights(
            fusion.w_down[:first], fusion.b_down[:first], None, None, w_out, None,
            sizes[:1], codes[:1],
        )  # fmt: skip
        return *tensors, stack([fusion, alone]), None

    given = in_dtype(case.dtype)  # once: it is not what is timed

    @torch.no_grad()
    def call(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        own = given if dtype == case.dtype else in_dtype(dtype)
        x, residual, query, gamma, beta, weights, p = own
        if case.op == "backward":
            *tensors, temperature, sizes, codes = weights
            backward = backends.load(backend).adapter_fusion_backward
            gradients = backward(
                residual, [x], None, *tensors, temperature, None, p, sizes, codes, NEEDED
            )
            return {k: v for k, v in zip(GRADIENTS, gradients, strict=True) if v.numel() > 0}
        if case.op == "norm":
            norm = (gamma, beta, 1e-12, True)
            out, p = adapter_fusion_norm(x, residual, *norm, weights, backend=backend)
        elif case.op == "groups":
            out, p = adapter_fusion_grouped(x, residual, ids, weights, backend=backend)
        else:
            out, p = adapter_fusion([x], query, residual, weights, backend=backend)
        return {"out": out, "p": p}

    return call


class Expected(NamedTuple):
    """What a call's results are held against."""

    truth: dict[str, Tensor]
    """Of the `torch` backend in fp64."""
    allowed: dict[str, float]
    """The largest error of each."""

    def fault(self, results: dict[str, Tensor]) -> str | None:
        """What is wrong with results, or None."""
        for name, truth in self.truth.items():
            error, allowed = (results[name].double() - truth).abs().max().item(), self.allowed[name]
            if not error <= allowed:  # a NaN is wrong too
                return f"{name} is wrong: error {error:.1e}, allowed {allowed:.1e}"
        return None


def expected_of(case: Case, call: Call) -> Expected:
    """The error allowed is `FACTOR` times that of the `torch` backend in the case's dtype, and
    `ROUNDINGS` of the largest value."""
    truth = call("torch", torch.float64)
    allowed = {}
    for name, plain in call("torch", case.dtype).items():
        rounding = torch.finfo(case.dtype).eps * truth[name].abs().max().item()
        error = (plain.double() - truth[name]).abs().max().item()
        allowed[name] = FACTOR * error + ROUNDINGS * rounding
    return Expected(truth, allowed)
