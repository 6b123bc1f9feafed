"""Fingerprints of a base and of its tokenizer, which tie a bundle to what it was trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec_peft.documents import parse_json, read_mapping
from llmrec_peft.errors import LLMRecError, ModelError
from llmrec_peft.files import write_json
from llmrec_peft.messages import shortened
from llmrec_peft.models.model_files import cache_dir
from llmrec_peft.models.tensor_files import TensorEntry, fingerprint

CACHED_ABOVE = 64 * 1024**2
"""Fingerprints of checkpoints of more bytes than this are kept in `cache_dir()`/fingerprints.json."""
_CACHED = 1000  # entries kept there

# What says how a checkpoint is named, stored, labelled, padded or run, and not what its backbone computes.
_NOT_COMPUTED = frozenset(
    (
        "_name_or_path", "name_or_path", "architectures", "transformers_version", "auto_map", "dtype", "torch_dtype",
        "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "pad_token_id", "use_cache",
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "quantization_config",
        "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict", "initializer_range",
    )
)  # fmt: skip


def fingerprint_of(entries: dict[str, TensorEntry], config: Any) -> str:
    """SHA-256 over a backbone's weights and what its configuration computes; see `base.base_fingerprint`."""
    weights = _cached_fingerprint(entries)
    text = json.dumps([weights, config_content(config)], sort_keys=True, default=str)
    return ("sampled-" if weights.startswith("sampled-") else "") + hashlib.sha256(text.encode()).hexdigest()


def short(value: Any) -> str:
    """A fingerprint's first characters, for a message."""
    return f"{shortened(str(value).removeprefix('sampled-')[:16])}..."


def config_content(config: Any) -> dict[str, Any]:
    """What a configuration says about the backbone's computation: rotary base, activation, epsilon, heads, windows.

    Values that its class has by default are left out, so that a new default key of another Transformers version leaves
    the fingerprint as it is.
    """
    try:
        defaults = type(config)().to_dict()
    except Exception:  # a class from a base's own code may need arguments; then nothing counts as a default
        defaults = {}
    return _computed(config.to_diff_dict(), defaults)


def _computed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    content = {}
    for key, value in values.items():
        if key in _NOT_COMPUTED or (key in defaults and value == defaults[key] and key != "model_type"):
            continue
        content[str(key)] = _computed(value, {}) if isinstance(value, Mapping) else value
    return content


def _cached_fingerprint(entries: dict[str, TensorEntry]) -> str:
    """`tensors.fingerprint`, paid once for a large checkpoint."""
    if sum(entry.end - entry.begin for entry in entries.values()) <= CACHED_ABOVE:
        return fingerprint(entries)
    files = sorted({Path(os.path.realpath(entry.file)) for entry in entries.values()})
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([stats, sorted(entries)]).encode()).hexdigest()
    path = cache_dir() / "fingerprints.json"
    known = _read_cache(path)
    if key not in known:
        known[key] = fingerprint(entries)
        _write_cache(path, dict(list(known.items())[-_CACHED:]))
    return known[key]


def _read_cache(path: Path) -> dict[str, str]:
    try:
        known = read_mapping(path)
    except LLMRecError:
        return {}
    return known if all(isinstance(value, str) for value in known.values()) else {}


def _write_cache(path: Path, known: Mapping[str, str]) -> None:
    """Write the cache into place; where that cannot be, the weights are read again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, path)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over what decides a text's token ids: vocabulary, merges, normaliser, splitting, the tokens that are put
    around a text, special tokens, and the flags of added ones.

    The pad token is left out: it never reaches an answer, and `load_tokenizer` may have chosen it.
    """
    return _tokenizer_digest(tokenizer, None)


def fits(tokenizer: Any, said: Any) -> bool:
    """Whether a fingerprint is this tokenizer's, or was before `load_tokenizer` took its end token away.

    Bundles of earlier versions hold the latter, and so do those that were saved with the base's tokenizer as it is.
    """
    before = getattr(tokenizer, "replaced_post_processor", None)
    return said == tokenizer_fingerprint(tokenizer) or (
        before is not None and said == _tokenizer_digest(tokenizer, before)
    )


def _tokenizer_digest(tokenizer: Any, post_processor: Any) -> str:
    """`post_processor` stands for the tokenizer's own unless it is None."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    special.pop("additional_special_tokens", None)
    content: dict[str, Any] = {"special": special, "vocabulary": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = parse_json(backend.to_str(), "the tokenizer", error=ModelError)
        content |= {part: parts.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")}
        if post_processor is not None:
            content["post_processor"] = post_processor
        content["model"] = {key: value for key, value in parts["model"].items() if key != "vocab"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
