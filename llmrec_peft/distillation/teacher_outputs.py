"""Outputs of a teacher that a student learns from: predictions for training targets, and item embeddings.

Shape letters: T targets, P predicted targets, C labels, K layers, H the teacher's hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrec_peft.checkpoints.manifest_schema import WEIGHTS
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.errors import DataError


@dataclass(frozen=True)
class TeacherPredictions:
    """A teacher's predictions for the targets of one stream data set, by target number.

    Attributes:
        logits: float32 [T, C], calibrated (temperature and biases applied); NaN for targets without a prediction.
        layers: numbers of the teacher's layers whose outputs are cached; -1 is the input of the head.
        hidden: float16 [P, K, H], outputs of these layers at the markers; None without layers.
        rows: int64 [T], row of `hidden` of each target, -1 without a prediction; None without layers.
    """

    logits: np.ndarray
    layers: tuple[int, ...] = ()
    hidden: np.ndarray | None = None
    rows: np.ndarray | None = None

    @property
    def predicted(self) -> np.ndarray:
        """Numbers of the targets that have a prediction, int64 [P]."""
        return np.flatnonzero(np.isfinite(self.logits).all(1))

    def check_targets(self, streams: StreamDataset) -> None:
        """Raise DataError unless `streams` has as many targets: predictions are found by target number."""
        if len(self.logits) != streams.num_targets:
            raise DataError(
                f"the student has {streams.num_targets} training targets and the teacher's predictions have "
                f"{len(self.logits)}; delete the cached teacher outputs"
            )

    def windows_of(self, streams: StreamDataset) -> StreamSubset:
        """The windows of `streams` in which at least one target has a prediction."""
        # Window w holds the targets target_offsets[w]:target_offsets[w + 1].
        windows = np.searchsorted(streams.target_offsets, self.predicted, "right") - 1
        return StreamSubset(streams, np.unique(windows))


@dataclass(frozen=True)
class TeacherOutputs:
    """Outputs that a student uses of its teacher; None for those that its options leave out.

    Attributes:
        predictions: for the training targets.
        item_embeddings: float32 [items, K * H], the teacher's representation of each item of the log.
    """

    predictions: TeacherPredictions | None = None
    item_embeddings: np.ndarray | None = None

    def describe(self, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
        """Entry about the teacher in a student's manifest, from the teacher's own; None if the teacher did not run."""
        if self.predictions is None and self.item_embeddings is None:
            return None
        files, weights = manifest["files"], manifest.get("weights", {})
        return {
            "method": manifest.get("method", "merged"),
            "base": manifest["base"].get("name"),
            "weights": weights.get("fingerprint") or files.get(WEIGHTS),
            "targets": 0 if self.predictions is None else len(self.predictions.predicted),
        }
