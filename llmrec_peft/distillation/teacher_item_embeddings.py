"""Item embeddings of a teacher: its hidden states for each item alone, without any history.

Shape letters: I items, K layers, H the teacher's hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.manifest import digest
from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.distillation.hidden_states import HEAD_INPUT, LayerOutputs
from llmrec_peft.distillation.teacher_cache import ADVICE, list_column, matrix, read_cached, write_cached
from llmrec_peft.errors import DataError, ModelError
from llmrec_peft.models.bottleneck import transformer_layers

ROW_TOKENS = 512
"""Tokens of the items that share one row."""


def check_item_texts(domain: Domain, log: BehaviorLog) -> None:
    """Raise DataError where an event of the teacher's domain names a column that the item table lacks."""
    columns = [name for name in domain.event_columns if name not in log.items.column_names]
    if columns:
        raise DataError(
            f"student.content: the event of domain {domain.name!r} names {columns[0]!r}, which items lack, so an item "
            "alone has no text; set student.content to false"
        )


def cached_item_embeddings(
    teacher: Bundle, domain: Domain, log: BehaviorLog, cache: Path, *, batch_tokens: int
) -> np.ndarray:
    """Embedding of each item of the log, float32 [I, K * H], read from or written to a file beside `cache`.

    Raises:
        DataError: the file is truncated, edited or of other items.
        ModelError: values that are not finite.
    """
    lead, events = _prompts(Vocabulary(domain, teacher.tokenizer), log)
    key = hashlib.sha256(digest(teacher.manifest).encode() + np.concatenate([lead, *events]).tobytes()).hexdigest()
    path = cache.with_name(f"{cache.name}-items-{key[:16]}.arrow")
    if path.is_file():
        found = matrix(read_cached(path, key), "content")
        if len(found) != len(events):
            raise DataError(f"{path} holds {len(found)} items, and the log has {len(events)}; {ADVICE}")
        return found
    layers = embedding_layers(len(transformer_layers(teacher.classifier.stock)))
    found = item_embeddings(teacher, lead, events, layers, batch_tokens=batch_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_cached(pa.table({"content": list_column(found)}), path, key)
    return found


def _prompts(vocabulary: Vocabulary, log: BehaviorLog) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens before each event, and the tokens of each item's event with its marker."""
    domain = vocabulary.domain
    texts = vocabulary.events({name: log.items.column(name).combine_chunks() for name in domain.event_columns})
    flat, offsets = vocabulary.tokens(texts.to_pylist())
    header = "" if domain.header_columns else domain.header  # a header with columns belongs to one user
    lead = np.concatenate([vocabulary.prefix, *([vocabulary.tokens([header])[0]] if header else [])])
    events = [np.concatenate([flat[offsets[row] : offsets[row + 1]], vocabulary.marker]) for row in range(len(texts))]
    return lead, events


class ItemStreams:
    """Items without history, as candidates after the domain's header: target n is item n.

    Args:
        lead: tokens before each event.
        events: tokens of each item's event with its marker.
        alone: whether each item has a row of its own, as encoders need it.

    Attributes:
        lengths: int64 [rows], tokens of each row.
    """

    def __init__(self, lead: np.ndarray, events: Sequence[np.ndarray], alone: bool = False) -> None:
        self._lead, self._events = lead, events
        sizes = np.array([len(event) for event in events], np.int64)
        room = max(ROW_TOKENS, int(sizes.max(initial=1)))
        starts, filled = [0], 0
        for number, size in enumerate(sizes.tolist()):
            if filled and (alone or filled + size > room):
                starts.append(number)
                filled = 0
            filled += size
        self._bounds = np.array([*starts, len(events)])
        self.lengths = len(lead) + np.add.reduceat(sizes, self._bounds[:-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Stream:
        items = np.arange(self._bounds[row], self._bounds[row + 1])
        build, no_marker = StreamBuilder([self._lead]), self._lead[:0]  # each event ends with its marker already
        if len(items) == 1:
            markers = np.array([build.prefix(self._events[items[0]])])
        else:
            markers = np.array([build.candidate(self._events[item], no_marker) for item in items])
        ids, positions, segment = build.arrays()
        return Stream(ids, positions, segment, markers, np.zeros_like(items), items, items)


def item_embeddings(
    teacher: Bundle,
    lead: np.ndarray,
    events: Sequence[np.ndarray],
    layers: Sequence[int],
    *,
    batch_tokens: int = 4000,
) -> np.ndarray:
    """Outputs of some layers at the marker of each item, concatenated: float32 [I, K * H].

    Args:
        lead: tokens before each event: the domain's header, if it names no columns of the user.
        events: tokens of each item's event with its marker.
        layers: numbers of the K layers; -1 is the input of the head.

    Raises:
        ModelError: values that are not finite.
    """
    classifier = teacher.classifier.eval()
    items = ItemStreams(lead, events, alone=classifier.encoder)
    collator = StreamCollator(teacher.tokenizer.pad_token_id, batch_tokens, mask=classifier.encoder)
    found: np.ndarray | None = None
    with torch.no_grad(), LayerOutputs(classifier, layers) as outputs:
        for group in tqdm(plan_micro_batches(items.lengths, batch_tokens), desc="teacher, items", unit="batch"):
            batch = collator.one([items[int(row)] for row in group])
            inputs = {key: value.to(classifier.device) for key, value in batch.items() if value is not None}
            classifier(**inputs)
            rows = outputs.at(inputs["markers"]).flatten(1).float().cpu().numpy()  # [items of the batch, K * H]
            if found is None:
                found = np.zeros((len(events), rows.shape[1]), np.float32)
            found[batch["targets"].numpy()] = rows
    if found is None or not np.isfinite(found).all():
        raise ModelError("the teacher gives item embeddings that are not finite; check its weights")
    return found


def embedding_layers(depth: int) -> tuple[int, ...]:
    """Layers whose outputs describe an item: those at one third and two thirds of the depth, and the head's input."""
    return (*sorted({depth // 3 - 1, 2 * depth // 3 - 1} - {HEAD_INPUT}), HEAD_INPUT)


def principal_components(embeddings: np.ndarray, width: int) -> np.ndarray:
    """The `width` leading principal components of standardised embeddings [I, d], each scaled to variance 1.

    With Z the standardised embeddings and Z^T Z / I = V diag(l) V^T (l descending), the result is Z V / sqrt(l), cut
    to its first `width` columns: float32 [I, min(width, I, d)].
    """
    centred = embeddings - embeddings.mean(0)
    scale = centred.std(0)
    standardised = centred / np.where(scale > 0, scale, 1.0)
    width = min(width, *standardised.shape)
    values, vectors = np.linalg.eigh(standardised.T @ standardised / len(standardised))
    # eigh sorts ascending. The floor keeps components without variance from being divided by zero.
    top = vectors[:, ::-1][:, :width]
    deviation = np.sqrt(np.maximum(values[::-1][:width], 1e-8))
    return (standardised @ top / deviation).astype(np.float32)
