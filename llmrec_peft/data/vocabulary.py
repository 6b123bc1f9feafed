"""A domain under one tokenizer: the fixed tokens of its streams, and the tokens of texts as plain data."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.rendering import render
from llmrec_peft.data.templates import template_literals
from llmrec_peft.errors import DataError, StreamError, input_errors
from llmrec_peft.messages import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN_ITEM = "<unknown item>"
"""Unknown token of tokenizers with one token for each item: a text without a token is refused."""


class Vocabulary:
    """A domain's fixed tokens under one tokenizer.

    Attributes:
        prefix, suffix: int32 tokens that the tokenizer puts around a text (BOS, or CLS and SEP).
        marker: int32 tokens of the marker.
        outcomes: int32 tokens of each label's word, in class order.
        forbidden: texts that a column's value must not contain.
        reserved: int64, sorted; special and added tokens that must not appear in the tokens of an item's text.

    Raises:
        StreamError: the marker or an outcome has no tokens, or two outcomes have the same. Where each item is one
            token, the marker may be empty: no item's text can then become an outcome.
    """

    def __init__(self, domain: Domain, tokenizer: PreTrainedTokenizerBase) -> None:
        self.domain = domain
        self.tokenizer = tokenizer
        self.prefix, self.suffix = special_tokens_around(tokenizer)
        flat, offsets = tokenise(tokenizer, [domain.marker, *domain.outcomes.values()])
        self.marker, *self.outcomes = [flat[offsets[i] : offsets[i + 1]] for i in range(len(offsets) - 1)]
        self.reads_ids = tokenizer.unk_token == UNKNOWN_ITEM
        if not len(self.marker) and not self.reads_ids:
            raise StreamError(f"marker {domain.marker!r} has no tokens in this tokenizer; choose a visible one")
        seen: dict[tuple[int, ...], str] = {}
        for label, ids in zip(domain.labels, self.outcomes, strict=True):
            key = tuple(ids.tolist())
            if not key or key in seen:
                rule = "has no tokens" if not key else f"has the same tokens as that of '{seen[key]}'"
                raise StreamError(f"outcome {domain.outcomes[label]!r} of '{label}' {rule}; choose another word")
            seen[key] = label
        known = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
        # Longest first: breaking up a short one must not hide a longer one that contains it.
        self.forbidden = domain.forbidden(sorted(known, key=lambda text: (-len(text), text)))
        literals = [part for text in (domain.event, domain.header) for part in template_literals(text)]
        spelled = tokenise(tokenizer, literals)[0]
        ids = np.array([*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids], np.int32)
        # A tokenizer may not know some texts; its unknown token stands for data and is allowed.
        self.reserved = np.setdiff1d(
            ids, [*spelled, *([] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id])]
        )

    def tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of events or headers, flat int32, and their offsets int64 [texts + 1].

        `neutralise` works on the text as written. A tokenizer that normalises texts can still produce a marker or a
        special token from another spelling, such as a full-width arrow. Such tokens are removed here.
        """
        flat, offsets = tokenise(self.tokenizer, texts)
        if self.reads_ids:
            return self._only_known(texts, flat), offsets
        bad = np.isin(flat, self.reserved)
        width = len(self.marker)
        if len(flat) >= width:
            runs = np.lib.stride_tricks.sliding_window_view(flat, width)
            starts = np.flatnonzero((runs == self.marker).all(1))
            owner = np.searchsorted(offsets, starts, "right")
            starts = starts[starts + width <= offsets[owner]]
            bad[starts[:, None] + np.arange(width)] = True
        if not bad.any():
            return flat, offsets
        # Removing one run can form another: each text is searched until none is left.
        rows = [flat[offsets[i] : offsets[i + 1]] for i in range(len(texts))]
        for i in np.unique(np.searchsorted(offsets, np.flatnonzero(bad), "right") - 1):
            rows[i] = self._without(rows[i])
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return np.concatenate(rows), offsets

    def _only_known(self, texts: list[str], flat: np.ndarray) -> np.ndarray:
        """Tokens of item ids, one each. Raises DataError for an id that the tokenizer does not know."""
        unknown = np.flatnonzero(flat == self.tokenizer.unk_token_id)
        if len(unknown):
            raise DataError(
                f"{quoted(texts[unknown[0]])} is unknown to this model of item ids ({len(unknown)} such): the "
                "catalogue has grown since it was trained; distil it again with the new item table"
            )
        return flat

    def _without(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of one text without reserved tokens and without runs equal to the marker."""
        ids, width, marker = ids[~np.isin(ids, self.reserved)], len(self.marker), self.marker.tolist()
        remaining: list[int] = []
        for token in ids.tolist():
            remaining.append(token)
            if remaining[-width:] == marker:
                del remaining[-width:]
        return np.array(remaining, np.int32)

    def events(self, columns: dict[str, pa.Array]) -> pa.Array:
        """Texts of events, neutralised, from their columns [rows]."""
        return render(self.domain.event, columns, self.forbidden)

    def headers(self, columns: dict[str, pa.Array], count: int) -> pa.Array:
        """Texts of headers [count], neutralised, from the users' columns."""
        if not columns:
            return pa.array([self.domain.header] * count, pa.large_string())
        return render(self.domain.header, columns, self.forbidden)


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens without any special token, flat int32, and their offsets int64 [texts + 1].

    Raises StreamError where the tokenizer fails.
    """
    if not texts:
        return np.empty(0, np.int32), np.zeros(1, np.int64)
    # The tokenizers library panics when a pattern of the tokenizer takes too long.
    with input_errors(StreamError, f"tokenizer {type(tokenizer).__name__}", "use tokenizer files that you trust"):
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                        verbose=False)["input_ids"]  # fmt: skip
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, offsets[-1]), offsets


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that the tokenizer adds before and after one text, each int32."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return np.array(whole[:start], np.int32), np.array(whole[start + len(plain) :], np.int32)
    raise StreamError(f"tokenizer {type(tokenizer).__name__} changes a text when it adds special tokens; use another")
