"""A student as ONNX, which counts as done when ONNX Runtime answers as torch does.

Shape letters: B rows, L tokens of a row, T answers, C labels.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.manifest import installed
from llmrec_peft.checkpoints.merged import load_merged, publish, read_merged, scratch_beside, without_links, writing
from llmrec_peft.checkpoints.model_card import CARD
from llmrec_peft.checkpoints.sealing import sha256
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.layout import Stream, StreamRows
from llmrec_peft.data.streams import Streams
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.files import plain, write_json
from llmrec_peft.merging.synthetic_inputs import SyntheticStreams
from llmrec_peft.models.base import check_positions
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.fingerprints import fits
from llmrec_peft.models.predict import Predictions, predict
from llmrec_peft.models.selftest import check_candidates

OPSET = 18
"""Of the graph by default: the least that torch's exporter writes."""
TOLERANCE = 1e-4
"""Largest difference of a logit in float32 that passes; times the logits' standard deviation where that is above 1."""
_MOST_BYTES = 1_900_000_000  # protobuf ends at 2 GiB
_PACKAGES = ("llmrec_peft", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


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
    """Write a student as ONNX with all that `OnnxScorer` needs, and measure that it answers as torch does.

    An earlier export in `out` is replaced; `out` is there whole or not at all.

    Args:
        student: directory of a student, or of any merged model of a decoder.
        out: directory to write.
        int8: write a second graph with weights of 8 bits, whose answers are measured and not refused.
        opset: of the graph; `OPSET` if None.
        streams: what both answer, by the student's domain and tokenizer (`build_streams`); made-up samples if None.
        tolerance: see `TOLERANCE`.
        batch_tokens: tokens that are answered at once, at most.

    Returns:
        What serving.json says as `measured`: `answers`, `streams`, `spread`, `tolerance`, `auc` (of torch's calibrated
        answers; None without `streams` of two labels or more), and for `float32` and `int8` each `max_difference`,
        `mean_difference` (of logits), `mean_probability` (mean difference of the probabilities), `auc` and `bytes`;
        and `seconds`.

    Raises:
        ModelError: an encoder, an opset that is not to be had, a package that is not installed, a setting out of range.
        BundleError: no merged model, a damaged one, streams by another domain or tokenizer, an output that is something
            else's, answers that differ.
    """
    start = time.perf_counter()
    if not 0 <= tolerance < float("inf"):
        raise ModelError(f"tolerance must be a finite number of at least 0, not {tolerance!r}; correct it")
    serving = _serving()
    opset = _check_opset(OPSET if opset is None else opset)
    manifest = read_merged(student)
    out = _check_output(Path(out), Path(student), serving)
    loaded = load_merged(student, dtype="float32")
    classifier = loaded.classifier
    if classifier.encoder:
        raise ModelError(
            f"student {student} ({classifier.config.model_type}) reads both ways and cannot share a history among "
            "candidates; export a decoder"
        )
    check_candidates(classifier, "an exported scorer answers many candidates to one history")
    domain = Domain.of_manifest(loaded.domain, source=f"the domain of {student}")
    check_positions(classifier.config, domain.stream.max_length)
    size = sum(value.numel() * value.element_size() for value in classifier.parameters())
    if size > _MOST_BYTES:
        raise ModelError(f"student {student} has {size / 1e9:.2f} GB, and one ONNX file holds 2; distil a smaller one")
    vocabulary = Vocabulary(domain, loaded.tokenizer)
    if streams is not None:
        _check_streams(streams, student, manifest)
    answered, name = _answered(streams, vocabulary, loaded)
    with scratch_beside(out) as scratch:
        with writing(out):
            loaded.tokenizer.backend_tokenizer.save(str(scratch / serving.TOKENIZER))
            _write_graph(classifier, scratch / serving.MODELS["float32"], opset)
        if int8:
            with writing(out):
                quantise(
                    scratch / serving.MODELS["float32"],
                    scratch / serving.MODELS["int8"],
                    blocks=not vocabulary.reads_ids,
                )
        content = _content(manifest, vocabulary, loaded, opset)
        measured = _measure(scratch, loaded, vocabulary, content, answered, batch_tokens, streams is not None)
        measured |= {"streams": name, "tolerance": tolerance * max(1.0, measured["spread"])}
        _check(out, measured)
        content |= {"measured": measured, "files": {path.name: sha256(path) for path in scratch.iterdir()}}
        with writing(out):
            write_json(serving.described(plain(content)), scratch / serving.MANIFEST)
            (scratch / CARD).write_text(_card(content), encoding="utf-8")
            publish(scratch, out)
    return measured | {"seconds": time.perf_counter() - start}


# -- before work starts ------------------------------------------------------------------------------


def _serving() -> Any:
    """The names of an export's files. Raises ModelError where a package that exporting needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"exporting needs the package {package}; install it with: pip install llmrec-peft[train,export]"
            )
    return importlib.import_module("llmrec_peft.serving.export_manifest")


def _check_opset(opset: int) -> int:
    import onnx
    import onnxruntime

    if isinstance(opset, bool) or not isinstance(opset, int) or opset < OPSET or not _runs(opset):
        highest = next(number for number in range(onnx.defs.onnx_opset_version(), 0, -1) if _runs(number))
        raise ModelError(
            f"opset must be from {OPSET}, the least that torch writes, to {highest}, the highest that onnxruntime "
            f"{onnxruntime.__version__} runs; got {opset!r}"
        )
    return opset


def _runs(opset: int) -> bool:
    """Whether the installed ONNX Runtime takes graphs of an opset."""
    import onnxruntime
    from onnx import TensorProto, defs, helper

    if opset > defs.onnx_opset_version():
        return False
    a, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab")
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "try", [a], [b])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # the library's exceptions have no common base but this
        return False
    return True


def _check_output(out: Path, student: Path, serving: Any) -> Path:
    """Where an export may be written: a new or empty directory, or one that holds an export."""
    out = without_links(out)
    if out.exists() and (not out.is_dir() or out.samefile(student)):
        raise BundleError(f"{out} is {'the student itself' if out.is_dir() else 'a file'}; choose another directory")
    if out.exists() and any(out.iterdir()) and not (out / serving.MANIFEST).is_file():
        raise BundleError(f"{out} exists and holds no export, so it is not replaced; choose another directory")
    return out


def _check_streams(streams: Streams, student: str | Path, manifest: Mapping[str, Any]) -> None:
    """Raise BundleError for streams that the student would read wrongly."""
    parent = streams.parent
    same = fits(parent.vocabulary.tokenizer, manifest["tokenizer"].get("fingerprint"))
    if not same or parent.domain.labels != manifest["labels"]:
        raise BundleError(
            f"streams of domain {parent.domain.name!r} with the labels {parent.domain.labels} were made "
            f"{'for another domain' if same else 'with another tokenizer'} than student {student} has, whose labels "
            f"are {manifest['labels']}; build them by the student's domain and tokenizer"
        )


# -- the graph ---------------------------------------------------------------------------------------


class _Graph(nn.Module):
    """From tokens [B, L] to logits [T, C]; the mask is made inside, of `segment`."""

    def __init__(self, classifier: BehaviorClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, segment: torch.Tensor, markers: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.classifier.hidden_states(input_ids, position_ids, markers, segment=segment)
        return self.classifier.head(hidden.float())


def _write_graph(classifier: BehaviorClassifier, path: Path, opset: int) -> None:
    from llmrec_peft.serving.onnx_graph import INPUTS, OUTPUT

    # Sizes that are all different, so that the exporter takes none of them for another or for a constant.
    rows, length = 2, 7
    ids = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length).expand(rows, -1).contiguous()
    segment = torch.tensor([[0, 0, 0, 0, 0, 1, 2]] * rows)
    markers = torch.tensor([3, 5, 6, 13])
    batch, tokens, answers = (torch.export.Dim(name) for name in ("batch", "length", "answers"))
    shapes = [{0: batch, 1: tokens}] * 3 + [{0: answers}]
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Graph(classifier).eval(), (ids, positions, segment, markers), dynamo=True, opset_version=opset,
            input_names=list(INPUTS), output_names=[OUTPUT], dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
        program.save(str(path), external_data=False)
    _forget_where(path)


def _forget_where(path: Path) -> None:
    """Take out the exporter's notes: stack traces with this machine's paths, which are larger than a small model.

    The shapes between nodes go too; onnxruntime infers them, and its quantiser stumbles over those of what it changes.
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    onnx.save(model, str(path))


_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "root", "onnxruntime.quantization.matmul_nbits_quantizer")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes: on optional packages, on axes' names, on its own deprecated calls."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# -- int8 --------------------------------------------------------------------------------------------


