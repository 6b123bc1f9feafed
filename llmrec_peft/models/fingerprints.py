"""Fingerprints of a base and of its tokenizer, which tie a bundle to what it was trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from llmrec_peft.documents import parse_json, read_mapping
from llmrec_peft.errors import LLMRecError, ModelError
from llmrec_peft.files import write_json
from llmrec_peft.messages import shortened
from llmrec_peft.models.cache_directory import cache_dir
from llmrec_peft.models.safetensors_header import TensorEntry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SAMPLED_ABOVE = 8 * 1024**3
"""Tensors of a checkpoint of more bytes than this are sampled for its fingerprint; smaller ones are hashed whole."""
_TENSOR_PIECES, _TENSOR_PIECE = 256, 4096  # 1 MiB of a tensor
_FILE_PIECES, _FILE_PIECE = 128, 256
_CHUNK = 16 * 1024**2
CACHED_ABOVE = 64 * 1024**2
"""Fingerprints of checkpoints of more bytes than this are cached in `cache_dir()`/fingerprints.json."""
_CACHED = 1000  # entries cached there, at most

# How a checkpoint is named, stored, labelled, padded or run: keys that do not change what its backbone computes.
_NOT_COMPUTED = frozenset(
    (
        "_name_or_path", "name_or_path", "architectures", "transformers_version", "auto_map", "dtype", "torch_dtype",
        "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "pad_token_id", "use_cache",
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "quantization_config",
        "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict", "initializer_range",
    )
)  # fmt: skip


def fingerprint(entries: dict[str, TensorEntry]) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes, in the order of the names; the same for any sharding.

    Above SAMPLED_ABOVE bytes in all, 1 MiB of each tensor is read in evenly spaced pieces, first and last bytes among
    them, and the fingerprint starts with "sampled-". A fine-tune moves nearly every weight and so shows; a change of a
    few rows may not.
    """
    digest = hashlib.sha256()
    maps: dict[Path, mmap.mmap] = {}
    total = sum(entry.end - entry.begin for entry in entries.values())
    sampled = total > SAMPLED_ABOVE
    try:
        with tqdm(total=total, desc="Reading the base", unit="B", unit_scale=True, disable=total < 4 * 1024**3) as bar:
            for name in sorted(entries):
                entry = entries[name]
                digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
                if entry.end > entry.begin and entry.file not in maps:
                    with entry.file.open("rb") as file:
                        maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                pieces = _TENSOR_PIECES if sampled else 0
                for begin, end in _pieces(entry.begin, entry.end, pieces, _TENSOR_PIECE):
                    for start in range(begin, end, _CHUNK):
                        digest.update(maps[entry.file][start : min(start + _CHUNK, end)])
                bar.update(entry.end - entry.begin)
    finally:
        for opened in maps.values():
            opened.close()
    return ("sampled-" if sampled else "") + digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file's size and evenly spaced pieces of it: names a converted copy in the cache."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for begin, end in _pieces(0, size, _FILE_PIECES, _FILE_PIECE):
            file.seek(begin)
            digest.update(file.read(end - begin))
    return digest.hexdigest()


def _pieces(begin: int, end: int, count: int, size: int) -> list[tuple[int, int]]:
    """`count` evenly spaced ranges of `size` bytes; the whole range if it is hardly longer, or if `count` is 0."""
    if count == 0 or end - begin < 2 * count * size:
        return [(begin, end)]
    room = end - begin - size
    starts = [begin + room * piece // (count - 1) for piece in range(count)]
    return [(start, start + size) for start in starts]


def fingerprint_of(entries: dict[str, TensorEntry], config: PreTrainedConfig) -> str:
    """SHA-256 over a backbone's weights and what its configuration computes; see `base_weights.base_fingerprint`."""
    weights = _cached_fingerprint(entries)
    text = json.dumps([weights, config_content(config)], sort_keys=True, default=str)
    return ("sampled-" if weights.startswith("sampled-") else "") + hashlib.sha256(text.encode()).hexdigest()


def short(value: Any) -> str:
    """A fingerprint's first characters, for a message."""
    return f"{shortened(str(value).removeprefix('sampled-')[:16])}..."


def config_content(config: PreTrainedConfig) -> dict[str, Any]:
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
    """`fingerprint`, computed once for a large checkpoint."""
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
    """Write the cache; if that fails, the weights are read again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, path)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides a text's token ids: vocabulary, merges, normaliser, splitting, the tokens that are put
    around a text, special tokens, and the flags of added ones.

    The pad token is left out: it never changes a prediction, and `load_tokenizer` may have chosen it.
    """
    return _tokenizer_digest(tokenizer, None)


def fits(tokenizer: PreTrainedTokenizerBase, stated: object) -> bool:
    """Whether a fingerprint is this tokenizer's, now or before `load_tokenizer` removed its end token.

    Bundles of earlier versions hold the latter, and so do bundles that were saved with the base's unchanged tokenizer.
    """
    before = getattr(tokenizer, "replaced_post_processor", None)
    return stated == tokenizer_fingerprint(tokenizer) or (
        before is not None and stated == _tokenizer_digest(tokenizer, before)
    )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase, post_processor: Any) -> str:
    """SHA-256 of a tokenizer; `post_processor` replaces its own unless it is None."""
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
