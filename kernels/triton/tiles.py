"""What the kernels share: activations, products of tiles, and how they are launched."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

import triton
import triton.language as tl
from fastfusion.ops.activations import activation_code
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from . import interpreter

LINEAR = tl.constexpr(activation_code("linear"))
RELU = tl.constexpr(activation_code("relu"))
GELU = tl.constexpr(activation_code("gelu"))
GELU_NEW = tl.constexpr(activation_code("gelu_new"))
SILU = tl.constexpr(activation_code("silu"))
TANH = tl.constexpr(activation_code("tanh"))
SIGMOID = tl.constexpr(activation_code("sigmoid"))
LEAKY_RELU = tl.constexpr(activation_code("leaky_relu"))


@triton.jit
def _tanh(x):
    # the quotient loses the low bits of small x, the series (to x^9) is exact to fp32 below 1/4
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    y = x * x
    series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def activation(x, CODE: tl.constexpr):
    if CODE == RELU:
        return tl.where(x < 0, 0.0, x)  # a NaN stays one
    elif CODE == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == GELU_NEW:
        # (1 + tanh(u)) / 2 = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif CODE == SILU:
        return x * tl.sigmoid(x)
    elif CODE == TANH:
        return _tanh(x)
    elif CODE == SIGMOID:
        return tl.sigmoid(x)
    elif CODE == LEAKY_RELU:
        return tl.where(x < 0, 0.01 * x, x)
    else:
        tl.static_assert(CODE == LINEAR, "an activation that this kernel has not")
        return x


@triton.jit
def activation_derivative(x, CODE: tl.constexpr):
    """As PyTorch has it where the function has a kink: 0 for relu, 0.01 for leaky_relu."""
    if CODE == RELU:
        return tl.where(x <= 0, 0.0, 1.0)
    elif CODE == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif CODE == GELU_NEW:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif CODE == SILU:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif CODE == TANH:
        y = _tanh(x)
        return 1.0 - y * y
    elif CODE == SIGMOID:
        s = tl.sigmoid(x)
        return s * (1.0 - s)
    elif CODE == LEAKY_RELU:
        return tl.where(x > 0, 1.0, 0.01)
    else:
        tl.static_assert(CODE == LINEAR, "an activation that this kernel has not")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def activate(pre, code, CODES: tl.constexpr):
    """Each column's own activation: one pass for each code that occurs."""
    z = activation(pre, CODES[0])
    for j in tl.static_range(1, len(CODES)):
        z = tl.where((code == CODES[j])[None, :], activation(pre, CODES[j]), z)
    return z


@triton.jit
def activate_backward(dz, pre, code, CODES: tl.constexpr):
    """The gradient of `pre`, from that of `activate(pre, code, CODES)`."""
    derivative = activation_derivative(pre, CODES[0])
    for j in tl.static_range(1, len(CODES)):
        own = (code == CODES[j])[None, :]
        derivative = tl.where(own, activation_derivative(pre, CODES[j]), derivative)
    return dz * derivative


@triton.jit
def dot_rows(
    a, w_ptr, rows, mask_rows, cols, mask_cols, acc,
    H: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    SWAPPED: tl.constexpr = False,
):  # fmt: skip
    """acc + a @ w[rows, cols], or its transpose, for a weight of H columns; SWAPPED: the weight is
    the first factor, and acc transposed."""
    tile = w_ptr + rows[:, None].to(tl.int64) * H + cols[None, :]
    w = tl.load(tile, mask=mask_rows[:, None] & mask_cols[None, :], other=0.0)
    if TRANSPOSED:
        w = tl.trans(w)
    if SWAPPED:
        return tl.dot(tl.trans(w), tl.trans(a), acc, input_precision=PRECISION)
    else:  # what follows a return is compiled too
        return tl.dot(a, w, acc, input_precision=PRECISION)


@triton.jit
def dot_one_hot(a, one_hot, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ one_hot for an fp32 `a`, on the matrix units if SPLIT."""
    if SPLIT:
        one_hot = one_hot.to(tl.float32).to(tl.bfloat16)
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(high, one_hot, acc, input_precision=PRECISION)
        return tl.dot(low, one_hot, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, one_hot.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def add_bias(acc, bias_ptr, offs, mask):
    return acc + tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :]


INTERPRETED = not isinstance(activate, triton.JITFunction)
if INTERPRETED:
    interpreter.correct()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Triton's `cdiv` and `next_power_of_2` serve kernels too, and take 10 us on the host.
def ceil_div(size: int, block: int) -> int:
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest that is not less than `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """The block that holds `size` entries: a power of two that a matrix product can take."""
    return max(16, power_of_two(size))


def precision(dtype: torch.dtype, target: GPUTarget | None) -> str:
    """How products are multiplied: fp32 in full, or as three products in tf32 where PyTorch's own
    may be one (`torch.set_float32_matmul_precision`); never as one in tf32."""
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = torch.backends.fp32_precision
    is_cuda = target is None or target.backend == "cuda"
    return "tf32x3" if dtype == torch.float32 and allowed == "tf32" and is_cuda else "ieee"


# Of the process, not of a thread: autograd's threads launch kernels too.
_watchers: list[list[CompiledKernel]] = []


@contextlib.contextmanager
def launched() -> Iterator[list[CompiledKernel]]:
    """The kernels that are launched inside, as compiled for them; none in the interpreter."""
    found: list[CompiledKernel] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers[:] = [watcher for watcher in _watchers if watcher is not found]


def launch(kernel: triton.JITFunction, programs: int, arguments: dict) -> None:
    """The kernel on the device of its tensors; nothing where there is nothing to do."""
    if programs > 0:
        tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            compiled = kernel[(programs,)](**arguments)
        if compiled is not None:
            for watcher in _watchers:
                watcher.append(compiled)


def contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its last dimension contiguous."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
