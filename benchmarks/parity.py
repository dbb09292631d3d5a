"""Which calls of the ops a GPU's kernels are checked with, and the rule for their errors.

    truth    the torch backend in fp64
    plain    the torch backend in the call's dtype, on the same numbers
    kernel   the triton backend: error <= 2 * error of plain + 4 roundings of the largest value

The torch backend is held against the literal formulas and by gradcheck in the test suite. Outputs
and every gradient are compared, and a second call has to give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastfusion.ops import (
    PackedWeights,
    adapter_fusion,
    adapter_fusion_grouped,
    adapter_fusion_norm,
    max_scored,
    routing_tables,
    stack,
)
from fastfusion.ops.activations import activation_code
from fastfusion.ops.weights import GroupedWeights

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# both sum the same terms in another order, so one may be lucky; a case of few terms has none
FACTOR, ROUNDINGS = 2, 4
EIGHT = (48,) * 8


@dataclass(frozen=True)
class Case:
    """A call of `adapter_fusion` or, with `norm`, of `adapter_fusion_norm`."""

    rows: int = 300
    hidden: int = 768
    sizes: tuple[int, ...] = (48, 48, 48)
    activations: tuple[str, ...] = ("relu",)
    score: bool = True
    query: bool = False
    residual: bool = True
    inputs: int = 1
    mask: bool = False
    offset: bool = False
    temperature: float | None = None
    norm: str | None = None
    """None, "after", or "both": the adapters read normalised rows."""


@dataclass(frozen=True)
class Groups:
    """A call of `adapter_fusion_grouped`: (sizes, activations, whether they are weighed) each."""

    rows: int
    hidden: int
    groups: tuple[tuple[tuple[int, ...], tuple[str, ...], bool], ...]
    run: int
    """Rows in a row that have the same group."""
    mask: bool = False


MIXED = (
    ((48,) * 4, ("relu",) * 4, True),
    ((48,), ("gelu",), False),
    ((16, 64, 33), ("gelu", "tanh", "silu"), True),
    ((4, 7), ("sigmoid", "leaky_relu"), False),
)
CASES: dict[str, Case | Groups] = {
    "N=3": Case(),
    "N=8": Case(sizes=EIGHT),
    "N=8, LayerNorm": Case(sizes=EIGHT, norm="after"),
    "groups": Groups(513, 768, MIXED, run=1, mask=True),
    "N=8, one row": Case(rows=1, sizes=EIGHT),
    "N=8, 16 rows": Case(rows=16, sizes=EIGHT, mask=True),
    "N=16, mask, temperature": Case(sizes=(48,) * 16, mask=True, temperature=3.0),
    "N=8, many rows": Case(rows=5000, sizes=EIGHT),
    "query, offset": Case(query=True, mask=True, offset=True, temperature=0.5),
    "N=8, query": Case(sizes=EIGHT, query=True, mask=True),
    "inputs": Case(inputs=3, query=True, mask=True),
    "one adapter": Case(sizes=(48,), activations=("gelu",), score=False),
    "sum, no residual": Case(sizes=(4, 100, 33), score=False, residual=False),
    "unequal": Case(sizes=(4, 100, 33), activations=("gelu", "relu", "tanh"), hidden=384),
    "activations": Case(
        sizes=(24,) * 5, activations=("gelu_new", "silu", "sigmoid", "leaky_relu", "linear")
    ),
    "H=64, d=4": Case(hidden=64, sizes=(4, 4)),
    "H=1600": Case(rows=130, hidden=1600, sizes=(50, 50)),
    "H=8192": Case(rows=33, hidden=8192, sizes=(64, 64)),
    "d=512": Case(rows=130, sizes=(512, 512)),
    "N=64": Case(rows=130, sizes=(4,) * 64),
    "LayerNorm, one adapter": Case(sizes=(48,), score=False, norm="after"),
    "LayerNorm on both sides": Case(norm="both", mask=True),
    "LayerNorm, 16 rows": Case(rows=16, sizes=EIGHT, norm="both"),
    "LayerNorm, H=384": Case(hidden=384, norm="both"),
    "LayerNorm, H=1600": Case(rows=130, hidden=1600, norm="after"),
    "LayerNorm, H=4096": Case(rows=33, hidden=4096, norm="both"),
    "groups, long": Groups(2048, 768, MIXED[:2], run=128),
    "groups, wide": Groups(300, 768, ((EIGHT, ("relu",) * 8, True), *MIXED[1:2]), run=37),
}
SANITIZED = ("N=3", "N=8", "N=8, LayerNorm", "groups", "N=8, one row")
"""What compute-sanitizer, which makes everything slower by orders of magnitude, runs."""


def tiny(case: Case | Groups) -> Case | Groups:
    """The same flags at sizes for the interpreter."""
    rows, hidden = min(case.rows, 19), min(case.hidden, 24)
    if isinstance(case, Groups):
        groups = tuple((tuple(min(d, 5) for d in sizes), *rest) for sizes, *rest in case.groups)
        return replace(case, rows=rows, hidden=hidden, groups=groups, run=min(case.run, 3))
    return replace(case, rows=rows, hidden=hidden, sizes=tuple(min(d, 5) for d in case.sizes))


class _Draw:
    """Random tensors, drawn in fp64 and rounded, so that every dtype reads the same numbers."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.generator = torch.Generator().manual_seed(1)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * std
        return values.to(self.dtype).to(self.device)

    def mask(self, rows: int, adapters: int) -> Tensor:
        kept = torch.rand(rows, adapters, generator=self.generator) > 0.3
        return (kept / 0.75).to(self.dtype).to(self.device)

    def pack(self, hidden: int, sizes: tuple[int, ...], names, score: bool) -> PackedWeights:
        """Scores are of the order of one, so that the softmax weighs, not picks."""
        columns, rows = sum(sizes), sum(sizes) + len(sizes)
        narrow = hidden**-0.5
        down = self.normal(columns, hidden, std=narrow), self.normal(columns, std=0.5)
        w_score = self.normal(rows, hidden, std=narrow * max(sizes) ** -0.5)
        b_score = self.normal(rows, std=0.5)
        w_out = self.normal(rows, hidden, std=max(sizes) ** -0.5)
        codes = [activation_code(name) for name in names]
        scores = (w_score, b_score) if score else (None, None)
        return PackedWeights(*down, *scores, w_out, None, list(sizes), codes)


