"""One domain's scorer: a history encoded once, any number of candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llmrec_peft.checkpoints.manifest import MANIFEST, WEIGHTS, digest
from llmrec_peft.checkpoints.merged import load_answering, read_answering
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import DataError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.merging.unload import fold
from llmrec_peft.models.base import check_positions
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.recommender import Recommendation, Recommender
from llmrec_peft.retrieval.retrieval_index import DIRECTORY as EVIDENCE
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.scoring.bank import BATCH_TOKENS, Items, load_base
from llmrec_peft.scoring.chunks import Wanted, probabilities
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.item_embeddings import embed_items
from llmrec_peft.scoring.item_table import Catalogue
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter, load_adapter, precision_of
from llmrec_peft.scoring.prefix_cache import PrefixCache
from llmrec_peft.scoring.prompts import Event, Prompts
from llmrec_peft.serving.request_rules import check_count, listed_requests

KEPT_BYTES = 512 * 1024**2
"""Memory for the keys and values of histories, by default."""


class Scorer:
    """Probabilities of a domain's labels for candidates of one user after another.

    It keeps the histories that it was asked for last, within `cache_bytes`: candidates of the same history, or of one
    that has grown by an event, cost their own tokens alone. Threads may share one. A float32 LoRA bundle's update is
    put into the scorer's own copy of the weights, since no other bundle shares them.
    """

    def __init__(self, engine: Engine, current: Callable[[], tuple[LoadedAdapter, Prompts]]) -> None:
        """For `load` and `DomainBank.scorer`; `current` gives the bundle that answers, and its words."""
        self._engine, self._current = engine, current
        self.retrieval_index: RetrievalIndex | None = None
        self.fusion: Fusion | None = None
        self._recommender: tuple[Any, Recommender] | None = None

    @classmethod
    def load(
        cls,
        directory: str | Path,
        items: Items = None,
        base: str | Path | None = None,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attn: Literal["sdpa", "eager"] = "sdpa",
        device: str | None = None,
        cache_bytes: int = KEPT_BYTES,
        retrieval: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> Scorer:
        """A scorer of a bundle or of a merged model.

        Args:
            directory: of either.
            items: the item table (see `Catalogue.read`); without it every event is a mapping of columns.
            base: where a bundle's base lies, if not where the bundle says.
            dtype: number format of the base; by default the one that the bundle was trained with.
            attn: attention kernel.
            device: such as "cuda"; by default the CPU. Never run on a GPU.
            cache_bytes: memory for histories; 0 encodes each history again in each call.
            retrieval: directory of what a log says of its items (`recipes/index.py`), for `recommend`; by default
                the one inside `directory`, if there is one.
            trust_remote_code: allow the base's own code to run.

        Raises:
            BundleError: a damaged bundle or merged model, or another base or tokenizer than it was trained with.
            ModelError: an encoder, which reads both ways.
            DataError: an item table that cannot be read.
        """
        directory, catalogue = Path(directory), Catalogue.read(items)
        manifest = read_answering(directory)
        options = {"dtype": dtype, "attn": attn, "trust_remote_code": trust_remote_code}
        if manifest.get("kind") == "merged" or manifest["method"] == "full" or _folds(manifest, dtype):
            bundle = load_answering(directory, base=None if base is None else str(base), **options)
            classifier, tokenizer = bundle.classifier, bundle.tokenizer
            if classifier.method == "lora":
                classifier = BehaviorClassifier(fold(classifier, torch.float32), "merged", classifier.labels)
            domain = Domain.of_manifest(bundle.domain, source=str(directory / MANIFEST))
            calibration = Calibration.from_dict(bundle.calibration)
            engine = Engine(classifier.to(device) if device else classifier, tokenizer.pad_token_id)
            head = classifier.head.weight.detach().float()
            version, size = digest(bundle.manifest), head.numel() * head.element_size()
            member = LoadedAdapter(directory, version, Vocabulary(domain, tokenizer), calibration, head, {}, size)
            check_positions(classifier.config, domain.stream.max_length)
        else:
            precision = precision_of(directory, manifest) | ({} if dtype is None else {"dtype": dtype})
            source = str(base or manifest["model_options"]["base"])
            loaded, classifier = load_base(
                source, precision, attn, trust_remote_code, device, manifest["model_options"].get("gguf_file")
            )
            engine = Engine(classifier, loaded.tokenizer.pad_token_id)
            member = load_adapter(directory, loaded, any_dtype=dtype is not None)
            engine.install(member.deltas)
        engine.kept = PrefixCache(cache_bytes) if cache_bytes else None
        prompts = Prompts(member.vocabulary, catalogue)
        scorer = cls(engine, lambda: (member, prompts))
        place = directory / EVIDENCE if retrieval is None else Path(retrieval)
        if retrieval is not None or place.is_dir():
            scorer.retrieval_index, scorer.fusion = RetrievalIndex.load(place, adapter=adapter_of(manifest))
        return scorer

    @property
    def domain(self) -> Domain:
        """The domain that answers."""
        return self._current()[0].domain

    @property
    def labels(self) -> list[str]:
        """Labels in class order: the columns of an answer."""
        return self._current()[0].labels

    @property
    def catalogue(self) -> Catalogue:
        """The item table."""
        return self.prompts.catalogue

    @property
    def prompts(self) -> Prompts:
        """The domain's words for the items of the table."""
        return self._current()[1]

    def score(
        self,
        history: Sequence[tuple[Event, str]],
        candidates: Sequence[Event],
        user: Mapping[str, Any] | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> np.ndarray:
        """Calibrated probabilities, float64 [candidates, labels], labels in class order.

        Args:
            history: (event, label) in time order; any number, the newest that the domain's window holds are used.
            candidates: events; each is answered as if it stood alone. An event is an item id of the item table, or a
                mapping of the columns that the domain's template names.
            user: columns that the domain's header names.
            batch_tokens: tokens of one forward pass, at most. Beside the answers, memory does not grow with the
                candidates: where there are more than `parts.PART`, all are checked first, and then answered in parts,
                with a progress bar.

        Raises:
            DataError: an unknown item or label, or a column that is missing.
            StreamError: a candidate that does not fit `stream.max_length`.
            ModelError: answers that are not finite.
        """
        member, prompts = self._current()
        return self._answer([Wanted(member, prompts, history, candidates, user)], batch_tokens)[0]

    def score_many(self, requests: Iterable[Sequence[Any]], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Answers of many users together: a list of what `score` returns.

        Args:
            requests: each (history, candidates) or (history, candidates, user). Histories may be of any length; those
                that are the same are encoded once, and candidates that stand twice after one are answered once.
            batch_tokens: as in `score`.

        Raises as `score` does, naming the request.
        """
        member, prompts = self._current()
        wanted = []
        for number, request in enumerate(listed_requests("requests", requests)):
            if not isinstance(request, list | tuple) or len(request) not in (2, 3):
                raise DataError(f"request {number} must be (history, candidates) or (history, candidates, user)")
            wanted.append(Wanted(member, prompts, *request, name=f"request {number}: "))
        return self._answer(wanted, batch_tokens)

    def recommend(self, history: Sequence[tuple[Event, str]], k: int = 10, **options: Any) -> list[Recommendation]:
        """The k best items of the table for a history, best first; options as `Recommender.recommend` has them.

        Without evidence of a log the LLM ranks the whole table.
        """
        return self.recommender().recommend(history, k, **options)

    def recommender(self) -> Recommender:
        """What `recommend` ranks by, with this scorer's evidence and fusion."""
        parts = (self.catalogue, self.retrieval_index, self.fusion)
        if self._recommender is None or any(a is not b for a, b in zip(self._recommender[0], parts, strict=True)):
            self._recommender = (parts, Recommender(self, self.retrieval_index, self.fusion))
        return self._recommender[1]

    def embed_items(self) -> np.ndarray:
        """Vectors of the texts of the item table, float16 [items, width of the base]; see `scoring.item_embeddings`."""
        weight = self._engine.classifier.stock.get_input_embeddings().weight
        return embed_items(self.catalogue, self.prompts.vocabulary, weight)

    def _answer(self, wanted: list[Wanted], batch_tokens: int) -> list[np.ndarray]:
        check_count("batch_tokens", batch_tokens, DataError, f"leave it out for {BATCH_TOKENS}")
        return probabilities(self._engine, wanted, batch_tokens)


def _folds(manifest: Mapping[str, Any], dtype: str | None) -> bool:
    """Whether a bundle answers as its adapter's own weights: where that rounds nothing that its base does not."""
    return manifest["method"] == "lora" and (dtype or manifest["model_options"].get("dtype")) == "float32"


def adapter_of(manifest: Mapping[str, Any]) -> str | None:
    """SHA-256 of the adapter's weights that a bundle has, or that a merged model was made of; None for several."""
    if manifest.get("kind") != "merged":
        return manifest["files"][WEIGHTS]
    sources = manifest["merged_from"]
    return sources[0]["weights_sha256"] if len(sources) == 1 else None
