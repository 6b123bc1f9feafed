"""Checks of a merged model's files before a model or a tokenizer is built from them.

All checksums may be right: whoever edits a file can compute them again. So the configuration may name no other weights
and build no more than the headers of the weights hold, and the rules of the tokenizer have bounds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from llmrec_peft.checkpoints.checksum import check_file
from llmrec_peft.checkpoints.directory_checks import check_links, read_json, stray_weights
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import MANIFEST, MERGED, MODEL_CONFIG, MODEL_INDEX, MODEL_WEIGHTS
from llmrec_peft.errors import BundleError, ModelError, input_errors
from llmrec_peft.messages import shortened
from llmrec_peft.models.base import load_tokenizer
from llmrec_peft.models.fingerprints import fingerprint, fits, short, tokenizer_fingerprint
from llmrec_peft.models.safetensors_header import TensorEntry, read_headers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_COUNT = 100_000
"""Layers or labels that a config.json gives, at most; lists are made of them before any weight is looked at."""
MAX_RULES, MAX_RULE, MAX_GROWTH = 50, 1_000, 10_000
"""Limits of a tokenizer's normalizer, pre-tokenizer and decoder: rules, characters in a rule, growth of a character.

Llama 3 has one pattern of 150 characters, DeepSeek five; `Replace` puts one to three characters in most tokenizers.
"""
_FORMATS = ("F32", "BF16", "F16")
_ELSEWHERE = ("transformers_weights", "quantization_config", "compression_config")
_COMPILED = "precompiled_charsmap"  # SentencePiece's table of characters, 300,000 characters long


def check_merged(
    directory: str | Path, trust_remote_code: bool = False
) -> tuple[dict[str, Any], list[Path], PreTrainedTokenizerBase]:
    """Check a merged model's files against each other; returns its manifest, its weights' files and its tokenizer.

    No model is made. Raises BundleError as `load_trained` does.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a directory; name the one that merging wrote")
    with reading_merged(directory):
        check_links(directory, "merged model")
        manifest = read_manifest(directory, MERGED)
        shards = _check_files(directory, manifest)
        check_config(directory / MODEL_CONFIG)
        check_tokenizer(directory)
        return manifest, shards, _tokenizer(directory, manifest, trust_remote_code)


def reading_merged(directory: Path) -> AbstractContextManager[None]:
    return input_errors(BundleError, f"merged model {directory}", MERGED.restore)


