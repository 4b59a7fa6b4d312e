"""Kernels that several methods use: each as plain torch, which is the specification, and as Triton."""

import functools
import importlib
from types import ModuleType


@functools.cache
def triton_or_none(name: str) -> ModuleType | None:
    """Returns a module of this package that needs Triton; None where Triton is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None
