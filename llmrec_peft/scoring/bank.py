"""Many domains on one base in one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.checkpoints.adapter_checks import check_bundle
from llmrec_peft.errors import DataError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.requests.argument_checks import check_count
from llmrec_peft.requests.batching import BATCH_TOKENS
from llmrec_peft.requests.item_table import ItemsLike
from llmrec_peft.requests.request import bank_requests
from llmrec_peft.scoring.adapter_bank import AdapterBank, check_name
from llmrec_peft.scoring.adapter_loading import precision_of
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.prefix_cache import PrefixCache
from llmrec_peft.scoring.scorer import Scorer
from llmrec_peft.scoring.shared_base import Attention, BaseOptions, Dtype, load_base


class DomainBank(AdapterBank):
    """Scores requests of many domains on one base, each by the bundle of its domain.

    LoRA (all variants), 4-bit LoRA, bottleneck and head-only bundles share the base's weights; each brings its adapter,
    head, labels, calibration and domain. All methods may be called by several threads at once: `score` computes each
    request wholly by the version of its bundle that was there when the call began. A version that no domain uses any
    more leaves memory when the last call that began with it ends.

    The name of a domain is a text of 1 to 200 printable characters without spaces around it. Names are compared as a
    whole: `foo` and `foobar`, or `Foo`, are different domains.
    """

    @classmethod
    def load(
        cls,
        base: str | Path,
        bundles: Mapping[str, str | Path],
        items: Mapping[str, ItemsLike] | None = None,
        *,
        fallback: str | None = None,
        max_bytes: int | None = None,
        cache_bytes: int = 0,
        dtype: Dtype | None = None,
        attn: Attention = "sdpa",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> DomainBank:
        """Load a base once, and bundles onto it.

        Args:
            base: an embedded name, a Hub id or a directory.
            bundles: mapping from the name of a domain, chosen here, to the directory of its bundle.
            items: mapping from the name of a domain to its item table (see `ItemTable.read`); other domains accept
                only events that are mappings.
            fallback: the domain that serves requests of names that the bank does not have; None: they are an error.
            max_bytes: memory for adapters; the least recently used ones leave it and are read again on demand.
            cache_bytes: memory for the keys and values of histories, which later requests continue from; 0 for none.
            dtype: number format of the base; by default that of the first bundle, with its 4-bit storage if any.
            attn: attention kernel.
            device: device of the base, such as "cuda"; by default the CPU. Not tested on a GPU.
            trust_remote_code: allow the base's own code to run.

        Raises:
            ModelError: a base that is not there, or a bidirectional encoder.
            BundleError: a damaged bundle, or one of another base, tokenizer or precision than the bank's.
            DataError: an item table that cannot be read, or of a domain that is not among the bundles; a name that is
                not allowed.
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
        shared = load_base(str(base), precision, BaseOptions(dtype, attn, device, trust_remote_code))
        cache = PrefixCache(cache_bytes) if cache_bytes else None
        engine = Engine(shared.classifier, shared.pad_token_id, cache)
        bank = cls(engine, shared, fallback=fallback, max_bytes=max_bytes, any_dtype=dtype is not None)
        for name, directory in bundles.items():
            bank.add(name, directory, items.get(name))
        return bank

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
        """Labels of a domain in class order: the columns of its probabilities."""
        return self.entry(name).domain.labels

    def scorer(self, name: str) -> Scorer:
        """A scorer of one domain on the bank's base, which follows its swaps. Raises DataError for an unknown name."""
        self.entry(name)
        return Scorer(self, name)

    def score(self, requests: Iterable[Sequence[Any]], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Score requests of any domains together, each candidate by the bundle of its domain.

        Args:
            requests: each (domain, history, candidates) or (domain, history, candidates, user). `history` is a list of
                (event, label) in time order, `candidates` a list of events; an event is an item id or a mapping of
                the columns that the domain's template names.
            batch_tokens: tokens of one forward pass, at most; requests that fit go through together. Memory is bounded
                as in `Scorer.score`.

        Returns:
            For each request its calibrated probabilities, float64 [candidates, labels], labels in class order.

        Raises:
            DataError: a malformed request, or an unknown domain, item or label; the message names the request.
            StreamError: a candidate that does not fit `stream.max_length`.
            BundleError: a bundle that was changed on disk since it was added, or is not there any more.
            ModelError: a logit is not a finite number.
        """
        check_count("batch_tokens", batch_tokens, DataError, f"leave it out for {BATCH_TOKENS}")
        wanted = bank_requests(requests)
        known, versions = self.domains, self.pin_all(request.domain for request in wanted)
        for number, request in enumerate(wanted):
            if request.domain not in versions:
                raise DataError(
                    f"request {number} is of domain {quoted(request.domain)}, which is not in the bank; use one of "
                    f"{listed(sorted(known))}, or give the bank a fallback"
                )
        return self.predict(wanted, versions, batch_tokens)
