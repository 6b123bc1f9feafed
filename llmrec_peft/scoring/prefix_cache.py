"""Keys and values of encoded histories, kept so that the next request goes on from them.

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
class Kept:
    """Keys and values of one prefix: for each layer [h, n, d] of both, on the engine's device."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def length(self) -> int:
        """n."""
        return self.keys[0].shape[1]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))

    def first(self, tokens: int) -> Kept:
        """Those of the first tokens alone, as views."""
        if tokens == self.length:
            return self
        return Kept(*(tuple(part[:, :tokens] for part in side) for side in (self.keys, self.values)))

    @staticmethod
    def together(pasts: list[Kept | None], device: torch.device) -> tuple[Any, torch.Tensor | None]:
        """A cache of Transformers for rows with different pasts, and which of its tokens each row has, bool [B, P].

        Shorter ones are filled up; without any past the cache is empty and there is nothing to see.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        lengths = torch.tensor([0 if past is None else past.length for past in pasts], device=device)
        width = int(lengths.max())
        if not width:
            return cache, None
        model = next(past for past in pasts if past is not None)
        for layer in range(len(model.keys)):
            sides = []
            for name in ("keys", "values"):
                like = getattr(model, name)[layer]
                rows = like.new_zeros((len(pasts), like.shape[0], width, like.shape[2]))
                for number, past in enumerate(pasts):
                    if past is not None:
                        rows[number, :, : past.length] = getattr(past, name)[layer]
                sides.append(rows)
            cache.update(*sides, layer)
        return cache, torch.arange(width, device=device)[None, :] < lengths[:, None]

    @staticmethod
    def cut(cache: Any, row: int, begin: int, width: int, new: int) -> Kept:
        """A row's prefix out of a cache: `begin` tokens of its past, `new` after the `width` places of all pasts."""

        def part(tensor: torch.Tensor) -> torch.Tensor:
            both = [tensor[row, :, :begin], tensor[row, :, width : width + new]]
            return torch.cat(both, dim=1) if begin else both[1].clone()

        layers = cache.layers
        return Kept(tuple(part(layer.keys) for layer in layers), tuple(part(layer.values) for layer in layers))


class PrefixCache:
    """The prefixes asked for last, within a number of bytes; threads may share it.

    A prefix is found by its longest beginning that ends after the header or after an event, for the same bundle.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._prefixes: OrderedDict[bytes, tuple[Kept, list[bytes]]] = OrderedDict()
        self._versions: dict[bytes, str] = {}
        self._retired: weakref.WeakSet[LoadedAdapter] = weakref.WeakSet()
        self._beginnings: dict[bytes, tuple[bytes, int]] = {}
        self._lock = threading.Lock()
        self.size = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, member: LoadedAdapter, prefix: tuple[np.ndarray, ...]) -> Kept | None:
        """The longest beginning of a prefix that is kept, or None."""
        digests = _digests(member, prefix)
        with self._lock:
            for digest, length in reversed(digests):
                if digest in self._beginnings:
                    owner, _ = self._beginnings[digest]
                    self._prefixes.move_to_end(owner)
                    return self._prefixes[owner][0].first(length)
        return None

    def put(self, member: LoadedAdapter, prefix: tuple[np.ndarray, ...], kept: Kept) -> None:
        """Keep a prefix; what it is an extension of goes, and so do those not used for the longest."""
        digests = _digests(member, prefix)
        own = digests[-1][0]
        with self._lock:
            if own in self._prefixes or kept.size > self.max_bytes or member in self._retired:
                return
            for digest, _ in digests[:-1]:
                if digest in self._prefixes:
                    self._drop(digest)
            self._prefixes[own] = (kept, [digest for digest, _ in digests])
            self._versions[own] = member.version
            self.size += kept.size
            for digest, length in digests:
                self._beginnings.setdefault(digest, (own, length))
            while self.size > self.max_bytes:
                self._drop(next(iter(self._prefixes)))

    def retire(self, member: LoadedAdapter) -> None:
        """Forget the prefixes of a version that nobody will ask again; what calls that have begun bring is not kept."""
        with self._lock:
            self._retired.add(member)
            for own in [own for own, version in self._versions.items() if version == member.version]:
                self._drop(own)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._prefixes.clear()
            self._versions.clear()
            self._beginnings.clear()
            self.size = 0

    def _drop(self, own: bytes) -> None:
        kept, digests = self._prefixes.pop(own)
        del self._versions[own]
        self.size -= kept.size
        for digest in digests:
            if self._beginnings.get(digest, (None,))[0] == own:
                del self._beginnings[digest]


def _digests(member: LoadedAdapter, prefix: tuple[np.ndarray, ...]) -> list[tuple[bytes, int]]:
    """Digest and length in tokens of each beginning of a prefix, shortest first."""
    digest, length, found = hashlib.blake2b(member.version.encode(), digest_size=16), 0, []
    for piece in prefix:
        digest.update(np.ascontiguousarray(piece, np.int32).tobytes())
        length += len(piece)
        found.append((digest.copy().digest(), length))
    return found
