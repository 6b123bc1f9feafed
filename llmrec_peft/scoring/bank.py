"""Many domains on one base in one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from llmrec_peft.checkpoints.bundle import check_bundle
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import BundleError, DataError, ModelError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.models.base import (
    Quantization,
    base_fingerprint,
    load_model,
    load_tokenizer,
    resolve_base,
)
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.fingerprints import tokenizer_fingerprint
from llmrec_peft.scoring.chunks import Wanted, probabilities
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.item_table import Catalogue
from llmrec_peft.scoring.loaded_adapter import Base, LoadedAdapter, load_adapter, precision_of
from llmrec_peft.scoring.prefix_cache import PrefixCache
from llmrec_peft.scoring.prompts import Prompts
from llmrec_peft.scoring.versions import Stamp, Versions, check_name, holds, stamp_of
from llmrec_peft.serving.request_rules import check_count, check_list, listed_requests

if TYPE_CHECKING:
    from llmrec_peft.scoring.scorer import Scorer

Items = str | Path | pa.Table | BehaviorLog | Catalogue | None
Request = Sequence[Any]
"""(domain, history, candidates), or with a fourth part: the user's columns that the domain's header names."""

BATCH_TOKENS = 4000


@dataclass(frozen=True)
class _Entry:
    """What a domain's name stands for; replaced whole, never changed."""

    directory: Path
    stamp: Stamp
    prompts: Prompts


