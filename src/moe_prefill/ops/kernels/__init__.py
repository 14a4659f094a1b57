"""Triton kernels, imported only where they run. Each has its plain reference in the op file of the same name."""
