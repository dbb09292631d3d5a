"""What the kernels share: activations, roundings, products of tiles, block sizes and schedules."""

import functools

import torch
from torch import Tensor

import triton
import triton.language as tl
from fastfusion.ops.activations import activation_code
from triton.backends.compiler import GPUTarget

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
):  # fmt: skip
    """acc + a @ w[rows, cols], or its transpose, for a weight of H columns."""
    tile = w_ptr + rows[:, None].to(tl.int64) * H + cols[None, :]
    w = tl.load(tile, mask=mask_rows[:, None] & mask_cols[None, :], other=0.0)
    return tl.dot(a, tl.trans(w) if TRANSPOSED else w, acc, input_precision=PRECISION)


@triton.jit
def dot_one_hot(a, one_hot, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ one_hot for an fp32 `a`, on the matrix units if SPLIT."""
    if SPLIT:
        one_hot = one_hot.to(tl.float32).to(tl.bfloat16)
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(high, one_hot, acc, input_precision=PRECISION)
        return tl.dot(low, one_hot, acc, input_precision=PRECISION)
    return tl.dot(a, one_hot.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def add_bias(acc, bias_ptr, offs, mask):
    return acc + tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :]


INTERPRETED = not isinstance(activate, triton.JITFunction)
if INTERPRETED:
    interpreter.correct()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The accumulators of a row block live in registers. With 192 bottleneck columns (and 16 for the
# scores) nothing spills on sm_90 and little on sm_80 (56 bytes; over groups 328), outside the loops
# over H; with 256 both spill, sm_80 in such a loop (compiled with Triton 3.9).
MAX_COLUMNS = 192 + 16


def padded(size: int) -> int:
    """The block that holds `size` entries: a power of two that a matrix product can take."""
    return max(16, triton.next_power_of_2(size))


def column_blocks(columns: int) -> tuple[int, int]:
    """Two blocks that hold the columns (144: 128 and 16; 256 would nearly double the work), or one
    and 0 where two are no narrower."""
    whole = padded(columns)
    first = whole // 2
    if first < 16 or columns - first > first // 2:
        return whole, 0
    return first, padded(columns - first)


def fits_one_launch(columns: int, adapters: int) -> bool:
    """Whether one program holds the bottlenecks and scores of a row block in registers."""
    return sum(column_blocks(columns)) + padded(adapters) <= MAX_COLUMNS


# A sum over rows is cut into shares of about SPLIT_ROWS of a group's rows, but not into more than
# MAX_SPLITS: each writes and reads the whole gradient in fp32. Small in the interpreter, so that
# tests have several.
SPLIT_ROWS = 64 if INTERPRETED else 512
MAX_SPLITS = 8


def row_splits(num_rows: int, num_groups: int) -> int:
    """How many shares a sum over the rows of each group has, if these are of one size."""
    return min(MAX_SPLITS, max(1, -(-num_rows // (SPLIT_ROWS * num_groups))))


@functools.cache
def target_of(device: torch.device) -> GPUTarget | None:
    """What the kernel is compiled for on a device; None in the interpreter."""
    if INTERPRETED:
        return None
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()


def precision(target: GPUTarget | None) -> str:
    """How fp32 is multiplied: in full, or as three products in tf32 where
    `torch.set_float32_matmul_precision` allows less than "highest"; never as one in tf32."""
    if torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32x3" if target is None or target.backend == "cuda" else "ieee"


def launch(kernel: triton.JITFunction, programs: int, arguments: dict) -> None:
    """The kernel on the device of its tensors; nothing where there is nothing to do."""
    if programs > 0:
        tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            kernel[(programs,)](**arguments)


def schedule(dtype: torch.dtype, target: GPUTarget | None) -> dict[str, int]:
    """Block sizes, warps and stages, from registers and spills of compiled code; never timed."""
    if target is not None and dtype == torch.float32:
        # plain FMAs: the operands too lie in registers, 64 rows spill kilobytes
        rows, k, h, warps, stages = 16, 16, 32, 8, 2
    elif target is None or (target.backend == "cuda" and target.arch // 10 in (9, 10)):
        rows, k, h, warps, stages = 64, 32, 64, 8, 3
    elif target.backend == "cuda":
        # mma.sync in a chain of products: each warp takes 16 rows of all columns, so four warps
        rows, k, h, warps, stages = 64, 16, 64, 4, 3
    else:
        rows, k, h, warps, stages = 64, 32, 64, 4, 2  # 64 KiB of LDS
    return {"BLOCK_T": rows, "BLOCK_K": k, "BLOCK_H": h, "num_warps": warps, "num_stages": stages}


def two_launch_schedule(
    dtype: torch.dtype, target: GPUTarget | None, num_rows: int
) -> dict[str, int]:
    """The same for two launches: BLOCK_D columns in the first, BLOCK_H of H in the second."""
    arch = target.arch // 10 if target is not None and target.backend == "cuda" else None
    if target is None:
        # small, so that tests have many tiles
        rows, d, k, h, warps, stages = 32, 32, 32, 64, 4, 1
    elif dtype == torch.float32:
        rows, d, k, h, warps, stages = 32, 32, 16, 32, 4, 2
    elif num_rows < 4096:
        rows, d, k, h, warps, stages = 64, 64, 64, 64, 4, 3
    elif arch == 9:
        rows, d, k, h, warps, stages = 128, 128, 32, 128, 8, 4
    elif arch == 10:
        rows, d, k, h, warps, stages = 128, 64, 64, 128, 8, 3
    else:
        rows, d, k, h, warps, stages = 128, 64, 32, 128, 8, 3
    if target is not None and target.backend != "cuda":
        stages = 2  # 64 KiB of LDS
    return {
        "BLOCK_T": rows, "BLOCK_D": d, "BLOCK_K": k, "BLOCK_H": h, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip


def backward_schedule(
    dtype: torch.dtype, target: GPUTarget | None, num_rows: int
) -> dict[str, dict[str, int]]:
    """The same for the kernels of `backward.py`; row blocks are of one size in the first three."""
    arch = target.arch // 10 if target is not None and target.backend == "cuda" else None
    options = {"num_warps": 4, "num_stages": 3}
    if target is None:
        # small, so that tests have many tiles
        rows, d, k, h, m, r = 32, 32, 32, 64, 32, 32
    elif dtype == torch.float32:
        rows, d, k, h, m, r, options["num_stages"] = 32, 32, 16, 32, 32, 16, 2
    elif num_rows < 4096:
        rows, d, k, h, m, r = 64, 64, 64, 64, 64, 64
    else:
        rows, d, k, h, m, r, options["num_warps"] = 128, 64, 64, 128, 128, 64, 8
    if target is not None and target.backend != "cuda":
        r, options["num_stages"] = min(r, 32), 2  # 64 KiB of LDS
    elif target is not None and dtype != torch.float32 and arch not in (9, 10):
        # a query of its own makes registers of mma.sync spill beyond this
        d, k = (32, k) if num_rows < 4096 else (d, 32)
    return {
        "columns": {"BLOCK_T": rows, "BLOCK_D": d, "BLOCK_K": k, **options},
        "scores": {"BLOCK_T": rows, "BLOCK_D": 32, **options},
        "input": {"BLOCK_T": rows, "BLOCK_K": r, "BLOCK_H": h, **options},
        "weights": {"BLOCK_M": m, "BLOCK_K": r, "BLOCK_H": h, **options},
    }


def row_schedule(hidden_size: int) -> dict[str, int]:
    """Whole rows in registers: 16 elements of a tensor per thread of NVIDIA's, from 128 threads to
    512."""
    block = triton.next_power_of_2(hidden_size)
    warps = min(16, max(4, block // 512))
    rows = max(1, 2048 // block)
    return {"BLOCK_T": rows, "BLOCK_H": block, "num_warps": warps, "num_stages": 1}


def contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its last dimension contiguous."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
