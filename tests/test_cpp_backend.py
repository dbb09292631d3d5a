"""What concerns the C++ backend alone; parity over all backends is in test_adapter_fusion.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfusion import reference
from fastfusion.absorb import Attention, Bottleneck, pack_absorbed
from fastfusion.configuration import AdapterFusionConfig, SeqBnConfig
from fastfusion.ops import (
    PackedWeights,
    adapter_fusion,
    adapter_fusion_norm,
    cpp_backend,
    torch_backend,
)
from fastfusion.ops.activations import ACTIVATIONS, NATIVE_ACTIVATIONS

EPS = 1e-12
WEIGHT_GRADIENTS = ("dw_down", "db_down", "dw_score", "db_score", "dw_out")
NAMES = ("out", "p", "dx", "dquery", *WEIGHT_GRADIENTS, "doffset")
NORM_NAMES = ("out", "p", "summed", "pre_norm", "dhidden", "dinput", *WEIGHT_GRADIENTS)


def packed(sizes, activations, hidden_size, *, padding=0, adjacent=True, scored=True):
    """Random packed weights; `adjacent` puts the score weights right behind the down weights."""
    columns = sum(sizes)
    rows = columns + len(sizes) + padding
    stacked = torch.randn(columns + rows, hidden_size) / hidden_size**0.5
    w_down, w_score = stacked.split([columns, rows])
    if not adjacent:
        w_score = w_score.clone()
    w_out = torch.randn(rows, hidden_size) / columns**0.5
    w_out[columns + len(sizes) :] = 0
    return PackedWeights(
        w_down,
        torch.randn(columns) * 0.1,
        w_score if scored else None,
        torch.randn(rows) * 0.1 if scored else None,
        w_out,
        torch.tensor(0.7) if scored else None,
        list(sizes),
        list(activations),
    )


def double(value):
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [v.double() for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def truth(name, *args):
    """The torch backend in fp64."""
    return getattr(torch_backend, name)(*map(double, args))


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def forward_and_backward(backend, weights, rows, hidden_size, *, norm=False):
    """Outputs and every gradient of one call by name, inputs drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(weights.w_down.dtype)

    *tensors, sizes, activations = weights
    x, residual, grad = (normal(rows, hidden_size) for _ in range(3))
    mask = (torch.rand(rows, len(sizes), generator=generator) > 0.2).float() / 0.8
    if weights.w_score is None:
        mask = None
    score = weights.w_score is not None
    call = truth if backend == "truth" else lambda name, *args: getattr(backend, name)(*args)
    if not norm:
        out, p = call(
            "adapter_fusion", [x], None, residual, *tensors, mask, None, sizes, activations
        )
        needs = [True, False, True, score, True, False]
        grads = call(
            "adapter_fusion_backward", grad, [x], None, *tensors, mask, p, sizes, activations, needs
        )
        return dict(zip(NAMES, [out, p, *grads], strict=True))
    norm_arguments = (normal(hidden_size), normal(hidden_size), EPS, True)
    out, p, summed, pre_norm = call(
        "adapter_fusion_norm",
        x,
        residual,
        *norm_arguments,
        *tensors,
        mask,
        sizes,
        activations,
        True,
    )
    grads = call(
        "adapter_fusion_norm_backward", grad, None, summed, pre_norm, *norm_arguments, *tensors,
        mask, p, sizes, activations, [True, True, score, True],
    )  # fmt: skip
    return dict(zip(NORM_NAMES, [out, p, summed, pre_norm, *grads], strict=True))


def assert_like_truth(weights, rows, hidden_size, *, norm=False):
    actual, plain, expected = (
        forward_and_backward(backend, weights, rows, hidden_size, norm=norm)
        for backend in (cpp_backend, torch_backend, "truth")
    )
    for name, a in actual.items():
        p, e = plain[name], expected[name]
        assert a.shape == p.shape and a.dtype == p.dtype, name
        if e.numel() and e.norm() > 1e-12:
            # 2e-6: sums of some hundred fp32 products. The score gradients of a few rows cancel, in
            # PyTorch's formulas as here: by chance one or the other comes out worse.
            assert relative_error(a, e) < 4 * relative_error(p, e) + 2e-6, name


@pytest.mark.parametrize("norm", [False, True])
# one row, a chunk of 32, a block of 1024, and one row to either side of each
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 1023, 1024, 1025, 2081])
def test_row_blocks(rows, norm, poisoned_empty):
    assert_like_truth(packed([3, 9], [2, 4], 20, padding=2), rows, 20, norm=norm)


