"""What a compiled kernel takes and does, read from its binary, and what is wrong with it.

NVIDIA: the cubin, as triton's own cuobjdump shows it. AMD: the assembly that the code object is
assembled from, with its metadata. Two figures are not in a cubin: how much shared memory a launch
asks for, which is the compiler's word, and how many columns of tensor memory, which stands in PTX.

What a kernel has to contain comes from its code: products from the first IR, before any pass, and
stores from the IR in which what constants exclude is gone, such as base rows in a plain call. A
binary that lost its work has fewer matrix instructions or stores.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Limits(NamedTuple):
    """Of a multiprocessor (AMD: a compute unit)."""

    shared_of_block: int
    shared: int
    warps: int
    blocks: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Each block takes
# RESERVED bytes of shared memory for itself; registers are given to warps by 256.
NVIDIA = {
    80: Limits(163 << 10, 164 << 10, 64, 32),
    86: Limits(99 << 10, 100 << 10, 48, 16),
    90: Limits(227 << 10, 228 << 10, 64, 32),
    100: Limits(227 << 10, 228 << 10, 64, 32),
    120: Limits(99 << 10, 100 << 10, 48, 24),
}
RESERVED = 1 << 10
TENSOR_COLUMNS = 512
# LLVM's "User Guide for AMDGPU Backend": four SIMDs of at most 8 waves; a wave has a share of 512
# vector registers, accumulators among them, given by 8.
AMD = {"gfx942": Limits(64 << 10, 64 << 10, 32, 32), "gfx950": Limits(160 << 10, 160 << 10, 32, 32)}


class Product(NamedTuple):
    """A product of [m, k] and [k, n] in the code of a kernel."""

    m: int
    n: int
    k: int
    dtype: str
    """Of the operands: "bf16", "f16" or "f32"."""
    precision: str
    """Of "f32": "ieee" or "tf32x3"."""


class Work(NamedTuple):
    """What the code of a kernel says."""

    products: tuple[Product, ...]
    stores: int
    streams: bool
    """There is a loop over tiles that loads operands of a product."""


class Reading(NamedTuple):
    """What a binary says."""

    registers: int
    """Of a thread; on AMD accumulators too."""
    stack: int
    """Bytes of a thread, where spills go."""
    spills: int
    """NVIDIA: instructions that move spills, in a loop; AMD: registers that are spilled, those to
    lanes of a vector register too."""
    shared: int
    """Bytes of a block."""
    tensor_columns: int
    """Of tensor memory."""
    matrix: dict[str, int]
    """How many matrix instructions stand there, by kind."""
    copies: int
    """Asynchronous copies into shared memory."""
    stores: int
    """Stores to device memory."""
    warps: int
    """Of a block."""
    blocks: int
    """How many fit a multiprocessor at once."""


_NAME = r'@("[^"]*"|[^\s(]+)\('
# blocks behind a `return` that a constexpr decides on
_DEAD = re.compile(r"\n *\^bb\d+: +// no predecessors.*?(?=\n *\^bb|\n  })", re.S)


def work(kernel: CompiledKernel) -> Work:
    """What stands in the kernel's code, functions that it calls included."""
    functions = {}
    for text in kernel.asm["source"].split("\n  tt.func ")[1:]:
        functions[re.search(_NAME, text)[1]] = _DEAD.sub("", text)
    entry = next(name for name, text in functions.items() if text.startswith("public"))
    texts = _called(entry, functions)
    return Work(
        tuple(product for text in texts for product in _products(text)),
        len(re.findall(r"\btt\.store\b", kernel.asm["ttir"])),
        _streams(kernel.asm["ttir"]),
    )


def _called(name: str, functions: dict[str, str]) -> Iterator[str]:
    """The text of a function, and those of the ones it calls, as often as it calls them."""
    yield functions[name]
    for callee in re.findall(r"\btt\.call " + _NAME, functions[name]):
        yield from _called(callee, functions)


