"""The Triton kernels compiled ahead of time, for GPUs that need not be there; spills read back."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastfusion.kernels.triton import adapter_fusion as module  # noqa: E402
from fastfusion.kernels.triton import grouped, two_launches  # noqa: E402
from fastfusion.ops.weights import layouts  # noqa: E402

KERNEL = module._adapter_fusion_fwd_kernel
GROUPED_KERNEL = grouped._adapter_fusion_grouped_fwd_kernel
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
}  # fmt: skip
SM_80, SM_90, SM_100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)

pytestmark = pytest.mark.skipif(
    not isinstance(KERNEL, triton.JITFunction), reason="the interpreter compiles nothing"
)


def compiled(target, dtype, hidden, sizes, activation=1, inputs=1, query=False, mask=False):
    """The kernel as `adapter_fusion` launches it for such a call on `target`."""
    columns, adapters, rows = sum(sizes), len(sizes), 1024

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype)

    x = empty(rows, hidden)
    weights = [
        empty(columns, hidden), empty(columns), empty(columns + adapters, hidden),
        empty(columns + adapters), empty(columns + adapters, hidden),
    ]  # fmt: skip
    arguments = module.launch_arguments(
        [x] * inputs, x if query else None, x, *weights, torch.tensor(1.0),
        empty(rows, adapters) if mask else None, None, sizes, [activation] * adapters, target,
    )  # fmt: skip
    return compiled_for(target, KERNEL, arguments)


def compiled_grouped(target, dtype, hidden, groups, scored, activations=(1,), mask=False):
    """The kernel as `adapter_fusion_grouped` launches it for groups of such sizes on `target`."""
    sizes, counts = [size for group in groups for size in group], [len(group) for group in groups]
    codes = [activations[i % len(activations)] for i in range(len(sizes))]
    last = layouts(sizes, counts, scored)[-1]
    rows, rows_in = 1024, (last.score or last.down).stop

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype)

    x = empty(rows, hidden)
    dropout = empty(rows, grouped.max_scored(counts, scored)) if mask else None
    arguments = grouped.launch_arguments(
        x, x, torch.zeros(rows, dtype=torch.int32), empty(rows_in, hidden), empty(rows_in),
        empty(last.out.stop, hidden), dropout, sizes, codes, counts, scored, target,
    )  # fmt: skip
    return compiled_for(target, GROUPED_KERNEL, arguments)


def compiled_for(target, kernel, arguments):
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        else:
            signature[parameter.name] = "i32"
        # as a launch specialises what it is given
        aligned = isinstance(value, torch.Tensor) or value % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def registers_and_stack(kernel, path: Path) -> tuple[int, int]:
    """Registers and bytes of stack, which is where spills go, per thread of a cubin."""
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", path]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def spills_in_loops(path: Path) -> int:
    """Instructions between a backward branch of a cubin and its target that move spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-sass", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", text)
    code = {int(address, 16): instruction for address, instruction in found}
    branches = {at: re.search(r"BRA.*0x([0-9a-f]+)", text) for at, text in code.items()}
    loops = [(int(to[1], 16), at) for at, to in branches.items() if to and int(to[1], 16) < at]
    assert loops
    return sum(
        "LDL" in instruction or "STL" in instruction
        for at, instruction in code.items()
        if any(first <= at <= last for first, last in loops)
    )


def compiled_pair(target, dtype, hidden, sizes, rows):
    """Both kernels of two launches for a plain call."""
    columns, adapters = sum(sizes), len(sizes)

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype)

    x = empty(rows, hidden)
    w_score, b_score = empty(columns + adapters, hidden), empty(columns + adapters)
    first, second, _ = two_launches.launch_arguments(
        x=[x], query=None, residual=x, groups=None,
        w_down=empty(columns, hidden), b_down=empty(columns), w_score=w_score,
        b_score=b_score, w_out=empty(columns + adapters, hidden), temperature=None, mask=None,
        score_offset=None, starts=[(0, 0, 0)], counts=[adapters], sizes=sizes,
        activations=[1] * adapters, target=target,
    )  # fmt: skip
    return (
        compiled_for(target, two_launches.adapter_columns_kernel, first),
        compiled_for(target, two_launches.adapter_output_kernel, second),
    )


BERT = dict(hidden=768, sizes=[48] * 3)
MINILM = dict(hidden=384, sizes=[24] * 4)


