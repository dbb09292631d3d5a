"""Kernels in languages of their own; their sources stand in `kernels/` at the checkout's root."""

import importlib.util
from pathlib import Path

# A source checkout that is not installed (PYTHONPATH=.) has no map from fastfusion.kernels.triton
# to kernels/triton.
if importlib.util.find_spec(f"{__name__}.triton") is None:
    __path__.append(str(Path(__file__).parents[2] / "kernels"))
