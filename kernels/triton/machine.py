"""The driver and the checkout that something is measured with."""

import shutil
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """The checkout's, or nothing where it is no repository or there is no git."""
    return _printed("git", "-C", str(Path(__file__).parent), "describe", "--always")


def driver() -> str:
    """The version of the GPU's driver."""
    amd = Path("/sys/module/amdgpu/version")
    if torch.version.hip:
        return amd.read_text().strip() if amd.exists() else "unknown"
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    return _printed("nvidia-smi", *query) or "unknown"


def _printed(*command: str) -> str:
    """A program's first word, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.split()[0] if run.returncode == 0 and run.stdout.split() else ""
