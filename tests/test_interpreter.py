"""What `kernels/triton/interpreter.py` corrects in Triton's interpreter, each against torch.

TRITON_INTERPRET=1 pytest tests/test_interpreter.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

import fastfusion.kernels.triton.tiles  # noqa: F401  corrects the interpreter

SIZE, DEPTH = 32, 128
INFINITY = float("inf")


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + rows[None, :])
    out_tile = out_ptr + rows[:, None] * N + rows[None, :]
    tl.store(out_tile, tl.dot(a, b, tl.load(out_tile), input_precision=PRECISION))


@triton.jit
def convert_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


def dot(a, b, precision="ieee", start=0.0):
    out = torch.full((SIZE, SIZE), start)
    dot_kernel[(1,)](a_ptr=a, b_ptr=b, out_ptr=out, N=SIZE, K=DEPTH, PRECISION=precision)
    return out


def convert(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    convert_kernel[(1,)](x_ptr=x, out_ptr=out, N=x.numel())
    return out


def operands(dtype):
    return torch.randn(SIZE, DEPTH).to(dtype), torch.randn(DEPTH, SIZE).to(dtype)


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_exact_and_sums_in_fp32(dtype):
    """Also where "tf32" is asked for: that is about fp32 operands."""
    a, b = operands(dtype)
    truth = 3.0 + a.double() @ b.double()
    for precision in ("ieee", "tf32x3") if dtype == torch.float32 else ("ieee", "tf32"):
        # fp32 sums of DEPTH terms: some roundings of 6e-8
        assert relative_error(dot(a, b, precision, start=3.0), truth) < 5e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_beyond_the_dtype(dtype):
    """64 * 64 * 128 is above fp16's range; and 1 more is lost in bf16, and in fp16."""
    a, b = torch.full((SIZE, DEPTH), 64.0), torch.full((DEPTH, SIZE), 64.0)
    out = dot(a.to(dtype), b.to(dtype), start=1.0)
    assert torch.equal(out, torch.full_like(out, 64 * 64 * DEPTH + 1))


def test_tf32_shows():
    """Ten bits of mantissa, cut off: up to 2^-10 of each factor."""
    a, b = operands(torch.float32)
    assert 1e-4 < relative_error(dot(a, b, "tf32"), a.double() @ b.double()) < 2e-3


def test_tf32_keeps_what_fits():
    """Factors of ten bits lose nothing."""
    a, b = (t.half().float() for t in operands(torch.float32))
    assert relative_error(dot(a, b, "tf32"), a.double() @ b.double()) < 5e-7


def floats(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.uint32).view(torch.float32)


ROUNDED = {
    "below a tie": (0x3F807FFF, 0x3F80),
    "a tie, even below": (0x3F808000, 0x3F80),
    "a tie, even above": (0x3F818000, 0x3F82),
    "above a tie": (0x3F808001, 0x3F81),
    "into the exponent": (0x3FFFFFFF, 0x4000),
    "a negative tie, even below": (0xBF808000, 0xBF80),
    "a negative tie, even above": (0xBF818000, 0xBF82),
    "infinity": (0x7F800000, 0x7F80),
    "minus infinity": (0xFF800000, 0xFF80),
    "to infinity": (0x7F7FFFFF, 0x7F80),
    "the largest": (0x7F7F7FFF, 0x7F7F),
    "subnormal": (0x00010000, 0x0001),
    "a subnormal tie": (0x00018000, 0x0002),
    "to zero": (0x00008000, 0x0000),
    "zero": (0x00000000, 0x0000),
    "minus zero": (0x80000000, 0x8000),
}


@pytest.mark.parametrize("bits, expected", ROUNDED.values(), ids=ROUNDED)
def test_rounding_to_nearest_even(bits, expected):
    assert convert(floats(bits), torch.bfloat16).view(torch.uint16).item() == expected


def test_nan_stays_nan():
    """Cut off, the second would be an infinity; rounded up, the last two zeros."""
    x = floats(0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)
    assert x.isnan().all()
    assert convert(x, torch.bfloat16).isnan().all()


def test_conversion_as_torch_rounds():
    """Random bits: every exponent, both signs."""
    x = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32).view(torch.float32)
    x = x[~x.isnan()][:2048]
    rounded = convert(x, torch.bfloat16)
    assert torch.equal(rounded, x.bfloat16())
    assert torch.equal(convert(rounded, torch.float32), rounded.float())