@pytest.mark.parametrize(
    "dtype, shape",
    [(torch.bfloat16, BERT), (torch.bfloat16, MINILM), (torch.float32, BERT)],
    ids=["bf16-bert", "bf16-minilm", "fp32-bert"],
)
@pytest.mark.parametrize("target", [SM_80, SM_90], ids=["sm_80", "sm_90"])
def test_nothing_spills(target, dtype, shape, tmp_path):
    kernel = compiled(target, dtype, **shape)
    _, stack = registers_and_stack(kernel, tmp_path / "kernel.cubin")
    assert stack == 0
    if dtype == torch.bfloat16:
        assert ("wgmma" if target is SM_90 else "mma.sync") in kernel.asm["ptx"]
    else:  # fp32 is multiplied in full
        assert "tf32" not in kernel.asm["ptx"]


def test_widest_block_on_hopper(tmp_path):
    kernel = compiled(SM_90, torch.bfloat16, 768, [48] * 4)
    assert registers_and_stack(kernel, tmp_path / "kernel.cubin")[1] == 0


def test_every_argument(tmp_path):
    kernel = compiled(SM_90, torch.float16, 768, [48, 24], 2, inputs=2, query=True, mask=True)
    assert registers_and_stack(kernel, tmp_path / "kernel.cubin")[1] == 0


def test_amd():
    kernel = compiled(GFX942, torch.bfloat16, **BERT)
    assert kernel.metadata.shared <= 64 * 1024  # a compute unit's LDS
    assert re.search(r"\.vgpr_spill_count:\s*0\b", kernel.asm["amdgcn"])
    assert "v_mfma" in kernel.asm["amdgcn"]


# a fusion, a sum and a single adapter in one launch
GROUPED_BERT = dict(hidden=768, groups=[[48] * 3, [48, 24], [48]], scored=[1, 0, 0])
GROUPED_MINILM = dict(hidden=384, groups=[[24] * 4, [24, 12], [24]], scored=[1, 0, 0])
MATRIX_UNITS = {SM_80: "mma.sync", SM_90: "wgmma", SM_100: "tcgen05.mma"}
SHARED = {SM_80: 163 * 1024, SM_90: 227 * 1024, SM_100: 227 * 1024}  # bytes that a block can have


@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.bfloat16, GROUPED_BERT),
        (torch.bfloat16, GROUPED_MINILM),
        (torch.float32, GROUPED_BERT),
    ],
    ids=["bf16-bert", "bf16-minilm", "fp32-bert"],
)
@pytest.mark.parametrize("target", MATRIX_UNITS, ids=["sm_80", "sm_90", "sm_100"])
def test_grouped_spills_nothing_in_its_loops(target, dtype, shape, tmp_path):
    kernel = compiled_grouped(target, dtype, **shape)
    _, stack = registers_and_stack(kernel, tmp_path / "kernel.cubin")
    # around the branch on whether a group is scored, a few registers are put aside
    assert stack <= 64
    assert stack == 0 or spills_in_loops(tmp_path / "kernel.cubin") == 0
    assert kernel.metadata.shared <= SHARED[target]
    if dtype == torch.bfloat16:
        assert MATRIX_UNITS[target] in kernel.asm["ptx"]
    else:  # fp32 is multiplied in full
        assert "tf32" not in kernel.asm["ptx"]


def test_grouped_widest_block(tmp_path):
    path = tmp_path / "kernel.cubin"
    shape = dict(hidden=768, groups=[[48] * 4, [48]], scored=[1, 0])
    assert registers_and_stack(compiled_grouped(SM_90, torch.bfloat16, **shape), path)[1] == 0
    registers_and_stack(compiled_grouped(SM_80, torch.bfloat16, **shape), path)
    assert spills_in_loops(path) == 0


def test_grouped_every_argument(tmp_path):
    kernel = compiled_grouped(
        SM_90, torch.float16, 768, [[48, 24], [48]], [1, 0], activations=(1, 2, 4), mask=True
    )
    assert registers_and_stack(kernel, tmp_path / "kernel.cubin")[1] == 0


