"""Tokens of an exported student's texts: the same as `data.vocabulary.Vocabulary` makes, without Transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmrec_peft.checkpoints.sealing import Whole, check_schema
from llmrec_peft.documents import read_mapping
from llmrec_peft.errors import BundleError, DataError, ModelError, one_line
from llmrec_peft.messages import quoted

AT_ONCE = 4096  # texts
_TOKEN = Whole(0, 2**31 - 1)
_TOKENIZER = {
    "model": dict, "normalizer": (dict, None), "pre_tokenizer": (dict, None),
    "added_tokens": [{"content": str, "id": _TOKEN}],
}  # fmt: skip
_WHOLE_TEXTS = {"vocab": {str: _TOKEN}, "unk_token?": (str, None)}


class Encoder(Protocol):
    """What turns texts into token ids, without any special token around them."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


class Words:
    """A domain's fixed tokens, and those of the texts that users give.

    Attributes:
        prefix, suffix: what stands around one text (BOS).
        marker: int32 tokens of the marker; none where the answer is read at the item's own token.
        outcomes: int32 tokens of each label's word, in class order.
        pad: token that fills rows up.
        forbidden: texts that data may not spell.
        reads_ids: whether each item is one token; texts that have none are refused then.
    """

    def __init__(self, manifest: Mapping[str, Any], tokenizer: Path) -> None:
        tokens = manifest["tokens"]
        self.prefix, self.suffix, self.marker = (
            np.array(tokens[name], np.int32) for name in ("prefix", "suffix", "marker")
        )
        self.outcomes = [np.array(ids, np.int32) for ids in tokens["outcomes"]]
        self.pad, self.reads_ids = int(tokens["pad"]), tokens["unknown_item"] is not None
        self.forbidden: list[str] = manifest["forbidden"]
        self._unknown, self._reserved = tokens["unknown_item"], frozenset(tokens["reserved"])
        self._encoder = read_encoder(tokenizer)

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of events or headers, int32, one array a text.

        A tokenizer that normalises texts can bring a marker or a special token out of another spelling, such as a
        full-width arrow. Such tokens are taken out here.

        Raises:
            DataError: an item that has no token, where items are tokens.
        """
        rows = self._encoder.encode(texts)
        if self.reads_ids:
            unknown = [text for text, row in zip(texts, rows, strict=True) if self._unknown in row]
            if unknown:
                raise DataError(
                    f"{quoted(unknown[0])} is unknown to this model of item ids ({len(unknown)} such): the catalogue "
                    "has grown since it was trained; distil it again with the new item table, and export it"
                )
            return [np.array(row, np.int32) for row in rows]
        return [self._clean(row) for row in rows]

    def _clean(self, ids: list[int]) -> np.ndarray:
        """Tokens of one text without reserved tokens and runs that spell the marker."""
        marker, width = self.marker.tolist(), len(self.marker)
        kept: list[int] = []
        for token in ids:
            if token in self._reserved:
                continue
            kept.append(token)
            # Taking one out can bring another together.
            if kept[-width:] == marker:
                del kept[-width:]
        return np.array(kept, np.int32)


def read_encoder(path: Path) -> Encoder:
    """The tokenizer of a tokenizer.json; one of whole texts is read here, any other by the package tokenizers.

    Raises:
        BundleError: not a tokenizer.
        ModelError: the package tokenizers is needed and not installed.
    """
    again = "export again"
    content = read_mapping(path, error=BundleError, advice=again)
    check_schema(content, _TOKENIZER, path, again)
    if content["model"].get("type") == "WordLevel" and not content["normalizer"] and not content["pre_tokenizer"]:
        check_schema(content["model"], _WHOLE_TEXTS, path, again, "model")
        return _WholeTexts(content)
    try:
        import tokenizers
    except ImportError:
        raise ModelError(
            f"{path} needs the package tokenizers; install it with: pip install llmrec-peft[serve-text]"
        ) from None
    try:
        return _Pieces(tokenizers.Tokenizer.from_file(str(path)))
    except BaseException as error:  # what goes wrong in Rust is a plain Exception, or a panic, which is none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BundleError(f"{path} is no tokenizer that loads ({one_line(error)}); {again}") from None


class _WholeTexts:
    """One token a text, by a look-up; a special token inside a text stands for itself."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._vocabulary: dict[str, int] = content["model"]["vocab"]
        unknown = content["model"].get("unk_token")
        self._unknown = self._vocabulary.get(unknown)
        added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        self._vocabulary = self._vocabulary | added
        longest = sorted(added, key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, longest)) + ")") if longest else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> list[int]:
        found = self._vocabulary.get(text)
        if found is not None:
            return [found]
        parts = [text] if self._added is None else self._added.split(text)
        ids = [self._vocabulary.get(part, self._unknown) for part in parts if part]
        return [token for token in ids if token is not None]


class _Pieces:
    """A tokenizer of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(texts), AT_ONCE):
            batch = self._tokenizer.encode_batch(list(texts[start : start + AT_ONCE]), add_special_tokens=False)
            found += [one.ids for one in batch]
        return found