class DomainBank:
    """Answers requests of many domains on one base, each by its own bundle.

    LoRA (all variants), 4-bit LoRA, bottleneck and head-only bundles share the base's weights; each brings its adapter,
    head, labels, calibration and domain. All methods may be called by several threads at once: `score` answers each
    request wholly by the version of its bundle that was there when the call began. A version that no domain uses any
    more leaves memory when the last call that began with it ends.

    A domain's name is a text of 1 to 200 printable characters without spaces around it. Names are compared as they are
    and never by their beginnings: `foo` and `foobar`, or `Foo`, are different domains.
    """

    def __init__(
        self,
        base: Base,
        engine: Engine,
        *,
        fallback: str | None = None,
        max_bytes: int | None = None,
        any_dtype: bool = False,
    ) -> None:
        """For `load`, which makes the base and the engine."""
        self._base, self._engine = base, engine
        self._fallback, self._any_dtype = fallback, any_dtype
        self._entries: dict[str, _Entry] = {}
        self._versions = Versions(max_bytes, None if engine.kept is None else engine.kept.retire)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        base: str | Path,
        bundles: Mapping[str, str | Path],
        items: Mapping[str, Items] | None = None,
        *,
        fallback: str | None = None,
        max_bytes: int | None = None,
        cache_bytes: int = 0,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attn: Literal["sdpa", "eager"] = "sdpa",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> DomainBank:
        """Load a base once, and bundles onto it.

        Args:
            base: an embedded name, a Hub id or a directory.
            bundles: from a domain's name, chosen here, to its bundle's directory.
            items: from a domain's name to its item table (see `Catalogue.read`); domains left out take mappings only.
            fallback: the domain that answers for names that the bank does not have; None: they are an error.
            max_bytes: bundles in memory take no more; those not used for the longest are read again when asked for.
            cache_bytes: memory for the keys and values of histories, which later requests go on from; 0 for none.
            dtype: number format of the base; by default that of the first bundle, with its 4-bit storage if any.
            attn: attention kernel.
            device: where the base goes, such as "cuda"; by default the CPU. Never run on a GPU.
            trust_remote_code: allow the base's own code to run.

        Raises:
            ModelError: a base that is not there, or an encoder, which reads both ways.
            BundleError: a damaged bundle, or one of another base, tokenizer or precision than the bank's.
            DataError: an item table that cannot be read, or of a domain that is not among the bundles; a name that
                cannot be one.
        """
        for name in bundles:
            check_name(name)
        items = dict(items or {})
        extra = sorted(set(items) - set(bundles))
        if extra:
            raise DataError(
                f"items names {extra[0]!r}, which is not among the domains {listed(sorted(bundles))}; correct it"
            )
        if fallback is not None and fallback not in bundles:
            raise DataError(
                f"fallback {fallback!r} is not among the domains {listed(sorted(bundles))}; name one of them"
            )
        precision: dict[str, Any] = {"dtype": dtype or "float32", "quantization": None}
        if bundles:
            first = Path(next(iter(bundles.values())))
            precision = precision_of(first, check_bundle(first)[0]) | ({"dtype": dtype} if dtype else {})
        loaded, classifier = load_base(str(base), precision, attn, trust_remote_code, device)
        kept = PrefixCache(cache_bytes) if cache_bytes else None
        engine = Engine(classifier, loaded.tokenizer.pad_token_id, kept)
        bank = cls(loaded, engine, fallback=fallback, max_bytes=max_bytes, any_dtype=dtype is not None)
        for name, directory in bundles.items():
            bank.add(name, directory, items.get(name))
        return bank

    # -- domains -------------------------------------------------------------------------------

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in the order in which they were added."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.domains)

    def labels(self, name: str) -> list[str]:
        """Labels of a domain in class order: the columns of its answers."""
        return self._entry(name).prompts.domain.labels

    def sizes(self) -> dict[str, int]:
        """Bytes that the bundle of each domain takes in memory; 0 where it is on disk only."""
        with self._lock:
            return {name: self._versions.size(entry.stamp) for name, entry in self._entries.items()}

    def add(self, name: str, directory: str | Path, items: Items = None) -> None:
        """Add a domain. After an error nothing has changed.

        Raises:
            BundleError: the name is taken, or the bundle does not fit.
            DataError: a name that cannot be one, or an item table that cannot be read.
        """
        check_name(name)
        self._check_free(name)
        entry, member = self._read(Path(directory), Catalogue.read(items))
        with self._lock:
            self._check_free(name)
            self._entries[name] = entry
            self._versions.put(entry.stamp, member)

    def swap(self, name: str, directory: str | Path) -> None:
        """Let another bundle answer for a domain from the next call of `score` on; its items stay.

        The new bundle is read and checked before anything changes: after an error the old one goes on. A bundle that
        the bank has in memory, by another name or by `preload`, is not read again.

        Raises:
            DataError: no domain has this name.
            BundleError: the bundle is damaged or does not fit the base.
        """
        old = self._entry(name)
        entry, member = self._read(Path(directory), old.prompts.catalogue, old.prompts)
        with self._lock:
            gone = self._entry(name)
            self._entries[name] = entry
            self._versions.put(entry.stamp, member)
            self._drop_unused(gone.stamp)

    def remove(self, name: str) -> None:
        """Take a domain out; a `score` that has begun still answers for it. Raises DataError if there is none."""
        with self._lock:
            gone = self._entry(name)
            if name == self._fallback:
                raise DataError(
                    f"domain {name!r} is the bank's fallback and stays; swap its bundle, or make another bank"
                )
            del self._entries[name]
            self._drop_unused(gone.stamp)

    def preload(self, directory: str | Path) -> None:
        """Read a bundle into memory ahead of a `swap` or `add`, which then takes no time.

        It stays until that first use, until `release`, or until `max_bytes` takes it. An earlier version of the same
        directory that was preloaded and not used goes.
        """
        mark = stamp_of(Path(directory))
        member = self._member(Path(directory), mark)
        with self._lock:
            for old in self._versions.ahead(mark[0]):
                self._release(old)
            self._versions.put(mark, member, ahead=True)

    def release(self, directory: str | Path) -> None:
        """Give up what was preloaded from a directory and has not been used; nothing happens where nothing was."""
        with self._lock:
            for mark in self._versions.ahead(os.path.realpath(directory)):
                self._release(mark)

    def scorer(self, name: str) -> Scorer:
        """A scorer of one domain on the bank's base; after a swap the new bundle answers. Raises DataError for none."""
        from llmrec_peft.scoring.scorer import Scorer

        self._entry(name)

        def current() -> tuple[LoadedAdapter, Prompts]:
            with self._lock:
                entry = self._entry(name)
                member = self._versions.get(entry.stamp)
            return member or self._read_again(entry), entry.prompts

        return Scorer(self._engine, current)

    def _read(self, directory: Path, catalogue: Catalogue, old: Prompts | None = None) -> tuple[_Entry, LoadedAdapter]:
        mark = stamp_of(directory)
        member = self._member(directory, mark)
        same = old is not None and old.vocabulary.domain == member.domain
        return _Entry(directory, mark, old if same else Prompts(member.vocabulary, catalogue)), member

    def _member(self, directory: Path, mark: Stamp) -> LoadedAdapter:
        """The bundle in memory, or read where it is not there; who uses it puts it into memory."""
        with self._lock:
            found = self._versions.get(mark)
        if found is not None:
            return found
        member = load_adapter(directory, self._base, any_dtype=self._any_dtype)
        if not holds(directory, mark):
            raise BundleError(f"bundle {directory} was changed while it was read; call swap once it is whole")
        self._engine.install(member.deltas)
        return member

    def _read_again(self, entry: _Entry) -> LoadedAdapter:
        """The entry's very version, which has left memory; it is there again only where a domain uses it still."""
        if not holds(entry.directory, entry.stamp):
            raise BundleError(
                f"bundle {entry.directory} is out of memory, and was changed or taken away since it was added; "
                "call swap with the version wanted"
            )
        member = self._member(entry.directory, entry.stamp)
        with self._lock:
            if self._uses(entry.stamp):
                self._versions.put(entry.stamp, member)
        return member

    def _uses(self, mark: Stamp) -> bool:
        return any(entry.stamp == mark for entry in self._entries.values())

    def _drop_unused(self, mark: Stamp) -> None:
        if not self._uses(mark):
            self._versions.drop(mark)

    def _release(self, mark: Stamp) -> None:
        self._versions.release(mark)
        self._drop_unused(mark)

    def _check_free(self, name: str) -> None:
        if name in self._entries:
            raise BundleError(f"domain {name!r} is in the bank already; call swap to replace its bundle")

    def _entry(self, name: Any) -> _Entry:
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise self._unknown(name)
        return entry

    def _unknown(self, name: Any) -> DataError:
        return DataError(f"domain {quoted(name)} is not in the bank; use one of {listed(sorted(self._entries))}")

    # -- answers -------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Answer requests of any domains together, each candidate by its domain's bundle.

        Args:
            requests: each (domain, history, candidates) or (domain, history, candidates, user). `history` is a list of
                (event, label) in time order, `candidates` a list of events; an event is an item id or a mapping of
                the columns that the domain's template names.
            batch_tokens: tokens of one forward pass, at most; requests that fit go through together. Memory is bounded
                as in `Scorer.score`.

        Returns:
            For each request its calibrated probabilities, float64 [candidates, labels], labels in class order.

        Raises:
            DataError: a request that is not understood, or an unknown domain, item or label; it names the request.
            StreamError: a candidate that does not fit `stream.max_length`.
            BundleError: a bundle that was changed on disk since it was added, or is not there any more.
            ModelError: answers that are not finite.
        """
        check_count("batch_tokens", batch_tokens, DataError, f"leave it out for {BATCH_TOKENS}")
        chosen = self._choose(listed_requests("requests", requests))
        wanted = [
            Wanted(member, entry.prompts, *request[1:], name=f"request {number} ({request[0]}): ")
            for number, (request, entry, member) in enumerate(chosen)
        ]
        return probabilities(self._engine, wanted, batch_tokens)

    def _choose(self, requests: Sequence[Request]) -> list[tuple[Request, _Entry, LoadedAdapter]]:
        """The version of a bundle that answers each request: one a domain for all of this call."""
        check_list("requests", requests)
        for number, request in enumerate(requests):
            if not isinstance(request, list | tuple) or len(request) not in (3, 4):
                raise DataError(
                    f"request {number} must be (domain, history, candidates) or (domain, history, candidates, user), "
                    f"not {quoted(request)}; correct it"
                )
            if not isinstance(request[0], str):
                raise DataError(f"request {number} has the domain {quoted(request[0])}, which is no text; correct it")
        names = dict.fromkeys(request[0] for request in requests)
        with self._lock:
            known = sorted(self._entries)
            entries = {name: self._entries.get(name if name in self._entries else self._fallback) for name in names}
            held = {name: self._versions.get(entry.stamp) for name, entry in entries.items() if entry is not None}
        for number, (name, *_) in enumerate(requests):
            if entries[name] is None:
                raise DataError(
                    f"request {number} is of domain {quoted(name)}, which is not in the bank; use one of "
                    f"{listed(known)}, or give the bank a fallback"
                )
        read: dict[Stamp, LoadedAdapter] = {}
        for name, entry in entries.items():
            if held[name] is None:
                held[name] = read.get(entry.stamp) or self._read_again(entry)
                read[entry.stamp] = held[name]
        return [(request, entries[request[0]], held[request[0]]) for request in requests]


def load_base(
    base: str,
    precision: Mapping[str, Any],
    attn: str,
    trust_remote_code: bool,
    device: str | None,
    gguf_file: str | None = None,
) -> tuple[Base, BehaviorClassifier]:
    """A base for bundles to share, and the classifier around it, whose head is not used."""
    if attn not in ("sdpa", "eager"):
        raise ModelError(f"attn must be sdpa or eager, not {attn!r}: candidates must not see each other; leave it out")
    source = resolve_base(base, gguf_file)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    quantization = precision["quantization"]
    stock = load_model(
        source,
        2,
        id2label={0: "0", 1: "1"},
        dtype=precision["dtype"],
        attn_implementation=attn,
        quantization=None if quantization is None else Quantization(**quantization),
        trust_remote_code=trust_remote_code,
        pad_token_id=tokenizer.pad_token_id,
    )
    classifier = BehaviorClassifier(stock, "head", ["0", "1"])
    if device is not None:
        classifier.to(device)
    loaded = Base(
        stock=stock,
        tokenizer=tokenizer,
        name=base,
        fingerprint=base_fingerprint(source, trust_remote_code=trust_remote_code),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        precision=dict(precision),
    )
    return loaded, classifier