BLOCK = 32
"""Weights of a column that share a scale, in a student of texts."""


def quantise(source: Path, target: Path, *, blocks: bool) -> None:
    """Write a graph with weights of 8 bits; the embedding has a scale a token, and the head stays float32.

    blocks: products have a scale for each block of weights and of activations, else one a column of weights and one a
        tensor of activations. The latter is faster in a small model, and useless in an LLM's layers: a few activations
        of their first token are hundreds of times those of all others, which one scale rounds to nothing.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(str(source))
    head = [node.name for node in model.graph.node if "logits" in node.output]
    with _quiet():
        if blocks:
            # Level 4: activations in 8 bits too, where the processor has a kernel for it.
            made = MatMulNBitsQuantizer(
                model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4, nodes_to_exclude=head
            )
            made.process()
            model = made.model.model
        else:
            # Unsigned: processors without VNNI add pairs of signed products in 16 bits, which would overflow.
            quantize_dynamic(
                model, str(target), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                weight_type=QuantType.QUInt8, nodes_to_exclude=head, extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
            model = onnx.load(str(target))
    _quantise_embedding(model)
    onnx.save(model, str(target))


def _quantise_embedding(model: Any) -> None:
    """Put the table that the input ids look rows up in into int8, each row by its own largest value, in place."""
    from onnx import helper, numpy_helper

    graph = model.graph
    tables = {tensor.name: tensor for tensor in graph.initializer}
    found = [
        (place, node)
        for place, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] == "input_ids"
    ]
    if len(found) != 1:
        return
    ((place, node),) = found
    table, output = tables[node.input[0]], node.output[0]
    if sum(table.name in other.input for other in graph.node) > 1:
        return  # another node reads it too, and would keep the floats beside the integers
    values = numpy_helper.to_array(table)
    scale = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float32).tiny * 127) / np.float32(127)
    parts = {"int8": np.rint(values / scale).astype(np.int8), "scale": scale.astype(np.float32)}
    graph.initializer.remove(table)
    graph.initializer.extend(numpy_helper.from_array(value, f"{table.name}_{key}") for key, value in parts.items())
    graph.node.remove(node)
    made = [
        helper.make_node("Gather", [f"{table.name}_{key}", "input_ids"], [f"{output}_{key}"], axis=0) for key in parts
    ]
    made += [
        helper.make_node("Cast", [f"{output}_int8"], [f"{output}_float"], to=1),
        helper.make_node("Mul", [f"{output}_float", f"{output}_scale"], [output]),
    ]
    for number, one in enumerate(made):
        graph.node.insert(place + number, one)


# -- answers -----------------------------------------------------------------------------------------


def _answered(streams: Streams | None, vocabulary: Vocabulary, loaded: Bundle) -> tuple[StreamRows, str]:
    """What both answer, and its name."""
    if streams is not None:
        return streams, f"{streams.parent.name} of {streams.parent.log.name}"
    if not vocabulary.reads_ids:
        return SyntheticStreams(vocabulary.domain, loaded.tokenizer), "samples"
    return IdSamples(vocabulary, loaded.tokenizer), "samples"


class IdSamples:
    """Streams of items drawn from the vocabulary of a student of item ids; labels are made up."""

    def __init__(self, vocabulary: Vocabulary, tokenizer: Any, count: int = 8, seed: int = 0) -> None:
        from llmrec_peft.data.layout import StreamBuilder

        rng = np.random.default_rng(seed)
        fixed = {*tokenizer.all_special_ids, *(int(token) for word in vocabulary.outcomes for token in word)}
        items = np.setdiff1d(np.arange(len(tokenizer)), list(fixed))
        stream = vocabulary.domain.stream
        self._streams: list[Stream] = []
        for _ in range(count):
            build = StreamBuilder([vocabulary.prefix])
            markers = []
            room = (stream.max_length - build.length) // 2 - 1
            for _ in range(max(1, min(stream.context + stream.targets, room, 40))):
                markers.append(build.prefix(rng.choice(items, 1).astype(np.int32), vocabulary.marker))
                build.prefix(vocabulary.outcomes[rng.integers(len(vocabulary.outcomes))])
            markers += [build.candidate(rng.choice(items, 1).astype(np.int32), vocabulary.marker) for _ in range(4)]
            ids, positions, segment = build.arrays()
            numbers = np.arange(len(markers)) + sum(len(made.markers) for made in self._streams)
            labels = np.arange(len(markers)) % len(vocabulary.outcomes)
            self._streams.append(Stream(ids, positions, segment, np.array(markers), labels, numbers, numbers))
        self.lengths = np.array([len(made) for made in self._streams])

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, number: int) -> Stream:
        return self._streams[number]


def _measure(
    scratch: Path,
    loaded: Bundle,
    vocabulary: Vocabulary,
    content: Mapping[str, Any],
    streams: Any,
    batch_tokens: int,
    labelled: bool,
) -> dict[str, Any]:
    """Differences of each graph's logits from torch's, their AUC where labels are real, and tokens of texts."""
    from llmrec_peft.serving.export_manifest import MODELS, TOKENIZER
    from llmrec_peft.serving.onnx_graph import Graph
    from llmrec_peft.serving.plain_vocabulary import Words

    _check_tokens(vocabulary, Words(content, scratch / TOKENIZER))
    collator = StreamCollator(loaded.tokenizer.pad_token_id, batch_tokens)
    torchs = predict(loaded.classifier, streams, collator, batch_tokens=batch_tokens)
    rows = [streams[number] for number in range(len(streams))]
    order = np.argsort(np.concatenate([row.targets for row in rows]), kind="stable")
    calibration = Calibration.from_dict(loaded.calibration)

    def auc(logits: np.ndarray) -> float | None:
        return _auc(torchs, calibration.apply(logits)) if labelled else None

    measured: dict[str, Any] = {
        "answers": len(torchs.logits), "spread": float(torchs.logits.std()), "auc": auc(torchs.logits)
    }  # fmt: skip
    for precision, file in MODELS.items():
        path = scratch / file
        if path.is_file():
            found = Graph(path, loaded.tokenizer.pad_token_id).answers(rows, batch_tokens)[order]
            difference = np.abs(found.astype(np.float64) - torchs.logits)
            measured[precision] = {
                "max_difference": float(difference.max()),
                "mean_difference": float(difference.mean()),
                "mean_probability": float(np.abs(_softmax(found) - _softmax(torchs.logits)).mean()),
                "auc": auc(found),
                "bytes": path.stat().st_size,
            }
    return measured


def _auc(answers: Predictions, probabilities: np.ndarray) -> float | None:
    """AUC of the labelled answers; None where they have one label."""
    known = answers.labels >= 0
    if len(np.unique(answers.labels[known])) < 2:
        return None
    value = compute_metrics(answers.labels[known], probabilities[known], names=["auc"])["auc"]
    return float(value) if np.isfinite(value) else None


def _softmax(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return values / values.sum(1, keepdims=True)


_TEXTS = (
    "a", "Toy Story (Animation, Children)",
    "Wool socks, 2 pairs; size 43-46 at 12.50", "日本語の映画 Кино 🎬 café\u0301",
    "x -> yes", "ｘ　－＞ fi ½ ﬁ", "don't  stop   I'm you'll",
)  # fmt: skip
"""Of several scripts, with numbers, spaces and other spellings of signs."""


def _check_tokens(vocabulary: Vocabulary, words: Any) -> None:
    """Raise ModelError where the scorer would tokenise a text otherwise than training did."""
    if vocabulary.reads_ids:
        known = sorted(vocabulary.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        texts = [text for text, token in known if token not in vocabulary.tokenizer.all_special_ids][:1000]
    else:
        literals = [*vocabulary.domain.outcomes.values(), vocabulary.domain.header, vocabulary.domain.event]
        texts = [*_TEXTS, *literals]
    flat, offsets = vocabulary.tokens(texts)
    for number, found in enumerate(words.tokens(texts)):
        said = flat[offsets[number] : offsets[number + 1]]
        if not np.array_equal(found, said):
            raise ModelError(
                f"the student's tokenizer makes {said.tolist()[:8]} of {texts[number]!r}, and its exported file "
                f"{found.tolist()[:8]}; use a fast tokenizer of the tokenizers library"
            )


def _check(out: Path, measured: Mapping[str, Any]) -> None:
    found = measured["float32"]
    if not found["max_difference"] <= measured["tolerance"]:
        raise BundleError(
            f"export {out} answers otherwise than torch: logits differ by {found['max_difference']:.3g} at most and "
            f"{found['mean_difference']:.3g} in the mean, over the tolerance {measured['tolerance']:.3g}, so it was "
            "not kept; set a higher tolerance, or another opset"
        )


# -- what is written ---------------------------------------------------------------------------------


def _content(manifest: Mapping[str, Any], vocabulary: Vocabulary, loaded: Bundle, opset: int) -> dict[str, Any]:
    """Entries of serving.json but those that follow from the files."""
    domain, tokenizer = vocabulary.domain, loaded.tokenizer
    return {
        "source": {"base": manifest["base"].get("name"), "weights": manifest["weights"], "seal": manifest["seal"]},
        "domain": plain(domain.to_dict()),
        "labels": manifest["labels"],
        "calibration": manifest["calibration"],
        "window": {
            "events": domain.stream.context + domain.stream.targets - 1,
            "stride": max(1, domain.stream.targets // 3),
            "max_length": domain.stream.max_length,
        },
        "tokens": {
            **{name: getattr(vocabulary, name).tolist() for name in ("prefix", "suffix", "marker")},
            "outcomes": [ids.tolist() for ids in vocabulary.outcomes],
            "pad": tokenizer.pad_token_id,
            "reserved": vocabulary.reserved.tolist(),
            "unknown_item": tokenizer.unk_token_id if vocabulary.reads_ids else None,
        },
        "forbidden": vocabulary.forbidden,
        "opset": opset,
        "max_positions": getattr(loaded.classifier.config.get_text_config(), "max_position_embeddings", None),
        "counts": manifest["counts"],
        "metrics": manifest["metrics"],
        "versions": installed(*_PACKAGES),
    }


def _card(content: Mapping[str, Any]) -> str:
    """README.md of an export. Other people's text stands in it only as Python spells it, inside code marks."""
    measured = content["measured"]
    rows = [
        f"| {precision} | {found['bytes'] / 1e6:.2f} | {found['max_difference']:.2g} | {found['mean_difference']:.2g} |"
        f" {found['mean_probability']:.2g} | {_told(found['auc'])} |"
        for precision, found in ((name, measured.get(name)) for name in ("float32", "int8"))
        if found
    ]
    metrics = [
        f"| {split} | {', '.join(f'{key} {value:.4f}' for key, value in values.items() if isinstance(value, float))} |"
        for split, values in content["metrics"].items()
        if split in ("valid", "test") and isinstance(values, Mapping)
    ]
    labels = ", ".join(_code(label) for label in content["labels"])
    lines = [
        "---", "library_name: onnx", "pipeline_tag: text-classification",
        "tags: [llmrec_peft, recommendation, onnx]", "---", "",
        f"# {_code(content['domain']['name'])}: behaviour classifier, exported to ONNX", "",
        f"It reads what a user did, in order, and answers which of {labels} comes next. Opset {content['opset']}; "
        "batch, length and number of answers are free.", "", "## Use", "", "```python",
        "from llmrec_peft.serving import OnnxScorer", "", 'scorer = OnnxScorer.load("DIRECTORY", items="items.csv")',
        "print(scorer.labels, scorer.score([], [\"ITEM\"]))", "```", "",
        "`pip install llmrec-peft[serve]`, or `[serve-text]` where items are texts; torch is not needed. The graph "
        "alone gives logits that are not calibrated: temperature and biases are in `serving.json`.", "",
        "## Compared with torch", "",
        f"{measured['answers']} answers on {_code(measured['streams'])}; their standard deviation is "
        f"{measured['spread']:.3g}. float32 passes up to {measured['tolerance']:.2g}. AUC of torch: "
        f"{_told(measured['auc'])}.", "",
        "| precision | MB | largest difference of a logit | mean difference | mean difference of a probability | AUC |",
        "| --- | --- | --- | --- | --- | --- |", *rows, "",
    ]  # fmt: skip
    if metrics:
        lines += ["## Metrics", "", "Of the student in torch, before the export.", "", "| split | |", "| --- | --- |"]
        lines += [*metrics, ""]
    written = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join([*lines, f"Written with {written}.", ""])


def _told(auc: float | None) -> str:
    return "not measured" if auc is None else f"{auc:.4f}"


def _code(value: Any) -> str:
    """A value in code marks, as Python spells it."""
    text = repr(str(value)).replace("|", r"\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * (longest + 1)
    return f"{marks}{text}{marks}"
