"""Merging a bundle into a stock checkpoint, which counts as done when the written one answers as the bundle does."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llmrec_peft.checkpoints.bundle import Bundle, load_bundle
from llmrec_peft.checkpoints.manifest import MANIFEST, WEIGHTS, installed, read_manifest
from llmrec_peft.checkpoints.merged import (
    check_output,
    check_room,
    describe,
    load_merged,
    loading_notes,
    publish,
    save_merged,
    scratch_beside,
    write_manifest,
    writing,
)
from llmrec_peft.checkpoints.model_card import CARD, merged_card
from llmrec_peft.checkpoints.stock_loading import measure_stock, prepare_tokenizer
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.layout import StreamRows
from llmrec_peft.data.streams import Streams, independent_prompts
from llmrec_peft.data.vocabulary import UNKNOWN_ITEM
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.merging.synthetic_inputs import SyntheticStreams
from llmrec_peft.merging.unload import fold
from llmrec_peft.models.predict import Predictions, predict
from llmrec_peft.models.selftest import hides_candidates

Dtype = Literal["float32", "bfloat16"]
TOLERANCE = {"float32": 1e-3, "low": 0.25}
"""Largest difference of a logit that passes by default, as a share of the adapted logits' standard deviation where that
is above 1: where adapted and merged compute in float32, and where one of them does not."""


@dataclass(frozen=True)
class MergeSettings:
    """What every kind of merge can be told; see `merge_bundle`."""

    dtype: Dtype | None = None
    base: str | None = None
    streams: Streams | None = None
    tolerance: float | None = None
    max_shard_size: str | int = "2GB"
    batch_tokens: int = 1000
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ModelError(f"dtype must be float32 or bfloat16, not {self.dtype!r}; choose one of them")
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise ModelError(f"tolerance must be a finite number of at least 0, not {self.tolerance!r}; correct it")


def merge_bundle(
    bundle: str | Path,
    out: str | Path,
    *,
    dtype: Dtype | None = None,
    base: str | None = None,
    streams: Streams | None = None,
    tolerance: float | None = None,
    max_shard_size: str | int = "2GB",
    batch_tokens: int = 1000,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a bundle and its base as one stock `AutoModelForSequenceClassification` checkpoint, and measure it.

    The adapter goes into the weights one layer at a time, 4-bit weights are dequantised first, and the head stays
    float32. What was written is loaded back and must answer as the bundle does, and so must stock classes on it; else
    nothing is left. An earlier merged
    model in `out` is replaced; `out` is there whole or not at all.

    Args:
        bundle: directory of a bundle of any method but `adapter`.
        out: directory to write.
        dtype: number format of the weights; that of the bundle's base if None, float32 for float16.
        base: where the base lies, if not where the bundle says.
        streams: what both answer, by the bundle's domain and tokenizer (`build_streams`); made-up samples if None.
        tolerance: largest difference of a logit that passes; see `TOLERANCE` for None.
        max_shard_size: bytes of one weights file, at most.
        batch_tokens: tokens that are answered at once, at most.
        trust_remote_code: allow the base's own code to run.

    Returns:
        `max_difference` and `mean_difference` (of the absolute differences of logits), `tolerance`, `spread` (standard
        deviation of the adapted logits), `answers`, `streams` ("samples" or the data's name), `auc_adapted` and
        `auc_merged` (None without labels of two classes), what `measure_stock` gives, `dtype`, `bytes` (of the
        weights), `seconds` and `peak_bytes` (resident memory of this process so far).

    Raises:
        BundleError: a damaged bundle or another base, a merged model in place of a bundle, a method that cannot be
            merged, a tokenizer that stock classes would read at another token, an output that is something else's or
            cannot be written, answers that differ.
        ModelError: a setting out of range, or answers that are not finite.
    """
    settings = MergeSettings(dtype, base, streams, tolerance, max_shard_size, batch_tokens, trust_remote_code)
    manifest = mergeable(bundle)
    out = check_output(out, bundle, base or manifest["base"]["name"])
    return write_merge(
        lambda: load_bundle(bundle, base=base, trust_remote_code=trust_remote_code, mapped=True),
        out,
        {**inherited(manifest), "merged_from": [provenance(manifest)], "combination": None},
        settings,
    )


