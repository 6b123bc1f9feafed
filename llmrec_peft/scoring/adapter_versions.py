"""Which versions of adapters a bank holds in memory, and for how long."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from llmrec_peft.scoring.change_key import ChangeKey
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter


class AdapterVersions:
    """Loaded adapters by change key. A version stays while a domain uses it, or from its preload to its first use.

    A request that has begun holds its `LoadedAdapter` itself, so the memory of a dropped version is free when the last
    such request ends. The caller holds a lock around every call.

    Args:
        max_bytes: beyond this the least recently used versions go, but never the last one; None for no limit.
        on_drop: called with each version that no domain will use any more.
    """

    def __init__(self, max_bytes: int | None = None, on_drop: Callable[[LoadedAdapter], None] | None = None) -> None:
        self._max_bytes, self._on_drop = max_bytes, on_drop
        self._adapters: OrderedDict[ChangeKey, LoadedAdapter] = OrderedDict()
        self._preloaded: set[ChangeKey] = set()

    def get(self, key: ChangeKey) -> LoadedAdapter | None:
        """The version in memory, or None; it counts as used now."""
        if key not in self._adapters:
            return None
        self._adapters.move_to_end(key)
        return self._adapters[key]

    def size(self, key: ChangeKey) -> int:
        """Bytes of a version; 0 if it is not in memory."""
        return self._adapters[key].size if key in self._adapters else 0

    def put(self, key: ChangeKey, adapter: LoadedAdapter, *, preload: bool = False) -> None:
        """Hold a version for the domain that uses it, or with `preload` for the domain that will."""
        self._adapters.setdefault(key, adapter)
        self._adapters.move_to_end(key)
        if preload:
            self._preloaded.add(key)
        else:
            self._preloaded.discard(key)
        while self._max_bytes is not None and len(self._adapters) > 1 and self._bytes() > self._max_bytes:
            gone, _ = self._adapters.popitem(last=False)
            self._preloaded.discard(gone)

    def drop(self, key: ChangeKey) -> None:
        """Forget a version that no domain uses any more, unless it was preloaded and waits for its first use."""
        if key not in self._preloaded:
            adapter = self._adapters.pop(key, None)
            if adapter is not None and self._on_drop is not None:
                self._on_drop(adapter)

    def preloaded(self, directory: str) -> list[ChangeKey]:
        """Preloaded versions of a directory (its real path) that wait for their first use."""
        return [key for key in self._preloaded if key[0] == directory]

    def release(self, key: ChangeKey) -> None:
        """Stop waiting for the first use of a preloaded version."""
        self._preloaded.discard(key)

    def _bytes(self) -> int:
        return sum(adapter.size for adapter in self._adapters.values())
