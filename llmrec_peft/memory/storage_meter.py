"""Counting the bytes of live tensor storages while a model runs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """Adds a storage when an operator returns it, and subtracts it when its last reference is gone.

    Attributes:
        live: bytes that are alive now.
        peak: largest `live` since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(value for value in tree_leaves(result) if isinstance(value, torch.Tensor))
        return result

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that existed before the meter was entered."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = id(storage), storage.nbytes()
            if key not in self._known:
                # The reference must be kept: a weak reference that is itself collected never calls back.
                self._known[key] = weakref.ref(storage, functools.partial(self._remove, key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._known[key]
        self.live -= size
