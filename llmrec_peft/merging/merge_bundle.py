"""Merging a bundle into a stock checkpoint, with a check that the written checkpoint predicts as the bundle does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest import installed, read_manifest, write_manifest
from llmrec_peft.checkpoints.manifest_schema import ADAPTER, MANIFEST, MERGED, WEIGHTS
from llmrec_peft.checkpoints.merged import loading_notes, save_merged, write_merged_manifest
from llmrec_peft.checkpoints.model_card import CARD, merged_card
from llmrec_peft.checkpoints.output_directory import check_output, check_room, publish, scratch_beside, writing
from llmrec_peft.checkpoints.stock_tokenizer import prepare_tokenizer
from llmrec_peft.data.streams import Streams
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.merging.comparison import (
    TOLERANCE,
    check_equal,
    compare,
    comparison_streams,
    predict_on,
    streams_name,
)
from llmrec_peft.merging.process_memory import large_blocks_apart, peak_bytes
from llmrec_peft.merging.stock_comparison import StockPrompts, check_stock, measure_stock
from llmrec_peft.merging.unload import unload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class MergeOptions:
    """Options of every merge.

    Attributes:
        dtype: number format of the weights; that of the bundle's base if None, float32 for float16.
        base: path or name of the base; that of the bundle if None.
        streams: streams that both models predict on, by the bundle's domain and tokenizer (`build_streams`); synthetic
            inputs if None.
        tolerance: largest difference of a logit that passes; see `TOLERANCE` for None.
        max_shard_size: bytes of one weights file, at most.
        batch_tokens: tokens of one forward pass, at most.
        trust_remote_code: allow the base's own code to run.

    Raises ModelError for a value out of range.
    """

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


def merge_bundle(bundle: str | Path, out: str | Path, options: MergeOptions | None = None) -> dict[str, Any]:
    """Write a bundle and its base as one stock `AutoModelForSequenceClassification` checkpoint, and measure it.

    The adapter goes into the weights one layer at a time, 4-bit weights are dequantised first, and the head stays
    float32. The written checkpoint is loaded back and must predict as the bundle does, and stock classes must predict
    the same; else nothing is left. An earlier merged model in `out` is replaced; `out` is there whole or not at all.

    Args:
        bundle: directory of a bundle of any method but `adapter`.
        out: directory to write.

    Returns:
        `max_difference` and `mean_difference` (of the absolute differences of logits), `tolerance`, `spread` (standard
        deviation of the adapted logits), `answers` (how many predictions), `streams` ("samples" for synthetic inputs,
        or the data's name), `auc_adapted` and `auc_merged` (None without labels of two classes), what `measure_stock`
        returns, `dtype`, `bytes` (of the weights), `seconds` and `peak_bytes` (resident memory of this process so far).

    Raises:
        BundleError: a damaged bundle or another base, a merged model in place of a bundle, a method that cannot be
            merged, a tokenizer that stock classes would read at another token, an output that is something else's or
            cannot be written, predictions that differ.
        ModelError: predictions that are not finite.
    """
    options = options or MergeOptions()
    manifest = mergeable(bundle)
    out = check_output(out, bundle, options.base or manifest["base"]["name"])
    loading = LoadOptions(base=options.base, trust_remote_code=options.trust_remote_code, mapped=True)
    return write_merge(
        lambda: load_trained(bundle, loading, kind=ADAPTER),
        out,
        {**inherited(manifest), "merged_from": [provenance(manifest)], "combination": None},
        options,
    )


def mergeable(bundle: str | Path) -> dict[str, Any]:
    """behavior.json of a bundle. Raises BundleError where it cannot be merged, saying what to do instead."""
    if not (Path(bundle) / MANIFEST).is_file():
        raise BundleError(f"bundle {bundle} has no {MANIFEST}; name the directory `bundle` that a training run left")
    manifest = read_manifest(bundle, ADAPTER)
    if manifest["method"] == "adapter":
        raise BundleError(
            f"bundle {bundle} is a bottleneck adapter, whose layers have no place in a stock checkpoint; serve it in a "
            "DomainBank, train method lora, or distil it"
        )
    return manifest


def provenance(manifest: Mapping[str, Any], weight: float = 1.0) -> dict[str, Any]:
    """Entry of a merged model's manifest for one bundle in it."""
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
    load: Callable[[], Bundle], out: Path, content: Mapping[str, Any], options: MergeOptions
) -> dict[str, Any]:
    """Merge the bundle that `load` returns into `out` and measure it; see `merge_bundle`.

    `load` returns the only reference, so that the adapted model's memory is free before the merged one is loaded.
    """
    start = time.perf_counter()
    with scratch_beside(out) as scratch, large_blocks_apart():
        adapted = load()
        base_dtype = adapted.classifier.model_options.dtype
        dtype = options.dtype or ("bfloat16" if base_dtype == "bfloat16" else "float32")
        # Layers of 4 bits may compute in another format than the rest.
        computes = getattr(adapted.classifier.method_options, "compute_dtype", None) or base_dtype
        usual = TOLERANCE["float32" if {base_dtype, computes, dtype} == {"float32"} else "low"]
        streams = comparison_streams(adapted, options.streams)
        # Predictions are stored, not the model: one model in memory at a time.
        before = predict_on(adapted, streams, options.batch_tokens)
        model = unload(adapted.classifier, getattr(torch, dtype))
        size = _save(scratch, out, model, adapted, options)
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
            manifest = write_merged_manifest(scratch, content)
        merged = load_trained(scratch, LoadOptions(trust_remote_code=options.trust_remote_code), kind=MERGED)
        after = predict_on(merged, streams, options.batch_tokens)
        measured = compare(before, after, labelled=options.streams is not None)
        prompts = StockPrompts(merged, options.streams)
        at_markers = predict_on(merged, prompts, options.batch_tokens).logits
        del merged
        gc.collect()
        measured |= measure_stock(scratch, prompts.tokens, prompts.texts, at_markers, options.trust_remote_code)
        # Logits of a large spread differ more by rounding.
        scale = max(1.0, measured["spread"])
        tolerance = usual * scale if options.tolerance is None else options.tolerance
        measured |= {"streams": streams_name(options.streams), "tolerance": tolerance}
        check_equal(out, measured)
        check_stock(out, measured, TOLERANCE["float32" if dtype == "float32" else "low"] * scale)
        # Only a model that passed appears under its name.
        with writing(out):
            manifest = write_manifest(scratch, {**manifest, "measured": measured}, MERGED)
            (scratch / CARD).write_text(merged_card(manifest), encoding="utf-8")
            publish(scratch, out)
    return measured | {
        "dtype": dtype,
        "bytes": size,
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }


def _save(scratch: Path, out: Path, model: PreTrainedModel, adapted: Bundle, options: MergeOptions) -> int:
    """Write weights, configuration and tokenizer of an unloaded model; returns the bytes of the weights."""
    prepare_tokenizer(adapted.tokenizer, model.config, adapted.domain, encoder=adapted.classifier.encoder)
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    check_room(scratch, size)
    with writing(out):
        save_merged(
            scratch, model, adapted.tokenizer, max_shard_size=options.max_shard_size,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    return size


_PACKAGES = ("llmrec_peft", "torch", "transformers", "peft", "safetensors")
