"""The Triton kernel compiled ahead of time, for GPUs that need not be there; spills read back."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastfusion.kernels.triton import adapter_fusion as module  # noqa: E402

KERNEL = module._adapter_fusion_fwd_kernel
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SM_80, SM_90 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)
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
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(KERNEL.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        else:
            signature[parameter.name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(KERNEL, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def registers_and_stack(kernel, path: Path) -> tuple[int, int]:
    """Registers and bytes of stack, which is where spills go, per thread of a cubin."""
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", path]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


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