def _products(text: str) -> Iterator[Product]:
    for line in re.findall(r"\btt\.dot (.*)", text):
        m, k, dtype, n = re.search(
            r": tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x", line
        ).groups()
        precision = re.search(r"inputPrecision = (\w+)", line)
        yield Product(int(m), int(n), int(k), dtype, precision[1] if precision else "ieee")


def _streams(ttir: str) -> bool:
    """Whether a loop's own body has a product and a load of two dimensions."""
    for indent, body in re.findall(r"\n( *)[^\n]*\bscf\.for\b[^\n]*\n(.*?)\n\1}", ttir, re.S):
        own = "\n".join(re.findall(rf"^{indent}  \S.*", body, re.M))
        if "tt.dot " in own and re.search(r"\btt\.load .*tensor<\d+x\d+x", own):
            return True
    return False


def matrix_least(found: Work, target: GPUTarget, warps: int) -> Counter[str]:
    """How many matrix instructions the products need at least, by kind: in a loop the products of
    one pass, each of them by the widest instruction that there is, shared out among the warps."""
    least: Counter[str] = Counter()
    for product in found.products:
        kind, size, issuers = _instruction(product, target, warps)
        if kind is not None:
            times = 3 if product.precision == "tf32x3" else 1
            # 8 of 16 may be padding, which a compiler drops that knows how many are needed
            n = 8 if kind == "HMMA" and product.n == 16 else product.n
            volume = product.m * n * product.k
            least[kind] += times * math.ceil(volume / (size * issuers))
    return least


def _instruction(product: Product, target: GPUTarget, warps: int) -> tuple[str | None, int, int]:
    """The kind of instruction for a product, the largest m*n*k of one, and how many warps or groups
    of warps issue their own."""
    full = product.dtype == "f32"
    if target.backend == "hip":
        deep = target.arch == "gfx950"
        return "v_mfma", 32 * 32 * (2 if full else 16 if deep else 8), warps
    if full and product.precision == "ieee":
        return None, 0, 0
    depth = 8 if full else 16
    if product.m % 64 or target.arch not in (90, 100):
        return "HMMA", 16 * 8 * depth, warps
    if target.arch == 90:
        return "HGMMA", 64 * min(product.n, 256) * depth, warps // 4
    return "UTCHMMA", 128 * min(product.n, 256) * depth, 1


def read(kernel: CompiledKernel) -> Reading:
    """The kernel's binary."""
    target: GPUTarget = kernel.metadata.target
    return _read_cuda(kernel) if target.backend == "cuda" else _read_hip(kernel)


def _read_cuda(kernel: CompiledKernel) -> Reading:
    arch, warps = kernel.metadata.target.arch, kernel.metadata.num_warps
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, static = (
        int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED")
    )
    if arch >= 90 and static:
        static -= RESERVED  # listed there
    code = {
        int(address, 16): (name, rest)
        for address, name, rest in re.findall(
            r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", text
        )
    }
    names = Counter(name.split(".")[0] for name, _ in code.values())
    matrix = {kind: names[kind] for kind in ("HMMA", "HGMMA", "UTCHMMA") if names[kind]}
    matrix |= {"tf32": n} if (n := kernel.asm["ptx"].count(".tf32")) else {}
    shared = kernel.metadata.shared + static
    columns = re.findall(r"tcgen05\.alloc\b.*, (\d+);", kernel.asm["ptx"])
    return Reading(
        registers=registers,
        stack=stack,
        spills=_spills_in_loops(code),
        shared=shared,
        tensor_columns=max(map(int, columns), default=0),
        matrix=matrix,
        copies=sum(names[name] for name in ("LDGSTS", "UTMALDG", "UBLKCP")),
        stores=sum(names[name] for name in ("STG", "ST", "UTMASTG")),
        warps=warps,
        blocks=_blocks_cuda(
            NVIDIA[arch], registers, shared, max(map(int, columns), default=0), warps
        ),
    )


