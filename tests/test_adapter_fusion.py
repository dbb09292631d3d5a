"""Every backend of the two ops against one oracle: `literal`, adapter by adapter, autograd.

    pytest tests/test_adapter_fusion.py                          # torch, cpp
    TRITON_INTERPRET=1 pytest tests/test_adapter_fusion.py       # triton on CPU tensors
    pytest -m gpu tests/test_adapter_fusion.py                   # triton on a GPU

The rule for errors: `truth` is the oracle in fp64, `plain` the oracle in the test's dtype, on the
same numbers; a backend may err as much as `plain` does, times a factor for another order of
summation, plus the rounding of the result.
"""

import os
from dataclasses import dataclass, replace
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.activations import ACT2FN

from fastfusion import reference
from fastfusion.ops import PackedWeights, adapter_fusion, adapter_fusion_norm, backends
from fastfusion.ops.activations import ACTIVATIONS, NATIVE_ACTIVATIONS, activation_code

# transformers 4.57 does not have these two
MISSING = {"hardswish": F.hardswish, "sqrtsoftplus": lambda x: F.softplus(x).sqrt()}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = {"torch": "cpu", "cpp": "cpu", "triton": "cpu" if INTERPRETED else "cuda"}
DTYPES = {
    "torch": [torch.float32, torch.bfloat16, torch.float16],
    "cpp": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.bfloat16, torch.float16],
}
if INTERPRETED:
    BACKENDS = ["triton"]
else:
    BACKENDS = ["torch", "cpp", pytest.param("triton", marks=pytest.mark.gpu)]
BACKENDS_AND_DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}", marks=getattr(entry, "marks", ()))
    for entry in BACKENDS
    for name in (entry.values if hasattr(entry, "values") else [entry])
    for dtype in DTYPES[name]
]
NATIVE = [activation.name for activation in ACTIVATIONS[:NATIVE_ACTIVATIONS]]
# what is no business of a backend runs in one process only
backend_free = pytest.mark.skipif(INTERPRETED, reason="independent of the backends")
pytestmark = pytest.mark.usefixtures("poisoned_empty", *["launches"] * INTERPRETED)


def plain(activation: str):
    """transformers' own function of this name."""
    return ACT2FN[activation] if activation in ACT2FN else MISSING[activation]


# --------------------------------------------------------------------------------------------------
# the oracle


def literal(x, query, residual, weights, mask=None, score_offset=None):
    """The definition of the op, one adapter after the other, in the dtype of its arguments."""
    sizes, num_adapters = weights.sizes, len(weights.sizes)
    columns = sum(sizes)
    x = x * num_adapters if len(x) == 1 else x
    query = x[0] if query is None else query
    scores, values, start = [], [], 0
    for i, (size, code) in enumerate(zip(sizes, weights.activations, strict=True)):
        own = slice(start, start + size)
        z = F.linear(x[i], weights.w_down[own], weights.b_down[own])
        z = plain(ACTIVATIONS[code].name)(z)
        values.append(z @ weights.w_out[own] + weights.w_out[columns + i])
        if weights.w_score is not None:
            t = F.linear(query, weights.w_score[own], weights.b_score[own])
            c = query @ weights.w_score[columns + i] + weights.b_score[columns + i]
            scores.append((z * t).sum(-1) + c)
        start += size
    if weights.w_score is None:
        p, out = None, sum(values)
    else:
        scores = torch.stack(scores, -1)
        scores = scores if score_offset is None else scores + score_offset[:, None]
        scores = scores if mask is None else scores * mask
        scores = scores if weights.temperature is None else scores / weights.temperature
        p = torch.softmax(scores, -1)
        out = sum(p[:, i, None] * value for i, value in enumerate(values))
    return (out if residual is None else residual + out), p


def literal_norm(hidden, input, ln_weight, ln_bias, ln_eps, ln_before, weights, mask=None):
    norm = ([hidden.shape[-1]], ln_weight, ln_bias, ln_eps)
    summed = hidden + input
    x = F.layer_norm(summed, *norm) if ln_before else hidden
    out, p = literal([x], None, summed, weights, mask)
    return F.layer_norm(out, *norm), p


# --------------------------------------------------------------------------------------------------
# the cases


