"""The Triton forward in the interpreter: every schedule, the sizes it is for, and its norms."""

import contextlib
import os

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from fastfusion.kernels.triton import backend as triton_backend  # noqa: E402
from fastfusion.kernels.triton import schedules, tiles  # noqa: E402
from fastfusion.ops import torch_backend  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter"),
    pytest.mark.usefixtures("poisoned_empty"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE = {
    "max_columns": 4096, "BLOCK_T": 64, "BLOCK_K": 32, "BLOCK_H": 64, "num_warps": 8,
    "num_stages": 1,
}  # fmt: skip
TWO = {
    "BLOCK_T": 32, "BLOCK_D": 32, "BLOCK_K": 32, "BLOCK_H": 64, "SWAPPED": False,
    "FUSED_NORM": True, "columns_num_warps": 4, "num_warps": 4, "num_stages": 1,
}  # fmt: skip
FEW = {"BLOCK_T": 16, "BLOCK_D": 16, "SWAPPED": True, "FUSED_NORM": False}
SCHEDULES = {
    "one launch": (ONE, TWO),
    "two launches": ({"max_columns": 0}, TWO),
    "norm in a launch of its own": ({"max_columns": 0}, {**TWO, "FUSED_NORM": False}),
    "few rows": ({"max_columns": 0}, {**TWO, **FEW}),
}


@pytest.fixture(params=SCHEDULES)
def planned(request):
    """Every call takes one schedule, whatever its sizes are."""
    one, two = SCHEDULES[request.param]
    names = {
        "one_launch": one, "one_launch_norm": one,
        "two_launches": two, "two_launches_norm": two, "two_launches_general": two,
    }  # fmt: skip
    entries = [
        {"schedules": [name], "archs": ["interpreter"], "bits": [16, 32], "blocks": blocks}
        for name, blocks in names.items()
    ]
    with schedules.first(*entries):
        yield request.param


def call(rows, hidden, sizes, dtype, *, score=True, mask=False, temperature=None):
    """The tensors of `adapter_fusion_norm`, at the sizes that a trained model has."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    columns, adapters = sum(sizes), len(sizes)
    weights = [
        randn(columns, hidden, std=hidden**-0.5),
        randn(columns, std=0.1),
        randn(columns + adapters, hidden, std=(hidden * max(sizes)) ** -0.5) if score else None,
        randn(columns + adapters, std=0.3) if score else None,
        randn(columns + adapters, hidden, std=0.1),
        None if temperature is None else torch.tensor(temperature),
        (torch.rand(rows, adapters, generator=generator) > 0.3).float() / 0.7 if mask else None,
    ]
    return {
        "x": randn(rows, hidden),
        "residual": randn(rows, hidden),
        "ln_weight": 1 + randn(hidden, std=0.1),
        "ln_bias": randn(hidden, std=0.1),
        "weights": weights,
        "layout": (list(sizes), [1] * adapters),
    }


def as_double(given: dict) -> dict:
    def double(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    found = {name: double(value) for name, value in given.items()}
    return {**found, "weights": [double(weight) for weight in given["weights"]]}


def plain(backend, given):
    return backend.adapter_fusion(
        [given["x"]], None, given["residual"], *given["weights"], None, *given["layout"]
    )


def norm(backend, given, ln_before, save):
    out, p, summed, pre_norm = backend.adapter_fusion_norm(
        given["x"], given["residual"], given["ln_weight"], given["ln_bias"], 1e-5, ln_before,
        *given["weights"], *given["layout"], save,
    )  # fmt: skip
    if save:  # kept up to a number for each row, which the norm does not see
        pre_norm = pre_norm - pre_norm.mean(-1, keepdim=True)
    return out, p, summed, pre_norm


def assert_as_good(results, literal, truth, factor=2.0) -> None:
    """The three-way rule: not much worse than PyTorch in the same dtype. Twice its error, as both
    sum in another order and one may be lucky, and four roundings of the largest value."""
    for value, other, expected in zip(results, literal, truth, strict=True):
        assert value.shape == expected.shape
        if expected.numel() == 0:
            continue
        assert value.isfinite().all()
        allowed = factor * (other.double() - expected).abs().max()
        allowed += 4 * torch.finfo(value.dtype).eps * expected.abs().max()
        assert (value.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("case", ["plain", "after", "before-and-after", "kept", "single", "mask"])
def test_every_schedule(planned, case, dtype):
    """41 rows: no block is full; 100 columns of H: the last tiles are not either."""
    given = call(
        41, 100, (24, 7, 33), dtype, score=case != "single", mask=case == "mask",
        temperature=2.0 if case == "mask" else None,
    )  # fmt: skip
    double = as_double(given)
    if case == "plain":
        found = [plain(b, g) for b, g in with_backends(given, double)]
    else:
        options = (case != "after", case == "kept")
        found = [norm(b, g, *options) for b, g in with_backends(given, double)]
    assert_as_good(*found)


def with_backends(given, double):
    return [(triton_backend, given), (torch_backend, given), (torch_backend, double)]


@pytest.mark.parametrize(
    "hidden, sizes",
    [(64, (4,) * 64), (384, (24,) * 4), (768, (48,) * 3), (1600, (512, 4, 65)), (8192, (16,))],
    ids=str,
)
def test_sizes(planned, hidden, sizes):
    given = call(5, hidden, sizes, torch.bfloat16)
    double = as_double(given)
    for ln_before in (True, False):
        assert_as_good(*(norm(b, g, ln_before, False) for b, g in with_backends(given, double)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("mean", [30.0, -1000.0])
def test_norm_of_rows_far_from_zero(planned, mean, dtype):
    """The absorbed LayerNorm subtracts what the rows have in common before it multiplies. The rows
    are exact in every dtype, so that what is measured is the op."""
    given = call(19, 64, (8, 8), dtype)
    spread = torch.randint(-4, 5, (19, 64), generator=torch.Generator().manual_seed(0))
    given["x"] = (spread * 8 + mean).to(dtype)
    given["residual"] = torch.full((19, 64), mean).to(dtype)
    double = as_double(given)
    assert_as_good(*(norm(b, g, True, False) for b, g in with_backends(given, double)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
def test_norm_of_rows_whose_first_entries_are_far_away(planned, dtype):
    """What is subtracted is near the mean of the whole row, not of its first tile."""
    given = call(19, 768, (8, 8), dtype)
    for name in ("x", "residual"):
        given[name][:, :32] += 15
    double = as_double(given)
    assert_as_good(*(norm(b, g, True, False) for b, g in with_backends(given, double)))


def test_constant_rows(planned):
    """A row without variance is its bias, as in PyTorch; nothing is divided by zero."""
    given = call(3, 64, (8,), torch.float32)
    given["x"], given["residual"] = torch.full((3, 64), 2.5), torch.full((3, 64), -0.5)
    given["weights"][4].zero_()
    out = norm(triton_backend, given, True, False)[0]
    expected = F.layer_norm(torch.full((3, 64), 2.0), [64], given["ln_weight"], given["ln_bias"])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ln_before", [False, True], ids=["after", "before-and-after"])
def test_norm_of_strided_parameters(planned, ln_before):
    given = call(5, 40, (6, 3), torch.float32)
    expected = norm(triton_backend, given, ln_before, False)[0]
    for name in ("ln_weight", "ln_bias"):
        given[name] = torch.stack([given[name], given[name] + 7], -1)[:, 0]
        assert not given[name].is_contiguous()
    assert torch.equal(norm(triton_backend, given, ln_before, False)[0], expected)


@contextlib.contextmanager
def fp32_precision(of_products, of_all):
    """PyTorch's settings, set back by hand: they are no attributes that can be deleted."""
    backends = (torch.backends, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend, value in zip(backends, (of_all, of_products), strict=True):
        backend.fp32_precision = value
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def test_three_products_in_tf32(planned):
    """Where PyTorch may use tf32, fp32 is multiplied as three tf32 products: nearly as good as in
    full, and not one product in tf32 (1e-3)."""
    given = call(41, 100, (24, 7, 33), torch.float32)
    truth = plain(torch_backend, as_double(given))[0]
    with fp32_precision("tf32", "none"):
        out = plain(triton_backend, given)[0]
    assert not torch.equal(out, plain(triton_backend, given)[0])
    assert (out - truth).abs().max() <= 4e-6 * truth.abs().max()


@pytest.mark.parametrize(
    "ours, everyones, dtype, expected",
    [
        ("none", "none", torch.float32, "ieee"),
        ("none", "tf32", torch.float32, "tf32x3"),
        ("ieee", "tf32", torch.float32, "ieee"),
        ("tf32", "none", torch.float32, "tf32x3"),
        ("tf32", "none", torch.bfloat16, "ieee"),
    ],
)
def test_precision_follows_pytorch(ours, everyones, dtype, expected):
    with fp32_precision(ours, everyones):
        assert tiles.precision(dtype, None) == expected
    assert tiles.precision(dtype, None) == "ieee"
