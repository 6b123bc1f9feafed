"""Many domains on one base in one process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.tables import listed, shorten
from llmrec_peft.errors import BundleError, DataError, LLMRecError, ModelError
from llmrec_peft.inference.catalogue import Catalogue
from llmrec_peft.inference.engine import Engine
from llmrec_peft.inference.kept import KeptTrunks
from llmrec_peft.inference.member import Base, Member, load_member, precision_of, stamp
from llmrec_peft.inference.plan import answer, ask
from llmrec_peft.inference.prompts import Prompts
from llmrec_peft.models.base import (
    Quantization,
    base_fingerprint,
    check_positions,
    load_model,
    load_tokenizer,
    resolve_base,
)
from llmrec_peft.models.bundle import check_bundle
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.fingerprints import tokenizer_fingerprint

if TYPE_CHECKING:
    from llmrec_peft.inference.scorer import Scorer

Items = str | Path | pa.Table | BehaviorLog | Catalogue | None
Request = Sequence[Any]
"""(domain, history, candidates), or with a fourth part: the user's columns that the domain's header names."""

BATCH_TOKENS = 4000


@dataclass(frozen=True)
class _Entry:
    """What a domain's name stands for; replaced whole, never changed."""

    directory: Path
    stamp: tuple[Any, ...]
    prompts: Prompts


