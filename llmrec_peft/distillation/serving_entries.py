"""The entries of serving.json, which the torch-free scorer reads beside the graph, and a check of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.manifest import installed
from llmrec_peft.checkpoints.manifest_schema import TOKENIZER
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import ModelError
from llmrec_peft.files import plain

_PACKAGES = ("llmrec_peft", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_TEXTS = (
    "a", "Toy Story (Animation, Children)",
    "Wool socks, 2 pairs; size 43-46 at 12.50", "日本語の映画 Кино 🎬 café\u0301",
    "x -> yes", "ｘ　－＞ fi ½ ﬁ", "don't  stop   I'm you'll",
)  # fmt: skip
"""Texts in several scripts, with numbers, spaces and compatibility forms of characters."""
_MOST_IDS = 1000
"""Item ids that are compared, at most."""


def serving_entries(manifest: Mapping[str, Any], vocabulary: Vocabulary, loaded: Bundle, opset: int) -> dict[str, Any]:
    """Entries of serving.json except those that follow from the files: `measured`, `files` and `seal`.

    Args:
        manifest: behavior.json of the student.
        vocabulary: tokens of its domain.
        loaded: the student.
        opset: opset of the graph.
    """
    domain, tokenizer = vocabulary.domain, loaded.tokenizer
    return {
        "source": {"base": manifest["base"].get("name"), "weights": manifest["weights"], "seal": manifest["seal"]},
        "domain": plain(domain.to_dict()),
        "labels": manifest["labels"],
        "calibration": manifest["calibration"],
        "window": {
            # As many events as training saw at most, and the step by which a full window moves on.
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


def check_tokens(vocabulary: Vocabulary, entries: Mapping[str, Any], directory: Path) -> None:
    """Raise ModelError where the scorer tokenises a text differently from training.

    Args:
        vocabulary: tokens of the student's domain, by Transformers' tokenizer.
        entries: contents of serving.json.
        directory: directory of the export, with its tokenizer.
    """
    from llmrec_peft.serving.exported_vocabulary import ExportedVocabulary

    if vocabulary.reads_ids:
        known = sorted(vocabulary.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        texts = [text for text, token in known if token not in vocabulary.tokenizer.all_special_ids][:_MOST_IDS]
    else:
        templates = [*vocabulary.domain.outcomes.values(), vocabulary.domain.header, vocabulary.domain.event]
        texts = [*_TEXTS, *templates]
    ours = _rows(*vocabulary.tokens(texts))
    exported = _rows(*ExportedVocabulary(entries, directory / TOKENIZER).tokens(texts))
    for text, expected, found in zip(texts, ours, exported, strict=True):
        if not np.array_equal(found, expected):
            raise ModelError(
                f"the student's tokenizer gives {expected.tolist()[:8]} for {text!r}, and its exported file "
                f"{found.tolist()[:8]}; use a fast tokenizer of the tokenizers library"
            )


def _rows(flat: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    """Tokens of each text, from all in one array and their offsets."""
    return np.split(flat, offsets[1:-1])