@pytest.mark.parametrize(
    ("sizes", "activations", "hidden_size"),
    [
        ([1], [1], 1),
        ([1, 2, 3], [0, 1, 7], 3),
        ([512, 1], [2, 5], 48),
        ([24] * 64, [1] * 64, 96),
        ([7, 7, 48, 5], [4, 4, 6, 3], 130),
    ],
    ids=["one", "tiny", "512 and 1", "64 adapters", "mixed"],
)
@pytest.mark.parametrize("adjacent", [True, False])
def test_sizes(sizes, activations, hidden_size, adjacent, poisoned_empty):
    weights = packed(sizes, activations, hidden_size, padding=3, adjacent=adjacent)
    assert_like_truth(weights, 45, hidden_size)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("norm", [False, True])
def test_single_adapter(padding, norm, poisoned_empty):
    weights = packed([40], [3], 24, padding=padding, scored=False)
    assert_like_truth(weights, 70, 24, norm=norm)


@pytest.fixture(params=[False, True], ids=["plain", "norm"])
def with_one_and_two_threads(request, set_threads):
    """(name, result with one thread, with two) for the outputs and gradients of one call."""
    weights = packed([48] * 3 + [17], [1, 2, 3, 4], 256)
    results = []
    for threads in (1, 2):
        set_threads(threads)
        results.append(forward_and_backward(cpp_backend, weights, 1500, 256, norm=request.param))
    return [(name, one, results[1][name]) for name, one in results[0].items()]


def test_threads_do_not_change_the_bits_of_outputs_inputs_and_biases(with_one_and_two_threads):
    for name, one, two in with_one_and_two_threads:
        if not name.startswith("dw"):
            assert torch.equal(one, two), name


def test_threads_change_the_weight_gradients_by_rounding_alone(with_one_and_two_threads):
    for name, one, two in with_one_and_two_threads:
        if name.startswith("dw"):
            # one product over all rows, a sum of 1500 terms that the BLAS may split over its
            # threads: another order of the same sum, so a few fp32 roundings apart
            assert relative_error(one, two.double()) < 1e-6, name


def test_the_same_bits_again():
    weights = packed([48] * 8, [2] * 8, 256)
    first, second = (forward_and_backward(cpp_backend, weights, 300, 256) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_adjacent_weights_give_the_same_result():
    weights = packed([48] * 3, [1] * 3, 64, padding=5)
    apart = weights._replace(w_score=weights.w_score.clone())
    assert weights.w_score.data_ptr() == weights.w_down.data_ptr() + weights.w_down.nbytes
    together = forward_and_backward(cpp_backend, weights, 100, 64)
    for name, separate in forward_and_backward(cpp_backend, apart, 100, 64).items():
        torch.testing.assert_close(together[name], separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adjacent", [True, False])
def test_padding_rows_of_the_scores_are_ignored(adjacent):
    weights = packed([5, 6], [1, 2], 16, padding=3, adjacent=adjacent)
    expected = forward_and_backward(cpp_backend, weights, 20, 16)
    weights.w_score[13:] = float("nan")
    weights.b_score[13:] = float("nan")
    for name, actual in forward_and_backward(cpp_backend, weights, 20, 16).items():
        assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("num_inputs", [1, 3])
def test_needs_decide_what_is_computed(num_inputs):
    weights = packed([4, 5, 6], [2, 3, 4], 12)
    *tensors, sizes, activations = weights
    x = [torch.randn(50, 12) for _ in range(num_inputs)]
    query, grad = torch.randn(50, 12), torch.randn(50, 12)
    p = cpp_backend.adapter_fusion(x, query, None, *tensors, None, None, sizes, activations)[1]

    def gradients(needs):
        return cpp_backend.adapter_fusion_backward(
            grad, x, query, *tensors, None, p, sizes, activations, needs
        )

    everything = gradients([True] * 6)
    owners = [0, 1, 2, 2, 3, 3, 4, 5]  # which of the needs each gradient belongs to
    for wanted in range(6):
        only = gradients([i == wanted for i in range(6)])
        for owner, full, alone in zip(owners, everything, only, strict=True):
            if owner == wanted:
                assert torch.equal(full, alone)
            else:
                assert alone.numel() == 0


def test_gradient_through_a_query_that_is_one_of_several_inputs():
    weights = packed([4, 5], [2, 2], 12)
    x = [torch.randn(9, 12, requires_grad=True) for _ in range(2)]
    grad = torch.randn(9, 12)
    implicit, _ = adapter_fusion(x, None, None, weights, backend="cpp")
    explicit, _ = adapter_fusion(x, x[0], None, weights, backend="cpp")
    for one, two in zip(
        torch.autograd.grad(implicit, x, grad), torch.autograd.grad(explicit, x, grad), strict=True
    ):
        torch.testing.assert_close(one, two)


def value_and_slope(code, x):
    """An activation and its derivative at every `x` [T, 1], through the two ops."""
    one, zero = torch.ones(1, 1), torch.zeros(1)
    weights = (one, zero, None, None, torch.tensor([[1.0], [0.0]]), None)
    value, _ = cpp_backend.adapter_fusion([x], None, None, *weights, None, None, [1], [code])
    slope, *_ = cpp_backend.adapter_fusion_backward(
        torch.ones_like(x), [x], None, *weights, None, torch.empty(0), [1], [code],
        [True, False, False, False, False, False],
    )  # fmt: skip
    return value, slope[0]


@pytest.mark.parametrize("code", range(NATIVE_ACTIVATIONS))
def test_activations_are_as_accurate_as_torch(code):
    points = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([-1e4, -0.0, 0.0, 1e-6, 1e4])])
    x = points.unsqueeze(-1)
    value, slope = value_and_slope(code, x)
    activation, exact = ACTIVATIONS[code], x.double()
    expected = activation.forward(exact)
    torch_error = (activation.forward(x).double() - expected).abs() / (1 + expected.abs())
    error = (value.double() - expected).abs() / (1 + expected.abs())
    # two units in the last place of values near one, or torch's own error
    assert error.max() <= max(torch_error.max().item(), 2.4e-7)
    expected = activation.backward(torch.ones_like(exact), exact)
    torch_error = (activation.backward(torch.ones_like(x), x).double() - expected).abs()
    assert (slope.double() - expected).abs().max() <= max(2 * torch_error.max().item(), 5e-7)


