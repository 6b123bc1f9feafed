"""The scorer of an exported student: the calls of `scoring.scorer.Scorer`, on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmrec_peft.checkpoints.export_files import check_export_file
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import EXPORT, GRAPHS, SERVING_MANIFEST, TOKENIZER
from llmrec_peft.data.templates import check_template
from llmrec_peft.errors import BundleError, DataError, input_errors
from llmrec_peft.probabilities import calibrated, read_calibration
from llmrec_peft.requests.argument_checks import check_count
from llmrec_peft.requests.batching import CandidateGroup, RequestBatch
from llmrec_peft.requests.item_source import NoTable
from llmrec_peft.requests.plain_items import PlainItems
from llmrec_peft.requests.request import Event, History, Request, scorer_requests
from llmrec_peft.requests.request_domain import RequestDomain
from llmrec_peft.requests.request_encoder import RequestEncoder
from llmrec_peft.serving.exported_vocabulary import ExportedVocabulary
from llmrec_peft.serving.onnx_graph import Graph

CACHED_EVENTS = 200_000
"""Events whose tokens are cached, by default."""
CANDIDATE_TOKENS = 512
"""Tokens of the candidates in one row, at most. Further rows encode the history again, since the graph caches nothing
between passes: a history of H tokens costs 1 + H / CANDIDATE_TOKENS times the tokens of its many candidates."""
BATCH_TOKENS = 4096
"""Tokens of one pass, at most, by default."""


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A graph with its labels and calibration."""

    graph: Graph
    labels: list[str]
    temperature: float
    bias: tuple[float, ...] | None

    def calibrate(self, logits: np.ndarray) -> np.ndarray:
        """softmax(logits / temperature + bias), float64 [n, labels]."""
        return calibrated(logits, self.temperature, self.bias)


