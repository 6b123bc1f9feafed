"""Keys and values of encoded histories, cached so that the next request continues from them.

Shape letters: N layers, h key heads, d head width, n tokens of a prefix.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmrec_peft.scoring.loaded_adapter import LoadedAdapter


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """Keys and values of one prefix, each [h, n, d] for each layer, on the engine's device."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def length(self) -> int:
        """Number of tokens, n."""
        return self.keys[0].shape[1]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))

    def first(self, tokens: int) -> CachedPrefix:
        """The first `tokens` tokens, as views."""
        if tokens == self.length:
            return self
        return CachedPrefix(*(tuple(part[:, :tokens] for part in side) for side in (self.keys, self.values)))

    @staticmethod
    def stack(pasts: list[CachedPrefix | None], device: torch.device) -> tuple[Any, torch.Tensor | None]:
        """A cache of Transformers for B rows with different pasts, and which of its P tokens each row has, bool [B, P].

        Shorter pasts are padded on the right. Where no row has a past the cache is empty and the mask is None.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        lengths = torch.tensor([0 if past is None else past.length for past in pasts], device=device)
        width = int(lengths.max())
        if not width:
            return cache, None
        example = next(past for past in pasts if past is not None)
        for layer in range(len(example.keys)):
            sides = []
            for name in ("keys", "values"):
                like = getattr(example, name)[layer]
                rows = like.new_zeros((len(pasts), like.shape[0], width, like.shape[2]))  # [B, h, P, d]
                for number, past in enumerate(pasts):
                    if past is not None:
                        rows[number, :, : past.length] = getattr(past, name)[layer]
                sides.append(rows)
            cache.update(*sides, layer)
        return cache, torch.arange(width, device=device)[None, :] < lengths[:, None]

    @staticmethod
    def cut(cache: Any, row: int, begin: int, width: int, new: int) -> CachedPrefix:
        """The prefix of one row of a cache: `begin` tokens of its past, and `new` ones after all pasts.

        The cache holds [B, h, width + L, d]: places 0 to width - 1 are the padded pasts, so the row's new tokens begin
        at `width` and not at `begin`.
        """

        def part(tensor: torch.Tensor) -> torch.Tensor:
            both = [tensor[row, :, :begin], tensor[row, :, width : width + new]]  # [h, begin, d], [h, new, d]
            # A copy in both cases: a view would keep the whole batch's cache in memory.
            return torch.cat(both, dim=1) if begin else both[1].clone()

        layers = cache.layers
        return CachedPrefix(tuple(part(layer.keys) for layer in layers), tuple(part(layer.values) for layer in layers))


class PrefixCache:
    """The most recently used prefixes, within a number of bytes. Threads may share it.

    A lookup finds the longest beginning of a prefix that ends after the header or after an event, for the same adapter.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        # By the digest of the whole prefix, least recently used first: the tensors, and the digests of its beginnings.
        self._prefixes: OrderedDict[bytes, tuple[CachedPrefix, list[bytes]]] = OrderedDict()
        self._versions: dict[bytes, str] = {}
        self._retired: weakref.WeakSet[LoadedAdapter] = weakref.WeakSet()
        # By the digest of a beginning: the cached prefix that has it, and its length in tokens.
        self._beginnings: dict[bytes, tuple[bytes, int]] = {}
        self._lock = threading.Lock()
        self.size = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, adapter: LoadedAdapter, prefix: tuple[np.ndarray, ...]) -> CachedPrefix | None:
        """The longest cached beginning of a prefix, or None."""
        digests = _digests(adapter, prefix)
        with self._lock:
            for digest, length in reversed(digests):  # the longest beginning first
                if digest in self._beginnings:
                    owner, _ = self._beginnings[digest]
                    self._prefixes.move_to_end(owner)
                    return self._prefixes[owner][0].first(length)
        return None

    def put(self, adapter: LoadedAdapter, prefix: tuple[np.ndarray, ...], cached: CachedPrefix) -> None:
        """Add a prefix. Prefixes that it extends go, and so do the least recently used ones beyond `max_bytes`."""
        digests = _digests(adapter, prefix)
        own = digests[-1][0]
        with self._lock:
            if own in self._prefixes or cached.size > self.max_bytes or adapter in self._retired:
                return
            # The new prefix contains its shorter beginnings, so their tensors are not needed any more.
            for digest, _ in digests[:-1]:
                if digest in self._prefixes:
                    self._drop(digest)
            self._prefixes[own] = (cached, [digest for digest, _ in digests])
            self._versions[own] = adapter.version
            self.size += cached.size
            for digest, length in digests:
                self._beginnings.setdefault(digest, (own, length))
            while self.size > self.max_bytes:
                self._drop(next(iter(self._prefixes)))

    def retire(self, adapter: LoadedAdapter) -> None:
        """Forget the prefixes of a version that is no longer used. Calls that still run with it add none."""
        with self._lock:
            self._retired.add(adapter)
            for own in [own for own, version in self._versions.items() if version == adapter.version]:
                self._drop(own)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._prefixes.clear()
            self._versions.clear()
            self._beginnings.clear()
            self.size = 0

    def _drop(self, own: bytes) -> None:
        cached, digests = self._prefixes.pop(own)
        del self._versions[own]
        self.size -= cached.size
        for digest in digests:
            # Another prefix may own the same beginning.
            if self._beginnings.get(digest, (None,))[0] == own:
                del self._beginnings[digest]


def _digests(adapter: LoadedAdapter, prefix: tuple[np.ndarray, ...]) -> list[tuple[bytes, int]]:
    """Digest and length in tokens of each beginning of a prefix, shortest first."""
    # The version comes first: keys and values depend on the adapter, so adapters never share an entry.
    digest, length, found = hashlib.blake2b(adapter.version.encode(), digest_size=16), 0, []
    for piece in prefix:
        digest.update(np.ascontiguousarray(piece, np.int32).tobytes())
        length += len(piece)
        found.append((digest.copy().digest(), length))
    return found