def _check_files(directory: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Compare the files with the manifest, the weights by their fingerprint; returns the files of the weights."""
    shards = weights_files(directory)
    strange = stray_weights(directory, [path.name for path in shards])
    if strange:
        raise BundleError(f"merged model {directory} holds {strange[0]!r} beside its own weights; remove it")
    for name, stated in manifest["files"].items():
        if Path(name).name != name:
            raise BundleError(
                f"{directory / MANIFEST} names the file {name!r} outside of its directory; {MERGED.restore}"
            )
        check_file(directory / name, str(stated), MANIFEST, MERGED.restore)
    try:
        entries = read_headers(shards)
        check_formats(entries)
        found = fingerprint(entries)
    except ValueError as error:
        raise BundleError(f"merged model {directory}: {error}; copy it again or merge again") from None
    stated = manifest["weights"].get("fingerprint")
    if found != stated:
        raise BundleError(
            f"the weights of {directory} have the fingerprint {short(found)}, but {MANIFEST} says {short(stated)}; "
            "copy them again or merge again"
        )
    return shards


def weights_files(directory: Path) -> list[Path]:
    """Safetensors files of a merged model, by its index if it has one."""
    if not (directory / MODEL_INDEX).is_file():
        shards = [directory / MODEL_WEIGHTS]
    else:
        names = read_json(directory / MODEL_INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
            raise BundleError(f"{directory / MODEL_INDEX} has no map from tensors to files beside it; {MERGED.restore}")
        shards = [directory / name for name in sorted(set(names.values()))]
    for path in shards:
        if not path.is_file():
            raise BundleError(
                f"merged model {directory} has no {path.name}; copy the whole directory that merging wrote"
            )
    return shards


def _tokenizer(directory: Path, manifest: Mapping[str, Any], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = load_tokenizer(str(directory), trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise BundleError(f"merged model {directory} has no tokenizer that loads: {error}") from error
    found, stated = tokenizer_fingerprint(tokenizer), manifest["tokenizer"].get("fingerprint")
    if found != stated and fits(tokenizer, stated):
        raise BundleError(
            f"the tokenizer of merged model {directory} puts an end token behind every text, which stock classes read "
            "in place of the marker, so other programs give other predictions; merge again with this version"
        )
    if found != stated:
        raise BundleError(
            f"merged model {directory} was trained with a tokenizer of fingerprint {short(stated)}, but its files have "
            f"{short(found)}; {MERGED.restore}"
        )
    return tokenizer


# -- limits of what is built ---------------------------------------------------------------------------


def check_formats(entries: Mapping[str, TensorEntry]) -> None:
    """Raise ValueError for a tensor that is not of one of the number formats that merging writes."""
    for name, entry in entries.items():
        if entry.dtype not in _FORMATS:
            raise ValueError(f"tensor {shortened(name)!r} is of number format {entry.dtype}, not {', '.join(_FORMATS)}")


def check_config(path: Path) -> None:
    """Raise BundleError where a config.json names other weights, or counts that no model has."""
    waiting: list[Any] = [read_json(path)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += value.values()
        for key, part in value.items():
            if key in _ELSEWHERE and part is not None:
                raise BundleError(
                    f"{path} sets {key}, and a merged model's weights are whole in its own files; {MERGED.restore}"
                )
            counts = "layer" in key or "label" in key
            if counts and isinstance(part, int | float) and not abs(part) <= MAX_COUNT:
                raise BundleError(
                    f"{path} has {shortened(key)} {shortened(part)}, and {MAX_COUNT:,} are the most; {MERGED.restore}"
                )


@contextmanager
def no_more_than(entries: Mapping[str, TensorEntry]) -> Iterator[None]:
    """Inside, a model whose parameters are far more, or far larger, than a header's tensors is not built.

    Transformers makes all parameters on the meta device first, which takes time and no memory. They are counted there,
    with twice as many allowed, since tied ones stand once in a file. What passes has its shapes compared by
    `load_model`.

    Raises:
        ModelError: too many parameters, or too large ones.
    """
    most = 2 * len(entries) + 100
    held = sum(math.prod(entry.shape) for entry in entries.values())
    thread, seen, numbers = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal seen, numbers
        if parameter is None or parameter.device.type != "meta" or threading.get_ident() != thread:
            return
        seen, numbers = seen + 1, numbers + parameter.numel()
        if seen > most or numbers > 2 * held:
            raise ModelError(
                f"config.json makes more than its weights hold ({len(entries):,} tensors of {held:,} numbers); "
                f"{MERGED.restore}"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_tokenizer(directory: Path) -> None:
    """Raise BundleError where the rules of a tokenizer.json are too many, too long, or let a text grow too much.

    Patterns are not run, so a pattern that never ends is not detected.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    content = read_json(path)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        rules, growth, waiting = 0, 1, [content.get(part)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting += value
            elif isinstance(value, dict):
                rules += "type" in value
                growth *= 1 + len(value["content"]) if isinstance(value.get("content"), str) else 1
                waiting += [inner for key, inner in value.items() if key != _COMPILED]
            elif isinstance(value, str) and len(value) > MAX_RULE:
                raise BundleError(
                    f"{path} has {len(value):,} characters in a rule of its {part}, and {MAX_RULE:,} are the most; "
                    f"{MERGED.restore}"
                )
            if rules > MAX_RULES or growth > MAX_GROWTH:
                reason = f"more than {MAX_RULES} rules" if rules > MAX_RULES else "rules that blow texts up"
                raise BundleError(f"{path} has {reason} in its {part}; {MERGED.restore}")
