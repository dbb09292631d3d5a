"""Triton's interpreter, set right where it computes something else than a GPU would.

The interpreter of Triton 3.6 to 3.9 keeps bf16 as raw bits: `tl.dot` multiplies these, and a
conversion to bf16 cuts the low bits off instead of rounding. And it ignores `input_precision`, so
that a product in tf32 looks like one in fp32. `tiles.py` calls `correct` where the interpreter
was chosen (TRITON_INTERPRET=1); nothing is changed otherwise.
"""

import numpy as np

import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16 numbers, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def tf32(x: np.ndarray) -> np.ndarray:
    """The ten bits of mantissa that the matrix units read of an fp32 number."""
    return (np.ascontiguousarray(x).view(np.uint32) & 0xFFFFE000).view(np.float32)


def _values(handle: TensorHandle) -> np.ndarray:
    is_bf16 = handle.dtype.scalar == tl.bfloat16
    return bf16_to_fp32(handle.data) if is_bf16 else handle.data


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    x, y = _values(a), _values(b)
    if x.dtype != np.float32 or a.dtype.scalar == tl.bfloat16:
        input_precision = ir.INPUT_PRECISION.IEEE  # it says how fp32 is multiplied
    if input_precision == ir.INPUT_PRECISION.TF32:
        product = tf32(x) @ tf32(y)
    elif input_precision == ir.INPUT_PRECISION.TF32x3:
        high_x, high_y = tf32(x), tf32(y)
        product = high_x @ tf32(y - high_y) + tf32(x - high_x) @ high_y + high_x @ high_y
    else:
        product = np.matmul(x, y, dtype=d.data.dtype)
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


_convert = InterpreterBuilder.cast_impl


def _cast(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.float32 and target == tl.bfloat16:
        return TensorHandle(fp32_to_bf16(src.data), target)
    if source == tl.bfloat16 and target == tl.float32:
        return TensorHandle(bf16_to_fp32(src.data), target)
    return _convert(self, src, dst_type)


def correct() -> None:
    """Replace the interpreter's products and conversions in this process."""
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