def test_grouped_without_scores(tmp_path):
    """Without a scored group there is no branch, and fewer registers are taken."""
    groups = [[48] * 3, [48, 24]]
    sums = compiled_grouped(SM_90, torch.bfloat16, 768, groups, [0, 0])
    mixed = compiled_grouped(SM_90, torch.bfloat16, 768, groups, [1, 0])
    taken, stack = registers_and_stack(sums, tmp_path / "sums.cubin")
    assert stack == 0
    assert taken < registers_and_stack(mixed, tmp_path / "mixed.cubin")[0]


def test_grouped_amd():
    kernel = compiled_grouped(GFX942, torch.bfloat16, **GROUPED_BERT)
    assert kernel.metadata.shared <= 64 * 1024  # a compute unit's LDS
    assert re.search(r"\.vgpr_spill_count:\s*0\b", kernel.asm["amdgcn"])
    assert "v_mfma" in kernel.asm["amdgcn"]


def test_grouped_is_compiled_once_for_every_mixture():
    """Neither the rows' groups nor their number, nor groups beside the widest are constants."""

    def constants(groups, ids):
        sizes, counts = [d for group in groups for d in group], [len(group) for group in groups]
        last = layouts(sizes, counts, [1] * len(groups))[-1]
        x = torch.empty(len(ids), 64)
        arguments = grouped.launch_arguments(
            x, x, torch.tensor(ids, dtype=torch.int32), torch.empty(last.score.stop, 64),
            torch.empty(last.score.stop), torch.empty(last.out.stop, 64), None,
            sizes, [1] * len(sizes), counts, [1] * len(groups), SM_90,
        )  # fmt: skip
        return {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)}

    expected = constants([[8, 8], [4]], [0, 1, -1])
    assert constants([[8, 8], [4]], [-1] * 70) == expected
    assert constants([[5], [3, 9], [1]], [2, 0, 1, 1]) == expected


# beyond the border of one launch: BERT-base with 8 adapters, with many rows and with few
@pytest.mark.parametrize(
    "dtype, rows", [(torch.bfloat16, 16384), (torch.bfloat16, 1024), (torch.float32, 16384)]
)
@pytest.mark.parametrize("target", MATRIX_UNITS, ids=["sm_80", "sm_90", "sm_100"])
def test_two_launches(target, dtype, rows, tmp_path):
    first, second = compiled_pair(target, dtype, 768, [48] * 8, rows)
    # z is written and read many elements at a time, and read ahead
    assert "st.global.b16" not in first.asm["ptx"]
    assert "ld.global.b16" not in second.asm["ptx"]
    for kernel in (first, second):
        assert registers_and_stack(kernel, tmp_path / "kernel.cubin")[1] == 0
        assert kernel.metadata.shared <= SHARED[target]
        if dtype == torch.bfloat16:
            assert MATRIX_UNITS[target] in kernel.asm["ptx"]
        else:
            assert "tf32" not in kernel.asm["ptx"]


# an offset in 32 bits would overflow in a tensor of 2**31 elements
def test_offsets_of_rows_are_wide():
    bf16 = torch.bfloat16
    for kernel in (
        compiled(SM_90, bf16, **BERT),
        compiled_grouped(SM_90, bf16, **GROUPED_BERT),
        *compiled_pair(SM_90, bf16, 768, [48] * 8, 16384),
    ):
        assert re.search(r"arith\.muli .*tensor<\d+x1xi64>", kernel.asm["ttir"])
        assert not re.search(r"arith\.muli .*tensor<\d+x1xi32>", kernel.asm["ttir"])


def test_two_launches_are_compiled_once_for_any_number_of_rows():
    """Of either schedule: a number that 16 divides is not special."""
    for rows in (1024, 16384):
        pairs = [compiled_pair(SM_90, torch.bfloat16, 64, [128] * 2, n) for n in (rows, rows + 1)]
        for kernel, other in zip(*pairs, strict=True):
            assert kernel.hash == other.hash


@pytest.mark.parametrize("rows", [16384, 1024])
def test_two_launches_on_amd(rows):
    first, second = compiled_pair(GFX942, torch.bfloat16, 768, [48] * 8, rows)
    assert "global_store_short" not in first.asm["amdgcn"]
    assert "global_load_ushort" not in second.asm["amdgcn"]
    for kernel in (first, second):
        assert kernel.metadata.shared <= 64 * 1024
        assert re.search(r"\.vgpr_spill_count:\s*0\b", kernel.asm["amdgcn"])
        assert "v_mfma" in kernel.asm["amdgcn"]
