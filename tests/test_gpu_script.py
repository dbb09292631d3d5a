"""benchmarks/gpu.py: its arguments, its processes, the rule of parity, and tables of its file."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gpu
import gpu_stage
import parity
import pytest
import table
import torch

BENCHMARKS = Path(gpu.__file__).parent
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--peer-site", "no-such-folder"], "expected a folder that has adapters in it; got no-su"),
        (["--minutes", "0"], "expected a number above 0; got 0"),
        (["--minutes", "nine"], "expected a number above 0; got nine"),
    ],
)
def test_arguments_say_what_is_wrong_with_them(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert f"argument {arguments[0]}: {expected}" in capsys.readouterr().err


def test_what_cannot_run_is_not_run_by_name(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    reasons = {stage.name: stage.not_run for stage in gpu.stages(False, None)}
    assert reasons["memcheck"] == "compute-sanitizer is not on the PATH"
    assert reasons["peer"].startswith("no --peer-site")
    assert all(reasons[name] is None for name in ("environment", "parity", "ops", "models"))


def test_the_shares_are_enough(tmp_path, monkeypatch):
    """Where all stages run and all take all of their time."""
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: tool)
    planned = gpu.stages(False, tmp_path)
    assert all(stage.not_run is None for stage in planned)
    assert sum(stage.share for stage in planned) == 60 * gpu.MINUTES < 60 * 9
    # to import PyTorch, and to end what was begun
    seconds = {stage.name: stage.share for stage in planned}
    assert seconds["tuning"] >= 60 * gpu_stage.TUNING_MINUTES + 20


@pytest.mark.parametrize("cores, processes", [(1, 1), (4, 4), (16, 16), (192, 16)])
def test_parity_takes_the_cores(cores, processes, monkeypatch):
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda process: set(range(cores)))
    found = {stage.name: stage.processes for stage in gpu.stages(False, None)}
    assert found.pop("parity") == processes and set(found.values()) == {1}
    assert {stage.processes for stage in gpu.stages(True, None)} == {1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    output = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "--dry-run needs none" in done.stderr
    assert not output.exists()


# --------------------------------------------------------------------------------------------------
# processes: a stand-in for gpu_stage.py, with the same report

STAGE = """
import json, os, sys, time

report, skip = sys.argv[sys.argv.index("--report") + 1], sys.argv[sys.argv.index("--skip") + 1]
number, processes = map(int, sys.argv[sys.argv.index("--part") + 1].split("/"))
names = ["good", "dies", "last", "hangs", "behind"][number::processes]


def say(**entry):
    with open(report, "a") as file:
        file.write(json.dumps(entry) + chr(10))


