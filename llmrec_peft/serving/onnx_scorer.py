"""The scorer of an exported student: the calls of `scoring.scorer.Scorer`, on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmrec_peft.checkpoints.export_files import calibration_of, check_export_file
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import EXPORT, GRAPHS, TOKENIZER
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.errors import BundleError, DataError, LLMRecError, input_errors
from llmrec_peft.probabilities import calibrated
from llmrec_peft.serving.onnx_graph import Graph
from llmrec_peft.serving.plain_items import Items
from llmrec_peft.serving.plain_prompts import Ask, Prompts
from llmrec_peft.serving.plain_vocabulary import Words
from llmrec_peft.serving.request_rules import Event, check_count, listed_requests

KNOWN_EVENTS = 200_000
"""Texts whose tokens are kept."""
PROBE_TOKENS = 512
"""Tokens of probes in one row, at most. Further rows encode the history again: the graph keeps nothing between passes,
so that a history of H tokens costs 1 + H / PROBE_TOKENS times the tokens of its many candidates."""
BATCH_TOKENS = 4096
"""Tokens of one pass, at most, by default."""


@dataclass
class _Task:
    """One prefix and its different probes, by their tokens."""

    prefix: np.ndarray
    probes: list[np.ndarray] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)
    answers: np.ndarray | None = None

    def number(self, probe: np.ndarray) -> int:
        key = probe.tobytes()
        if key not in self.numbers:
            self.numbers[key] = len(self.probes)
            self.probes.append(probe)
        return self.numbers[key]

    def rows(self, limit: int) -> list[tuple[int, int]]:
        """Runs first:last of probes that stand in one row, of at most `limit` tokens or one probe."""
        found, first, size = [], 0, 0
        for number, probe in enumerate(self.probes):
            if number > first and size + len(probe) > limit:
                found.append((first, number))
                first, size = number, 0
            size += len(probe)
        return [*found, (first, len(self.probes))] if self.probes else []


class OnnxScorer:
    """Probabilities of a domain's labels for candidates of one user after another. Threads may share one."""

    def __init__(self, manifest: Mapping[str, Any], prompts: Prompts, graph: Graph) -> None:
        self._manifest, self._prompts, self._graph = manifest, prompts, graph
        self._temperature, self._bias = calibration_of(manifest)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        items: Any = None,
        *,
        precision: Literal["float32", "int8"] = "float32",
        threads: int | None = None,
        kept: int = KNOWN_EVENTS,
    ) -> OnnxScorer:
        """A scorer of what `export_onnx` wrote.

        Args:
            directory: of the export.
            items: rows of the item table: a list of mappings with `item_id`, a mapping from ids to mappings, or a path
                of csv or jsonl (of parquet where pyarrow is installed). A student that reads item ids needs none; else
                every event is a mapping of columns without it.
            precision: which of the export's graphs answers.
            threads: of one pass; ONNX Runtime's own choice if None.
            kept: texts whose tokens are kept for the next calls.

        Raises:
            BundleError: a damaged or edited file, or a precision that was not exported.
            DataError: an item table that cannot be read.
            ModelError: `threads` below 1, or a tokenizer whose package is not installed.
        """
        directory = Path(directory)
        with input_errors(BundleError, f"export {directory}", "export again"):
            return cls._load(directory, items, precision, threads, kept)

    @classmethod
    def _load(cls, directory: Path, items: Any, precision: str, threads: int | None, kept: int) -> OnnxScorer:
        manifest = read_manifest(directory, EXPORT)
        calibration_of(manifest)
        name = GRAPHS.get(precision)
        if name not in manifest["files"]:
            has = [key for key, file in GRAPHS.items() if file in manifest["files"]]
            raise BundleError(f"{directory} has no model of precision {precision!r}; use {' or '.join(has)}")
        words = Words(manifest, check_export_file(directory, manifest, TOKENIZER))
        graph = Graph(check_export_file(directory, manifest, name), words.pad, threads, len(manifest["labels"]))
        return cls(manifest, Prompts(manifest, words, Items.read(items), kept), graph)

    @property
    def labels(self) -> list[str]:
        """Labels in class order: the columns of an answer."""
        return list(self._manifest["labels"])

    @property
    def domain(self) -> dict[str, Any]:
        """The domain that answers, as its YAML file says it."""
        return self._manifest["domain"]

    @property
    def manifest(self) -> Mapping[str, Any]:
        """All that serving.json says: source, metrics, what the export measured."""
        return self._manifest

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
            batch_tokens: tokens of one pass, at most, or one history with a row of candidates; memory does not grow
                with the candidates beyond it.

        Raises:
            DataError: an unknown item or label, or a column that is missing.
            DomainError: a value that does not fit the template's format.
            StreamError: a candidate that does not fit `stream.max_length`.
            ModelError: answers that are not finite.
        """
        return self._answer([self._prompts.ask(history, candidates, user)], batch_tokens)[0]

    def score_many(self, requests: Iterable[Sequence[Any]], *, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
        """Answers of many users together: a list of what `score` returns.

        Args:
            requests: each (history, candidates) or (history, candidates, user). Histories may be of any length; those
                that are the same are encoded together, and candidates that stand twice after one are answered once.
            batch_tokens: as in `score`.

        Raises as `score` does, naming the request.
        """
        asks = []
        for number, request in enumerate(listed_requests("requests", requests)):
            if not isinstance(request, list | tuple) or len(request) not in (2, 3):
                raise DataError(f"request {number} must be (history, candidates) or (history, candidates, user)")
            try:
                asks.append(self._prompts.ask(*request))
            except LLMRecError as error:
                raise type(error)(f"request {number}: {error}") from None
        return self._answer(asks, batch_tokens)

    def _answer(self, asks: list[Ask], batch_tokens: int) -> list[np.ndarray]:
        check_count("batch_tokens", batch_tokens, DataError, f"leave it out for {BATCH_TOKENS}")
        tasks: dict[bytes, _Task] = {}
        places = []
        for ask in asks:
            own = []
            for count in np.unique(ask.dropped):
                prefix = ask.prefix(int(count))
                task = tasks.setdefault(prefix.tobytes(), _Task(prefix))
                numbers = np.flatnonzero(ask.dropped == count)
                own.append((task, numbers, np.array([task.number(ask.probes[number]) for number in numbers])))
            places.append(own)
        self._run(list(tasks.values()), batch_tokens)
        results = []
        for ask, own in zip(asks, places, strict=True):
            logits = np.empty((len(ask.probes), len(self.labels)), np.float32)
            for task, numbers, taken in own:
                logits[numbers] = task.answers[taken]
            results.append(self._calibrated(logits))
        return results

    def _run(self, tasks: list[_Task], batch_tokens: int) -> None:
        """Fill in the tasks' answers; as many rows as a pass holds stand in memory at one time."""
        rows: list[tuple[_Task, int, int]] = []
        tokens = 0
        for task in tasks:
            task.answers = np.empty((len(task.probes), len(self.labels)), np.float32)
            for first, last in task.rows(min(PROBE_TOKENS, batch_tokens)):
                rows.append((task, first, last))
                tokens += len(task.prefix) + sum(map(len, task.probes[first:last]))
                if tokens >= 8 * batch_tokens:  # enough to find rows of like length among
                    self._pass(rows, batch_tokens)
                    rows, tokens = [], 0
        self._pass(rows, batch_tokens)

    def _pass(self, rows: list[tuple[_Task, int, int]], batch_tokens: int) -> None:
        if not rows:
            return
        streams = [_stream(task.prefix, task.probes[first:last]) for task, first, last in rows]
        logits = self._graph.answers(streams, batch_tokens)
        start = 0
        for task, first, last in rows:
            task.answers[first:last] = logits[start : start + last - first]
            start += last - first

    def _calibrated(self, logits: np.ndarray) -> np.ndarray:
        """softmax(logits / temperature + bias), float64 [n, labels]."""
        return calibrated(logits, self._temperature, self._bias)


def _stream(prefix: np.ndarray, probes: Sequence[np.ndarray]) -> Stream:
    """A row: the prefix, and probes that hang off its end."""
    build = StreamBuilder([prefix] if len(prefix) else [])
    markers = np.array([build.candidate(probe, probe[:0]) for probe in probes], np.int64)
    ids, positions, segment = build.arrays()
    zeros = np.zeros(len(markers), np.int64)
    return Stream(ids, positions, segment, markers, zeros, zeros, zeros)
