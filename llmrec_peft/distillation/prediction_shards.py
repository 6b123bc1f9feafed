"""The cache of a teacher's predictions: a directory of Arrow shards, each with the predictions of some whole windows.

A shard is written whole or not at all, so an interrupted run continues after the last one. `teacher.json` states which
teacher predicted which targets; a cache of anything else is refused.

Shape letters: T targets of the data set, N targets of a shard, C labels, K layers, H the teacher's hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec_peft.checkpoints.checksum import digest
from llmrec_peft.checkpoints.directory_checks import read_json
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.distillation.teacher_cache import ADVICE, list_column, matrix, read_cached, write_cached
from llmrec_peft.distillation.teacher_outputs import TeacherPredictions
from llmrec_peft.errors import DataError, input_errors
from llmrec_peft.files import write_json

METADATA = "teacher.json"
FORMAT = 2
"""Version of the shards' format; shards of format 1 had no checksum."""
MAX_LOGIT = 1e6
"""Largest absolute calibrated logit that a teacher may give."""


@dataclass(frozen=True)
class CachedPredictions:
    """Contents of the shards of a directory: the predictions, and the numbers of their windows, int64, ascending."""

    predictions: TeacherPredictions
    windows: np.ndarray


class PredictionShards:
    """The cache directory of one teacher's predictions for one stream data set.

    Args:
        directory: directory of the shards; it need not exist.
        manifest: manifest of the teacher.
        streams: the whole data set, by the teacher's domain and tokenizer.
        num_labels: C.
        layers: numbers of the layers whose outputs are cached too.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Mapping[str, Any],
        streams: StreamDataset,
        num_labels: int,
        layers: tuple[int, ...],
    ) -> None:
        self.directory, self.streams, self.num_labels, self.layers = directory, streams, num_labels, layers
        self._metadata = {
            "format": FORMAT,
            "teacher": digest(manifest),
            "targets": targets_fingerprint(streams),
            "texts": texts_fingerprint(streams),
            "split": streams.name,
            "layers": list(layers),
        }
        self._owner = digest(self._metadata)

    def check(self) -> bool:
        """Whether the directory is a cache. Raises DataError where it is a stale one, or holds other files."""
        return _check_metadata(self.directory, self._metadata)

    def create(self) -> None:
        """Make the directory and write its metadata."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self._metadata, self.directory / METADATA)

    def write(self, windows: np.ndarray, targets: np.ndarray, logits: np.ndarray, hidden: np.ndarray | None) -> None:
        """Write one shard.

        Args:
            windows: int64, the shard's windows.
            targets: int64 [N], numbers of their targets.
            logits: float32 [N, C], calibrated.
            hidden: float16 [N, K, H], or None without layers.
        """
        columns = {
            "window": pa.array(np.searchsorted(self.streams.target_offsets, targets, "right") - 1),
            "target": pa.array(targets),
            "logits": list_column(logits),
        }
        if hidden is not None:
            columns["hidden"] = list_column(hidden.reshape(len(targets), -1))
        # Named after its first window: two runs that predict the same windows write the same files.
        path = self.directory / f"part-{int(windows[0]):09d}-{len(windows):06d}.arrow"
        write_cached(pa.table(columns), path, self._owner)

    def read(self) -> CachedPredictions:
        """Read all shards. Raises DataError for one that fails its checksum or does not match the windows."""
        logits = np.full((self.streams.num_targets, self.num_labels), np.nan, np.float32)
        rows, start = np.full(self.streams.num_targets, -1, np.int64), 0
        hidden: list[np.ndarray] = []
        windows: list[np.ndarray] = []
        for path in sorted(self.directory.glob("part-*.arrow")):
            table = read_cached(path, self._owner)
            with input_errors(DataError, f"cached teacher output {path}", ADVICE):
                targets, values = table.column("target").to_numpy(), matrix(table, "logits")
                own = np.unique(table.column("window").to_numpy())
                self._check_shard(path, own, targets, values)
                logits[targets] = values
                windows.append(own)
                if self.layers:
                    hidden.append(read_hidden_states(path, table, len(self.layers)))
                    rows[targets] = start + np.arange(len(targets))
                    start += len(targets)
        found = np.sort(np.concatenate(windows)) if windows else np.empty(0, np.int64)
        if len(np.unique(found)) < len(found):
            raise DataError(f"{self.directory} holds one window in more than one shard; delete the directory")
        predictions = TeacherPredictions(
            logits, self.layers, np.concatenate(hidden) if hidden else None, rows if hidden else None
        )
        return CachedPredictions(predictions, found)

    def _check_shard(self, path: Path, windows: np.ndarray, targets: np.ndarray, logits: np.ndarray) -> None:
        """Raise DataError unless a shard holds each target of its windows once, with C finite logits."""
        offsets = self.streams.target_offsets
        if len(windows) and (windows[0] < 0 or windows[-1] >= len(offsets) - 1):
            raise DataError(f"{path} names a window that the log does not have; {ADVICE}")
        expected = [np.arange(offsets[window], offsets[window + 1]) for window in windows.tolist()]
        if not np.array_equal(np.sort(targets), np.concatenate(expected) if expected else targets[:0]):
            raise DataError(f"{path} does not hold each target of its windows once; {ADVICE}")
        if logits.shape[1] != self.num_labels or not (np.abs(logits) <= MAX_LOGIT).all():
            raise DataError(f"{path} does not hold {self.num_labels} finite logits for each target; {ADVICE}")


