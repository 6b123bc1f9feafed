"""What a teacher answers, kept in Arrow files: computed once, read by any student.

A directory of parts, each with the answers of some whole windows; a part is there whole or not at all, so that work
that was broken off goes on after the last part. `teacher.json` says whose answers they are and of which targets.

T targets, C labels, H the teacher's hidden width, K layers kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.manifest import digest
from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.layout import Stream, StreamBuilder
from llmrec_peft.data.streams import IndependentPrompts, StreamDataset, StreamSubset
from llmrec_peft.distillation.teacher_cache import ADVICE, matrix, read_kept, write_kept
from llmrec_peft.errors import DataError, ModelError, input_errors
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.files import write_json
from llmrec_peft.models.bottleneck import transformer_layers
from llmrec_peft.models.model_files import read_json

NOTE = "teacher.json"
FORMAT = 2
"""Parts of format 1 had no digest."""
LARGEST = 1e6
"""Largest calibrated logit that a teacher gives."""
PART_TOKENS = 60_000
"""Tokens of the windows of one part: what is lost at most if a process is killed."""


@dataclass(frozen=True)
class TeacherAnswers:
    """A teacher's answers to targets of one stream data set, by target number.

    Attributes:
        logits: float32 [T, C], calibrated (temperature and biases applied); NaN for targets that were not asked.
        layers: numbers of the teacher's layers whose outputs are kept; -1 is what the head reads.
        hidden: float16 [asked, K, H], outputs at the markers; None if none were kept.
        rows: int64 [T], row of `hidden` of each target, -1 for those not asked.
    """

    logits: np.ndarray
    layers: tuple[int, ...] = ()
    hidden: np.ndarray | None = None
    rows: np.ndarray | None = None

    @property
    def asked(self) -> np.ndarray:
        """Numbers of the targets that the teacher answered, int64."""
        return np.flatnonzero(np.isfinite(self.logits).all(1))


def targets_fingerprint(streams: StreamDataset) -> str:
    """SHA-256 of a data set's targets and windows: what a teacher's answers belong to."""
    found = hashlib.sha256(streams.domain.name.encode())
    for array in (streams.target_rows, streams.target_items, streams.target_labels, streams.target_offsets,
                  streams.lengths):  # fmt: skip
        found.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def texts_fingerprint(streams: StreamDataset) -> str:
    """SHA-256 of the tokens of a data set's headers and events, and of where they stand."""
    found = hashlib.sha256()
    for array in streams.token_arrays():
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def check_kept(directory: Path, manifest: dict[str, Any], layers: Sequence[int] = ()) -> None:
    """Raise DataError where the answers in `directory` are another teacher's, or lack layers; nothing there is fine."""
    _check(directory, {"teacher": digest(manifest), "layers": list(layers)})


def _check(directory: Path, wanted: dict[str, Any]) -> bool:
    path = directory / NOTE
    if not path.is_file():
        if directory.is_dir() and any(directory.iterdir()):
            raise DataError(f"{directory} holds files, but no {NOTE} of a teacher's answers; choose another directory")
        return False
    found = {"texts": wanted.get("texts"), **read_json(path)}  # notes were without it once
    rules = {
        "format": "another version wrote it",
        "teacher": "they are another teacher's, or it was trained again since",
        "targets": "they belong to other data, splits or windows",
        "texts": "the texts of items or users are other ones",
        "layers": "other layers were kept",
    }
    for key, reason in rules.items():
        if key in wanted and found.get(key) != wanted[key]:
            raise DataError(
                f"{directory} holds stale answers: {reason} ({key} {str(found.get(key))[:16]}, now "
                f"{str(wanted[key])[:16]}); remove the directory, or name another with teacher_outputs.path"
            )
    return True


def teacher_answers(
    teacher: Bundle,
    streams: StreamDataset | StreamSubset,
    directory: str | Path,
    *,
    layers: Sequence[int] = (),
    batch_tokens: int = 4000,
    processes: PartialState | None = None,
) -> TeacherAnswers:
    """Answers of `teacher` to all targets of `streams`; those in `directory` are read, the rest computed and added.

    Args:
        teacher: a bundle or a merged model, as `load_answering` gives it.
        streams: by the teacher's domain and tokenizer.
        directory: of the parts; one for each teacher and split.
        layers: numbers of the layers whose outputs to keep, -1 for what the head reads.
        batch_tokens: tokens of one forward pass, at most.
        processes: with several ranks, each answers its share of the parts; `directory` must be shared by all.

    Raises:
        DataError: `directory` holds answers of another teacher or of other targets, or a part that was cut or edited.
        ModelError: an answer, or a hidden state in float16, is not finite.
    """
    parent = streams.parent
    directory = Path(directory)
    note = {
        "format": FORMAT,
        "teacher": digest(teacher.manifest),
        "targets": targets_fingerprint(parent),
        "texts": texts_fingerprint(parent),
        "split": parent.name,
        "layers": list(layers),
    }
    state = processes or PartialState()
    if not _check(directory, note) and state.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(note, directory / NOTE)
    state.wait_for_everyone()
    windows, labels = streams.windows, len(teacher.classifier.labels)
    owner = digest(note)
    done = _gather(directory, parent, labels, tuple(layers), owner).windows
    missing = np.setdiff1d(windows, done)
    _compute(teacher, parent, missing, directory, tuple(layers), batch_tokens, state, owner)
    state.wait_for_everyone()
    return _gather(directory, parent, labels, tuple(layers), owner).answers


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*.arrow"))


