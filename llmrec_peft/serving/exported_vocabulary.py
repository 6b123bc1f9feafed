"""Tokens of an exported student's texts, the same as those of `data.vocabulary.Vocabulary`, without Transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmrec_peft.checkpoints.value_schema import Whole, check_schema
from llmrec_peft.documents import read_mapping
from llmrec_peft.errors import BundleError, DataError, ModelError, one_line
from llmrec_peft.messages import quoted

AT_ONCE = 4096
"""Texts that are tokenised together."""
_TOKEN = Whole(0, 2**31 - 1)
_TOKENIZER = {
    "model": dict, "normalizer": (dict, None), "pre_tokenizer": (dict, None),
    "added_tokens": [{"content": str, "id": _TOKEN}],
}  # fmt: skip
_WHOLE_TEXTS = {"vocab": {str: _TOKEN}, "unk_token?": (str, None)}


class Encoder(Protocol):
    """Turns texts into token ids, without special tokens around them."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


class ExportedVocabulary:
    """A domain's fixed tokens and its tokenizer: an `EventVocabulary`.

    Attributes:
        prefix, suffix: int32 tokens around one text (BOS).
        marker: int32 tokens of the marker; empty where the label is read at the item's own token.
        outcomes: int32 tokens of each label's word, in class order.
        pad: token that fills rows up.
        forbidden: texts that data may not spell.
        reads_ids: whether each item is one token; a text without a token is then an error.
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

    def tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of events or headers, flat int32, and their offsets int64 [texts + 1].

        A tokenizer that normalises texts can bring a marker or a special token out of another spelling, such as a
        full-width arrow. Such tokens are removed.

        Raises:
            DataError: an item without a token, where items are tokens.
        """
        rows = self._encoder.encode(texts)
        if self.reads_ids:
            unknown = [text for text, row in zip(texts, rows, strict=True) if self._unknown in row]
            if unknown:
                raise DataError(
                    f"{quoted(unknown[0])} is unknown to this model of item ids ({len(unknown)} such): the catalogue "
                    "has grown since it was trained; distil it again with the new item table, and export it"
                )
        else:
            rows = [self._clean(row) for row in rows]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(rows), np.int32, offsets[-1]), offsets

    def _clean(self, ids: list[int]) -> list[int]:
        """Tokens of one text without reserved tokens and runs that spell the marker."""
        marker, width = self.marker.tolist(), len(self.marker)
        left: list[int] = []
        for token in ids:
            if token in self._reserved:
                continue
            left.append(token)
            # Removing one marker can bring another together.
            if left[-width:] == marker:
                del left[-width:]
        return left


def read_encoder(path: Path) -> Encoder:
    """The tokenizer of a tokenizer.json. One of whole texts is read here, any other by the package tokenizers.

    Raises:
        BundleError: the file is not a tokenizer.
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
    except BaseException as error:  # Rust raises a plain Exception, or a panic, which is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BundleError(f"{path} is not a tokenizer that loads ({one_line(error)}); {again}") from None


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
