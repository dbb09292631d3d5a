"""The command `fastfusion`: what a GPU's schedules are, and how they are tuned."""

from collections import Counter
from pathlib import Path
from typing import Annotated, NoReturn

import torch

from .ops import backends

try:
    import typer
except ImportError as error:
    raise SystemExit(
        "The command fastfusion needs typer, which is not here: pip install 'fastfusion[cli]'"
    ) from error

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


def _stop(reason: str) -> NoReturn:
    typer.echo(f"fastfusion: {reason}", err=True)
    raise typer.Exit(1)


def _require_triton() -> None:
    if reason := backends.missing("triton"):
        _stop(f"the triton backend cannot be loaded: {reason}")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"expected bottleneck sizes as in 48,48,48; got {text!r}", param_hint="--sizes"
        ) from error


@app.command()
def tune(
    output: Annotated[
        Path | None, typer.Option(help="A new file for the table in use and what was measured.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write into the table in use instead.")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="Begin nothing after so long.")] = 30.0,
    hidden: Annotated[int, typer.Option(help="The hidden size.")] = 768,
    sizes: Annotated[
        list[str] | None,
        typer.Option(help="Bottleneck sizes, 48,48,48; again for more. Default: 3 and 8 of 48."),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(help="Rows of a call; again for more. Default: 16384, 1024, 32, 16."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="bfloat16, float16 or float32; again for more. Default: bfloat16, float32."
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(help="plain, norm, query, groups or backward; again for more. Default: all."),
    ] = None,
) -> None:
    """Measure the schedules of this GPU and write a table with them.

    FASTFUSION_SCHEDULES=FILE makes it the table in use. Candidates that are wrong, spill or do not
    compile are left out.
    """
    _require_triton()
    from .kernels.triton import (
        device_timer,
        processes,
        schedule_files,
        schedules,
        tiles,
        tuning,
        tuning_cases,
    )

    if (output is None) != in_place:
        raise typer.BadParameter(
            "expected one of --output FILE and --in-place; got "
            + ("both" if in_place else "neither")
        )
    path = schedules.path_in_use() if output is None else output
    if not in_place and path.exists():
        raise typer.BadParameter(f"{path} is there; nothing is overwritten", param_hint="--output")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path.absolute().parent} is no directory", param_hint="--output")
    if not torch.cuda.is_available() or tiles.INTERPRETED:
        why = "TRITON_INTERPRET=1 is set" if tiles.INTERPRETED else "PyTorch finds none"
        _stop(f"tuning needs a GPU: {why}")
    dtypes = {str(known).removeprefix("torch."): known for known in tiles.DTYPES}
    given = {
        "sizes": [_sizes(text) for text in sizes or ()],
        "num_rows": rows,
        "dtypes": [dtypes.get(name, name) for name in dtype or ()],
        "ops": op,
    }
    try:
        table = schedules.loaded()
        cases = tuning_cases.cases(
            hidden, **{name: value for name, value in given.items() if value}
        )
    except ValueError as error:
        _stop(str(error))
    device = torch.device("cuda", torch.cuda.current_device())
    timer = device_timer.DeviceTimer(device)
    with processes.Processes(processes.usable()) as compilers:
        found = tuning.tune(cases, device, timer, minutes, say=typer.echo, compilers=compilers)
    for (unit, reason), count in Counter((d.unit, d.reason) for d in found.dropped).items():
        typer.echo(f"dropped {count}: {unit}: {reason}", err=True)
    for what, units in (("not reached", found.unreached), ("nothing right", found.failed)):
        for unit in units:
            typer.echo(f"{what}: {unit}", err=True)
    typer.echo(
        f"{found.timed} candidates timed, {len(found.dropped)} dropped, {found.untried} not tried"
    )
    if not found.entries:
        _stop("nothing was measured; no table is written")
    schedule_files.write(path, schedule_files.refreshed(table, found.entries), overwrite=in_place)
    typer.echo(f"{len(found.entries)} entries measured: {path}")


@app.command("schedules")
def show_schedules(
    arch: Annotated[
        str | None, typer.Option(help="sm_90, gfx942, ...; without it, this GPU's.")
    ] = None,
) -> None:
    """Print the schedules in use on a GPU: for which rows, with which blocks, from where."""
    _require_triton()
    from .kernels.triton import schedule_files, schedules

    if arch is None:
        if not torch.cuda.is_available():
            raise typer.BadParameter("expected a name where there is no GPU", param_hint="--arch")
        device = torch.device("cuda", torch.cuda.current_device())
        arch = schedules.arch_of(schedules.target_of(device))
    try:
        entries = schedules.table()
    except ValueError as error:
        _stop(str(error))
    typer.echo(f"{schedules.path_in_use()}, {arch}:")
    for name in schedule_files.BLOCKS:
        for bits in (16, 32):
            for begin, end, entry in schedule_files.ranges(entries, name, arch, bits):
                rows = f"{begin}.." if end == float("inf") else f"{begin}..{end}"
                typer.echo(f"  {name}, {bits} bits, {rows} rows: {_told(entry)}")


def _told(entry: dict) -> str:
    origin = entry.get("origin")
    where = "derived" if origin is None else f"{origin.get('device')}, {origin.get('date')}"
    blocks = " ".join(f"{block}={value}" for block, value in entry["blocks"].items())
    return f"{blocks} ({where})"


def main() -> None:
    app()
