"""The routing kernels for GPUs, run on the host thread by thread, under ASan and UBSan."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parent / "csrc" / "cuda" / "routing.cuh"
BARRIERS = [
    number
    for number, line in enumerate(KERNELS.read_text().splitlines(), start=1)
    if "__syncthreads()" in line
]
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the program that checks the kernels with these arguments."""
    program = tmp_path_factory.mktemp("simt") / "routing"
    flags = "-std=c++20 -O1 -g -Wall -Werror -Wno-unknown-pragmas"
    flags += " -fsanitize=address,undefined -fno-sanitize-recover=all"
    # a preloaded sanitizer is for the interpreter only
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [COMPILER, *flags.split(), HERE / "simt" / "routing.cpp", "-o", program]
    subprocess.run(command, check=True, env=environment)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_kernels(run, order):
    """Tables against a stable sort, rows against memcmp, and every barrier of the source is met."""
    result = run(order)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [int(line) for line in result.stdout.split()] == BARRIERS


@pytest.mark.parametrize("line", BARRIERS)
def test_a_missing_barrier_is_noticed(run, line):
    """By a wrong table or by a sanitizer, in one of the two orders; the other may let it pass."""
    results = (run(order, str(line)) for order in ("forward", "reverse"))
    assert any(result.returncode != 0 for result in results)