def _spills_in_loops(code: dict[int, tuple[str, str]]) -> int:
    """Instructions on the stack between a branch backwards and where it goes."""
    loops = []
    for address, (name, rest) in code.items():
        to = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and to and int(to[1], 16) < address:
            loops.append((int(to[1], 16), address))
    return sum(
        name.startswith(("LDL", "STL")) and any(first <= at <= last for first, last in loops)
        for at, (name, _) in code.items()
    )


def _blocks_cuda(limits: Limits, registers: int, shared: int, columns: int, warps: int) -> int:
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (16384 // of_warp) // warps  # four parts of 16384 registers
    by_shared = limits.shared // (shared + RESERVED)
    by_columns = TENSOR_COLUMNS // columns if columns else limits.blocks
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared, by_columns)


def _read_hip(kernel: CompiledKernel) -> Reading:
    text, metadata = kernel.asm["amdgcn"], kernel.metadata
    limits, warps = AMD[metadata.target.arch], metadata.num_warps

    def value(name: str) -> int:
        return int(re.search(rf"^ *\.{name}: +(\d+)", text, re.M)[1])

    names = re.findall(r"^\t([a-z]\w+)(?= |$)(.*)", text, re.M)
    count = Counter(name for name, _ in names)
    matrix = {"v_mfma": sum(n for name, n in count.items() if name.startswith("v_mfma"))}
    matrix |= {"tf32": n} if (n := sum(k for name, k in count.items() if "xf32" in name)) else {}
    shared = metadata.shared + value("group_segment_fixed_size")
    registers = value("vgpr_count")
    waves = 4 * min(8, 512 // (-(-registers // 8) * 8))
    return Reading(
        registers=registers,
        stack=value("private_segment_fixed_size"),
        spills=value("vgpr_spill_count"),  # those of scalars go to lanes of vector registers
        shared=shared,
        tensor_columns=0,
        matrix=matrix,
        copies=sum(
            name.startswith("global_load_lds") or (name.startswith("buffer_load") and "lds" in rest)
            for name, rest in names
        ),
        stores=sum(
            n for name, n in count.items()
            if name.startswith(("global_store", "buffer_store", "flat_store"))
        ),
        warps=warps,
        blocks=min(waves // warps, limits.shared // shared if shared else limits.blocks),
    )  # fmt: skip


def faults(kernel: CompiledKernel, reading: Reading) -> list[str]:
    """What is wrong with a binary; empty where nothing is."""
    target, found = kernel.metadata.target, work(kernel)
    cuda = target.backend == "cuda"
    limits = (NVIDIA if cuda else AMD)[target.arch]
    wrong = []

    def expect(good: bool, text: str) -> None:
        if not good:
            wrong.append(text)

    expect(reading.stack == 0, f"{reading.stack} bytes of stack")
    expect(reading.spills == 0, f"{reading.spills} spills")
    limit = limits.shared_of_block
    expect(reading.shared <= limit, f"{reading.shared} bytes of shared memory of {limit}")
    expect(reading.tensor_columns <= TENSOR_COLUMNS, f"{reading.tensor_columns} tensor columns")
    expect(reading.blocks > 0, "not one block fits a multiprocessor")
    for kind, least in matrix_least(found, target, reading.warps).items():
        there = reading.matrix.get(kind, 0)
        expect(there >= least, f"{there} {kind} instructions, the products need {least}")
    if all(product.precision == "ieee" for product in found.products):
        expect("tf32" not in reading.matrix, "tf32 where fp32 is to be multiplied in full")
    else:
        expect("tf32" in reading.matrix, "no tf32 instruction")
    expect(reading.stores >= found.stores, f"{reading.stores} stores of {found.stores}")
    # for AMD the compiler chooses between registers and copies to read ahead
    if found.streams and kernel.metadata.num_stages > 1 and cuda:
        expect(reading.copies > 0, f"no asynchronous copy in {kernel.metadata.num_stages} stages")
    return wrong
