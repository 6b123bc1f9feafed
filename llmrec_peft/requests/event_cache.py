"""Tokens of the events and headers that requests named last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np


class EventCache:
    """Tokens by key; beyond `max_entries` the least recently used ones go. The caller holds a lock."""

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._tokens: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tokens

    def __getitem__(self, key: Hashable) -> np.ndarray:
        return self._tokens[key]

    def put(self, key: Hashable, tokens: np.ndarray) -> None:
        """Add an entry, or mark it as used now."""
        self._tokens[key] = tokens
        self._tokens.move_to_end(key)
        if len(self._tokens) > self.max_entries:
            self._tokens.popitem(last=False)
