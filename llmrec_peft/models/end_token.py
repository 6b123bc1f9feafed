"""The end token that some tokenizers add behind a text. For decoders nothing may follow the marker.

A stock classifier pools the last token that is not the pad token. Tokenizers such as Qwen3-Embedding's add an end
token, so the head would read that token and not the marker. `leave_end_token_out` changes such a tokenizer, and every
saved copy of it is changed too. Encoders keep their tokens: they pool [CLS], and were trained with [SEP].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec_peft.data.vocabulary import special_tokens_around
from llmrec_peft.errors import BundleError, StreamError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def has_end_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds tokens behind a text."""
    try:
        return len(special_tokens_around(tokenizer)[1]) > 0
    except StreamError:  # reported when a domain is used with the tokenizer
        return False


def leave_end_token_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change a tokenizer so that it adds nothing behind a text, if its kind allows it; `has_end_token` tells.

    `tokenizer.replaced_post_processor` is then the former part of its file, for `fingerprints.fits`, or None.
    """
    tokenizer.replaced_post_processor = None
    if getattr(tokenizer, "_add_eos_token", False):
        object.__setattr__(tokenizer, "_add_eos_token", False)  # the public setter makes a new post-processor
    if getattr(tokenizer, "add_eos_token", False):  # tokenizers in Python
        tokenizer.add_eos_token = False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    processor = getattr(backend, "post_processor", None)
    if backend is None or processor is None:
        return
    found = json.loads(processor.__getstate__())
    changed = _without_end(found)
    if changed != found:
        from tokenizers.processors import Sequence, TemplateProcessing

        new = Sequence([]) if changed["type"] == "Sequence" else TemplateProcessing("$A", "$A $B", [])
        new.__setstate__(json.dumps(changed).encode())
        backend.post_processor = new
        tokenizer.replaced_post_processor = found


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, *, trust_remote_code: bool = False) -> None:
    """Write a tokenizer so that it loads as it is now, without the end token that `leave_end_token_out` removed.

    Raises BundleError if the saved tokenizer adds an end token again.
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
    """A post-processor in the JSON of its file, without the tokens behind the last text."""
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


def tokens_around(tokenizer: PreTrainedTokenizerBase, *, encoder: bool) -> dict[str, list[int]]:
    """Token ids before and behind a prompt, as manifests store them: `prefix`, and `suffix` (none for decoders)."""
    prefix, suffix = special_tokens_around(tokenizer)
    return {"prefix": prefix.tolist(), "suffix": suffix.tolist() if encoder else []}
