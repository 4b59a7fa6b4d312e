"""Looking into a forward pass, and changing it, whether a module returns a tensor or a tuple."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Stop(Exception):
    """Ends a forward pass early, where the rest of it is not needed."""


def first(output: Any) -> torch.Tensor:
    """Returns a module's output tensor, or the first of a tuple of outputs."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """Returns an output of the same form with another first tensor."""
    if isinstance(output, tuple | list):
        return type(output)([tensor, *output[1:]])
    return tensor


@contextlib.contextmanager
def changed_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Puts the (first) output of a module through a function inside the block."""
    handle = module.register_forward_hook(lambda _, __, output: with_first(output, change(first(output))))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def seen_output(module: nn.Module, look: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Shows the (first) output of a module to a function inside the block."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        look(first(output))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def seen_input(module: nn.Module, look: Callable[[torch.Tensor], None], *, stop: bool = False) -> Iterator[None]:
    """Shows the first input of a module to a function inside the block.

    Args:
        module: Such as a ``Linear``.
        look: Called with the input.
        stop: Raise :class:`Stop` then, which the caller of the model catches.
    """

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        look(arguments[0])
        if stop:
            raise Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
