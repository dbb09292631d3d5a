"""Write docs/figures.md from the newest records of the benchmarks' results.

python benchmarks/table.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
HEAD = """# Figures

Written by `benchmarks/table.py` from `benchmarks/results/`: medians [quartiles] of interleaved
rounds in one process. "over" is a ratio of times: below 1 is faster, and above 1 is where we lose.
"""


def newest(name: str, mode: str) -> tuple[dict, dict]:
    """The newest record of each title that ends or starts with a mode; and the newest of all."""
    found, last = {}, None
    for line in (RESULTS / f"{name}.jsonl").read_text().splitlines():
        record = json.loads(line)
        for title, results in record.get("results", {}).items():
            if title.startswith(mode) or title.partition(" ")[2] == mode:
                found[title], last = results, record
    if last is None:
        raise SystemExit(f"{name}.jsonl: no results of {mode!r}; run benchmarks/bench_{name}.py")
    return last, found


def source(record: dict) -> str:
    versions = [f"{k} {record[k]}" for k in ("torch", "transformers", "adapters") if k in record]
    return (
        f"{record['machine']}, {record['threads']} threads, {', '.join(versions)}; commit "
        f"{record['commit']}, {record['date'][:10]}, {record['rounds']} rounds"
    )


def spread(quartiles: list[float], digits: int = 2) -> str:
    low, middle, high = (f"{q:.{digits}f}" for q in quartiles)
    return f"{middle} [{low}, {high}]"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def one_place() -> list[str]:
    lines = []
    for mode in ("forward", "forward+backward", "bf16 forward"):
        record, found = newest("adapter_fusion", mode)
        rows = []
        for title, results in found.items():
            for provider, result in results.items():
                floor = result.get("over_products")
                error = result["relative_error"]
                rows.append(
                    [
                        title.split()[0],
                        provider,
                        spread(result["ms"], 1),
                        "" if floor is None else spread(floor),
                        f"{1 / result['over_reference'][1]:.1f}x",
                        "" if error is None else f"{error:.1e}",
                    ]
                )
        lines += [f"One place, T=1024, H=768, d=48, {mode}:", ""]
        header = ["", "", "ms", "over its three products", "literal / this", "error (fp64)"]
        lines += table(header, rows)
    return [*lines, f"({source(record)})", ""]


def whole_model(mode: str, columns: list[str], text: str) -> list[str]:
    record, found = newest("model", mode)
    lines = []
    for title, results in found.items():
        rows = []
        for name, result in results.items():
            cells = [name, spread(result["ms"], 1)]
            for column in columns:
                value = result.get(column, "")
                cells.append(spread(value) if isinstance(value, list) else str(value))
            rows.append(cells)
        lines += [f"{text}, {title.removeprefix(mode).strip()}:", ""]
        lines += table(["", "ms", *(column.replace("_", " ") for column in columns)], rows)
    return [*lines, f"({source(record)})", ""]


def routing() -> list[str]:
    record, found = newest("routing", "R=")
    rows = [
        [title, provider, spread(result["ms"], 3), spread(result["over_plain"])]
        for title, results in found.items()
        for provider, result in results.items()
    ]
    lines = ["Routing: R rows to G groups, plain is torch.sort, bincount, cumsum and indexing:", ""]
    lines += table(["", "", "ms", "over plain"], rows)
    return [*lines, f"({source(record)})", ""]


def rows() -> list[str]:
    texts = {
        "one place": "A setup for each row, B=32, S=128, one place",
        "4 layers": "A setup for each row, B=32, S=128, 4 layers",
        "inactive": "One active adapter of those loaded, B=8, S=128, 4 layers",
        "add_adapter": "One call of `add_adapter`, 4 layers, by its number",
    }
    lines = []
    for mode, text in texts.items():
        record, found = newest("rows", mode)
        for results in found.values():
            lines += [f"{text}:", ""]
            cells = []
            for name, result in results.items():
                error = result.get("relative_error")
                over = f"{spread(result['over_base'])} of {result['base']}"
                compared = "" if error is None else f"{error:.1e}"
                cells.append([name, spread(result["ms"], 1), over, compared])
            lines += table(["", "ms", "time over", "error"], cells)
    return [*lines, f"({source(record)})", ""]


GPU_HEAD = """Medians [20 %, 80 %] of interleaved rounds, caches flushed before each call. Eager and
compiled calls start on an idle GPU, so their launches count; a graph's time is the GPU's alone."""
GPU_FACTS = (
    "architecture", "driver", "runtime", "torch", "triton", "transformers", "extension_C",
    "extension_C_cuda", "peak_tflops", "peak_gb_s", "commit", "date",
)  # fmt: skip


def gpu(records: list[dict]) -> list[str]:
    """Everything that runs of gpu.py said, the newest record of each device's stages."""
    devices: dict[str, dict[str, dict]] = {}
    for record in records:
        devices.setdefault(record["device"], {})[record["stage"]] = record
    lines = []
    for device, stages in devices.items():
        first = next(iter(stages.values()))
        lines += [f"## {device}", ""]
        if first.get("dry"):
            lines += ["**A dry run: its times say nothing about any device.**", ""]
        facts = [f"{name} {first[name]}" for name in GPU_FACTS if first.get(name) is not None]
        lines += [f"({', '.join(facts)})", ""]
        lines += [GPU_HEAD, ""]
        for stage, record in stages.items():
            lines += _gpu_stage(stage, record)
    return lines