def _compute(
    teacher: Bundle,
    parent: StreamDataset,
    missing: np.ndarray,
    directory: Path,
    layers: tuple[int, ...],
    batch_tokens: int,
    state: PartialState,
    owner: str,
) -> None:
    """Answer the windows that are missing, a part at a time."""
    if not len(missing):
        return
    # Windows of like length come together, so that little is padding.
    order = missing[np.argsort(-parent.lengths[missing], kind="stable")]
    parts = np.split(order, np.flatnonzero(np.diff(np.cumsum(parent.lengths[order]) // PART_TOKENS)) + 1)
    total = sum(len(part) for part in parts[state.process_index :: state.num_processes])
    with tqdm(total=total, desc="teacher", unit="window", disable=not state.is_main_process) as bar:
        for part in parts[state.process_index :: state.num_processes]:
            table = _answer(teacher, StreamSubset(parent, part), layers, batch_tokens, bar)
            # Named by its first window: two runs that answer the same windows write the same files.
            path = directory / f"part-{int(part[0]):09d}-{len(part):06d}.arrow"
            write_kept(table, path, owner)


@torch.no_grad()
def _answer(teacher: Bundle, streams: StreamSubset, layers: tuple[int, ...], batch_tokens: int, bar: tqdm) -> pa.Table:
    """Columns window, target, logits and hidden of all targets of some windows."""
    classifier = teacher.classifier.eval()
    collator = StreamCollator(teacher.tokenizer.pad_token_id, batch_tokens, mask=classifier.encoder)
    rows = IndependentPrompts(streams) if classifier.encoder else streams
    device = classifier.device
    targets, logits, hidden = [], [], []
    with LayerOutputs(classifier, layers) as outputs:
        for group in plan_micro_batches(rows.lengths, batch_tokens):
            batch = collator.one([rows[int(row)] for row in group])
            found = classifier(**{key: value.to(device) for key, value in batch.items() if value is not None})
            targets.append(batch["targets"].numpy())
            logits.append(found.float().cpu().numpy())
            if layers:
                hidden.append(outputs.at(batch["markers"].to(device)).half().cpu().numpy())
            bar.update(len(group) if rows is streams else len(group) * len(streams) / len(rows))
    calibrated = Calibration.from_dict(teacher.calibration).shift(np.concatenate(logits)).astype(np.float32)
    if not (np.abs(calibrated) <= LARGEST).all():
        raise ModelError(f"the teacher gives answers that are not finite, or above {LARGEST:g}; check its weights")
    if layers and not all(np.isfinite(part).all() for part in hidden):
        raise ModelError(
            f"the teacher gives hidden states in layers {list(layers)} that are not finite in float16; keep other "
            "layers, or check its weights"
        )
    numbers = np.concatenate(targets)
    window = np.searchsorted(streams.parent.target_offsets, numbers, "right") - 1
    columns = {
        "window": pa.array(window),
        "target": pa.array(numbers),
        "logits": _fixed(calibrated, pa.float32()),
    }
    if layers:
        columns["hidden"] = _fixed(np.concatenate(hidden).reshape(len(numbers), -1), pa.float16())
    return pa.table(columns)


def _fixed(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), values.shape[1])


@dataclass(frozen=True)
class _Gathered:
    answers: TeacherAnswers
    windows: np.ndarray  # int64, sorted: those that are answered


def _gather(directory: Path, streams: StreamDataset, labels: int, layers: tuple[int, ...], owner: str) -> _Gathered:
    """Everything that the parts hold, by target number, each part checked by its digest and against the windows."""
    logits = np.full((streams.num_targets, labels), np.nan, np.float32)
    rows, hidden, start = np.full(streams.num_targets, -1, np.int64), [], 0
    windows: list[np.ndarray] = []
    for path in _parts(directory):
        table = read_kept(path, owner)
        with input_errors(DataError, f"{path}, an answer that was kept,", ADVICE):
            numbers, own, values = table.column("target").to_numpy(), _windows_of(table), matrix(table, "logits")
            _check_part(path, streams, own, numbers, values, labels)
            logits[numbers] = values
            windows.append(own)
            if layers:
                hidden.append(_hidden_of(path, table, len(layers)))
                rows[numbers] = start + np.arange(len(numbers))
                start += len(numbers)
    found = np.sort(np.concatenate(windows)) if windows else np.empty(0, np.int64)
    if len(np.unique(found)) < len(found):
        raise DataError(f"{directory} holds a window's answers in more than one part; remove the directory")
    answers = TeacherAnswers(logits, layers, np.concatenate(hidden) if hidden else None, rows if hidden else None)
    return _Gathered(answers, found)


def _hidden_of(path: Path, table: pa.Table, layers: int) -> np.ndarray:
    """Hidden states of a part, float16 [targets, layers, H]. Raises DataError for one that is not finite."""
    hidden = matrix(table, "hidden")
    if not np.isfinite(hidden).all():
        raise DataError(f"{path} holds hidden states that are not finite; {ADVICE}")
    return hidden.reshape(len(hidden), layers, -1)


def _windows_of(table: pa.Table) -> np.ndarray:
    return np.unique(table.column("window").to_numpy())


def _check_part(
    path: Path, streams: StreamDataset, windows: np.ndarray, numbers: np.ndarray, logits: np.ndarray, labels: int
) -> None:
    """Raise DataError unless a part answers each target of its windows once, by numbers that a teacher gives."""
    offsets = streams.target_offsets
    if len(windows) and (windows[0] < 0 or windows[-1] >= len(offsets) - 1):
        raise DataError(f"{path} answers a window that the log does not have; {ADVICE}")
    expected = [np.arange(offsets[window], offsets[window + 1]) for window in windows.tolist()]
    if not np.array_equal(np.sort(numbers), np.concatenate(expected) if expected else numbers[:0]):
        raise DataError(f"{path} does not answer each target of its windows once; {ADVICE}")
    if logits.shape[1] != labels or not (np.abs(logits) <= LARGEST).all():
        raise DataError(f"{path} does not hold {labels} finite logits for each target; {ADVICE}")


class LayerOutputs:
    """Inside its block, keeps the outputs of layers in a forward pass: -1 is what the head reads."""

    def __init__(self, classifier: Any, layers: Sequence[int]) -> None:
        self._classifier, self._layers = classifier, tuple(layers)
        self._found: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> LayerOutputs:
        if not self._layers:
            return self
        stack = transformer_layers(self._classifier.stock)
        for number in self._layers:
            if number >= 0:
                hook = stack[number].register_forward_hook(lambda _m, _i, out, n=number: self._keep(n, out))
            else:
                hook = self._classifier.head.register_forward_pre_hook(lambda _m, inputs: self._keep(-1, inputs[0]))
            self._hooks.append(hook)
        return self

    def _keep(self, number: int, output: Any) -> None:
        self._found[number] = output[0] if isinstance(output, tuple) else output

    def at(self, markers: torch.Tensor) -> torch.Tensor:
        """Outputs at flat marker indices [T]: [T, K, H] of the last forward pass."""
        parts = [
            self._found[n] if n < 0 else self._found[n].flatten(0, 1).index_select(0, markers) for n in self._layers
        ]
        return torch.stack(parts, dim=1)

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


ROW_TOKENS = 512
"""Tokens of items that stand side by side on one header."""


class ItemStreams:
    """Items by themselves, as candidates on the domain's header: answer n is that of item n.

    lengths: int64 [rows], tokens of each.
    """

    def __init__(self, lead: np.ndarray, events: Sequence[np.ndarray], alone: bool) -> None:
        """lead: what stands before each event. alone: one item a row, for models that read both ways."""
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
        build, none = StreamBuilder([self._lead]), self._lead[:0]
        lay = build.prefix if len(items) == 1 else lambda event: build.candidate(event, none)
        markers = np.array([lay(self._events[item]) for item in items])
        ids, positions, segment = build.arrays()
        return Stream(ids, positions, segment, markers, np.zeros_like(items), items, items)


def item_content(
    teacher: Bundle,
    lead: np.ndarray,
    events: Sequence[np.ndarray],
    layers: Sequence[int],
    *,
    batch_tokens: int = 4000,
) -> np.ndarray:
    """What a teacher makes of each item alone, without any history: float32 [items, len(layers) * H].

    Args:
        lead: tokens before an event: the domain's header, where it has no user's columns.
        events: tokens of each item's event with its marker.
        layers: numbers of the layers whose outputs at the marker are taken, one after the other; -1 is what the head
            reads.

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
            rows = outputs.at(inputs["markers"]).flatten(1).float().cpu().numpy()
            if found is None:
                found = np.zeros((len(events), rows.shape[1]), np.float32)
            found[batch["targets"].numpy()] = rows
    if found is None or not np.isfinite(found).all():
        raise ModelError("the teacher gives item representations that are not finite; check its weights")
    return found


def content_layers(depth: int) -> tuple[int, ...]:
    """Layers whose outputs describe an item: a third and two thirds up, and the last."""
    return (*sorted({depth // 3 - 1, 2 * depth // 3 - 1} - {-1}), -1)


def reduced(content: np.ndarray, width: int) -> np.ndarray:
    """The `width` leading principal components of content, each of variance 1: float32 [items, width]."""
    centred = content - content.mean(0)
    scale = centred.std(0)
    centred = centred / np.where(scale > 0, scale, 1.0)
    width = min(width, *centred.shape)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    top = vectors[:, ::-1][:, :width]
    spread = np.sqrt(np.maximum(values[::-1][:width], 1e-8))
    return (centred @ top / spread).astype(np.float32)