@pytest.mark.parametrize("code", range(NATIVE_ACTIVATIONS))
def test_activations_of_huge_inputs(code):
    # |x| from 88 on: where exp overflows
    points = torch.tensor([88.0, 88.5, 89.0, 100.0, 1e4, 1e19, 1e20, 1e36, 3e38])
    x = torch.cat([points, -points]).unsqueeze(-1)
    value, slope = value_and_slope(code, x)
    # fp64: torch's own fp32 gives inf for gelu(3e38) and nan for the slope of gelu_new
    activation, exact = ACTIVATIONS[code], x.double()
    torch.testing.assert_close(value.double(), activation.forward(exact), rtol=3e-7, atol=1e-30)
    expected = activation.backward(torch.ones_like(exact), exact)
    torch.testing.assert_close(slope.double(), expected, rtol=3e-7, atol=1e-30)


def test_nan_and_infinite_inputs_are_seen():
    weights = packed([4, 4], [1, 2], 8)
    for value in (float("nan"), float("inf")):
        x = torch.randn(3, 8)
        x[1, 2] = value
        with torch.no_grad():
            out, _ = adapter_fusion([x], None, None, weights, backend="cpp")
        assert not out[1].isfinite().any()
        assert out[[0, 2]].isfinite().all()


def test_large_scores_do_not_overflow():
    weights = packed([4, 4], [0, 0], 8)._replace(temperature=torch.tensor(1e-4))
    with torch.no_grad():
        out, p = adapter_fusion([torch.randn(30, 8) * 10], None, None, weights, backend="cpp")
    assert out.isfinite().all()
    torch.testing.assert_close(p.sum(-1), torch.ones(30))


def test_opcheck():
    weights = packed([4, 5], [2, 3], 12, padding=2)
    *tensors, sizes, activations = weights
    tensors = [t.clone().requires_grad_() if i < 5 else t for i, t in enumerate(tensors)]
    x = torch.randn(6, 12, requires_grad=True)
    residual = torch.randn(6, 12, requires_grad=True)
    args = ([x], None, residual, *tensors, None, None, sizes, activations, "cpp")
    torch.library.opcheck(torch.ops.fastfusion.adapter_fusion, args)
    norm = (torch.ones(12), torch.zeros(12), 1e-5, True)
    args = (x, residual, *norm, *tensors, None, sizes, activations, True, "cpp")
    torch.library.opcheck(torch.ops.fastfusion.adapter_fusion_norm, args)


def test_gradients_through_autograd():
    weights = packed([4, 5], [2, 3], 12, padding=2)
    x, residual = torch.randn(40, 12), torch.randn(40, 12)

    def gradients(backend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual, *weights[:5])]
        x_, residual_, *tensors = leaves
        own = PackedWeights(*tensors, weights.temperature.to(dtype), *weights[6:])
        out, _ = adapter_fusion([x_], None, residual_, own, backend=backend)
        ln = torch.ones(12, dtype=dtype), torch.zeros(12, dtype=dtype)
        out, _ = adapter_fusion_norm(out, residual_, *ln, 1e-5, False, own, backend=backend)
        return torch.autograd.grad(out.square().sum() + out[:, 0].sum(), leaves)

    for actual, expected in zip(
        gradients("cpp", torch.float32), gradients("torch", torch.float64), strict=True
    ):
        assert relative_error(actual, expected) < 1e-5


