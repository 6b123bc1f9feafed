"""Tokens that a tokenizer puts around one text. For decoders nothing may follow the marker.

A stock classifier pools the last token that is not the pad token. Tokenizers such as Qwen3-Embedding's put an end token
there, so a text would be read at that token and not at its marker. Such a tokenizer is told to leave it out, and so is
every copy of it that is saved. Encoders keep theirs: their stock forward reads [CLS], and was trained with [SEP].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmrec_peft.data.vocabulary import special_tokens_around
from llmrec_peft.errors import BundleError, StreamError


def has_end_token(tokenizer: Any) -> bool:
    """Whether the tokenizer puts tokens behind a text."""
    try:
        return len(special_tokens_around(tokenizer)[1]) > 0
    except StreamError:  # said where a domain meets the tokenizer
        return False


def leave_end_token_out(tokenizer: Any) -> None:
    """Make a tokenizer put nothing behind a text, where its kind can be told so; `has_end_token` says if it was.

    `tokenizer.replaced_post_processor` is then the part of its file that did, for `fingerprints.fits`, or None.
    """
    tokenizer.replaced_post_processor = None
    if getattr(tokenizer, "_add_eos_token", False):
        object.__setattr__(tokenizer, "_add_eos_token", False)  # the public setter makes a new post-processor
    if getattr(tokenizer, "add_eos_token", False):  # tokenizers in Python
        tokenizer.add_eos_token = False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    processor = getattr(backend, "post_processor", None)
    if processor is None:
        return
    found = json.loads(processor.__getstate__())
    changed = _without_end(found)
    if changed != found:
        from tokenizers.processors import Sequence, TemplateProcessing

        new = Sequence([]) if changed["type"] == "Sequence" else TemplateProcessing("$A", "$A $B", [])
        new.__setstate__(json.dumps(changed).encode())
        backend.post_processor = new
        tokenizer.replaced_post_processor = found


def save_tokenizer(tokenizer: Any, directory: Path, *, trust_remote_code: bool = False) -> None:
    """Write a tokenizer such that it comes back as it is, without the end token that was taken from it.

    Raises BundleError where it comes back with one.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(directory)
    if not hasattr(tokenizer, "replaced_post_processor"):
        return

    def returns() -> bool:
        return has_end_token(AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code))

    path = directory / "tokenizer_config.json"
    if returns() and (directory / "tokenizer.json").is_file():
        # Classes such as T5Tokenizer make their own post-processor; the plain one goes by tokenizer.json alone.
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), "utf-8")
    if returns():
        raise BundleError(
            f"tokenizer {type(tokenizer).__name__} puts its end token behind every text again once it is saved, so "
            "stock classes would read that token and not the marker; serve the bundle in a Scorer or a DomainBank"
        )


def _without_end(processor: dict[str, Any]) -> dict[str, Any]:
    """A post-processor as its file spells it, without what it puts behind the last text."""
    kind = processor["type"]
    if kind == "Sequence":
        return {**processor, "processors": [_without_end(part) for part in processor["processors"]]}
    if kind == "TemplateProcessing":
        return {**processor, **{part: _up_to_text(processor[part]) for part in ("single", "pair")}}
    if kind in ("BertProcessing", "RobertaProcessing"):
        name, number = processor["cls"]
        start = {"SpecialToken": {"id": name, "type_id": 0}}
        texts = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
        return {
            "type": "TemplateProcessing",
            "single": [start, texts[0]],
            "pair": [start, *texts],
            "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
        }
    return processor


def _up_to_text(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((place for place, piece in enumerate(pieces) if "Sequence" in piece), default=len(pieces) - 1)
    return pieces[: last + 1]


def tokens_around(tokenizer: Any, *, encoder: bool) -> dict[str, list[int]]:
    """Token ids before a prompt and behind it, as model cards say them: `prefix`, `suffix` (none for decoders)."""
    prefix, suffix = special_tokens_around(tokenizer)
    return {"prefix": prefix.tolist(), "suffix": suffix.tolist() if encoder else []}
