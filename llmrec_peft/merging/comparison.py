"""The comparison of a merged model with the bundle that it was merged from, on a log's streams or on synthetic ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.layout import StreamRows
from llmrec_peft.data.streams import Streams, independent_prompts
from llmrec_peft.data.vocabulary import UNKNOWN_ITEM
from llmrec_peft.errors import BundleError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.merging.synthetic_inputs import SyntheticStreams
from llmrec_peft.models.predict import Predictions, predict
from llmrec_peft.models.selftest import hides_candidates

TOLERANCE = {"float32": 1e-3, "low": 0.25}
"""Largest difference of a logit that passes by default: where both models compute in float32, and where one does not.

It is multiplied by the standard deviation of the adapted logits where that is above 1.
"""


def comparison_streams(adapted: Bundle, streams: Streams | None) -> StreamRows:
    """Streams that both models predict on: the given ones (independent prompts for an encoder), or synthetic inputs."""
    encoder = adapted.classifier.encoder
    if streams is not None:
        return independent_prompts(streams) if encoder else streams
    domain = Domain.of_manifest(adapted.domain, source="the bundle's domain")
    if adapted.tokenizer.unk_token == UNKNOWN_ITEM:
        raise BundleError(
            f"a bundle on a model of item ids (domain {domain.name!r}) cannot read synthetic items, so its merge "
            "is not measured without a log; give streams, or data.path to recipes/merge.py"
        )
    return SyntheticStreams(domain, adapted.tokenizer, independent=not hides_candidates(adapted.classifier))


def streams_name(streams: Streams | None) -> str:
    """Name of the streams in `measured`: split and log, or "samples" for synthetic inputs."""
    return "samples" if streams is None else f"{streams.parent.name} of {streams.parent.log.name}"


def predict_on(bundle: Bundle, streams: StreamRows, batch_tokens: int) -> Predictions:
    """Predictions of a loaded bundle or merged model."""
    classifier = bundle.classifier
    collator = StreamCollator(bundle.tokenizer.pad_token_id, batch_tokens, mask=classifier.encoder)
    return predict(classifier, streams, collator, batch_tokens=batch_tokens)


def compare(adapted: Predictions, merged: Predictions, *, labelled: bool) -> dict[str, Any]:
    """Differences of the logits [n, C], their spread, and AUC of both where the labels are real."""
    difference = np.abs(adapted.logits.astype(np.float64) - merged.logits)
    aucs: dict[str, float | None] = {"auc_adapted": None, "auc_merged": None}
    if labelled:
        for name, predictions in (("auc_adapted", adapted), ("auc_merged", merged)):
            probabilities = Calibration().apply(predictions.logits)
            value = compute_metrics(predictions.labels, probabilities, names=["auc"])["auc"]
            aucs[name] = value if np.isfinite(value) else None
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "spread": float(adapted.logits.std()),
        "answers": len(adapted.logits),
        **aucs,
    }


def check_equal(out: Path, measured: Mapping[str, Any]) -> None:
    """Raise BundleError where the largest difference is over the tolerance."""
    if not measured["max_difference"] <= measured["tolerance"]:
        raise BundleError(
            f"merged model {out} differs from what it was merged from: logits differ by "
            f"{measured['max_difference']:.3g} at most and {measured['mean_difference']:.3g} in the mean, over the "
            f"tolerance {measured['tolerance']:.3g}, so it was not kept; use dtype float32, or set a higher tolerance"
        )