@dataclass(frozen=True)
class Case:
    rows: int = 37
    hidden: int = 37
    sizes: tuple[int, ...] = (5, 1, 16)
    activations: tuple[str, ...] = ("gelu",)
    score: bool = True
    query: bool = False
    residual: bool = True
    inputs: int = 1
    mask: bool = False
    offset: bool = False
    temperature: float | None = None
    padding: int = 0


CASES = {
    "plain": Case(),
    "no-residual": Case(residual=False),
    "no-rows": Case(rows=0, mask=True, offset=True),
    "no-rows-equal": Case(rows=0, sizes=(4, 4), query=True),
    "one-row": Case(rows=1, mask=True),
    "five-rows": Case(rows=5, query=True, temperature=3.0),
    "many-rows": Case(rows=300, sizes=(12, 12, 12), mask=True, padding=1),
    "two-column-blocks": Case(sizes=(30, 7, 33), hidden=72, mask=True, offset=True),
    "mask": Case(mask=True),
    "offset": Case(mask=True, offset=True, temperature=0.5),
    "offset-alone": Case(offset=True),
    "temperature": Case(temperature=50.0),
    "query": Case(query=True, mask=True),
    "inputs": Case(inputs=3),
    "inputs-query": Case(inputs=3, query=True, mask=True, offset=True, temperature=2.0),
    "padding-rows": Case(sizes=(5, 1, 16), padding=7, mask=True),
    "one-adapter": Case(sizes=(6,), mask=True),
    "single": Case(sizes=(24,), score=False),
    "sum": Case(sizes=(5, 16, 3), score=False, activations=("gelu", "relu", "gelu")),
    "sum-inputs": Case(sizes=(5, 16), score=False, inputs=2),
    "single-bare": Case(sizes=(1,), score=False, residual=False, padding=6),
    "d-1": Case(sizes=(1, 1, 1, 1)),
    "sixteen": Case(sizes=(3,) * 16, mask=True),
    "mixed": Case(sizes=(4, 5, 6, 4), activations=("gelu", "relu", "tanh", "gelu"), mask=True),
    "everything": Case(
        rows=70, hidden=40, sizes=(8, 3, 8), activations=("silu", "leaky_relu", "linear"),
        query=True, mask=True, offset=True, temperature=1.5, padding=2,
    ),
}  # fmt: skip

IN_16_BITS = [
    "plain", "no-rows", "many-rows", "two-column-blocks", "inputs-query", "single", "everything",
]  # fmt: skip


