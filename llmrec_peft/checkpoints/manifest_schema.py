"""The manifests of trained directories: which file, which format versions, which entries. Nothing here needs torch.

An adapter bundle, a merged model, a student, an ONNX export and a retrieval index each have a manifest, a JSON file
beside the weights. Entries that several kinds share are described once, in `_COMMON` and `_STREAMED`. A student is a
merged model with the entry `student`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmrec_peft.checkpoints.value_schema import Real, Whole

MANIFEST = "behavior.json"
"""The manifest of a bundle, of a merged model and of a student."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The other files of a bundle; PEFT's names."""
FILES = (CONFIG, WEIGHTS, MANIFEST)
"""All files of a bundle."""
MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
"""Files of a merged model and of a student; Transformers' names."""
SERVING_MANIFEST, TOKENIZER = "serving.json", "tokenizer.json"
"""The manifest and the tokenizer of an ONNX export."""
GRAPHS = {"float32": "model.onnx", "int8": "model.int8.onnx"}
"""From a precision to the file of its ONNX graph; int8 may be left out."""
INDEX_MANIFEST, INDEX_ARRAYS = "index.json", "index.safetensors"
"""The two files of a retrieval index."""


@dataclass(frozen=True)
class ManifestKind:
    """One kind of manifest.

    Attributes:
        name: name of the kind, for messages.
        file: name of the manifest.
        fields: schema of its entries (`value_schema`).
        kind: value of the entry `kind`; None where there is no such entry.
        version: format version that is written; 1 to this one are read.
        checksum_from: first format version whose manifests hold their own checksum; None where no version does.
        made_by: the directory to name instead of a wrong one, for messages.
        restore: how to repair a damaged manifest, for messages.
        again: how to make another one, for messages.
    """

    name: str
    file: str
    fields: dict[str, Any]
    made_by: str
    restore: str
    again: str
    kind: str | None = None
    version: int = 1
    checksum_from: int | None = 1


_COMMON: dict[str, Any] = {
    "domain": dict,
    "labels": [str],
    "calibration": (dict, None),
    "metrics": dict,
    "versions": {str: str},
}
"""Entries of every directory that predicts labels."""
_STREAMED: dict[str, Any] = {**_COMMON, "words": [str], "stream": dict, "tokenizer": {"fingerprint": str}}
"""Entries of bundles, merged models and students."""
_RATIO = Real(-1e300, 1e300)
_TOKEN = Whole(0, 2**31 - 1)

ADAPTER = ManifestKind(
    name="bundle",
    file=MANIFEST,
    version=2,
    checksum_from=2,
    made_by="the directory `bundle` that a training run left",
    restore="restore the file that training wrote",
    again="train again",
    fields={
        **_STREAMED,
        "method": str,
        "method_options": dict,
        "model_options": {"base": str, "dtype": str},
        "base": {"name": str, "source?": (str, None), "fingerprint": str},
        "counts": {"split?": (dict, None)},
        "files": {CONFIG: str, WEIGHTS: str},
        "seal?": str,
    },
)
"""A bundle: an adapter, or all weights, that training left. Format 1 had no checksum; it is read with a warning."""

MERGED = ManifestKind(
    name="merged model",
    file=MANIFEST,
    kind="merged",
    made_by="the directory that merging wrote",
    restore="restore the file that merging wrote, or merge again",
    again="merge again",
    fields={
        **_STREAMED,
        "merged_from": [{"name?": (str, None), "method": str, "weights_sha256": str, "weight": _RATIO}],
        "combination": (dict, None),
        "base": {"name": (str, None)},
        "dtype": ("float32", "bfloat16", "float16"),
        "weights": {"fingerprint": str},
        "counts": {"split?": ({"boundaries?": ([_RATIO], None)}, None)},
        "metrics": {"test?": (dict, None)},
        "measured": {str: (str, _RATIO, None)},
        "files": {MODEL_CONFIG: str},
        "attn?": ("sdpa", "eager"),
        "student?": {"options": dict, "loss": dict, "teacher": (dict, None)},
        "seal": str,
    },
)
"""A merged model or a student: a stock sequence classifier."""

EXPORT = ManifestKind(
    name="export",
    file=SERVING_MANIFEST,
    kind="onnx",
    made_by="the directory that export_onnx wrote",
    restore="restore the file that the export wrote, or export again",
    again="export again",
    fields={
        **_COMMON,
        "source": dict,
        "domain": {"name": str, "event": str, "header": str, "outcomes": {str: str},
                   "stream": {"history_labels?": ([str], None)}},
        "window": {"events": Whole(0, 10**6), "stride": Whole(1, 10**6), "max_length": Whole(1, 10**9)},
        "tokens": {
            "prefix": [_TOKEN], "suffix": [_TOKEN], "marker": [_TOKEN], "outcomes": [[_TOKEN]], "pad": _TOKEN,
            "reserved": [_TOKEN], "unknown_item": (_TOKEN, None),
        },
        "forbidden": [str],
        "opset": Whole(1, 1000),
        "max_positions": (Whole(1, 10**9), None),
        "files": {TOKENIZER: str, GRAPHS["float32"]: str},
        "measured": dict,
        "counts": dict,
        "seal": str,
    },
)  # fmt: skip
"""A student exported to ONNX."""

INDEX = ManifestKind(
    name="retrieval index",
    file=INDEX_MANIFEST,
    checksum_from=None,
    made_by="the directory that RetrievalIndex.save wrote",
    restore="restore the file or fit again",
    again="fit again",
    fields={
        "models": {str: {str: (Real(-1e12, 1e12), str, None)}},
        "fitted": dict,
        "fusion": (dict, None),
        "adapter_sha256": (str, None),
        "files": {INDEX_ARRAYS: str},
    },
)
"""Collaborative models of a log. The header of the arrays' file holds the checksum of this manifest."""
FORMER_INDEX = dataclasses.replace(
    INDEX, file="evidence.json", fields=INDEX.fields | {"files": {"evidence.safetensors": str}}
)
"""The same by the file names of version 0.1.0."""
