"""The Triton kernels of the backward pass, compiled ahead of time for GPUs that are not here."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastfusion.kernels.triton import (  # noqa: E402
    backward,
    norm_backward,
    tiles,
    weight_gradients,
)
from fastfusion.ops.weights import layouts, max_scored  # noqa: E402

pytestmark = pytest.mark.skipif(tiles.INTERPRETED, reason="the interpreter compiles nothing")
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
}  # fmt: skip
SM_80, SM_90, SM_100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
MATRIX_UNITS = {SM_80: "mma.sync", SM_90: "wgmma", SM_100: "tcgen05.mma"}
SHARED = {SM_80: 163 * 1024, SM_90: 227 * 1024, SM_100: 227 * 1024}  # bytes that a block can have
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def recorded(monkeypatch, target, function, *arguments, **keywords) -> dict[str, tuple]:
    """The launches of `function` on `target`: kernels and arguments, by name."""
    found: dict[str, tuple] = {}

    def record(kernel, programs, launch_arguments):
        name, i = kernel.fn.__name__, 2
        while name in found:
            name, i = f"{kernel.fn.__name__}_{i}", i + 1
        found[name] = (kernel, launch_arguments)

    for module in (backward, norm_backward, weight_gradients):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(backward, "target_of", lambda device: target)
    function(*arguments, **keywords)
    return found


def compiled_for(target, kernel, arguments):
    """The kernel as a launch with these arguments specialises it."""
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
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
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
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


def plain(
    monkeypatch, target, dtype, hidden=768, sizes=(48,) * 8, rows=16384,
    inputs=1, query=False, mask=False, score=True,
):  # fmt: skip
    """The launches for a call of the plain op that needs every gradient."""
    columns, adapters = sum(sizes), len(sizes)

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype)

    x, p = empty(rows, hidden), torch.empty(rows, adapters)
    used = columns + adapters
    weights = [
        empty(columns, hidden), empty(columns), empty(used, hidden) if score else None,
        empty(used) if score else None, empty(used, hidden), torch.tensor(1.0),
    ]  # fmt: skip
    return recorded(
        monkeypatch, target, backward.adapter_fusion_backward, x, [x] * inputs,
        x if query else None, *weights, empty(rows, adapters) if mask else None,
        p if score else torch.empty(0), list(sizes), [1] * adapters,
        [True, query, True, score, True, score],
    )  # fmt: skip


def grouped(monkeypatch, target, dtype, hidden, groups, scored, ids):
    """The launches for a call of the op over groups of such sizes."""
    sizes, counts = [size for group in groups for size in group], [len(group) for group in groups]
    last = layouts(sizes, counts, scored)[-1]
    x = torch.empty(len(ids), hidden, dtype=dtype)
    w_in = torch.empty((last.score or last.down).stop, hidden, dtype=dtype)
    w_out = torch.empty(last.out.stop, hidden, dtype=dtype)
    p = torch.empty(len(ids), max_scored(counts, scored))
    return recorded(
        monkeypatch, target, backward.adapter_fusion_grouped_backward, x, x,
        torch.tensor(ids, dtype=torch.int32), w_in, w_in[:, 0].contiguous(), w_out, p.to(dtype), p,
        sizes, [1, 2] * (len(sizes) // 2) + [1] * (len(sizes) % 2), counts, scored, [True] * 3,
    )  # fmt: skip


def norm(monkeypatch, target, dtype, hidden, rows=1024):
    """The LayerNorm's gradient with something to add."""
    x, w = torch.empty(rows, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
    return recorded(monkeypatch, target, norm_backward._through_norm, x, x, w, 1e-12, add=x)


PRODUCTS = {
    "adapter_columns_bwd_kernel", "adapter_scores_bwd_kernel", "adapter_input_bwd_kernel",
    "adapter_weights_bwd_kernel",
}  # fmt: skip


def check(target, dtype, launches: dict, path) -> None:
    """No stack, limits kept, the target's matrix instructions in every product."""
    checked = set()
    for kernel, arguments in launches.values():
        name = kernel.fn.__name__
        binary = compiled_for(target, kernel, dict(arguments))
        if target is GFX942:
            assert re.search(r"\.vgpr_spill_count:\s*0\b", binary.asm["amdgcn"]), name
            assert binary.metadata.shared <= 64 * 1024, name
            code, matrix = binary.asm["amdgcn"], "v_mfma"
        else:
            assert registers_and_stack(binary, path)[1] == 0, name
            assert binary.metadata.shared <= SHARED[target], name
            code, matrix = binary.asm["ptx"], MATRIX_UNITS[target]
            assert "tf32" not in code, name
        if "tt.dot" in binary.asm["ttir"] and dtype != fp32:
            assert matrix in code, name
        # offsets into tensors of 2**31 elements
        assert not re.search(r"arith\.muli .*tensor<\d+x1xi32>", binary.asm["ttir"]), name
        checked.add(name)
    assert checked


ALL_TARGETS = pytest.mark.parametrize(
    "target", [*MATRIX_UNITS, GFX942], ids=["sm_80", "sm_90", "sm_100", "gfx942"]
)


# BERT-base with 8 adapters and with 3, with many rows and with few
@pytest.mark.parametrize(
    "dtype, adapters, rows",
    [(bf16, 8, 16384), (bf16, 8, 1024), (bf16, 3, 16384), (fp32, 8, 16384)],
    ids=["bf16", "bf16-few-rows", "bf16-3", "fp32"],
)
@ALL_TARGETS
def test_plain(target, dtype, adapters, rows, monkeypatch, tmp_path):
    launches = plain(monkeypatch, target, dtype, sizes=[48] * adapters, rows=rows)
    assert PRODUCTS <= {kernel.fn.__name__ for kernel, _ in launches.values()}
    check(target, dtype, launches, tmp_path / "kernel.cubin")


@ALL_TARGETS
def test_groups(target, monkeypatch, tmp_path):
    """A fusion, a sum and a single adapter in the same launches."""
    groups, scored = [[48] * 3, [48, 24], [48]], [1, 0, 0]
    ids = [0, 1, 2, -1] * 1024
    launches = grouped(monkeypatch, target, bf16, 768, groups, scored, ids)
    check(target, bf16, launches, tmp_path / "kernel.cubin")


@pytest.mark.parametrize(
    "target, call",
    [
        (SM_90, dict(dtype=fp16, inputs=8, query=True, mask=True)),
        (SM_80, dict(dtype=bf16, sizes=[48] * 2, inputs=2)),
        (SM_80, dict(dtype=bf16, query=True, mask=True)),
        (SM_80, dict(dtype=bf16, query=True, rows=1024)),
        (SM_90, dict(dtype=bf16, score=False)),
        (SM_90, dict(dtype=bf16, sizes=[8] * 64)),
        (SM_80, dict(dtype=bf16, sizes=[8] * 64)),
    ],
    ids=[
        "every-argument",
        "inputs",
        "query",
        "query-few-rows",
        "no-scores",
        "64-adapters",
        "64-adapters-sm_80",
    ],
)
def test_other_calls(target, call, monkeypatch, tmp_path):
    check(target, call["dtype"], plain(monkeypatch, target, **call), tmp_path / "kernel.cubin")


@pytest.mark.parametrize("hidden", [64, 768, 8192])
@ALL_TARGETS
def test_norms(target, hidden, monkeypatch, tmp_path):
    launches = norm(monkeypatch, target, bf16, hidden)
    assert len(launches) == 1
    check(target, bf16, launches, tmp_path / "kernel.cubin")


def test_wide_accesses(monkeypatch):
    """The buffers between the launches and the factors of sums are moved many elements at once."""
    for name, (kernel, arguments) in plain(monkeypatch, SM_90, bf16).items():
        ptx = compiled_for(SM_90, kernel, dict(arguments)).asm["ptx"]
        narrow = ptx.count("ld.global.b16") + ptx.count("st.global.b16")
        # biases, the offset's gradient, and a sum of shares that begins anywhere: a bias's
        reads_biases = ("adapter_columns", "adapter_scores", "add_splits")
        assert narrow == 0 or name.startswith(reads_biases), name
        if name.startswith("adapter_columns"):
            assert "st.global.b16" not in ptx
        if name.startswith("adapter_scores"):
            assert "ld.global.b16" not in ptx and ptx.count("st.global.b16") == 1
        if name in PRODUCTS - {"adapter_scores_bwd_kernel"}:
            assert "cp.async" in ptx, name


def test_compiled_once_for_any_number_of_rows_and_any_groups(monkeypatch):
    """A number that 16 divides is not special, and groups are no constants."""

    def hashes(launches):
        return {
            name: compiled_for(SM_90, kernel, dict(arguments)).hash
            for name, (kernel, arguments) in launches.items()
        }

    few, more = (plain(monkeypatch, SM_90, bf16, 64, [8] * 2, rows) for rows in (1024, 1001))
    assert hashes(few) == hashes(more)
    mixtures = [[0, 1, -1] * 40, [1] * 120]
    one, other = (
        grouped(monkeypatch, SM_90, bf16, 64, [[8, 8], [8]], [1, 0], ids) for ids in mixtures
    )
    assert hashes(one) == hashes(other)