def read_hidden_states(path: Path, table: pa.Table, layers: int) -> np.ndarray:
    """Hidden states of a shard, float16 [N, K, H] with K = `layers`. Raises DataError if one is not finite."""
    hidden = matrix(table, "hidden")
    if not np.isfinite(hidden).all():
        raise DataError(f"{path} holds hidden states that are not finite; {ADVICE}")
    return hidden.reshape(len(hidden), layers, -1)


def check_cache(directory: Path, manifest: Mapping[str, Any], layers: Sequence[int] = ()) -> None:
    """Raise DataError where `directory` caches another teacher's predictions, or other layers; an empty one is fine.

    This needs no log: whether the targets are the same is checked when the log has been read.
    """
    _check_metadata(directory, {"teacher": digest(manifest), "layers": list(layers)})


def _check_metadata(directory: Path, expected: dict[str, Any]) -> bool:
    """Whether `directory` has metadata. Raises DataError where an entry differs from the expected one."""
    path = directory / METADATA
    if not path.is_file():
        if directory.is_dir() and any(directory.iterdir()):
            raise DataError(
                f"{directory} holds files, but no {METADATA} of cached teacher outputs; choose another directory"
            )
        return False
    # Early caches of format 2 have no fingerprint of texts; they pass.
    found = {"texts": expected.get("texts"), **read_json(path)}
    reasons = {
        "format": "another version wrote them",
        "teacher": "they are another teacher's, or the teacher was trained again since",
        "targets": "they belong to other data, splits or windows",
        "texts": "the texts of items or users have changed",
        "layers": "other layers were cached",
    }
    for key, reason in reasons.items():
        if key in expected and found.get(key) != expected[key]:
            raise DataError(
                f"{directory} holds stale teacher outputs: {reason} ({key} {str(found.get(key))[:16]}, now "
                f"{str(expected[key])[:16]}); delete the directory, or name another with teacher_outputs.path"
            )
    return True


def targets_fingerprint(streams: StreamDataset) -> str:
    """SHA-256 of a data set's targets and windows, which a teacher's predictions belong to."""
    fingerprint = hashlib.sha256(streams.domain.name.encode())
    for array in (streams.target_rows, streams.target_items, streams.target_labels, streams.target_offsets,
                  streams.lengths):  # fmt: skip
        fingerprint.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return fingerprint.hexdigest()


def texts_fingerprint(streams: StreamDataset) -> str:
    """SHA-256 of the tokens of a data set's headers and events, and of their offsets."""
    fingerprint = hashlib.sha256()
    for array in streams.token_arrays():
        fingerprint.update(f"{array.dtype}{array.shape}".encode())
        fingerprint.update(np.ascontiguousarray(array).data)
    return fingerprint.hexdigest()
