"""Training steps against `adapters` 1.3.0 itself, in its environment (transformers 4.57.6)."""

import os
import subprocess
from pathlib import Path

import pytest

PEER = os.environ.get("FASTFUSION_PEER_PYTHON")


@pytest.mark.peer
@pytest.mark.skipif(PEER is None, reason="FASTFUSION_PEER_PYTHON is not set")
def test_training_steps_equal_those_of_adapters():
    """Under one seed, dropout included: losses and weights of four steps, in both forms."""
    script = Path(__file__).with_name("peer_training.py")
    done = subprocess.run([PEER, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("equal")