def tensors_of(case: Case, dtype, device, scale=1.0) -> dict[str, torch.Tensor | None]:
    """Random arguments. Scores are of the order of one, so that the softmax weighs, not picks."""
    columns, adapters = sum(case.sizes), len(case.sizes)
    rows = columns + adapters + case.padding
    # drawn in fp64 and rounded, so that every dtype's oracle reads the numbers the backend reads
    generator = torch.Generator().manual_seed(1)

    def randn(*shape, std=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (std * scale * values).to(dtype).to(device)

    narrow = case.hidden**-0.5
    w_score = randn(rows, case.hidden, std=narrow * max(1, *case.sizes) ** -0.5)
    w_out = randn(rows, case.hidden, std=0.5)
    w_out[columns + adapters :] = 0
    keep = (torch.rand(case.rows, adapters, generator=generator) > 0.3).to(dtype).to(device)
    given = {
        **{f"x{i}": randn(case.rows, case.hidden) for i in range(case.inputs)},
        "query": randn(case.rows, case.hidden) if case.query else None,
        "residual": randn(case.rows, case.hidden) if case.residual else None,
        "w_down": randn(columns, case.hidden, std=narrow),
        "b_down": randn(columns, std=0.5),
        "w_score": w_score if case.score else None,
        "b_score": randn(rows, std=0.5) if case.score else None,
        "w_out": w_out,
        "score_offset": randn(case.rows) if case.offset else None,
        "mask": keep / 0.75 if case.mask else None,
        "grad": randn(case.rows, case.hidden),
    }
    return given


def weights_of(case: Case, given: dict) -> PackedWeights:
    names = case.activations * (len(case.sizes) if len(case.activations) == 1 else 1)
    temperature = None
    if case.temperature is not None:
        temperature = torch.tensor(case.temperature, device=given["w_down"].device)
    tensors = [given[name] for name in ("w_down", "b_down", "w_score", "b_score", "w_out")]
    codes = [activation_code(name) for name in names]
    return PackedWeights(*tensors, temperature, list(case.sizes), codes)


CONSTANT = ("mask", "grad")


def run(function, case: Case, given: dict, learn=None) -> dict[str, torch.Tensor]:
    """`function`'s out, p and the gradient of every argument in `learn` (default: of each)."""
    learn = [name for name in given if name not in CONSTANT] if learn is None else learn
    given = {
        name: value if value is None else value.detach().requires_grad_(name in learn)
        for name, value in given.items()
    }
    x = [given[f"x{i}"] for i in range(case.inputs)]
    out, p = function(
        x, given["query"], given["residual"], weights_of(case, given),
        mask=given["mask"], score_offset=given["score_offset"],
    )  # fmt: skip
    results = {"out": out.detach()}
    if p is not None and case.score:
        results["p"] = p.detach()
    if out.requires_grad:
        out.backward(given["grad"])
    for name, value in given.items():
        if value is not None and value.grad is not None:
            results[f"d{name}"] = value.grad
    return results


def on(backend: str):
    """The op on one backend, in the form of `literal`."""

    def function(x, query, residual, weights, mask=None, score_offset=None):
        return adapter_fusion(
            x, query, residual, weights, mask=mask, score_offset=score_offset, backend=backend
        )

    return function


def as_double(given: dict) -> dict:
    return {name: value if value is None else value.double() for name, value in given.items()}


def assert_as_good(results: dict, plain: dict, truth: dict, dtype, skip=(), factor=2) -> None:
    """The three-way rule for every result.

    Twice the error of `plain`: both sum the same terms in another order, so one may be lucky. Plus
    four roundings of the largest value: a case of few terms has a `plain` without any error.
    """
    assert results.keys() == truth.keys()
    for name, expected in truth.items():
        if name in skip:
            continue
        value = results[name]
        assert value.shape == expected.shape, name
        assert value.isfinite().all(), name
        if expected.numel() == 0:
            continue
        error = (value.double() - expected).abs().max().item()
        allowed = factor * (plain[name].double() - expected).abs().max().item()
        allowed += 4 * torch.finfo(value.dtype).eps * expected.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


# --------------------------------------------------------------------------------------------------
# parity


def for_each_backend(in_fp32, in_16_bits):
    """Parametrize by the name of a case, backend and dtype."""
    params = [
        pytest.param(name, *entry.values, id=f"{name}-{entry.id}", marks=entry.marks)
        for name in in_fp32
        for entry in BACKENDS_AND_DTYPES
        if entry.values[1] == torch.float32 or name in in_16_bits
    ]
    return pytest.mark.parametrize("name, backend, dtype", params)


@for_each_backend(CASES, IN_16_BITS)
def test_parity(name, backend, dtype):
    case = CASES[name]
    given = tensors_of(case, dtype, DEVICE[backend])
    truth = run(literal, case, as_double(given))
    results = run(on(backend), case, given)
    assert_as_good(results, run(literal, case, given), truth, dtype)
    assert results["out"].dtype == dtype
    if case.score:
        assert results["p"].dtype == torch.float32


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("activation", NATIVE)
def test_native_activations(activation, backend, dtype):
    # five times the usual spread, into the flat ends too; scores stay of the order of one
    case = Case(rows=20, sizes=(9, 3), activations=(activation,), mask=True)
    given = tensors_of(case, dtype, DEVICE[backend])
    given["w_down"] = given["w_down"] * 5
    given["w_score"] = given["w_score"] / 5
    truth = run(literal, case, as_double(given))
    assert_as_good(run(on(backend), case, given), run(literal, case, given), truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_tanh_keeps_its_digits(backend):
    case = Case(sizes=(8,), hidden=8, activations=("tanh",), score=False, residual=False)
    given = tensors_of(case, torch.float32, DEVICE[backend])
    given["w_down"] = 1e-3 * torch.eye(8, device=DEVICE[backend])
    given["b_down"] = torch.zeros_like(given["b_down"])
    given["w_out"] = torch.eye(9, 8, device=DEVICE[backend])
    truth = literal([given["x0"].double()], None, None, weights_of(case, as_double(given)))[0]
    out = on(backend)([given["x0"]], None, None, weights_of(case, given))[0]
    torch.testing.assert_close(out.double(), truth, rtol=5e-7, atol=0)


@backend_free
@pytest.mark.parametrize("activation", [a.name for a in ACTIVATIONS])
def test_activation_and_derivative(activation):
    x = torch.linspace(-13, 13, 4001, dtype=torch.float64)  # no kink lies on these points but 0
    x = x[x != 0].requires_grad_()
    mine = ACTIVATIONS[activation_code(activation)]
    expected = plain(activation)(x)
    torch.testing.assert_close(mine.forward(x), expected)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(mine.backward(dy, x.detach()), dx)


@backend_free
@pytest.mark.parametrize("activation", [a.name for a in ACTIVATIONS])
def test_gradcheck(activation):
    case = Case(
        rows=3, hidden=4, sizes=(2, 1), activations=(activation,), query=True, mask=True,
        offset=True, temperature=2.0, padding=1,
    )  # fmt: skip
    given = tensors_of(case, torch.float64, "cpu")
    mask = given["mask"] + 0.25  # a dropped score would have no gradient to check
    names = [n for n in given if n not in CONSTANT]

    def function(*values):
        changed = {**given, **dict(zip(names, values, strict=True))}
        return on("torch")(
            [changed["x0"]], changed["query"], changed["residual"], weights_of(case, changed),
            mask, changed["score_offset"],
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(
        function, [given[n].requires_grad_() for n in names], fast_mode=True
    )


@backend_free
@pytest.mark.parametrize("name", ["everything", "inputs", "inputs-query", "single"])
def test_torch_backend_in_double(name):
    case = CASES[name]
    given = tensors_of(case, torch.float64, "cpu")
    results, truth = run(on("torch"), case, given), run(literal, case, given)
    assert results.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(results[name], truth[name], rtol=1e-12, atol=1e-12)


@backend_free
def test_against_literal_attention():
    """The packs, derived here by hand, against AdapterFusion as it is defined."""
    hidden, sizes, temperature = 12, (5, 3), torch.tensor(1.7, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    down, b_down = [randn(d, hidden) for d in sizes], [randn(d) for d in sizes]
    up, b_up = [randn(hidden, d) for d in sizes], [randn(hidden) for _ in sizes]
    w_q, b_q, w_k, b_k, w_v = (
        randn(hidden, hidden), randn(hidden), randn(hidden, hidden), randn(hidden),
        randn(hidden, hidden),
    )  # fmt: skip
    x, residual, mask = randn(7, hidden), randn(7, hidden), torch.rand(7, 2).double() * 2
    leaves = [x, residual, *down, *b_down, *up, *b_up, w_q, b_q, w_k, b_k, w_v]

    parameters = {
        "query.weight": w_q, "query.bias": b_q, "key.weight": w_k, "key.bias": b_k,
        "value.weight": w_v,
    }  # fmt: skip
    config = dict(
        query=True, key=True, value=True, value_before_softmax=True, residual_before=False
    )
    z = [F.relu(F.linear(x, d, b)) for d, b in zip(down, b_down, strict=True)]
    outputs = [F.linear(z_i, u, b) for z_i, u, b in zip(z, up, b_up, strict=True)]
    expected, expected_p = reference.adapter_fusion(
        x[None], torch.stack(outputs, -2)[None], residual[None], parameters, config, temperature,
        mask[None],
    )  # fmt: skip

    k = torch.stack([w_k @ b + b_k for b in b_up])
    weights = PackedWeights(
        torch.cat(down),
        torch.cat(b_down),
        torch.cat(
            [*(u.t() @ w_k.t() @ w_q for u in up), torch.stack([w_q.t() @ k_i for k_i in k])]
        ),
        torch.cat([*(u.t() @ w_k.t() @ b_q for u in up), torch.stack([k_i @ b_q for k_i in k])]),
        torch.cat([*((w_v @ u).t() for u in up), torch.stack([w_v @ b for b in b_up])]),
        temperature,
        list(sizes),
        [activation_code("relu")] * 2,
    )
    out, p = adapter_fusion([x], None, residual, weights, mask=mask, backend="torch")
    torch.testing.assert_close(out, expected[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(p, expected_p[0].detach(), rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, leaves, grad)
    for value, truth in zip(mine, torch.autograd.grad(expected[0], leaves, grad), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# which gradients, which layouts


SUBSETS = [
    (), ("x0",), ("query",), ("residual",), ("w_down",), ("b_down",), ("w_score",), ("b_score",),
    ("w_out",), ("score_offset",), ("x0", "residual"), ("x0", "query", "residual"),
    ("w_down", "w_out"), ("w_down", "b_down", "w_score", "b_score", "w_out"),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learn", SUBSETS, ids=lambda names: "+".join(names) or "none")
def test_only_what_is_needed(learn, backend):
    case = CASES["everything"]
    given = tensors_of(case, torch.float32, DEVICE[backend])
    everything = run(on(backend), case, given)
    some = run(on(backend), case, given, learn)
    assert some.keys() == {"out", "p", *(f"d{name}" for name in learn)}
    for name, value in some.items():
        torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_recording(backend):
    case = CASES["everything"]
    given = tensors_of(case, torch.float32, DEVICE[backend])
    expected = run(on(backend), case, given)
    with torch.no_grad():
        results = run(on(backend), case, given)
    for name in ("out", "p"):
        torch.testing.assert_close(results[name], expected[name], rtol=0, atol=0)


def strided(value: torch.Tensor | None, layout: str) -> torch.Tensor | None:
    """The same numbers in another layout."""
    if value is None or value.dim() == 0:
        return value
    if layout == "columns" and value.dim() == 2:
        return value.t().contiguous().t()
    if layout == "rows":
        wide = torch.full([*value.shape[:-1], value.shape[-1] + 3], float("nan"))
        wide = wide.to(value)
        wide[..., 1:-2] = value
        return wide[..., 1:-2]
    every_other = torch.full([*value.shape, 2], float("nan")).to(value)
    every_other[..., 0] = value
    return every_other[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["columns", "rows", "every-other"])
@pytest.mark.parametrize("name", ["everything", "inputs-query"])
def test_non_contiguous(name, layout, backend):
    case = CASES[name]
    given = tensors_of(case, torch.float32, DEVICE[backend])
    results = run(on(backend), case, {key: strided(v, layout) for key, v in given.items()})
    for key, value in run(on(backend), case, given).items():
        torch.testing.assert_close(results[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend):
    case = Case(mask=True)
    given = tensors_of(case, torch.float32, DEVICE[backend])
    given["grad"] = torch.ones_like(given["grad"])
    expected = run(on(backend), case, given)
    given["grad"] = torch.ones((), device=DEVICE[backend]).expand(given["grad"].shape)
    for key, value in run(on(backend), case, given).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_that_is_the_input(backend):
    """An explicit query that is x: its gradient and x's are one sum."""
    case = Case(mask=True)
    given = tensors_of(case, torch.float32, DEVICE[backend])
    expected = run(on(backend), case, given)

    def function(x, query, *rest, **kwargs):
        return on(backend)(x, x[0], *rest, **kwargs)

    for key, value in run(function, case, given).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# properties


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_sums_to_one(backend):
    case = Case(rows=64, mask=True, temperature=0.1, offset=True)
    given = tensors_of(case, torch.float32, DEVICE[backend], scale=3.0)
    p = run(on(backend), case, given)["p"]
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[:, 0]), rtol=0, atol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_adapters(backend):
    case = Case(sizes=(5, 2, 9), activations=("relu", "gelu", "tanh"), mask=True, padding=2)
    given = tensors_of(case, torch.float32, DEVICE[backend])
    expected = run(on(backend), case, given)
    columns, starts = sum(case.sizes), (0, 5, 7)
    for order in permutations(range(3)):
        moved = [row for i in order for row in range(starts[i], starts[i] + case.sizes[i])]
        rows = [*moved, *(columns + i for i in order), columns + 3, columns + 4]
        permuted = {
            **given,
            **{name: given[name][moved] for name in ("w_down", "b_down")},
            **{name: given[name][rows] for name in ("w_score", "b_score", "w_out")},
            "mask": given["mask"][:, list(order)],
        }
        other = replace(
            case,
            sizes=tuple(case.sizes[i] for i in order),
            activations=tuple(case.activations[i] for i in order),
        )
        results = run(on(backend), other, permuted)
        torch.testing.assert_close(
            results["p"], expected["p"][:, list(order)], rtol=1e-5, atol=1e-6
        )
        for name in ("out", "dx0", "dresidual"):
            torch.testing.assert_close(results[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_cancels_without_dropout(backend):
    case = Case()
    given = tensors_of(case, torch.float32, DEVICE[backend])
    expected = run(on(backend), case, given)
    given["score_offset"] = torch.randn(case.rows, device=DEVICE[backend])
    results = run(on(backend), case, given)
    torch.testing.assert_close(results["out"], expected["out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        results["dscore_offset"], torch.zeros_like(given["score_offset"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores_stay_finite(backend):
    case = Case(sizes=(4, 4))
    given = tensors_of(case, torch.float32, DEVICE[backend])
    given["w_score"] = given["w_score"] * 1e4
    results = run(on(backend), case, given)
    for name, value in results.items():
        assert value.isfinite().all(), name
    torch.testing.assert_close(results["p"].max(-1).values, torch.ones_like(results["p"][:, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_touch_each_other(backend):
    case = Case(rows=130, sizes=(4, 7), mask=True)
    given = tensors_of(case, torch.float32, DEVICE[backend])
    expected = on(backend)([given["x0"]], None, None, weights_of(case, given), given["mask"])[0]
    spoilt = given["x0"].clone()
    spoilt[77] = float("nan")
    out = on(backend)([spoilt], None, None, weights_of(case, given), given["mask"])[0]
    assert out[77].isnan().all()
    kept = [row for row in range(130) if row != 77]
    torch.testing.assert_close(out[kept], expected[kept], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again(backend):
    case = CASES["many-rows"]
    given = tensors_of(case, torch.float32, DEVICE[backend])
    first, second = run(on(backend), case, given), run(on(backend), case, given)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mask_and_temperature_dtypes(dtype, backend):
    """Neither has to be of the inputs' dtype."""
    case = Case(rows=9, sizes=(4, 4), mask=True)
    given = tensors_of(case, torch.float32, DEVICE[backend])
    weights = weights_of(case, given)
    mask = given["mask"].round()
    expected = literal([given["x0"]], None, None, weights._replace(temperature=2.0), mask)[0]
    temperature = torch.tensor(2.0, dtype=dtype, device=DEVICE[backend])
    weights = weights._replace(temperature=temperature)
    out = on(backend)([given["x0"]], None, None, weights, mask.to(dtype))[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# with the sub-layer's norms around it


def run_norm(function, case, given, ln_before, learn):
    given = {
        name: value if value is None else value.detach().requires_grad_(name in learn)
        for name, value in given.items()
    }
    out, p = function(
        given["x0"], given["residual"], given["ln_weight"], given["ln_bias"], 1e-5, ln_before,
        weights_of(case, given), mask=given["mask"],
    )  # fmt: skip
    if learn:
        out.backward(given["grad"])
    results = {f"d{name}": given[name].grad for name in learn}
    return {"out": out.detach(), **results, **({"p": p.detach()} if case.score else {})}


def norm_tensors_of(case, dtype, device):
    given = tensors_of(case, dtype, device)
    given["ln_weight"] = (1 + 0.3 * torch.randn(case.hidden)).to(dtype).to(device)
    given["ln_bias"] = (0.3 * torch.randn(case.hidden)).to(dtype).to(device)
    return given


WEIGHTS = ("w_down", "b_down", "w_score", "b_score", "w_out")


@for_each_backend(
    ["plain", "many-rows", "no-rows-equal", "single", "temperature"], ["plain", "single"]
)
@pytest.mark.parametrize("ln_before", [False, True], ids=["after", "before-and-after"])
def test_norm_parity(name, ln_before, backend, dtype):
    case = replace(CASES[name], query=False, residual=True)
    given = norm_tensors_of(case, dtype, DEVICE[backend])
    learn = ["x0", "residual", *(WEIGHTS if case.score else ("w_down", "b_down", "w_out"))]

    def op(*args, **kwargs):
        return adapter_fusion_norm(*args, **kwargs, backend=backend)

    truth = run_norm(literal_norm, case, as_double(given), ln_before, learn)
    plain = run_norm(literal_norm, case, given, ln_before, learn)
    # between two norms a rounding of p grows by what its row is divided by: of 300 rows the worst
    # is another one for each order of summing, while medians over seeds are the same
    results = run_norm(op, case, given, ln_before, learn)
    assert_as_good(results, plain, truth, dtype, factor=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ln_before", [False, True], ids=["after", "before-and-after"])
@pytest.mark.parametrize(
    "learn", [(), ("x0",), ("residual",), ("w_down",), ("w_score",), ("w_out",)]
)
def test_norm_only_what_is_needed(learn, ln_before, backend):
    case = Case(mask=True)
    given = norm_tensors_of(case, torch.float32, DEVICE[backend])

    def op(*args, **kwargs):
        return adapter_fusion_norm(*args, **kwargs, backend=backend)

    everything = run_norm(op, case, given, ln_before, ["x0", "residual", *WEIGHTS])
    for name, value in run_norm(op, case, given, ln_before, learn).items():
        torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-6)


@backend_free
@pytest.mark.parametrize("ln_before", [False, True], ids=["after", "before-and-after"])
def test_norm_gradcheck(ln_before):
    case = Case(rows=3, hidden=4, sizes=(2, 1), mask=True)
    given = norm_tensors_of(case, torch.float64, "cpu")
    names = ["x0", "residual", *WEIGHTS]

    def function(*values):
        changed = {**given, **dict(zip(names, values, strict=True))}
        return adapter_fusion_norm(
            changed["x0"], changed["residual"], given["ln_weight"], given["ln_bias"], 1e-5,
            ln_before, weights_of(case, changed), mask=given["mask"], backend="torch",
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(
        function, [given[n].requires_grad_() for n in names], fast_mode=True
    )


@backend_free
def test_norm_refuses_a_trainable_layer_norm():
    case = Case()
    given = norm_tensors_of(case, torch.float32, "cpu")
    out, _ = adapter_fusion_norm(
        given["x0"], given["residual"], given["ln_weight"].requires_grad_(), given["ln_bias"],
        1e-5, True, weights_of(case, given), backend="torch",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="ln_weight and ln_bias must not require gradients"):
        out.sum().backward()


# --------------------------------------------------------------------------------------------------
# torch.library, torch.compile


def op_arguments(case, given, backend):
    """The positional arguments of `torch.ops.fastfusion.adapter_fusion`."""
    x = [given[f"x{i}"] for i in range(case.inputs)]
    *tensors, sizes, activations = weights_of(case, given)
    tail = (given["mask"], given["score_offset"], sizes, activations, backend)
    return (x, given["query"], given["residual"], *tensors, *tail)


def require_grad(given: dict) -> dict:
    for name, value in given.items():
        if value is not None and name not in CONSTANT and not name.startswith("ln_"):
            value.requires_grad_()
    return given


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["inputs-query", "single"])
def test_opcheck_compile(name, backend):
    case = CASES[name]
    given = require_grad(tensors_of(case, torch.float32, DEVICE[backend]))
    op = torch.ops.fastfusion.adapter_fusion.default
    torch.library.opcheck(op, op_arguments(case, given, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ln_before", [False, True], ids=["after", "before-and-after"])
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
def test_opcheck_norm_compile(save, ln_before, backend):
    case = Case(mask=True, padding=2)
    given = norm_tensors_of(case, torch.float32, DEVICE[backend])
    given = require_grad(given) if save else given
    *tensors, sizes, activations = weights_of(case, given)
    norm = (given["ln_weight"], given["ln_bias"], 1e-5, ln_before)
    args = (given["x0"], given["residual"], *norm, *tensors, given["mask"], sizes, activations)
    torch.library.opcheck(torch.ops.fastfusion.adapter_fusion_norm.default, (*args, save, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend):
    """Forward and backward, and one graph for all numbers of rows."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(on(backend), fullgraph=True, dynamic=True, backend=counter)
    for rows in (37, 20):
        case = replace(CASES["everything"], rows=rows)
        given = tensors_of(case, torch.float32, DEVICE[backend])
        expected = run(on(backend), case, given)
        for name, value in run(compiled, case, given).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_shapes(backend):
    """The fake implementation against what the backends give, for unused gradients too."""
    case = Case(mask=True, padding=1)
    given = tensors_of(case, torch.float32, DEVICE[backend])
    args = op_arguments(case, given, backend)
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda v: v.to("meta"), args)
    for real, fake in zip(
        torch.ops.fastfusion.adapter_fusion(*args),
        torch.ops.fastfusion.adapter_fusion(*meta),
        strict=True,
    ):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


# --------------------------------------------------------------------------------------------------
# errors and the choice of the backend


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(w_down=torch.zeros(21, 37)),
            r"w_down: expected \[22, 37\]; got \[21, 37\]",
        ),
        (dict(x0=torch.zeros(37, 36)), r"x\[0\]: expected \[37, 37\]; got \[37, 36\]"),
        (dict(x0=torch.zeros(2, 3, 37)), r"mask: expected \[2, 3\]"),
        (dict(w_out=torch.zeros(24, 37)), r"w_out: expected \[25, 37\]; got \[24, 37\]"),
        (dict(w_out=torch.zeros(25, 8)), r"w_out: expected \[25, 37\]; got \[25, 8\]"),
        (dict(b_down=torch.zeros(1)), r"b_down: expected \[22\]; got \[1\]"),
        (dict(b_score=torch.zeros(3)), r"b_score: expected .*; got \[3\]"),
        (dict(residual=torch.zeros(1, 37)), r"residual: expected \[37, 37\]; got \[1, 37\]"),
        (dict(query=torch.zeros(2, 37)), r"query: expected \[37, 37\]; got \[2, 37\]"),
        (dict(score_offset=torch.zeros(1)), r"score_offset: expected \[37\]; got \[1\]"),
        (dict(mask=torch.zeros(37, 2)), r"mask: expected \[37, 3\]; got \[37, 2\]"),
    ],
)
@backend_free
def test_shape_errors(change, message):
    case = Case(mask=True)
    given = {**tensors_of(case, torch.float32, "cpu"), **change}
    with pytest.raises(ValueError, match=message):
        run(on("torch"), case, given)


@backend_free
def test_number_of_inputs():
    case = Case(inputs=2)
    with pytest.raises(ValueError, match="x: expected 1 or 3 tensors; got 2"):
        run(on("torch"), case, tensors_of(case, torch.float32, "cpu"))


@backend_free
def test_choice_of_backend():
    case = Case()
    chosen = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        given = tensors_of(case, dtype, "cpu")
        chosen[dtype] = backends.choose(None, given["x0"], weights_of(case, given))
    assert chosen == {
        torch.float32: "cpp",
        torch.bfloat16: "cpp",
        torch.float16: "torch",
        torch.float64: "torch",
    }
    relu6 = replace(case, activations=("relu6",))
    given = tensors_of(relu6, torch.float32, "cpu")
    assert backends.choose(None, given["x0"], weights_of(relu6, given)) == "torch"


@backend_free
def test_refusals_by_name():
    case = Case()
    given = tensors_of(case, torch.float64, "cpu")
    weights = weights_of(case, given)
    with pytest.raises(ValueError, match="backend: 'cpp' cannot run this: .*float64"):
        adapter_fusion([given["x0"]], None, None, weights, backend="cpp")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this: .*TRITON_INTERPRET=1"):
        adapter_fusion([given["x0"]], None, None, weights, backend="triton")
    with pytest.raises(ValueError, match="backend: expected None or one of .*; got 'cuda'"):
        adapter_fusion([given["x0"]], None, None, weights, backend="cuda")


@pytest.mark.skipif(not INTERPRETED, reason="the triton backend's limits")
@pytest.mark.parametrize(
    "case, dtype, message",
    [
        (Case(), torch.float64, "float32, bfloat16 or float16; x is torch.float64"),
        (Case(activations=("mish",)), torch.float32, "it has no mish"),
    ],
)
def test_triton_refusals(case, dtype, message):
    given = tensors_of(case, dtype, "cpu")
    with pytest.raises(ValueError, match=f"backend: 'triton' cannot run this: .*{message}"):
        run(on("triton"), case, given)


@pytest.mark.skipif(not INTERPRETED, reason="the triton backend's limits")
def test_triton_refuses_mixed_dtypes():
    case = Case()
    given = tensors_of(case, torch.float32, "cpu")
    given["w_out"] = given["w_out"].bfloat16()
    with pytest.raises(ValueError, match="w_out is torch.bfloat16 on cpu, x torch.float32 on cpu"):
        run(on("triton"), case, given)


SIZES = [(192,), (97, 95), (1,) * 32, (8,) * 16, (193,), (1,) * 64, (512, 4, 65), (48,) * 8, (0, 1)]
SIZES += [(0, 40, 0, 0, 25, 0)]


@pytest.mark.skipif(not INTERPRETED, reason="the widest block takes a second")
@pytest.mark.parametrize("inputs", [1, 2], ids=["", "inputs"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_triton_on_both_sides_of_its_border(sizes, inputs):
    inputs = 1 if inputs == 1 else len(sizes)
    case = Case(rows=5, hidden=20, sizes=sizes, mask=True, inputs=inputs)
    given = tensors_of(case, torch.float32, "cpu")
    truth = run(literal, case, as_double(given), [])
    plain = run(literal, case, given, [])
    assert_as_good(run(on("triton"), case, given, []), plain, truth, torch.float32)
