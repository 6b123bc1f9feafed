"""What a merged model's files are held to before a model or a tokenizer is built of them.

All digests may be right: whoever edits a file can seal it again. So the configuration may name no other weights, and
make no more than the weights' headers hold; the tokenizer's rules have bounds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from llmrec_peft.errors import BundleError, ModelError
from llmrec_peft.messages import shortened
from llmrec_peft.models.model_files import read_json
from llmrec_peft.models.tensor_files import TensorEntry

MAX_COUNT = 100_000
"""Layers or labels that a config.json gives, at most; lists are made of them before any weight is looked at."""
MAX_RULES, MAX_RULE, MAX_GROWTH = 50, 1_000, 10_000
"""Of a tokenizer's normalizer, pre-tokenizer and decoder: rules, characters of one, and what they make of a character.

Llama 3 has one pattern of 150 characters, DeepSeek five; `Replace` puts one to three characters in most tokenizers.
"""
_FORMATS = ("F32", "BF16", "F16")
_ELSEWHERE = ("transformers_weights", "quantization_config", "compression_config")
_RESTORE = "restore the file that merging wrote, or merge again"
_COMPILED = "precompiled_charsmap"  # SentencePiece's table of characters, 300,000 characters long


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
                    f"{path} sets {key}, and a merged model's weights are whole in its own files; {_RESTORE}"
                )
            counts = "layer" in key or "label" in key
            if counts and isinstance(part, int | float) and not abs(part) <= MAX_COUNT:
                raise BundleError(
                    f"{path} has {shortened(key)} {shortened(part)}, and {MAX_COUNT:,} are the most; {_RESTORE}"
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
                f"{_RESTORE}"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_tokenizer(directory: Path) -> None:
    """Raise BundleError where the rules of a tokenizer.json are too many, too long, or let a text grow too much.

    No pattern is tried: one that takes for ever passes.
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
                    f"{_RESTORE}"
                )
            if rules > MAX_RULES or growth > MAX_GROWTH:
                reason = f"more than {MAX_RULES} rules" if rules > MAX_RULES else "rules that blow texts up"
                raise BundleError(f"{path} has {reason} in its {part}; {_RESTORE}")