class OnnxScorer:
    """Probabilities of a domain's labels for candidates of one user after another. Threads may share a scorer."""

    def __init__(self, manifest: Mapping[str, Any], encoder: RequestEncoder, model: ExportedModel) -> None:
        self._manifest, self._encoder, self._model = manifest, encoder, model

    @classmethod
    def load(
        cls,
        directory: str | Path,
        items: Any = None,
        *,
        precision: Literal["float32", "int8"] = "float32",
        threads: int | None = None,
        cache_events: int = CACHED_EVENTS,
    ) -> OnnxScorer:
        """A scorer of an export that `export_onnx` wrote.

        Args:
            directory: directory of the export.
            items: rows of the item table: a list of mappings with `item_id`, a mapping from ids to mappings, or a path
                of csv or jsonl (of parquet where pyarrow is installed). A student that reads item ids needs none; for
                any other, every event must then be a mapping of columns.
            precision: which of the export's graphs is used.
            threads: number of threads of one pass; ONNX Runtime's own choice if None.
            cache_events: number of events whose tokens are cached for the next calls.

        Raises:
            BundleError: a damaged or edited file, or a precision that was not exported.
            DataError: an item table that cannot be read.
            ModelError: `threads` below 1, or a tokenizer whose package is not installed.
        """
        directory = Path(directory)
        with input_errors(BundleError, f"export {directory}", "export again"):
            return cls._load(directory, items, precision, threads, cache_events)

    @classmethod
    def _load(cls, directory: Path, items: Any, precision: str, threads: int | None, cache_events: int) -> OnnxScorer:
        manifest = read_manifest(directory, EXPORT)
        labels = list(manifest["labels"])
        temperature, bias = read_calibration(manifest["calibration"], len(labels), SERVING_MANIFEST)
        name = GRAPHS.get(precision)
        if name is None or name not in manifest["files"]:
            has = [key for key, file in GRAPHS.items() if file in manifest["files"]]
            raise BundleError(f"{directory} has no model of precision {precision!r}; use {' or '.join(has)}")
        vocabulary = ExportedVocabulary(manifest, check_export_file(directory, manifest, TOKENIZER))
        graph = Graph(check_export_file(directory, manifest, name), vocabulary.pad, threads, len(labels))
        table, domain = PlainItems.read(items), request_domain(manifest)
        source = NoTable(takes_any_id=domain.event_columns == ["item_id"]) if table is None else table
        encoder = RequestEncoder(domain, vocabulary, source, cache_events)
        return cls(manifest, encoder, ExportedModel(graph, labels, temperature, bias))

    @property
    def labels(self) -> list[str]:
        """Labels in class order: the columns of the probabilities."""
        return list(self._model.labels)

    @property
    def domain(self) -> dict[str, Any]:
        """The domain, as in its YAML file."""
        return self._manifest["domain"]

    @property
    def manifest(self) -> Mapping[str, Any]:
        """All of serving.json: source, metrics, measurements of the export."""
        return self._manifest

    def score(
        self,
        history: History,
        candidates: Sequence[Event],
        user: Mapping[str, Any] | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> np.ndarray:
        """Calibrated probabilities, float64 [candidates, labels], of the same arguments as `Scorer.score`.

        `batch_tokens` bounds one pass, which takes at least one history with a row of candidates. Memory beyond the
        tokens of the request does not grow with the candidates.

        Raises:
            DataError: an unknown item or label, or a missing column.
            DomainError: a value that does not fit the template's format.
            StreamError: a candidate that does not fit `stream.max_length`.
            ModelError: a logit is not a finite number.
        """
        return self._predict([Request(history, candidates, user)], batch_tokens)[0]

    def score_many(self, requests: Iterable[Sequence[Any]], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Score the requests of many users together, as `Scorer.score_many` does: a list of what `score` returns.

        Each request is (history, candidates) or (history, candidates, user). Raises as `score` does; the message names
        the request.
        """
        return self._predict(scorer_requests(requests), batch_tokens)

    def _predict(self, requests: list[Request], batch_tokens: int) -> list[np.ndarray]:
        check_count("batch_tokens", batch_tokens, DataError, f"leave it out for {BATCH_TOKENS}")
        batch: RequestBatch[ExportedModel] = RequestBatch()
        results = []
        for request in requests:
            encoded = self._encoder.encode(request)
            results.append(np.empty((len(encoded.candidates), len(self._model.labels))))
            batch.add(encoded, self._model, results[-1])
        batch.run(lambda groups: self._predict_groups(groups, batch_tokens))
        return results

    def _predict_groups(self, groups: Sequence[CandidateGroup[ExportedModel]], batch_tokens: int) -> None:
        """Set the logits of the groups; only the rows of one pass are in memory at a time."""
        rows: list[_Row] = []
        tokens = 0
        for group in groups:
            group.logits = np.empty((len(group.candidates), len(self._model.labels)), np.float32)
            first = 0
            while first < len(group.candidates):
                last = group.fitting(first, min(CANDIDATE_TOKENS, batch_tokens))
                rows.append(_Row(group, first, last))
                tokens += len(group.prefix_ids) + sum(map(len, group.candidates[first:last]))
                first = last
                if tokens >= 8 * batch_tokens:  # enough to find rows of similar length among
                    self._predict_rows(rows, batch_tokens)
                    rows, tokens = [], 0
        self._predict_rows(rows, batch_tokens)

    def _predict_rows(self, rows: Sequence[_Row], batch_tokens: int) -> None:
        if not rows:
            return
        logits = self._model.graph.predict([row.group.stream(row.first, row.last) for row in rows], batch_tokens)
        start = 0
        for row in rows:
            count = row.last - row.first
            row.group.logits[row.first : row.last] = logits[start : start + count]
            start += count


@dataclass(frozen=True)
class _Row:
    """A prefix with the candidates first:last of its group."""

    group: CandidateGroup[ExportedModel]
    first: int
    last: int


def request_domain(manifest: Mapping[str, Any]) -> RequestDomain:
    """The domain of an export, as the request encoder needs it.

    Raises:
        DomainError: a template that cannot be filled.
    """
    domain, window, labels = manifest["domain"], manifest["window"], list(manifest["labels"])
    for key in ("event", "header"):
        check_template(domain[key], f"domain '{domain['name']}': {key}")
    history_labels = domain["stream"].get("history_labels")
    return RequestDomain(
        name=domain["name"],
        event=domain["event"],
        header=domain["header"],
        labels=tuple(labels),
        history_labels=frozenset(labels if history_labels is None else history_labels),
        window=window["events"],
        stride=window["stride"],
        max_length=window["max_length"],
    )