@pytest.fixture(params=["bf16 products", "fp32 products"])
def bf16_products(request, monkeypatch):
    """Both ways, whatever the processor has: without bf16 instructions PyTorch emulates them."""
    native = request.param == "bf16 products"
    monkeypatch.setattr(cpp_backend, "multiplies_bf16", lambda: native)
    return native


def in_bf16(weights):
    """The same weights in bf16, the score weights right behind the down weights."""
    low = [tensor if tensor is None else tensor.bfloat16() for tensor in weights[:5]]
    if weights.w_score is not None:
        stacked = torch.cat([low[0], low[2]])
        low[0], low[2] = stacked.split([low[0].shape[0], low[2].shape[0]])
    return PackedWeights(*low, *weights[5:])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sizes", [[24, 24, 8], [5, 6], [24]])
def test_bf16_against_torch_in_bf16(bf16_products, norm, sizes, poisoned_empty):
    errors = {}
    # the errors of single draws scatter by a factor of two: compare their means
    draws = 4
    for seed in range(draws):
        torch.manual_seed(seed)
        scored = len(sizes) > 1
        weights = in_bf16(packed(sizes, [2] * len(sizes), 96, padding=1, scored=scored))
        if scored:
            weights.w_score[-1] = float("nan")  # padding
        exact, plain, ours = (
            forward_and_backward(backend, weights, 64, 96, norm=norm)
            for backend in ("truth", torch_backend, cpp_backend)
        )
        for name, o in ours.items():
            p, e = plain[name], exact[name]
            assert o.shape == p.shape and o.dtype == p.dtype, name
            if e.numel() and e.norm() > 1e-12:
                pair = torch.tensor([relative_error(o, e), relative_error(p, e)])
                errors[name] = errors.get(name, 0) + pair / draws
    for name, (error, plain_error) in errors.items():
        # torch rounds the sum of residual and mixture once less
        assert error <= 2 * plain_error, name


@pytest.mark.parametrize("adapters", [2, 8])
def test_bf16_is_no_worse_than_the_literal_path(bf16_products, adapters):
    hidden_size, size, sequence = 96, 16, 128
    adapter_config, fusion_config = SeqBnConfig(reduction_factor=6), AdapterFusionConfig()

    def normal(*shape):
        return (torch.randn(*shape) / shape[-1] ** 0.5).bfloat16()

    bottlenecks = [
        Bottleneck(
            normal(size, hidden_size), normal(size), normal(hidden_size, size), normal(hidden_size),
            1.0, None, None, 1,
        )
        for _ in range(adapters)
    ]  # fmt: skip
    square = [normal(hidden_size, hidden_size) for _ in range(3)]
    attention = Attention(square[0], normal(hidden_size), square[1], normal(hidden_size), square[2])
    x = torch.randn(1, sequence, hidden_size).bfloat16()

    def literal(dtype):
        names = ("adapter_down.0.weight", "adapter_down.0.bias")
        names += ("adapter_up.weight", "adapter_up.bias")
        rows = x.to(dtype)
        up = [
            reference.adapter_up(
                rows,
                {n: t.to(dtype) for n, t in zip(names, b[:4], strict=True)},
                adapter_config,
                1.0,
            )
            for b in bottlenecks
        ]
        names = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
        fusion = {n: t.to(dtype) for n, t in zip(names, attention, strict=True)}
        return reference.adapter_fusion(rows, torch.stack(up, dim=2), rows, fusion, fusion_config)[
            0
        ][0]

    # packed as the inference cache does: in fp32, cast once
    wide = [Bottleneck(*(t.float() for t in b[:4]), *b[4:]) for b in bottlenecks]
    weights = pack_absorbed(wide, Attention(*(t.float() for t in attention)))
    weights = PackedWeights(*(t.bfloat16() for t in weights[:5]), *weights[5:])
    with torch.no_grad():
        ours, _ = adapter_fusion([x[0]], None, x[0], weights, backend="cpp")
    exact = literal(torch.float64)
    assert relative_error(ours, exact) <= relative_error(literal(torch.bfloat16), exact)


