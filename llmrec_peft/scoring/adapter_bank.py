"""A bank of adapters on one base: the common part of `Scorer` and `DomainBank`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import BundleError, DataError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.requests.item_table import ItemsLike, ItemTable
from llmrec_peft.requests.request import Request
from llmrec_peft.requests.request_domain import RequestDomain
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.scoring.adapter_loading import load_adapter
from llmrec_peft.scoring.adapter_versions import AdapterVersions
from llmrec_peft.scoring.change_key import ChangeKey, is_unchanged, read_change_key
from llmrec_peft.scoring.chunks import PinnedVersion, predict_probabilities
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter
from llmrec_peft.scoring.shared_base import SharedBase

NAME_LENGTH = 200
"""Characters of a domain's name in a bank, at most."""


@dataclass(frozen=True)
class BankEntry:
    """The bundle, items and encoder of a domain. An entry is replaced as a whole and never changed.

    Attributes:
        directory: directory of the bundle.
        change_key: key of the version of the bundle.
        domain: the domain that the bundle was trained on.
        items: the item table.
        encoder: encodes the domain's requests.
    """

    directory: Path
    change_key: ChangeKey
    domain: Domain
    items: ItemTable
    encoder: RequestEncoder


class AdapterBank:
    """Adapters by the name of a domain, on one engine.

    All methods may be called by several threads at once. A version of an adapter that no domain uses any more leaves
    memory when the last call that began with it ends.
    """

    def __init__(
        self,
        engine: Engine,
        base: SharedBase | None,
        *,
        fallback: str | None = None,
        max_bytes: int | None = None,
        any_dtype: bool = False,
    ) -> None:
        """For `DomainBank.load` and `Scorer.load`.

        Args:
            engine: runs the base.
            base: the base that adapters are checked against; None if the engine's weights belong to one domain.
            fallback: the domain that serves requests of unknown domains; None: they are an error.
            max_bytes: memory limit of all loaded adapters; None for no limit.
            any_dtype: accept adapters that were trained on a base in another number format.
        """
        self._engine, self._base = engine, base
        self._fallback, self._any_dtype = fallback, any_dtype
        self._entries: dict[str, BankEntry] = {}
        cache = engine.prefix_cache
        self._versions = AdapterVersions(max_bytes, None if cache is None else cache.retire)
        self._lock = threading.Lock()

    # -- domains -------------------------------------------------------------------------------

    def entry(self, name: Any) -> BankEntry:
        """The entry of a domain. Raises DataError for an unknown name."""
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise DataError(f"domain {quoted(name)} is not in the bank; use one of {listed(sorted(self._entries))}")
        return entry

    def sizes(self) -> dict[str, int]:
        """Bytes that the adapter of each domain takes in memory; 0 where it is on disk only."""
        with self._lock:
            return {name: self._versions.size(entry.change_key) for name, entry in self._entries.items()}

    def add(self, name: str, directory: str | Path, items: ItemsLike = None) -> None:
        """Add a domain. After an error nothing has changed.

        Raises:
            BundleError: the name is taken, or the bundle does not fit.
            DataError: a name that is not allowed, or an item table that cannot be read.
        """
        check_name(name)
        self._check_free(name)
        entry, adapter = self._load(Path(directory), ItemTable.read(items))
        self._put(name, entry, adapter)

    def add_loaded(self, name: str, adapter: LoadedAdapter, items: ItemTable) -> None:
        """Add a domain whose adapter is in memory and stays there."""
        encoder = _encoder(adapter, items)
        self._put(name, BankEntry(adapter.directory, (adapter.version,), adapter.domain, items, encoder), adapter)

    def swap(self, name: str, directory: str | Path) -> None:
        """Replace the bundle of a domain from the next call on; its items stay.

        The new bundle is read and checked before anything changes: after an error the old one stays. A bundle that is
        in memory already, under another name or by `preload`, is not read again.

        Raises:
            DataError: no domain has this name.
            BundleError: the bundle is damaged or does not fit the base.
        """
        old = self.entry(name)
        entry, adapter = self._load(Path(directory), old.items, old)
        with self._lock:
            gone = self.entry(name)
            self._entries[name] = entry
            self._versions.put(entry.change_key, adapter)
            self._drop_unused(gone.change_key)

    def remove(self, name: str) -> None:
        """Remove a domain; calls that have begun still use it. Raises DataError for an unknown name."""
        with self._lock:
            gone = self.entry(name)
            if name == self._fallback:
                raise DataError(
                    f"domain {name!r} is the bank's fallback and stays; swap its bundle, or make another bank"
                )
            del self._entries[name]
            self._drop_unused(gone.change_key)

    def preload(self, directory: str | Path) -> None:
        """Read a bundle into memory ahead of a `swap` or `add`, which then takes no time.

        It stays until that first use, until `release`, or until `max_bytes` removes it. An earlier version of the same
        directory that was preloaded and not used is dropped.
        """
        key = read_change_key(Path(directory))
        adapter = self._adapter(Path(directory), key)
        with self._lock:
            for old in self._versions.preloaded(key[0]):
                self._release(old)
            self._versions.put(key, adapter, preload=True)

    def release(self, directory: str | Path) -> None:
        """Drop what was preloaded from a directory and has not been used; without any, nothing happens."""
        with self._lock:
            for key in self._versions.preloaded(os.path.realpath(directory)):
                self._release(key)

    # -- requests ------------------------------------------------------------------------------

    def pin(self, name: str) -> PinnedVersion:
        """The version of a domain for one call. Raises DataError if there is no such domain."""
        with self._lock:
            entry = self.entry(name)
            adapter = self._versions.get(entry.change_key)
        return PinnedVersion(adapter or self._read_again(entry), entry.encoder)

    def pin_all(self, names: Iterable[str]) -> dict[str, PinnedVersion]:
        """The versions of several domains, all of one moment; for an unknown name, that of the fallback if any.

        An unknown name without a fallback is left out.
        """
        with self._lock:
            fallback = None if self._fallback is None else self._entries.get(self._fallback)
            found = {name: self._entries.get(name, fallback) for name in names}
            entries = {name: entry for name, entry in found.items() if entry is not None}
            adapters = {name: self._versions.get(entry.change_key) for name, entry in entries.items()}
        read: dict[ChangeKey, LoadedAdapter] = {}
        pinned = {}
        for name, entry in entries.items():
            adapter = adapters[name] or read.get(entry.change_key)
            if adapter is None:
                adapter = read[entry.change_key] = self._read_again(entry)
            pinned[name] = PinnedVersion(adapter, entry.encoder)
        return pinned

    def predict(
        self, requests: Sequence[Request], versions: Mapping[str, PinnedVersion], batch_tokens: int
    ) -> list[np.ndarray]:
        """Probabilities of requests by the versions of their domains; see `chunks.predict_probabilities`."""
        return predict_probabilities(self._engine, requests, versions, batch_tokens)

    def token_embeddings(self) -> torch.Tensor:
        """The base's embeddings of tokens, [tokens, width]."""
        embedding: nn.Module = self._engine.classifier.stock.get_input_embeddings()
        return embedding.get_parameter("weight")

    # -- versions ------------------------------------------------------------------------------

    def _put(self, name: str, entry: BankEntry, adapter: LoadedAdapter) -> None:
        with self._lock:
            self._check_free(name)
            self._entries[name] = entry
            self._versions.put(entry.change_key, adapter)

    def _load(self, directory: Path, items: ItemTable, old: BankEntry | None = None) -> tuple[BankEntry, LoadedAdapter]:
        """An entry for a bundle. The encoder of `old`, with all that it has cached, stays for an equal domain."""
        key = read_change_key(directory)
        adapter = self._adapter(directory, key)
        same = old is not None and old.domain == adapter.domain
        encoder = old.encoder if old is not None and same else _encoder(adapter, items)
        return BankEntry(directory, key, adapter.domain, items, encoder), adapter

    def _adapter(self, directory: Path, key: ChangeKey) -> LoadedAdapter:
        """The version in memory, or read from disk. The caller puts it into memory."""
        with self._lock:
            found = self._versions.get(key)
        if found is not None:
            return found
        if self._base is None:
            raise BundleError(f"bundle {directory} needs a base to share; load it by DomainBank.load")
        adapter = load_adapter(directory, self._base, any_dtype=self._any_dtype)
        if not is_unchanged(directory, key):
            raise BundleError(f"bundle {directory} was changed while it was read; call swap once it is whole")
        self._engine.install(adapter.layers)
        return adapter

    def _read_again(self, entry: BankEntry) -> LoadedAdapter:
        """The very version of an entry, which has left memory. It enters memory only if a domain still uses it."""
        if not is_unchanged(entry.directory, entry.change_key):
            raise BundleError(
                f"bundle {entry.directory} is out of memory, and was changed or taken away since it was added; "
                "call swap with the version wanted"
            )
        adapter = self._adapter(entry.directory, entry.change_key)
        with self._lock:
            if self._uses(entry.change_key):
                self._versions.put(entry.change_key, adapter)
        return adapter

    def _uses(self, key: ChangeKey) -> bool:
        return any(entry.change_key == key for entry in self._entries.values())

    def _drop_unused(self, key: ChangeKey) -> None:
        if not self._uses(key):
            self._versions.drop(key)

    def _release(self, key: ChangeKey) -> None:
        self._versions.release(key)
        self._drop_unused(key)

    def _check_free(self, name: str) -> None:
        if name in self._entries:
            raise BundleError(f"domain {name!r} is in the bank already; call swap to replace its bundle")


def _encoder(adapter: LoadedAdapter, items: ItemTable) -> RequestEncoder:
    return RequestEncoder(RequestDomain.of(adapter.domain), adapter.vocabulary, items)


def check_name(name: Any) -> None:
    """Raise DataError for a name that a domain in a bank may not have."""
    if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not 0 < len(name) <= NAME_LENGTH:
        raise DataError(
            f"a domain's name must be a text of 1 to {NAME_LENGTH} printable characters without spaces around it, not "
            f"{quoted(name)}; rename it"
        )
