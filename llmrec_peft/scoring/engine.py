"""One base that answers many bundles' requests, each history encoded once.

Shape letters: B rows, L new tokens of a row, P tokens before them, H hidden width, T answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import collate
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.errors import ModelError
from llmrec_peft.models import attention
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.last_layer import LastLayer
from llmrec_peft.models.selftest import check_candidates
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter
from llmrec_peft.scoring.prefix_cache import Kept, PrefixCache

ROW_TOKENS = 800
"""Tokens of one row: its new prefix tokens and as many probes as fit, at least CHUNK_TOKENS of them; the rest follow in
rows of their own."""
CHUNK_TOKENS = 512
"""Tokens of a row of probes alone, at most."""
Progress = Callable[[int], object]
"""Called with the number of candidates answered since the last call."""


@dataclass
class Task:
    """One prefix and the probes that hang off its end.

    Attributes:
        member: the bundle that answers.
        prefix: tokens of the header and of each event with its outcome; a kept prefix may end after any of them.
        probes: tokens of each candidate with its marker.
        answers: raw logits, float32 [probes, labels], as far as they are known.
    """

    member: LoadedAdapter
    prefix: tuple[np.ndarray, ...]
    probes: Sequence[np.ndarray]
    answers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.answers = np.empty((len(self.probes), len(self.member.labels)), np.float32)


@dataclass
class _Row:
    """Tokens that go through the base together: what the prefix has beyond `past`, and the probes first:last."""

    task: Task
    past: Kept | None
    first: int
    last: int
    keep: bool

    @property
    def begin(self) -> int:
        """Prefix tokens before this row."""
        return 0 if self.past is None else self.past.length

    def stream(self) -> Stream:
        build = StreamBuilder([])
        build.point = self.begin
        prefix = np.concatenate(self.task.prefix)[self.begin :]
        if len(prefix):
            build.prefix(prefix)
        alone = self.last - self.first == 1  # the only probe sees all before it, as the prefix itself would
        lay = (lambda tokens: build.prefix(tokens)) if alone else (lambda tokens: build.candidate(tokens, tokens[:0]))
        markers = np.array([lay(probe) for probe in self.task.probes[self.first : self.last]], np.int64)
        ids, positions, segment = build.arrays()
        zeros = np.zeros(len(markers), np.int64)
        return Stream(ids, positions, segment, markers, zeros, zeros, np.arange(self.first, self.last))


@dataclass(frozen=True)
class _Span:
    """Rows first:last of the batch belong to one bundle."""

    first: int
    last: int
    member: LoadedAdapter


class Engine:
    """Runs a decoder's base; the bundles' changes are put in by hooks, which look at whose rows a thread is answering.

    Threads may answer at the same time: each has its own spans, and a bundle never changes once it is read.

    Args:
        classifier: on the base, in any state of its head, which is not used.
        pad_token_id: what fills up rows.
        kept: histories' keys and values to go on from; None to encode each history again in each call.
    """

    def __init__(self, classifier: BehaviorClassifier, pad_token_id: int, kept: PrefixCache | None = None) -> None:
        if classifier.encoder:
            raise ModelError(
                f"base {classifier.config.model_type} reads both ways and cannot share a history among candidates; "
                "score its bundle by recipes/evaluate.py, or use a decoder"
            )
        check_candidates(classifier, "a scorer or bank answers many candidates to one history", cache=True)
        attention.count_no_places(classifier.stock)
        self.classifier = classifier.eval().requires_grad_(False)
        self.pad_token_id, self.kept = pad_token_id, kept
        self._modules = dict(classifier.stock.named_modules())
        self._hooked: set[str] = set()
        self._last_layer = LastLayer(classifier.stock)
        self._lock = threading.Lock()
        self._active = threading.local()

    def install(self, paths: Iterable[str]) -> None:
        """Make the outputs of modules changeable; for a path that is so already this does nothing."""
        with self._lock:
            for path in set(paths) - self._hooked:
                self._modules[path].register_forward_hook(self._hook(path), with_kwargs=True)
                self._hooked.add(path)

    def _hook(self, path: str) -> Any:
        def change(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            spans = getattr(self._active, "spans", ())
            if not any(path in span.member.deltas for span in spans):
                return
            y = output[0] if isinstance(output, tuple) else output
            x = args[0] if args else next(iter(kwargs.values()))
            for span in spans:
                deltas = span.member.deltas.get(path)
                if deltas:
                    x_own, y_own = self._rows(x, span), self._rows(y, span)
                    for delta in deltas:
                        delta(x_own, y_own)

        return change

    def _rows(self, tensor: torch.Tensor, span: _Span) -> torch.Tensor:
        """A bundle's tokens of an activation, [n, width], without a copy."""
        rows, length = self._active.shape
        if tensor.dim() == 4 and tensor.shape[1] == 1:  # DeepSeek's keys and values, shared by all heads
            tensor = tensor.squeeze(1)
        if tensor.shape[:2] == (rows, length):
            return tensor[span.first : span.last].view(-1, tensor.shape[-1])
        if tensor.shape[0] == rows * length:
            return tensor[span.first * length : span.last * length]
        raise ModelError(
            f"a module of this base is adapted, but sees {tuple(tensor.shape)} of {rows} rows of {length} tokens; "
            "leave it out of target_modules, or serve the merged model"
        )

    def answer(self, tasks: Sequence[Task], batch_tokens: int, progress: Progress | None = None) -> None:
        """Fill in the answers of all tasks.

        Tasks whose probes fit one row go through in batches of at most `batch_tokens` tokens. The others follow one by
        one: memory holds the keys and values of one history and of one row of probes, however many there are.
        `progress` hears of the answers of each forward pass.

        Raises:
            ModelError: an answer is not a finite number.
        """
        whole, long = [], []
        for task in tasks:
            if len(task.probes):
                row = self._first_row(task, batch_tokens)
                (whole if row.last == len(task.probes) else long).append(row)
        lengths = np.array([sum(map(len, row.task.prefix)) - row.begin + self._size(row) for row in whole], np.int64)
        progress = progress or (lambda _count: None)
        for batch in plan_micro_batches(lengths, batch_tokens):
            rows = [whole[number] for number in batch]
            self._run(sorted(rows, key=lambda row: id(row.task.member)))
            progress(sum(row.last - row.first for row in rows))
        for row in long:
            (past,) = self._run([row])
            progress(row.last - row.first)
            limit = min(batch_tokens, CHUNK_TOKENS)
            while row.last < len(row.task.probes):
                row = _Row(row.task, past, row.last, self._fitting(row.task, row.last, limit), False)
                self._run([row])
                progress(row.last - row.first)

    def _first_row(self, task: Task, batch_tokens: int) -> _Row:
        past = None if self.kept is None else self.kept.find(task.member, task.prefix)
        new = sum(map(len, task.prefix)) - (0 if past is None else past.length)
        last = self._fitting(task, 0, min(max(ROW_TOKENS - new, CHUNK_TOKENS), batch_tokens - new))
        return _Row(task, past, 0, last, keep=last < len(task.probes) or self.kept is not None)

    @staticmethod
    def _fitting(task: Task, first: int, room: int) -> int:
        """The end of the probes from `first` on that fit in `room` tokens; one at least."""
        last = first + 1
        room -= len(task.probes[first])
        while last < len(task.probes) and len(task.probes[last]) <= room:
            room -= len(task.probes[last])
            last += 1
        return last

    @staticmethod
    def _size(row: _Row) -> int:
        return sum(len(probe) for probe in row.task.probes[row.first : row.last])

    @torch.inference_mode()
    def _run(self, rows: list[_Row]) -> list[Kept | None]:
        """One forward pass, in which the rows of one bundle stand together; returns the prefixes that rows keep."""
        spans: list[_Span] = []
        for number, row in enumerate(rows):
            if spans and spans[-1].member is row.task.member:
                spans[-1] = _Span(spans[-1].first, number + 1, row.task.member)
            else:
                spans.append(_Span(number, number + 1, row.task.member))
        batch = collate([row.stream() for row in rows], self.pad_token_id)
        device = self.classifier.device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "markers")}
        segment = None if batch["segment"] is None else batch["segment"].to(device)
        past, seen = None, None
        if any(row.keep or row.past for row in rows):
            past, seen = Kept.together([row.past for row in rows], self.classifier.device)
            if seen is not None and segment is None:
                sizes = [len(row.stream()) for row in rows]
                segment = _pads(sizes, inputs["input_ids"].shape[1], device)
        self._active.spans, self._active.shape = spans, tuple(inputs["input_ids"].shape)
        try:
            with self._last_layer.answers(self._answers(spans, inputs)):
                hidden = self.classifier.hidden_states(**inputs, segment=segment, past=past, past_seen=seen).float()
        finally:
            self._active.spans = ()
        self._read(rows, spans, hidden)
        return [self._keep(row, number, past, seen) if row.keep else None for number, row in enumerate(rows)]

    def _answers(self, spans: list[_Span], inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The answers' places, where no bundle changes the last layer, for which its hooks would need all tokens."""
        inside = self._last_layer.path + "."
        changed = any(path.startswith(inside) for span in spans for path in span.member.deltas)
        return None if changed else inputs["markers"]

    def _read(self, rows: list[_Row], spans: list[_Span], hidden: torch.Tensor) -> None:
        ends = np.cumsum([0, *(row.last - row.first for row in rows)])
        for span in spans:
            logits = nn.functional.linear(hidden[ends[span.first] : ends[span.last]], span.member.head)
            if not bool(torch.isfinite(logits).all()):
                raise ModelError(f"bundle {span.member.directory} gives answers that are not finite; train it again")
            values = logits.cpu().numpy()
            for number in range(span.first, span.last):
                row, start = rows[number], ends[number] - ends[span.first]
                row.task.answers[row.first : row.last] = values[start : start + row.last - row.first]

    def _keep(self, row: _Row, number: int, past: Any, seen: torch.Tensor | None) -> Kept:
        """Keys and values of a row's whole prefix."""
        width = 0 if seen is None else seen.shape[1]
        new = sum(map(len, row.task.prefix)) - row.begin
        kept = Kept.cut(past, number, row.begin, width, new)
        if self.kept is not None:
            self.kept.put(row.task.member, row.task.prefix, kept)
        return kept


def _pads(sizes: list[int], length: int, device: torch.device) -> torch.Tensor:
    """Branch of rows that are prefix alone, int64 [B, L]: 0, and -1 at pads."""
    places = torch.arange(length, device=device)[None, :]
    return torch.where(places < torch.tensor(sizes, device=device)[:, None], 0, -1)