def _gpu_stage(stage: str, record: dict) -> list[str]:
    lines = [f"### {stage}", ""]
    if "adapters" in record:
        lines += [f"(adapters {record['adapters']}, transformers {record['transformers']})", ""]
    results = record.get("results", {})
    rows = [(title, row, result) for title, own in results.items() for row, result in own.items()]
    agreed = [result["agreed"] for _, _, result in rows if "agreed" in result]
    if agreed:
        lines += [f"{sum(agreed)} of {len(agreed)} outputs agree.", ""]
    elif results:  # under a tool that watches
        lines += [f"{len(results)} ran.", ""]
    for title, row, result in rows:
        if not result.get("agreed", True):
            lines.append(f"- disagrees: {title}, {row}: {result}")
        if "left_out" in result:
            lines.append(f"- left out, for want of time: {'; '.join(result['left_out'])}")
    if "not_run" in record:
        lines.append(f"- not run: {record['not_run']}")
    if "left_out" in record:
        lines.append(f"- left out, for want of time: {'; '.join(record['left_out'])}")
    for item, text in record.get("failed", {}).items():
        lines.append(f"- failed: {item}: `{text.splitlines()[-1]}`")
    if lines[-1]:
        lines.append("")
    for title, own in results.items():
        if any("ms" in result or "failed" in result for result in own.values()):
            lines += [f"{title}:", "", *_timed(own)]
    return lines


def _timed(results: dict[str, dict]) -> list[str]:
    """A table of what was timed, a column for everything that any row has."""
    last = ("tflops", "gb_s", "peak_mib", "relative_error", "agreed")
    found = dict.fromkeys(key for result in results.values() for key in result)
    columns = [key for key in found if key not in ("ms", "failed", *last)]
    columns += [key for key in last if key in found]
    rows = []
    for name, result in results.items():
        if "failed" in result:
            rows.append([name, f"failed: {result['failed']}", *[""] * len(columns)])
            continue
        cells = [spread(result["ms"], 3)]
        for key in columns:
            value = result.get(key, "")
            cells.append(spread(value) if isinstance(value, list) else str(value))
        rows.append([name, *cells])
    return table(["", "ms", *(key.replace("_", " ") for key in columns)], rows)


def main() -> None:
    lines = [
        *one_place(),
        *whole_model("forward", ["over_bare"], "BERT-base, evaluation"),
        *whole_model(
            "training step",
            ["literal_over_this", "saved_mib"],
            "One training step of the fusion, BERT-base with 4 layers",
        ),
        *routing(),
        *rows(),
    ]
    if (RESULTS / "gpu.jsonl").exists():
        lines += gpu([json.loads(line) for line in (RESULTS / "gpu.jsonl").open()])
    (ROOT / "docs" / "figures.md").write_text(HEAD + "\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
