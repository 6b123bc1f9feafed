"""The exported graph on ONNX Runtime.

Shape letters: B rows, L tokens of a row, T candidates, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from llmrec_peft.data.batches import PAD, plan_micro_batches
from llmrec_peft.data.layout import Stream
from llmrec_peft.errors import BundleError, ModelError

INPUTS = ("input_ids", "position_ids", "segment", "markers")
"""Three of int64 [B, L], and flat indices b * L + l, int64 [T]. The graph makes the attention mask from `segment`."""
OLD_INPUTS = ("input_ids", "position_ids", "branch", "markers")
"""Names in exports of version 0.1.0."""
OUTPUT = "logits"
"""float32 [T, C]."""


class Graph:
    """Computes the logits of streams.

    Args:
        path: an .onnx file.
        pad: token that fills rows up.
        threads: number of threads of one pass; ONNX Runtime's own choice if None.
        labels: number of labels, C; not checked if None.

    Raises:
        BundleError: a file that ONNX Runtime cannot load, or of other inputs or outputs.
        ModelError: `threads` below 1.
    """

    def __init__(self, path: str | Path, pad: int, threads: int | None = None, labels: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ModelError(f"threads must be at least 1, not {threads}; leave it out for ONNX Runtime's choice")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions have no common base but this
            reason = " ".join(str(error).split())[:160]
            raise BundleError(
                f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__} ({reason}); export again"
            ) from None
        names = tuple(entry.name for entry in self._session.get_inputs())
        if names not in (INPUTS, OLD_INPUTS):
            raise BundleError(f"{path} has the inputs {names}, and {INPUTS} belong there; export again")
        outputs = {entry.name: entry.shape for entry in self._session.get_outputs()}
        shape = outputs.get(OUTPUT)
        if shape is None or len(shape) != 2 or (labels is not None and shape[1] != labels):
            raise BundleError(
                f"{path} has the outputs {outputs}, and {OUTPUT} [candidates, {labels or 'labels'}] belongs there; "
                "export again"
            )
        self._pad, self._inputs = pad, names

    def predict(self, streams: Sequence[Stream], batch_tokens: int) -> np.ndarray:
        """Logits of all markers of all streams in order, float32 [T, C].

        Streams of similar length go through together: at most `batch_tokens` tokens in one pass, or one stream.

        Raises:
            ModelError: a logit is not a finite number, or there is no stream.
        """
        ends = np.cumsum([0, *(len(stream.markers) for stream in streams)])
        logits: np.ndarray | None = None
        for batch in plan_micro_batches(np.array([len(stream) for stream in streams]), batch_tokens):
            found = self._run([streams[row] for row in batch])
            if logits is None:
                logits = np.empty((ends[-1], found.shape[1]), np.float32)
            logits[np.concatenate([np.arange(ends[row], ends[row + 1]) for row in batch])] = found
        if logits is None:
            raise ModelError("there is no stream to predict; give at least one")
        if not np.isfinite(logits).all():
            raise ModelError("the exported model gives logits that are not finite; train it again")
        return logits

    def _run(self, streams: list[Stream]) -> np.ndarray:
        length = max(map(len, streams))
        ids = np.full((len(streams), length), self._pad, np.int64)
        positions, segment = np.zeros_like(ids), np.full_like(ids, PAD)
        markers = []
        for row, stream in enumerate(streams):
            size = len(stream)
            ids[row, :size], positions[row, :size] = stream.input_ids, stream.position_ids
            segment[row, :size] = stream.segment
            markers.append(stream.markers + row * length)
        values = (ids, positions, segment, np.concatenate(markers).astype(np.int64))
        return self._session.run([OUTPUT], dict(zip(self._inputs, values, strict=True)))[0]
