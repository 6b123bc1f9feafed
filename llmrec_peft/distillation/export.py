"""Exporting a student to ONNX: checks, the graph, quantisation, verification against torch, and publication.

Modules of `serving` are imported inside functions: they need onnxruntime, whose absence is reported first.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.checksum import sha256
from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest import read_manifest, write_manifest
from llmrec_peft.checkpoints.manifest_schema import EXPORT, GRAPHS, MERGED, SERVING_MANIFEST, TOKENIZER
from llmrec_peft.checkpoints.model_card import CARD
from llmrec_peft.checkpoints.output_directory import publish, scratch_beside, without_links, writing
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import Streams
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.distillation.export_card import export_card
from llmrec_peft.distillation.export_check import (
    CheckedStreams,
    check_difference,
    check_streams_fit,
    checked_streams,
    compare_graphs,
)
from llmrec_peft.distillation.onnx_model import OPSET, check_opset, write_graph
from llmrec_peft.distillation.quantise import quantise
from llmrec_peft.distillation.serving_entries import check_tokens, serving_entries
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.models.selftest import check_candidates

TOLERANCE = 1e-4
"""Largest difference of a float32 logit that passes; times the logits' standard deviation where that is above 1."""
_MOST_BYTES = 1_900_000_000  # a protobuf file ends at 2 GiB


def export_onnx(
    student: str | Path,
    out: str | Path,
    *,
    int8: bool = True,
    opset: int | None = None,
    streams: Streams | None = None,
    tolerance: float = TOLERANCE,
    batch_tokens: int = 2000,
) -> dict[str, Any]:
    """Write a student as ONNX with all that `OnnxScorer` needs, and verify that it predicts what torch predicts.

    An earlier export in `out` is replaced; `out` is written whole or not at all.

    Args:
        student: directory of a student, or of any merged model of a decoder.
        out: directory to write.
        int8: write a second graph with weights of 8 bits, whose differences are measured but not limited.
        opset: opset of the graph; `OPSET` if None.
        streams: streams that both predict on, by the student's domain and tokenizer (`build_streams`); synthetic
            inputs if None.
        tolerance: see `TOLERANCE`.
        batch_tokens: tokens of one forward pass, at most.

    Returns:
        `measured` of serving.json: what `compare_graphs` gives, `streams` (their name) and `tolerance`; and `seconds`.

    Raises:
        ModelError: an encoder, an opset that is not available, a missing package, a setting out of range.
        BundleError: no merged model, a damaged one, streams of another domain or tokenizer, an output directory that
            holds something else, predictions that differ.
    """
    start = time.perf_counter()
    if not 0 <= tolerance < float("inf"):
        raise ModelError(f"tolerance must be a finite number of at least 0, not {tolerance!r}; correct it")
    _check_packages()
    opset = check_opset(OPSET if opset is None else opset)
    manifest = read_manifest(student, MERGED)
    out = _check_output(Path(out), Path(student))
    loaded = load_trained(student, LoadOptions(dtype="float32"), kind=MERGED)
    domain = _check_exportable(student, loaded)
    vocabulary = Vocabulary(domain, loaded.tokenizer)
    if streams is not None:
        check_streams_fit(streams, student, manifest)
    checked = checked_streams(streams, vocabulary, loaded)
    with scratch_beside(out) as scratch:
        with writing(out):
            graphs = _write_graphs(scratch, loaded, opset, int8=int8, blocks=not vocabulary.reads_ids)
        entries = serving_entries(manifest, vocabulary, loaded, opset)
        check_tokens(vocabulary, entries, scratch)
        measured = _verify(out, graphs, loaded, checked, tolerance, batch_tokens)
        with writing(out):
            _write_manifest(scratch, {**entries, "measured": measured})
            publish(scratch, out)
    return measured | {"seconds": time.perf_counter() - start}


def _check_packages() -> None:
    """Raise ModelError where a package that exporting needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"exporting needs the package {package}; install it with: pip install llmrec-peft[train,export]"
            )


def _check_output(out: Path, student: Path) -> Path:
    """Where an export may be written: a new or empty directory, or one that holds an export."""
    out = without_links(out)
    if out.exists() and (not out.is_dir() or out.samefile(student)):
        raise BundleError(f"{out} is {'the student itself' if out.is_dir() else 'a file'}; choose another directory")
    if out.exists() and any(out.iterdir()) and not (out / SERVING_MANIFEST).is_file():
        raise BundleError(f"{out} exists and holds no export, so it is not replaced; choose another directory")
    return out


def _check_exportable(student: str | Path, loaded: Bundle) -> Domain:
    """The student's domain. Raises ModelError for a model that ONNX or the scorer cannot hold."""
    classifier = loaded.classifier
    if classifier.encoder:
        raise ModelError(
            f"student {student} ({classifier.config.model_type}) is a bidirectional encoder and cannot share a history "
            "among candidates; export a decoder"
        )
    check_candidates(classifier, "an exported scorer scores many candidates on one history")
    domain = Domain.of_manifest(loaded.domain, source=f"the domain of {student}")
    check_positions(classifier.config, domain.stream.max_length)
    size = sum(value.numel() * value.element_size() for value in classifier.parameters())
    if size > _MOST_BYTES:
        raise ModelError(f"student {student} has {size / 1e9:.2f} GB, and one ONNX file holds 2; distil a smaller one")
    return domain


def _write_graphs(scratch: Path, loaded: Bundle, opset: int, *, int8: bool, blocks: bool) -> dict[str, Path]:
    """Write the tokenizer and the graphs; returns the graph of each precision. `blocks` is that of `quantise`."""
    loaded.tokenizer.backend_tokenizer.save(str(scratch / TOKENIZER))
    graphs = {"float32": scratch / GRAPHS["float32"]}
    write_graph(loaded.classifier, graphs["float32"], opset)
    if int8:
        graphs["int8"] = scratch / GRAPHS["int8"]
        quantise(graphs["float32"], graphs["int8"], blocks=blocks)
    return graphs


def _verify(
    out: Path,
    graphs: Mapping[str, Path],
    loaded: Bundle,
    checked: CheckedStreams,
    tolerance: float,
    batch_tokens: int,
) -> dict[str, Any]:
    """`measured` of serving.json. Raises BundleError where the float32 graph differs by more than the tolerance."""
    measured = compare_graphs(graphs, loaded, checked, batch_tokens)
    measured |= {"streams": checked.name, "tolerance": tolerance * max(1.0, measured["spread"])}
    check_difference(out, measured)
    return measured


def _write_manifest(scratch: Path, entries: dict[str, Any]) -> None:
    """Write serving.json, with the digests of the files beside it, and the card."""
    entries = {**entries, "files": {path.name: sha256(path) for path in scratch.iterdir()}}
    write_manifest(scratch, entries, EXPORT)
    (scratch / CARD).write_text(export_card(entries), encoding="utf-8")
