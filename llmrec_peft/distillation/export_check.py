"""Verification of an export: predictions of each ONNX graph against those of torch on the same streams.

Shape letters: T targets, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.layout import StreamRows
from llmrec_peft.data.streams import Streams
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.distillation.synthetic_ids import SyntheticIdStreams
from llmrec_peft.errors import BundleError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.merging.synthetic_inputs import SyntheticStreams
from llmrec_peft.models.fingerprints import fits
from llmrec_peft.models.predict import Predictions, predict


@dataclass(frozen=True)
class CheckedStreams:
    """Streams that torch and the graphs predict on.

    Attributes:
        streams: the streams.
        name: as serving.json has it.
        labelled: whether the labels are those of a log.
    """

    streams: StreamRows
    name: str
    labelled: bool


def checked_streams(streams: Streams | None, vocabulary: Vocabulary, loaded: Bundle) -> CheckedStreams:
    """The given streams, or synthetic inputs that the student can read."""
    if streams is not None:
        parent = streams.parent
        return CheckedStreams(streams, f"{parent.name} of {parent.log.name}", labelled=True)
    if vocabulary.reads_ids:
        return CheckedStreams(SyntheticIdStreams(vocabulary, loaded.tokenizer), "samples", labelled=False)
    return CheckedStreams(SyntheticStreams(vocabulary.domain, loaded.tokenizer), "samples", labelled=False)


def check_streams_fit(streams: Streams, student: str | Path, manifest: Mapping[str, Any]) -> None:
    """Raise BundleError for streams of another domain or tokenizer than the student's."""
    parent = streams.parent
    same = fits(parent.vocabulary.tokenizer, manifest["tokenizer"].get("fingerprint"))
    if not same or parent.domain.labels != manifest["labels"]:
        raise BundleError(
            f"streams of domain {parent.domain.name!r} with the labels {parent.domain.labels} were made "
            f"{'for another domain' if same else 'with another tokenizer'} than student {student} has, whose labels "
            f"are {manifest['labels']}; build them by the student's domain and tokenizer"
        )


def compare_graphs(
    graphs: Mapping[str, Path], loaded: Bundle, checked: CheckedStreams, batch_tokens: int
) -> dict[str, Any]:
    """Differences between each graph's logits and torch's, and AUC of both where labels are real.

    Args:
        graphs: mapping from a precision to the file of its graph.
        loaded: the student in torch.
        checked: the streams that both predict on.
        batch_tokens: tokens of one forward pass, at most.

    Returns:
        `answers` (number of targets), `spread` (standard deviation of torch's logits), `auc` of torch; and for each
        precision `max_difference`, `mean_difference`, `mean_probability`, `auc` and `bytes`.
    """
    from llmrec_peft.serving.onnx_graph import Graph

    streams, pad = checked.streams, loaded.tokenizer.pad_token_id
    expected = predict(loaded.classifier, streams, StreamCollator(pad, batch_tokens), batch_tokens=batch_tokens)
    rows = [streams[number] for number in range(len(streams))]
    # `predict` sorts by target number, and a graph predicts in the order of the rows.
    order = np.argsort(np.concatenate([row.targets for row in rows]), kind="stable")
    calibration = Calibration.from_dict(loaded.calibration)

    def auc(logits: np.ndarray) -> float | None:
        return _auc(expected, calibration.apply(logits)) if checked.labelled else None

    measured: dict[str, Any] = {
        "answers": len(expected.logits), "spread": float(expected.logits.std()), "auc": auc(expected.logits)
    }  # fmt: skip
    for precision, path in graphs.items():
        logits = Graph(path, pad).predict(rows, batch_tokens)[order]
        difference = np.abs(logits.astype(np.float64) - expected.logits)
        measured[precision] = {
            "max_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "mean_probability": float(np.abs(_softmax(logits) - _softmax(expected.logits)).mean()),
            "auc": auc(logits),
            "bytes": path.stat().st_size,
        }
    return measured


def check_difference(out: Path, measured: Mapping[str, Any]) -> None:
    """Raise BundleError where the float32 graph differs from torch by more than the tolerance."""
    found = measured["float32"]
    if not found["max_difference"] <= measured["tolerance"]:  # also where it is NaN
        raise BundleError(
            f"export {out} differs from torch: logits differ by {found['max_difference']:.3g} at most and "
            f"{found['mean_difference']:.3g} on average, over the tolerance {measured['tolerance']:.3g}, so it was "
            "deleted; set a higher tolerance, or another opset"
        )


def _auc(predictions: Predictions, probabilities: np.ndarray) -> float | None:
    """AUC of the targets with a label, by probabilities [T, C]; None where they have one class."""
    known = predictions.labels >= 0
    if len(np.unique(predictions.labels[known])) < 2:
        return None
    value = compute_metrics(predictions.labels[known], probabilities[known], names=["auc"])["auc"]
    return float(value) if np.isfinite(value) else None


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 [T, C]; the largest logit is subtracted, so that no exponential overflows."""
    values = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return values / values.sum(1, keepdims=True)
