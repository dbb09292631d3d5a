"""Triton kernels with their launchers: they know tensors, not modules."""