Call = Callable[[dict[str, Tensor], str], tuple[Tensor, Tensor]]


def _mixture(case: Case, draw: _Draw) -> tuple[dict[str, Tensor], Call]:
    names = case.activations * (len(case.sizes) // len(case.activations))
    pack = draw.pack(case.hidden, case.sizes, names, case.score)
    given = {name: t for name, t in pack._asdict().items() if isinstance(t, Tensor)}
    for i in range(case.inputs):
        given[f"x{i}"] = draw.normal(case.rows, case.hidden)
    if case.residual or case.norm:
        given["residual"] = draw.normal(case.rows, case.hidden)
    if case.query:
        given["query"] = draw.normal(case.rows, case.hidden)
    if case.offset:
        given["score_offset"] = draw.normal(case.rows)
    constant = {}
    if case.mask:
        constant["mask"] = draw.mask(case.rows, len(case.sizes))
    if case.norm:
        constant["ln_weight"] = draw.normal(case.hidden)
        constant["ln_bias"] = draw.normal(case.hidden)

    def call(given: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        weights = PackedWeights(
            *(given.get(name) for name in PackedWeights._fields[:5]),
            None if case.temperature is None else given["b_down"].new_tensor(case.temperature),
            *pack[6:],
        )
        keywords = {"mask": given.get("mask"), "backend": backend}
        if case.norm:
            norm = given["ln_weight"], given["ln_bias"], 1e-5, case.norm == "both"
            return adapter_fusion_norm(given["x0"], given["residual"], *norm, weights, **keywords)
        return adapter_fusion(
            [given[f"x{i}"] for i in range(case.inputs)],
            given.get("query"),
            given.get("residual"),
            weights,
            score_offset=given.get("score_offset"),
            **keywords,
        )

    return _leaves(given) | constant, call


def _grouped(case: Groups, draw: _Draw) -> tuple[dict[str, Tensor], Call]:
    weights = stack([draw.pack(case.hidden, *group) for group in case.groups])
    # -1 for base rows, and neighbours of different groups
    runs = torch.randperm(-(-case.rows // case.run), generator=draw.generator)
    numbers = runs.repeat_interleave(case.run)[: case.rows] % (len(case.groups) + 1) - 1
    groups = numbers.int().to(draw.device)
    given = dict(zip(("w_in", "b_in", "w_out"), weights[:3], strict=True))
    given["x"] = draw.normal(case.rows, case.hidden)
    given["residual"] = draw.normal(case.rows, case.hidden)
    constant = {}
    if case.mask:
        constant["mask"] = draw.mask(case.rows, max_scored(weights.counts, weights.scored))

    def call(given: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        own = GroupedWeights(*(given[name] for name in ("w_in", "b_in", "w_out")), *weights[3:])
        return adapter_fusion_grouped(
            given["x"], given["residual"], groups, own, mask=given.get("mask"), backend=backend
        )

    return _leaves(given) | constant, call


def _leaves(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in given.items()}


def _results(call: Call, given: dict[str, Tensor], backend: str, grad: Tensor) -> dict:
    """out, p and the gradient of every argument that has one."""
    out, p = call(given, backend)
    learned = [name for name, t in given.items() if t.requires_grad]
    grads = torch.autograd.grad(out, [given[name] for name in learned], grad)
    found = {f"d{name}": t for name, t in zip(learned, grads, strict=True)}
    found |= {"out": out.detach(), "p": p}
    return {name: t for name, t in found.items() if t.numel() > 0}


def check(case: Case | Groups, dtype: torch.dtype, device: torch.device) -> dict:
    """The largest error over what is allowed, of which result, and whether all agree."""
    draw = _Draw(dtype, device)
    given, call = (_grouped if isinstance(case, Groups) else _mixture)(case, draw)
    grad = draw.normal(case.rows, case.hidden)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in given.items()}
    truth = _results(call, exact, "torch", grad.double())
    plain = _results(call, given, "torch", grad)
    kernel = _results(call, given, "triton", grad)
    again = _results(call, given, "triton", grad)
    worst, culprit = 0.0, "out"
    for name, expected in truth.items():
        error = (kernel[name].double() - expected).abs().max().item()
        allowed = FACTOR * (plain[name].double() - expected).abs().max().item()
        allowed += ROUNDINGS * torch.finfo(kernel[name].dtype).eps * expected.abs().max().item()
        # a NaN is no number below any other
        share = error / allowed if error <= allowed or allowed > 0 else float("inf")
        if not share <= worst:
            worst, culprit = share, name
    repeats = all(torch.equal(kernel[name], again[name]) for name in kernel)
    return {
        "error_over_allowed": round(worst, 3),
        "of": culprit,
        "repeats": repeats,
        "agreed": worst <= 1 and repeats,
    }


def exercise(case: Case | Groups, dtype: torch.dtype, device: torch.device) -> None:
    """The kernels alone, once, for a tool that watches them."""
    draw = _Draw(dtype, device)
    given, call = (_grouped if isinstance(case, Groups) else _mixture)(case, draw)
    _results(call, given, "triton", draw.normal(case.rows, case.hidden))


def check_routing(rows: int, groups: int, block_rows: int, device: torch.device) -> dict:
    """Whether the device's routing tables are the CPU's, entry by entry."""
    ids = torch.randint(-1, groups, (rows,), generator=torch.Generator().manual_seed(1))
    expected = routing_tables(ids, groups, block_rows)
    found = routing_tables(ids.to(device), groups, block_rows)
    agreed = all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    return {"agreed": agreed}