def mergeable(bundle: str | Path) -> dict[str, Any]:
    """behavior.json of a bundle. Raises BundleError where it cannot be merged, saying what to do instead."""
    if not (Path(bundle) / MANIFEST).is_file():
        raise BundleError(f"bundle {bundle} has no {MANIFEST}; name the directory `bundle` that a training run left")
    manifest = read_manifest(bundle)
    if manifest["method"] == "adapter":
        raise BundleError(
            f"bundle {bundle} is a bottleneck adapter, whose layers have no place in a stock checkpoint; serve it in a "
            "DomainBank, train method lora, or distil it"
        )
    return manifest


def provenance(manifest: Mapping[str, Any], weight: float = 1.0) -> dict[str, Any]:
    """What a merged model says of a bundle in it."""
    return {
        "name": manifest["domain"].get("name"),
        "method": manifest["method"],
        "weights_sha256": manifest["files"][WEIGHTS],
        "weight": weight,
    }


def inherited(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a merged model's manifest that are its bundle's."""
    same = ("base", "tokenizer", "domain", "labels", "words", "stream", "calibration", "counts", "metrics")
    return {key: manifest[key] for key in same}


def write_merge(
    load: Callable[[], Bundle], out: Path, content: Mapping[str, Any], settings: MergeSettings
) -> dict[str, Any]:
    """Merge what `load` gives into `out` and measure it; see `merge_bundle`.

    `load` hands over the only reference, so that the adapted model's memory is free before the merged one is loaded.
    """
    start = time.perf_counter()
    with scratch_beside(out) as scratch, _large_blocks_apart():
        adapted = load()
        held = adapted.classifier.model_options.dtype
        dtype = settings.dtype or ("bfloat16" if held == "bfloat16" else "float32")
        # Layers of 4 bits may compute in another format than the rest.
        computes = getattr(adapted.classifier.method_options, "compute_dtype", None) or held
        usual = TOLERANCE["float32" if {held, computes, dtype} == {"float32"} else "low"]
        streams, labelled = _streams(adapted, settings)
        before = _answers(adapted, streams, settings)
        model = fold(adapted.classifier, getattr(torch, dtype))
        prepare_tokenizer(adapted.tokenizer, model.config, adapted.domain, encoder=adapted.classifier.encoder)
        size = sum(value.numel() * value.element_size() for value in model.parameters())
        check_room(scratch, size)
        with writing(out):
            save_merged(
                scratch, model, adapted.tokenizer, max_shard_size=settings.max_shard_size,
                trust_remote_code=settings.trust_remote_code,
            )  # fmt: skip
        content = {
            **content,
            **loading_notes(adapted.classifier, adapted.tokenizer),
            "dtype": dtype,
            "measured": {},
            "versions": installed(*_PACKAGES),
        }
        del adapted, model
        gc.collect()  # models refer to themselves
        with writing(out):
            manifest = describe(scratch, content)
        merged = load_merged(scratch, trust_remote_code=settings.trust_remote_code)
        measured = _compared(before, _answers(merged, streams, settings), labelled)
        prompts = _Prompts(merged, settings.streams)
        at_markers = _answers(merged, prompts, settings).logits
        del merged
        gc.collect()
        measured |= measure_stock(scratch, prompts.tokens, prompts.texts, at_markers, settings.trust_remote_code)
        measured |= {
            "streams": "samples" if settings.streams is None else _name(settings.streams),
            "tolerance": settings.tolerance,
        }
        if settings.tolerance is None:
            measured["tolerance"] = usual * max(1.0, measured["spread"])
        _check(out, measured)
        _check_stock(
            out, measured, TOLERANCE["float32" if dtype == "float32" else "low"] * max(1.0, measured["spread"])
        )
        with writing(out):
            manifest = write_manifest(scratch, {**manifest, "measured": measured})
            (scratch / CARD).write_text(merged_card(manifest), encoding="utf-8")
            publish(scratch, out)
    return measured | {"dtype": dtype, "bytes": size, "seconds": time.perf_counter() - start, "peak_bytes": _peak()}


_PACKAGES = ("llmrec_peft", "torch", "transformers", "peft", "safetensors")


# -- answers -----------------------------------------------------------------------------------------


def _streams(adapted: Bundle, settings: MergeSettings) -> tuple[StreamRows, bool]:
    """What both models answer, and whether its labels are real."""
    encoder, streams = adapted.classifier.encoder, settings.streams
    if streams is None:
        domain = Domain.of_manifest(adapted.domain, source="the bundle's domain")
        if adapted.tokenizer.unk_token == UNKNOWN_ITEM:
            raise BundleError(
                f"a bundle on a model of item ids (domain {domain.name!r}) cannot answer made-up items, so its merge "
                "is not measured without a log; give streams, or data.path to recipes/merge.py"
            )
        alone = not hides_candidates(adapted.classifier)
        return SyntheticStreams(domain, adapted.tokenizer, independent=alone), False
    return independent_prompts(streams) if encoder else streams, True


def _name(streams: Streams) -> str:
    """Split and log of a data set of streams."""
    parent = streams.parent
    return f"{parent.name} of {parent.log.name}"


class _Prompts:
    """A few prompts of one answer each, for stock classes.

    Attributes:
        tokens: their token ids.
        texts: the same as whole texts; None where the model reads item ids, and prompts come from `streams`.
    """

    def __init__(self, merged: Bundle, streams: Streams | None) -> None:
        self.texts: list[str] | None = None
        if streams is not None and merged.tokenizer.unk_token == UNKNOWN_ITEM:
            whole = independent_prompts(streams)
            self._rows = [whole[number] for number in range(min(_STOCK_PROMPTS, len(whole)))]
        else:
            domain = Domain.of_manifest(merged.domain, source="the bundle's domain")
            samples = SyntheticStreams(domain, merged.tokenizer, independent=True)
            # Of different lengths, and different places in their windows.
            numbers = np.linspace(0, len(samples) - 1, min(_STOCK_PROMPTS, len(samples))).round().astype(int)
            self._rows = [samples[number] for number in numbers]
            self.texts = [samples.texts[number] for number in numbers]
        self.tokens = [row.input_ids for row in self._rows]
        self.lengths = np.array([len(row) for row in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        return self._rows[number]


_STOCK_PROMPTS = 8


def _answers(bundle: Bundle, streams: StreamRows, settings: MergeSettings) -> Predictions:
    classifier = bundle.classifier
    collator = StreamCollator(bundle.tokenizer.pad_token_id, settings.batch_tokens, mask=classifier.encoder)
    return predict(classifier, streams, collator, batch_tokens=settings.batch_tokens)


def _compared(adapted: Predictions, merged: Predictions, labelled: bool) -> dict[str, Any]:
    """Differences of the logits, their spread, and AUC of both."""
    difference = np.abs(adapted.logits.astype(np.float64) - merged.logits)
    aucs: dict[str, float | None] = {"auc_adapted": None, "auc_merged": None}
    if labelled:
        for name, answers in (("auc_adapted", adapted), ("auc_merged", merged)):
            value = compute_metrics(answers.labels, Calibration().apply(answers.logits), names=["auc"])["auc"]
            aucs[name] = value if np.isfinite(value) else None
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "spread": float(adapted.logits.std()),
        "answers": len(adapted.logits),
        **aucs,
    }


def _check(out: Path, measured: Mapping[str, Any]) -> None:
    if not measured["max_difference"] <= measured["tolerance"]:
        raise BundleError(
            f"merged model {out} answers otherwise than what it was merged from: logits differ by "
            f"{measured['max_difference']:.3g} at most and {measured['mean_difference']:.3g} in the mean, over the "
            f"tolerance {measured['tolerance']:.3g}, so it was not kept; use dtype float32, or set a higher tolerance"
        )


def _check_stock(out: Path, measured: Mapping[str, Any], tolerance: float) -> None:
    if not measured["stock_difference"] <= tolerance:
        raise BundleError(
            f"merged model {out} answers otherwise in stock classes: on the same tokens logits differ by "
            f"{measured['stock_difference']:.3g} at most, over the tolerance {tolerance:.3g}, so it was not kept; "
            "stock classes must read the last token that is not the pad token, which a base's own code may change"
        )
    through_text = measured["text_same_difference"]
    if through_text is not None and not through_text <= tolerance:
        raise BundleError(
            f"merged model {out} answers otherwise in stock classes: where whole texts give our tokens, logits differ "
            f"by {through_text:.3g} at most, over the tolerance {tolerance:.3g}, so it was not kept; nothing else "
            "that the tokenizer gives, such as token types, may change the answers: correct model_input_names in its "
            "tokenizer_config.json"
        )


@contextmanager
def _large_blocks_apart() -> Iterator[None]:
    """Inside, glibc maps each large block by itself, and gives it back when it is freed.

    By default it comes to keep blocks of up to 32 MiB in its heap, where what quantising and merging free between the
    weights of two layers fits nothing that comes after: the holes may add up to a second copy of the weights.
    """
    libc = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**21)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.malloc_trim(0)


_M_MMAP_THRESHOLD = -3  # malloc.h


def _peak() -> int:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