def test_refusals():
    weights = packed([4], [1], 8)
    x = torch.randn(3, 8)
    assert cpp_backend.refusal(x, weights) is None
    assert "float64" in cpp_backend.refusal(x.double(), weights)
    assert "w_down" in cpp_backend.refusal(x.bfloat16(), weights)
    assert "w_out" in cpp_backend.refusal(x, weights._replace(w_out=weights.w_out.half()))
    assert "meta" in cpp_backend.refusal(x.to("meta"), weights)
    with pytest.raises(ValueError, match="'cpp' cannot run this: it needs float32 or bfloat16"):
        adapter_fusion([x.double()], None, None, weights, backend="cpp")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("residual", [1, 8]), ("query", [4, 8]), ("score_offset", [4, 1]), ("b_down", [3])],
)
def test_wrong_shapes_never_reach_the_memory(name, shape):
    with pytest.raises(RuntimeError, match=f"{name}: expected a contiguous"):
        call_op(**{name: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [[], [48], [6, 8, 1]])
@pytest.mark.parametrize("name", ["x", "w_down", "w_score", "w_out"])
def test_matrices_of_other_dimensions_are_refused(name, shape):
    value = torch.zeros(shape)
    named = "the input" if name == "x" else name
    with pytest.raises(RuntimeError, match=f"{named}: expected two dimensions"):
        call_op(**{name: [value] if name == "x" else value})


def test_no_input_is_refused():
    with pytest.raises(RuntimeError, match="x: expected one tensor or more; got none"):
        call_op(x=[])


@pytest.mark.parametrize(
    "sizes", [[4, 1], [4, 3], [7, -1], [-1, 7], [2**63 - 1, 7], [4, 2**63 - 1], [-(2**63), 6]]
)
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(RuntimeError, match=r"sizes: expected .*the sum 6") as error:
        call_op(sizes=sizes)
    assert f"got {sizes}" in str(error.value)


@pytest.mark.parametrize("wanted", ["query", "score_offset"])
def test_a_single_adapter_has_no_gradient_for_the_query_or_the_offset(wanted):
    weights = packed([4], [1], 8, scored=False)
    *tensors, sizes, activations = weights
    needs = [False, wanted == "query", False, False, False, wanted == "score_offset"]
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="needs: without w_score neither query nor score_offset"):
        cpp_backend.adapter_fusion_backward(
            x, [x], x, *tensors, None, torch.empty(0), sizes, activations, needs
        )


def call_op(**changed):
    """`adapter_fusion_cpu` with correct arguments but for `changed`, below the Python checks."""
    *tensors, sizes, activations = packed([4, 2], [1, 1], 8)
    names = ("w_down", "b_down", "w_score", "b_score", "w_out", "temperature")
    arguments = {
        "x": [torch.randn(3, 8)],
        "query": None,
        "residual": None,
        **dict(zip(names, tensors, strict=True)),
        "mask": None,
        "score_offset": None,
        "sizes": sizes,
        "activations": activations,
    }
    return torch.ops.fastfusion.adapter_fusion_cpu(*(arguments | changed).values())


def test_the_messages_name_no_build_directory():
    with pytest.raises(RuntimeError) as error:
        call_op(residual=torch.zeros(1, 8))
    assert " csrc/cpu/tensors.h:" in str(error.value)


def test_without_the_extension_the_import_says_why():
    code = """
import sys
sys.modules["fastfusion._C"] = None
try:
    import fastfusion.ops.cpp_backend
except ImportError as error:
    assert "fastfusion._C is not built" in str(error), error
    assert "torch >= 2.13" in str(error), error
else:
    raise SystemExit("imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_compile_leaves_no_earlier_library(tmp_path):
    root = Path(__file__).resolve().parent.parent
    shutil.copy(root / "setup.py", tmp_path)
    for source in root.glob("csrc/**/*.cpp"):
        broken = tmp_path / source.relative_to(root)
        broken.parent.mkdir(parents=True, exist_ok=True)
        broken.write_text("#error broken\n")
    earlier = tmp_path / "fastfusion" / "_C.abi3.so"
    earlier.parent.mkdir()
    earlier.touch()
    # the surroundings may require the extension
    environment = {k: v for k, v in os.environ.items() if k != "FASTFUSION_REQUIRE_EXT"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    result = subprocess.run(build, env=environment, **run)
    assert result.returncode == 0, result.stderr
    assert "installing without the C++ extension: the compiler failed" in result.stderr
    assert not earlier.exists()
    earlier.touch()
    required = subprocess.run(build, env=environment | {"FASTFUSION_REQUIRE_EXT": "1"}, **run)
    assert required.returncode != 0
    assert "FASTFUSION_REQUIRE_EXT=1, but the compiler failed" in required.stderr
    assert earlier.exists()
