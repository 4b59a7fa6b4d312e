"""What a computation allocates, seen from inside: the proof that no matrix of all pairs exists."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LargestTensor(TorchDispatchMode):
    """Records, while entered, the tensors that operations return: the largest of them, and the most alive at once.

    It sees every operation that the dispatcher runs, forward and backward, in this thread (the backward pass of CPU
    tensors runs in the thread that asks for it). It does not see what a kernel allocates and frees within one
    operation, such as a matrix product's packing buffers or a Triton kernel's registers.

    Attributes:
        elements: Elements of the largest tensor; a view counts as what it shows, an expanded one too.
        name: The operation that returned it.
        peak_bytes: Most bytes of storage alive at once, of storages first seen here, so without inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.name = ""
        self.peak_bytes = 0
        self._live: dict[int, int] = {}
        self._given: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operation and looks at what it takes and returns."""
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self._live and key not in self._given:
                self._given.add(key)
                # The address may serve another storage later.
                weakref.finalize(storage, self._given.discard, key)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.numel() > self.elements:
                self.elements, self.name = tensor.numel(), str(function)
            self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live or key in self._given:
            return
        self._live[key] = storage.nbytes()
        weakref.finalize(storage, self._live.pop, key, None)
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
