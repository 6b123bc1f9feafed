"""Forward passes of one base for the requests of many adapters; each history is encoded once.

Shape letters: B rows, L new tokens of a row, P cached tokens before them, H hidden width, T candidates of all rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import collate
from llmrec_peft.data.layout import Stream
from llmrec_peft.errors import ModelError
from llmrec_peft.models import attention
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.last_layer import LastLayer
from llmrec_peft.models.selftest import check_candidates
from llmrec_peft.requests.batching import CandidateGroup
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter
from llmrec_peft.scoring.prefix_cache import CachedPrefix, PrefixCache

ROW_TOKENS = 800
"""Tokens of the first row of a group: its new prefix tokens and the candidates that fit, for which there is room of
CHUNK_TOKENS at least. The other candidates follow in rows of their own."""
CHUNK_TOKENS = 512
"""Tokens of a row of candidates alone, at most."""
Progress: TypeAlias = Callable[[int], object]
"""Called with the number of candidates computed since the last call."""
AdapterGroup: TypeAlias = CandidateGroup[LoadedAdapter]


@dataclass
class _Row:
    """Tokens that go through the base together: the prefix after `past`, and the candidates first:last."""

    group: AdapterGroup
    past: CachedPrefix | None
    first: int
    last: int
    cache: bool

    @property
    def begin(self) -> int:
        """Prefix tokens before this row."""
        return 0 if self.past is None else self.past.length

    @property
    def count(self) -> int:
        """Candidates."""
        return self.last - self.first

    @property
    def length(self) -> int:
        """Tokens, known before the stream is built."""
        prefix = len(self.group.prefix_ids) - self.begin
        return prefix + sum(map(len, self.group.candidates[self.first : self.last]))

    @cached_property
    def stream(self) -> Stream:
        """Its tokens; positions continue from `begin`."""
        return self.group.stream(self.first, self.last, self.begin)


@dataclass(frozen=True)
class _Span:
    """Rows first:last of the batch belong to one adapter."""

    first: int
    last: int
    adapter: LoadedAdapter


class Engine:
    """Runs a decoder's base. Hooks on its modules apply each adapter to the rows of that adapter.

    Threads may predict at the same time: each thread has its own spans, and a loaded adapter never changes.

    Args:
        classifier: wraps the base; its own head is not used.
        pad_token_id: token that pads rows.
        prefix_cache: keys and values of histories to continue from; None to encode each history again in each call.
    """

    def __init__(
        self, classifier: BehaviorClassifier, pad_token_id: int, prefix_cache: PrefixCache | None = None
    ) -> None:
        if classifier.encoder:
            raise ModelError(
                f"base {classifier.config.model_type} is a bidirectional encoder and cannot share a history among "
                "candidates; score its bundle by recipes/evaluate.py, or use a decoder"
            )
        check_candidates(classifier, "a scorer or bank scores many candidates after one history", cache=True)
        attention.count_no_places(classifier.stock)
        self.classifier = classifier.eval().requires_grad_(False)
        self.pad_token_id, self.prefix_cache = pad_token_id, prefix_cache
        self._modules = dict(classifier.stock.named_modules())
        self._hooked: set[str] = set()
        self._last_layer = LastLayer(classifier.stock)
        self._lock = threading.Lock()
        self._active = threading.local()

    def install(self, paths: Iterable[str]) -> None:
        """Hook modules of the base, so that adapters can change their outputs; hooked ones stay as they are."""
        with self._lock:
            for path in set(paths) - self._hooked:
                self._modules[path].register_forward_hook(self._hook(path), with_kwargs=True)
                self._hooked.add(path)

    def _hook(self, path: str) -> Any:
        def change(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            spans = getattr(self._active, "spans", ())
            if not any(path in span.adapter.layers for span in spans):
                return
            y = output[0] if isinstance(output, tuple) else output
            x = args[0] if args else next(iter(kwargs.values()))
            for span in spans:
                layers = span.adapter.layers.get(path)
                if layers:
                    # [n, in] and [n, out], views of the rows of this adapter: layers change y in place.
                    x_own, y_own = self._rows(x, span), self._rows(y, span)
                    for layer in layers:
                        layer(x_own, y_own)

        return change

    def _rows(self, tensor: torch.Tensor, span: _Span) -> torch.Tensor:
        """The tokens of one adapter in an activation, [n, width], as a view."""
        rows, length = self._active.shape
        # Modules see [B, L, width] or, in mixtures of experts, [B * L, width].
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

    def predict(self, groups: Sequence[AdapterGroup], batch_tokens: int, progress: Progress | None = None) -> None:
        """Set the logits of all groups.

        Groups whose candidates fit one row go through in batches of at most `batch_tokens` tokens. The others follow
        one by one: memory holds the keys and values of one history and of one row of candidates, however many there
        are. `progress` is called after each forward pass.

        Raises:
            ModelError: a logit is not a finite number.
        """
        progress = progress or (lambda _count: None)
        whole: list[_Row] = []
        long: list[_Row] = []
        for group in groups:
            group.logits = np.empty((len(group.candidates), len(group.model.labels)), np.float32)
            if group.candidates:
                row = self._first_row(group, batch_tokens)
                (whole if row.last == len(group.candidates) else long).append(row)
        lengths = np.array([row.length for row in whole], np.int64)
        for batch in plan_micro_batches(lengths, batch_tokens):
            # Rows of one adapter stand together, so that each of its layers runs once.
            rows = sorted((whole[number] for number in batch), key=lambda row: id(row.group.model))
            self._run(rows)
            for row in rows:
                del row.stream  # one batch of streams in memory at a time
            progress(sum(row.count for row in rows))
        for row in long:
            self._predict_long(row, min(batch_tokens, CHUNK_TOKENS), progress)

    def _predict_long(self, row: _Row, row_tokens: int, progress: Progress) -> None:
        """The first row of a group, and all others, which continue from its prefix."""
        # The first pass encodes the whole prefix; the later ones hold candidates only.
        (past,) = self._run([row])
        progress(row.count)
        group, last = row.group, row.last
        while last < len(group.candidates):
            row = _Row(group, past, last, group.fitting(last, row_tokens), False)
            self._run([row])
            progress(row.count)
            last = row.last

    def _first_row(self, group: AdapterGroup, batch_tokens: int) -> _Row:
        past = None if self.prefix_cache is None else self.prefix_cache.find(group.model, group.prefix)
        new = len(group.prefix_ids) - (0 if past is None else past.length)  # prefix tokens to encode
        last = group.fitting(0, min(max(ROW_TOKENS - new, CHUNK_TOKENS), batch_tokens - new))
        return _Row(group, past, 0, last, cache=last < len(group.candidates) or self.prefix_cache is not None)

    @torch.inference_mode()
    def _run(self, rows: list[_Row]) -> list[CachedPrefix | None]:
        """One forward pass of rows sorted by adapter; returns the prefixes of the rows that cache theirs."""
        spans = _spans(rows)
        batch, device = collate([row.stream for row in rows], self.pad_token_id), self.classifier.device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "markers")}
        segment = None if batch["segment"] is None else batch["segment"].to(device)
        past, seen = None, None
        # Rows with different pasts share one padded cache of P tokens; `seen`, bool [B, P], marks the real ones.
        if any(row.cache or row.past for row in rows):
            past, seen = CachedPrefix.stack([row.past for row in rows], device)
            # Padded pasts need an explicit mask, which is made from segments.
            if seen is not None and segment is None:
                segment = _pads([len(row.stream) for row in rows], inputs["input_ids"].shape[1], device)
        self._active.spans, self._active.shape = spans, tuple(inputs["input_ids"].shape)
        try:
            with self._last_layer.only_at(self._marker_places(spans, inputs)):
                # [T, H], the markers of row 0, then of row 1, ...
                hidden = self.classifier.hidden_states(**inputs, segment=segment, past=past, past_seen=seen).float()
        finally:
            self._active.spans = ()
        self._read(rows, spans, hidden)
        return [self._cached(row, number, past, seen) if row.cache else None for number, row in enumerate(rows)]

    def _marker_places(self, spans: list[_Span], inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The markers, where the last layer may leave all other tokens out; None where it may not.

        The hooks of an adapter that changes the last layer need all of its tokens.
        """
        inside = self._last_layer.path + "."
        changed = any(path.startswith(inside) for span in spans for path in span.adapter.layers)
        return None if changed else inputs["markers"]

    def _read(self, rows: list[_Row], spans: list[_Span], hidden: torch.Tensor) -> None:
        """logits = hidden head^T for the candidates of each adapter."""
        ends = np.cumsum([0, *(row.count for row in rows)])  # row r has hidden states ends[r]:ends[r + 1]
        for span in spans:
            # [t, H] x [labels, H]^T = [t, labels], for the t candidates of this adapter.
            logits = nn.functional.linear(hidden[ends[span.first] : ends[span.last]], span.adapter.head)
            if not bool(torch.isfinite(logits).all()):
                raise ModelError(f"bundle {span.adapter.directory} gives logits that are not finite; train it again")
            values = logits.cpu().numpy()
            for number in range(span.first, span.last):
                row, start = rows[number], ends[number] - ends[span.first]
                row.group.logits[row.first : row.last] = values[start : start + row.count]

    def _cached(self, row: _Row, number: int, past: Any, seen: torch.Tensor | None) -> CachedPrefix:
        """Keys and values of a row's whole prefix."""
        width = 0 if seen is None else seen.shape[1]  # P, the padded length of all pasts
        prefix = CachedPrefix.cut(past, number, row.begin, width, len(row.group.prefix_ids) - row.begin)
        if self.prefix_cache is not None:
            self.prefix_cache.put(row.group.model, row.group.prefix, prefix)
        return prefix


def _spans(rows: list[_Row]) -> list[_Span]:
    """Runs of neighbouring rows of one adapter; `rows` are sorted by adapter."""
    spans: list[_Span] = []
    for number, row in enumerate(rows):
        if spans and spans[-1].adapter is row.group.model:
            spans[-1] = _Span(spans[-1].first, number + 1, row.group.model)
        else:
            spans.append(_Span(number, number + 1, row.group.model))
    return spans


def _pads(sizes: list[int], length: int, device: torch.device) -> torch.Tensor:
    """Segments of rows without candidates, int64 [B, L]: 0 for tokens, -1 for padding."""
    places = torch.arange(length, device=device)[None, :]
    return torch.where(places < torch.tensor(sizes, device=device)[:, None], 0, -1)
