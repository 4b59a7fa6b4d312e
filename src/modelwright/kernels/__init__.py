"""Kernels that several methods use: each as plain torch, which is the specification, and as Triton."""