class DomainBank:
    """Answers requests of many domains on one base, each by its own bundle.

    LoRA (all variants), 4-bit LoRA, bottleneck and head-only bundles share the base's weights; each brings its adapter,
    head, labels, calibration and domain. All methods may be called by several threads at once: `score` answers each
    request wholly by the version of its bundle that was there when the call began.
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
        self._fallback, self._max_bytes, self._any_dtype = fallback, max_bytes, any_dtype
        self._entries: dict[str, _Entry] = {}
        self._members: OrderedDict[tuple[Any, ...], Member] = OrderedDict()
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
        kept_bytes: int = 0,
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
            kept_bytes: memory for the keys and values of histories, which later requests go on from; 0 for none.
            dtype: number format of the base; by default that of the first bundle, with its 4-bit storage if any.
            attn: attention kernel.
            device: where the base goes, such as "cuda"; by default the CPU. Never run on a GPU.
            trust_remote_code: allow the base's own code to run.

        Raises:
            ModelError: a base that is not there, or an encoder, which reads both ways.
            BundleError: a damaged bundle, or one of another base, tokenizer or precision than the bank's.
            DataError: an item table that cannot be read, or of a domain that is not among the bundles.
        """
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
        kept = KeptTrunks(kept_bytes) if kept_bytes else None
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
            held = {name: self._members.get(entry.stamp) for name, entry in self._entries.items()}
        return {name: 0 if member is None else member.size for name, member in held.items()}

    def add(self, name: str, directory: str | Path, items: Items = None) -> None:
        """Add a domain. Raises BundleError, and changes nothing, if the name is taken or the bundle does not fit."""
        if name in self._entries:
            raise BundleError(f"domain {name!r} is in the bank already; call swap to replace its bundle")
        entry = self._read(Path(directory), Catalogue.read(items))
        with self._lock:
            if name in self._entries:
                raise BundleError(f"domain {name!r} is in the bank already; call swap to replace its bundle")
            self._entries[name] = entry

    def swap(self, name: str, directory: str | Path) -> None:
        """Let another bundle answer for a domain from the next call of `score` on; its items stay.

        The new bundle is read and checked before anything changes: after an error the old one goes on. A bundle that
        the bank has in memory, whatever the name, is not read again.

        Raises:
            DataError: no domain has this name.
            BundleError: the bundle is damaged or does not fit the base.
        """
        old = self._entry(name)
        entry = self._read(Path(directory), old.prompts.catalogue, old.prompts)
        with self._lock:
            if name not in self._entries:
                raise self._unknown(name)
            self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Take a domain out; a `score` that has begun still answers for it. Raises DataError if there is none."""
        with self._lock:
            if name not in self._entries:
                raise self._unknown(name)
            if name == self._fallback:
                raise DataError(
                    f"domain {name!r} is the bank's fallback and stays; swap its bundle, or make another bank"
                )
            gone = self._entries.pop(name)
            if all(entry.stamp != gone.stamp for entry in self._entries.values()):
                self._members.pop(gone.stamp, None)

    def preload(self, directory: str | Path) -> None:
        """Read a bundle into memory ahead of a `swap`, which then takes no time."""
        self._read(Path(directory), Catalogue(None))

    def scorer(self, name: str) -> Scorer:
        """A scorer of one domain on the bank's base; after a swap the new bundle answers. Raises DataError for none."""
        from llmrec_peft.inference.scorer import Scorer

        self._entry(name)

        def current() -> tuple[Member, Prompts]:
            with self._lock:
                entry = self._entry(name)
            return self._member_of(entry), entry.prompts

        return Scorer(self._engine, current)

    def _read(self, directory: Path, catalogue: Catalogue, old: Prompts | None = None) -> _Entry:
        try:
            mark = stamp(directory)
        except OSError as error:
            raise BundleError(
                f"bundle {directory} cannot be read ({error.strerror}: {Path(error.filename or directory).name}); "
                "name a directory that training left"
            ) from None
        member = self._member(directory, mark)
        same = old is not None and old.vocabulary.domain == member.domain
        return _Entry(directory, mark, old if same else Prompts(member.vocabulary, catalogue))

    def _member(self, directory: Path, mark: tuple[Any, ...]) -> Member:
        """The bundle in memory, read if it is not there; what was not used for the longest makes room."""
        with self._lock:
            if mark in self._members:
                self._members.move_to_end(mark)
                return self._members[mark]
        member = load_member(directory, self._base, any_dtype=self._any_dtype)
        check_positions(self._base.stock.config, member.domain.stream.max_length)
        try:
            unchanged = stamp(directory) == mark
        except OSError:
            unchanged = False
        if not unchanged:
            raise BundleError(f"bundle {directory} was changed while it was read; call swap once it is whole")
        self._engine.install(member.deltas)
        with self._lock:
            self._members[mark] = member
            while self._max_bytes is not None and self._held() > self._max_bytes and len(self._members) > 1:
                self._members.popitem(last=False)
        return member

    def _held(self) -> int:
        return sum(member.size for member in self._members.values())

    def _entry(self, name: Any) -> _Entry:
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise self._unknown(name)
        return entry

    def _unknown(self, name: Any) -> DataError:
        return DataError(f"domain {shorten(name)} is not in the bank; use one of {listed(sorted(self._entries))}")

    # -- answers -------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Answer requests of any domains together, each candidate by its domain's bundle.

        Args:
            requests: each (domain, history, candidates) or (domain, history, candidates, user). `history` is a list of
                (event, label) in time order, `candidates` a list of events; an event is an item id or a mapping of
                the columns that the domain's template names.
            batch_tokens: tokens of one forward pass, at most; requests that fit go through together.

        Returns:
            For each request its calibrated probabilities, float64 [candidates, labels], labels in class order.

        Raises:
            DataError: a request that is not understood, or an unknown domain, item or label; it names the request.
            StreamError: a candidate that does not fit `stream.max_length`.
            BundleError: a bundle that was changed on disk since it was added, or is not there any more.
            ModelError: answers that are not finite.
        """
        if batch_tokens < 1:
            raise DataError(f"batch_tokens must be at least 1, not {batch_tokens}; leave it out for {BATCH_TOKENS}")
        chosen = self._choose(requests)
        asks = []
        for number, (request, entry, member) in enumerate(chosen):
            try:
                _, history, candidates, *user = request
                asks.append(ask(member, entry.prompts, history, candidates, user[0] if user else None))
            except LLMRecError as error:
                raise type(error)(f"request {number} ({request[0]}): {error}") from None
        found = answer(self._engine, asks, batch_tokens)
        return [one.member.calibration.apply(logits) for one, logits in zip(asks, found, strict=True)]

    def _choose(self, requests: Sequence[Request]) -> list[tuple[Request, _Entry, Member]]:
        """The version of a bundle that answers each request: one a domain for all of this call."""
        with self._lock:
            entries = dict(self._entries)
        for number, request in enumerate(requests):
            if not isinstance(request, list | tuple) or len(request) not in (3, 4):
                raise DataError(
                    f"request {number} must be (domain, history, candidates) or (domain, history, candidates, user), "
                    f"not {shorten(request)}; correct it"
                )
        found: dict[str, tuple[_Entry, Member]] = {}
        for number, (name, *_) in enumerate(requests):
            if isinstance(name, str) and name in found:
                continue
            entry = entries.get(name if isinstance(name, str) and name in entries else self._fallback)
            if entry is None:
                raise DataError(
                    f"request {number} is of domain {shorten(name)}, which is not in the bank; use one of "
                    f"{listed(sorted(entries))}, or give the bank a fallback"
                )
            found[name] = (entry, self._member_of(entry))
        return [(request, *found[request[0]]) for request in requests]

    def _member_of(self, entry: _Entry) -> Member:
        """The entry's very version; one that is out of memory is read again if its files are the same still."""
        with self._lock:
            if entry.stamp in self._members:
                self._members.move_to_end(entry.stamp)
                return self._members[entry.stamp]
        try:
            unchanged = stamp(entry.directory) == entry.stamp
        except OSError:
            unchanged = False
        if not unchanged:
            raise BundleError(
                f"bundle {entry.directory} is out of memory, and was changed or taken away since it was added; "
                "call swap with the version wanted"
            )
        return self._member(entry.directory, entry.stamp)


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
