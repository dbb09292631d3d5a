"""Kernels in languages of their own; their sources stand in `kernels/` at the checkout's root."""

from pathlib import Path

# An installed wheel has them here; a checkout, editable or on PYTHONPATH, has them at its root.
if not (Path(__file__).parent / "triton").is_dir():
    __path__.append(str(Path(__file__).parents[2] / "kernels"))
