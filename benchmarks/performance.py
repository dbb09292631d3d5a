"""Write docs/performance.md: what peak figures allow, and the bytes that `bytes.py` counted.

python benchmarks/performance.py
"""

import json

from peaks import PEAKS, Peak
from table import RESULTS, ROOT, table

ROWS, ADAPTERS, HIDDEN, SIZE = (1024, 16384), (3, 8, 16), 768, 48
ELEMENT = 2  # bf16
GPUS = {
    "A100": PEAKS["A100-SXM4-80GB"],
    "H100": PEAKS["H100 80GB HBM3"],
    "MI300X": PEAKS["MI300X"],
}

HEAD = """# Performance on GPUs

Written by `python benchmarks/performance.py`. **Nothing on this page is a measured time.** The
first part is arithmetic, the second counts bytes in Triton's interpreter. One place of a layer,
H = 768, N adapters of d = 48, T rows, bf16. fp8 is out of scope: no kernel reads or writes it, and
no bound here assumes it.
"""

BOUNDS = """## Bounds

What a GPU would need for the products alone at its peak, or for moving each input and output once
at its peak, whichever is more. No launch, no latency, no byte twice. Real kernels take longer; a
time below the bound is a mistake in the measurement.

With D = N d, forward: `2 T H (3 D + 2 N)` flops in the absorbed form; x, the residual and the
output, p in fp32, and the weights. Backward: `2 T H (8 D + 4 N)`: z, t and the gradient of `p z`
again, the input's two products, three gradients of weights; x, the output's gradient, p and the
input's gradient, the weights and their gradients. The packs' own making, `14 H^2 D` flops in a
training step, does not depend on T and is not in here.
"""

COUNTED = """## Bytes that the launches move

Counted in the interpreter over {rows} rows, with the tiles that an H100 takes for
T = {schedule_rows}, by

    TRITON_INTERPRET=1 python benchmarks/bytes.py

*Once* counts each address once in a launch: what crosses device memory where the programs of a row
block run together. *All* counts every access of every program, which is what L2 sees. Bytes of rows
grow with T; weights are the same once at any T, and read again for each row block. Where `kept_ptr`
is stored and `out_ptr` is not, they are the same tensor. The literal path is the sum of the inputs
and outputs of every ATen call of the reference that is not a view, without any reuse between calls.
The backward adds up each weight's gradient from shares of the rows, in fp32, through memory: here
four of 64 rows, on a GPU one for each 512 rows or fewer (eleven at T = 16384 and N = 8), so these
bytes weigh far more in the table than in a call of that many rows.
"""


def weight_bytes(adapters: int) -> int:
    """w_down, w_score and w_out."""
    columns = adapters * SIZE
    return (3 * columns + 2 * adapters) * HIDDEN * ELEMENT


def forward(rows: int, adapters: int) -> tuple[int, int]:
    """Flops and bytes."""
    flops = 2 * rows * HIDDEN * (3 * adapters * SIZE + 2 * adapters)
    moved = 3 * rows * HIDDEN * ELEMENT + 4 * rows * adapters + weight_bytes(adapters)
    return flops, moved


def backward(rows: int, adapters: int) -> tuple[int, int]:
    """Flops and bytes."""
    flops = 2 * rows * HIDDEN * (8 * adapters * SIZE + 4 * adapters)
    moved = 3 * rows * HIDDEN * ELEMENT + 4 * rows * adapters + 2 * weight_bytes(adapters)
    return flops, moved


def bound(peak: Peak, flops: int, moved: int) -> str:
    """The time in microseconds, and what it is spent on."""
    by_flops, by_bytes = flops / peak.flops * 1e6, moved / peak.bytes * 1e6
    limit = "products" if by_flops > by_bytes else "bytes"
    return f"{max(by_flops, by_bytes):.1f} ({limit})"


def bounds() -> list[str]:
    lines = [BOUNDS]
    for name, cost in (("forward", forward), ("backward", backward)):
        cells = []
        for rows in ROWS:
            for adapters in ADAPTERS:
                flops, moved = cost(rows, adapters)
                times = [bound(peak, flops, moved) for peak in GPUS.values()]
                size = [f"{flops / 1e9:.2f}", f"{moved / 1e6:.1f}"]
                cells.append([str(rows), str(adapters), *size, *times])
        lines += [f"Lower bounds of the {name} in microseconds:", ""]
        lines += table(["T", "N", "Gflop", "MB", *GPUS], cells)
    cells = [
        [name, f"{peak.flops / 1e12:.1f}", f"{peak.bytes / 1e12:.3f}", peak.source]
        for name, peak in GPUS.items()
    ]
    lines += ["Peaks:", ""]
    return lines + table(["", "Tflop/s, bf16 dense", "TB/s", "source"], cells)


def once(launches: list[dict]) -> int:
    """Bytes that cross device memory in some launches."""
    each = (tensor for launch in launches for tensor in launch["traffic"].values())
    return sum(tensor["loaded_once"] + tensor["stored_once"] for tensor in each)


def everything(launches: list[dict]) -> int:
    each = (tensor for launch in launches for tensor in launch["traffic"].values())
    return sum(tensor["loaded"] + tensor["stored"] for tensor in each)


def compared(record: dict) -> list[str]:
    cells = []
    for name, launches in record["launches"].items():
        if not launches:
            continue  # the torch backend ran it
        moved, literal = once(launches), record["literal"].get(name)
        against = ["", ""]
        if literal is not None:
            against = [f"{literal / 1e6:.1f}", f"{literal / moved:.1f}x"]
        cells.append(
            [name, str(len(launches)), f"{moved / 1e6:.2f}", f"{everything(launches) / 1e6:.2f}"]
            + against
        )
    return table(["", "launches", "once, MB", "all, MB", "literal, MB", "literal / once"], cells)


def by_tensor(record: dict, name: str) -> list[str]:
    """Each launch of an op, tables and scalars of less than a thousandth left out."""
    launches = record["launches"][name]
    least = once(launches) / 1000
    cells = []
    for i, launch in enumerate(launches):
        kernel = f"{launch['kernel']} ({launch['programs']} programs)"
        for tensor, moved in sorted(launch["traffic"].items()):
            if moved["loaded_once"] + moved["stored_once"] < least:
                continue
            names = ("loaded_once", "loaded", "stored_once", "stored")
            sizes = [f"{moved[key] / 1e3:.1f}" if moved[key] else "" for key in names]
            cells.append([str(i + 1), kernel, tensor, *sizes])
            kernel = ""
    header = ["", "kernel", "tensor", "loaded once, KB", "loaded", "stored once", "stored"]
    return [f"By launch and tensor, {name}:", "", *table(header, cells)]


def main() -> None:
    record = json.loads((RESULTS / "bytes.jsonl").read_text().splitlines()[-1])
    lines = [*bounds(), COUNTED.format(**record), *compared(record)]
    for name in record["launches"]:
        if name.endswith("N=8") and record["launches"][name]:
            lines += by_tensor(record, name)
    lines += [f"(commit {record['commit']}, {record['date'][:10]}, torch {record['torch']})", ""]
    (ROOT / "docs" / "performance.md").write_text(HEAD + "\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