say(items=names)
for name in names[int(skip) :]:
    say(began=name)
    if name == "dies":
        print("broken on purpose", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    say(done=name, results={"triton": {"agreed": name != "last"}})
"""


@pytest.fixture
def run_stage(tmp_path, monkeypatch):
    (tmp_path / "gpu_stage.py").write_text(STAGE)
    monkeypatch.setattr(gpu, "HERE", tmp_path)

    def run(processes: int, seconds: float) -> gpu.Outcome:
        runner = gpu.Runner(seconds / 60, True, tmp_path)
        return runner.run(gpu.Stage("stage", 1, processes=processes), 1.0)

    return run


def test_a_stage_survives_what_dies_and_says_what_it_left_out(run_stage):
    outcome = run_stage(processes=1, seconds=5)
    assert list(outcome.results) == ["good", "last"]
    assert outcome.failed == {"dies": "exit status 3: broken on purpose"}
    assert outcome.left_out == ["hangs", "behind"]
    assert outcome.faults() == ["last: triton"]


def test_processes_share_a_stage(run_stage):
    outcome = run_stage(processes=5, seconds=5)
    assert sorted(outcome.results) == ["behind", "good", "last"]
    assert (list(outcome.failed), outcome.left_out) == (["dies"], ["hangs"])


UNFINISHED = """
import json, sys, time

stage, report = sys.argv[1], sys.argv[sys.argv.index("--report") + 1]
items = {
    "environment": {"environment": {"device": "none"}},
    "tuning": {"schedules": {"schedules": {"timed": 3, "left_out": ["5 candidates"]}}},
    "parity": {"N=3": {"triton": {"agreed": True}}},
}[stage]
with open(report, "w") as file:
    print(json.dumps({"items": [*items, "N=8"] if stage == "parity" else [*items]}), file=file)
    for name, results in items.items():
        print(json.dumps({"done": name, "results": results}), file=file)
if stage == "parity":
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "stage, status, left_out",
    [
        (gpu.Stage("tuning", 1), 0, "5 candidates"),
        (gpu.Stage("parity", 1), 0, "N=8"),
        (gpu.Stage("parity", 1, is_check=True), 1, "N=8"),
    ],
)
def test_who_has_no_time_says_so(stage, status, left_out, tmp_path, monkeypatch, capsys):
    """On the terminal and in the file; what a check left out was not checked."""
    (tmp_path / "gpu_stage.py").write_text(UNFINISHED)
    output = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "stages", lambda *_: [gpu.Stage("environment", 1), stage])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    command = ["gpu.py", "--minutes", "0.05", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == status
    during, after = capsys.readouterr().out.split("## none")
    assert f"left out, for want of time: {left_out}\n" in during
    assert f"- left out, for want of time: {left_out}\n" in after
    assert left_out in output.read_text().splitlines()[-1]


def test_who_interrupts_it_ends_its_processes(tmp_path, monkeypatch):
    (tmp_path / "gpu_stage.py").write_text(STAGE)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    runner = gpu.Runner(1.0, True, tmp_path)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    # as SIGINT does where nobody ignores it: a process in the background may have been told to
    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run(gpu.Stage("stage", 1), 1.0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - began < 30  # of 60
    assert not runner.running


# --------------------------------------------------------------------------------------------------
# parity


def perturbed(op, factor: float):
    """The torch backend in place of triton, its output times a factor."""

    def run(*args, backend, **kwargs):
        out, p = op(*args, backend="torch", **kwargs)
        return (out * factor if backend == "triton" else out), p

    return run


@pytest.mark.parametrize("name", ["query, offset", "LayerNorm on both sides", "groups"])
def test_parity_sees_an_error_of_one_part_in_a_thousand(name, monkeypatch):
    case = parity.tiny(parity.CASES[name])
    for factor, agrees in ((1.0, True), (1.001, False), (float("nan"), False)):
        with monkeypatch.context() as patch:
            for op in ("adapter_fusion", "adapter_fusion_norm", "adapter_fusion_grouped"):
                patch.setattr(parity, op, perturbed(getattr(parity, op), factor))
            assert parity.check(case, torch.float32, CPU)["agreed"] == agrees, factor


# --------------------------------------------------------------------------------------------------
# the file and its tables


def test_a_stage_reports_each_item_of_its_part(tmp_path, monkeypatch):
    def items(device):
        return {name: lambda name=name: {"triton": {"of": name}} for name in "abcdef"}

    def report(*arguments: str) -> list[dict]:
        path = tmp_path / "-".join(arguments).replace("/", "-")
        command = ["gpu_stage.py", "ops", "--dry-run", "--report", str(path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        gpu_stage.main()
        return [json.loads(line) for line in path.read_text().splitlines()]

    monkeypatch.setitem(gpu_stage.STAGES, "ops", items)
    lines = report("--part", "1/2", "--skip", "1")
    assert lines[0]["items"] == ["b", "d", "f"]
    assert lines[0]["versions"]["torch"] == torch.__version__
    assert [line.get("began") or line["done"] for line in lines[1:]] == ["d", "d", "f", "f"]
    assert lines[2]["results"] == {"triton": {"of": "d"}}


def test_results_make_a_table():
    timed = {
        "products eager": {"ms": [0.9, 1.0, 1.1], "over products eager": [1, 1, 1]},
        "triton graph": {"ms": [0.5, 0.6, 0.7], "relative_error": 0.002, "agreed": True},
        "torch compiled": {"failed": "RuntimeError: no compiler"},
        "torch eager": {"ms": [2.0, 2.0, 2.0], "relative_error": 0.3, "agreed": False},
    }
    base = {"device": "a GPU", "torch": "2.11.0", "commit": "abc"}
    records = [
        {**base, "stage": "ops", "results": {"N=8 forward": {"old": {"ms": [1, 1, 1]}}}},
        {**base, "stage": "ops", "results": {"N=8 forward": timed}, "left_out": ["N=16 forward"]},
        {**base, "stage": "peer", "adapters": "1.3.0", "transformers": "4.57.6"},
        {**base, "stage": "memcheck", "results": {"N=3": {}, "N=8": {}}},
        {**base, "stage": "racecheck", "not_run": "no compute-sanitizer"},
        {**base, "stage": "models", "failed": {"forward": "exit status 1: out of memory"}},
    ]
    text = "\n".join(table.gpu(records))
    assert "| triton graph | 0.600 [0.500, 0.700] |  | 0.002 | True |" in text
    assert "| torch compiled | failed: RuntimeError: no compiler |" in text
    assert "1 of 2 outputs agree" in text and "- disagrees: N=8 forward, torch eager" in text
    assert "- left out, for want of time: N=16 forward" in text
    assert "### memcheck\n\n2 ran." in text
    assert "- not run: no compute-sanitizer" in text
    assert "(adapters 1.3.0, transformers 4.57.6)" in text
    assert "- failed: forward: `exit status 1: out of memory`" in text
    assert "| old |" not in text  # the newest of a device's stages
