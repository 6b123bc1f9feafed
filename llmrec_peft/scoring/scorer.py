"""One domain's scorer: a history is encoded once, for any number of candidates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrec_peft.checkpoints.checksum import digest
from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import MANIFEST, WEIGHTS
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import DataError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.merging.unload import unload
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.requests.argument_checks import check_count
from llmrec_peft.requests.batching import BATCH_TOKENS
from llmrec_peft.requests.item_table import ItemsLike, ItemTable
from llmrec_peft.requests.request import Event, History, Request, scorer_requests
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.index_files import DIRECTORY as RETRIEVAL
from llmrec_peft.retrieval.recommender import Recommendation, Recommender
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.scoring.adapter_bank import AdapterBank
from llmrec_peft.scoring.adapter_loading import precision_of
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.item_embeddings import embed_items
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter
from llmrec_peft.scoring.prefix_cache import PrefixCache
from llmrec_peft.scoring.shared_base import Attention, BaseOptions, Dtype, load_base

CACHE_BYTES = 512 * 1024**2
"""Memory for the keys and values of histories, by default."""
_OWN = "own"
"""Name of the only domain in the bank of a scorer that `Scorer.load` makes."""


class Scorer:
    """Probabilities of a domain's labels for candidates of one user after another: a bank seen by one of its domains.

    It caches the histories that were used last, within `cache_bytes`: candidates of the same history, or of one that
    has grown by an event, cost only their own tokens. Threads may share a scorer. `load` merges the update of a float32
    LoRA bundle into the scorer's own copy of the weights, since no other bundle shares them.
    """

    def __init__(self, bank: AdapterBank, name: str) -> None:
        """For `load` and `DomainBank.scorer`."""
        self._bank, self._name = bank, name
        self.retrieval_index: RetrievalIndex | None = None
        self.fusion: Fusion | None = None
        self._recommender: tuple[tuple[object, ...], Recommender] | None = None

    @classmethod
    def load(
        cls,
        directory: str | Path,
        items: ItemsLike = None,
        base: str | Path | None = None,
        *,
        dtype: Dtype | None = None,
        attn: Attention = "sdpa",
        device: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        retrieval: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> Scorer:
        """A scorer of a bundle or of a merged model.

        Args:
            directory: directory of the bundle or merged model.
            items: the item table (see `ItemTable.read`); without it every event must be a mapping of columns.
            base: another path or name of a bundle's base.
            dtype: number format of the base; by default the one that the bundle was trained with.
            attn: attention kernel.
            device: device of the model, such as "cuda"; by default the CPU. Not tested on a GPU.
            cache_bytes: memory for histories; 0 encodes each history again in each call.
            retrieval: directory of a retrieval index (`recipes/index.py`), for `recommend`; by default the one inside
                `directory`, if there is one.
            trust_remote_code: allow the base's own code to run.

        Raises:
            BundleError: a damaged bundle or merged model, or another base or tokenizer than it was trained with.
            ModelError: a bidirectional encoder.
            DataError: an item table that cannot be read.
        """
        directory, table = Path(directory), ItemTable.read(items)
        manifest = read_manifest(directory)
        cache = PrefixCache(cache_bytes) if cache_bytes else None
        options = BaseOptions(dtype, attn, device, trust_remote_code)
        if manifest.get("kind") == "merged" or manifest["method"] == "full" or _merges(manifest, dtype):
            bank = _bank_of_model(directory, table, base, options, cache)
        else:
            bank = _bank_of_adapter(directory, manifest, table, base, options, cache)
        scorer = cls(bank, _OWN)
        place = directory / RETRIEVAL if retrieval is None else Path(retrieval)
        if retrieval is not None or place.is_dir():
            scorer.retrieval_index, scorer.fusion = RetrievalIndex.load(place, adapter=adapter_of(manifest))
        return scorer

    @property
    def domain(self) -> Domain:
        """The domain of the bundle."""
        return self._bank.entry(self._name).domain

    @property
    def labels(self) -> list[str]:
        """Labels in class order: the columns of the probabilities."""
        return self.domain.labels

    @property
    def items(self) -> ItemTable:
        """The item table."""
        return self._bank.entry(self._name).items

    @property
    def encoder(self) -> RequestEncoder:
        """Encodes the domain's requests."""
        return self._bank.entry(self._name).encoder

    def score(
        self,
        history: History,
        candidates: Sequence[Event],
        user: Mapping[str, Any] | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> np.ndarray:
        """Calibrated probabilities, float64 [candidates, labels], labels in class order.

        Args:
            history: (event, label) in time order; of any number, the newest that the domain's window holds are used.
            candidates: events; each is scored as if it were the only one. An event is an item id of the item table, or
                a mapping of the columns that the domain's template names.
            user: columns that the domain's header names.
            batch_tokens: tokens of one forward pass, at most. Beside the result, memory does not grow with the
                candidates: where there are more than `chunks.CHUNK`, all are checked first and then computed in chunks,
                with a progress bar.

        Raises:
            DataError: an unknown item or label, or a missing column.
            StreamError: a candidate that does not fit `stream.max_length`.
            ModelError: a logit is not a finite number.
        """
        return self._predict([Request(history, candidates, user, self._name)], batch_tokens)[0]

    def score_many(self, requests: Iterable[Sequence[Any]], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Score the requests of many users together: a list of what `score` returns.

        Args:
            requests: each (history, candidates) or (history, candidates, user). Histories may be of any length. Equal
                histories are encoded once, and equal candidates after one history are computed once.
            batch_tokens: as in `score`.

        Raises as `score` does; the message names the request.
        """
        return self._predict(scorer_requests(requests, self._name), batch_tokens)

    def recommend(self, history: History, k: int = 10, **options: Any) -> list[Recommendation]:
        """The k best items of the table for a history, best first; options as in `Recommender.recommend`.

        Without a retrieval index the LLM ranks the whole table.
        """
        return self.recommender().recommend(history, k, **options)

    def recommender(self) -> Recommender:
        """A recommender with this scorer's retrieval index and fusion."""
        parts = (self.items, self.retrieval_index, self.fusion)
        if self._recommender is None or any(a is not b for a, b in zip(self._recommender[0], parts, strict=True)):
            self._recommender = (parts, Recommender(self, self.retrieval_index, self.fusion))
        return self._recommender[1]

    def embed_items(self) -> np.ndarray:
        """Embeddings of the item table's texts, float16 [items, width of the base]; see `scoring.item_embeddings`."""
        return embed_items(self.items, self.encoder, self._bank.token_embeddings())

    def _predict(self, requests: list[Request], batch_tokens: int) -> list[np.ndarray]:
        check_count("batch_tokens", batch_tokens, DataError, f"leave it out for {BATCH_TOKENS}")
        return self._bank.predict(requests, {self._name: self._bank.pin(self._name)}, batch_tokens)


def _bank_of_adapter(
    directory: Path,
    manifest: Mapping[str, Any],
    items: ItemTable,
    base: str | Path | None,
    options: BaseOptions,
    cache: PrefixCache | None,
) -> AdapterBank:
    """A bank of one bundle on its base, whose weights do not change."""
    precision = precision_of(directory, manifest) | ({} if options.dtype is None else {"dtype": options.dtype})
    model = manifest["model_options"]
    shared = load_base(str(base or model["base"]), precision, options, model.get("gguf_file"))
    engine = Engine(shared.classifier, shared.pad_token_id, cache)
    bank = AdapterBank(engine, shared, any_dtype=options.dtype is not None)
    bank.add(_OWN, directory, items)
    return bank


def _bank_of_model(
    directory: Path, items: ItemTable, base: str | Path | None, options: BaseOptions, cache: PrefixCache | None
) -> AdapterBank:
    """A bank of one model with weights of its own: merged, fully trained, or a LoRA bundle that is merged here."""
    place = None if base is None else str(base)
    bundle = load_trained(directory, LoadOptions(place, options.dtype, options.attn, options.trust_remote_code))
    classifier, tokenizer = bundle.classifier, bundle.tokenizer
    if classifier.method == "lora":
        classifier = BehaviorClassifier(unload(classifier, torch.float32), "merged", classifier.labels)
    domain = Domain.of_manifest(bundle.domain, source=str(directory / MANIFEST))
    calibration = Calibration.from_dict(bundle.calibration)
    if options.device is not None:
        classifier.to(options.device)
    engine = Engine(classifier, tokenizer.pad_token_id, cache)
    head = classifier.head.get_parameter("weight").detach().float()
    version, size = digest(bundle.manifest), head.numel() * head.element_size()
    adapter = LoadedAdapter(directory, version, Vocabulary(domain, tokenizer), calibration, head, {}, size)
    check_positions(classifier.config, domain.stream.max_length)
    bank = AdapterBank(engine, None)
    bank.add_loaded(_OWN, adapter, items)
    return bank


def _merges(manifest: Mapping[str, Any], dtype: str | None) -> bool:
    """Whether a bundle's update is merged into the weights: a LoRA in float32, where merging rounds nothing more."""
    return manifest["method"] == "lora" and (dtype or manifest["model_options"].get("dtype")) == "float32"


def adapter_of(manifest: Mapping[str, Any]) -> str | None:
    """SHA-256 of the adapter weights in a bundle, or of those that a merged model was made from; None for several."""
    if manifest.get("kind") != "merged":
        return manifest["files"][WEIGHTS]
    sources = manifest["merged_from"]
    return sources[0]["weights_sha256"] if len(sources) == 1 else None
