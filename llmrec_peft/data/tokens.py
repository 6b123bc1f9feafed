"""Token sequences of many texts in one flat, memory-mapped array."""

import itertools
import tempfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from llmrec_peft.data.domain import Domain, render, template_literals
from llmrec_peft.data.tables import shorten
from llmrec_peft.errors import DataError, StreamError, input_errors, output_errors

CHUNK = 32_768  # texts that are Python objects at one time
UNKNOWN_ITEM = "<unknown item>"
"""Unknown token of tokenizers that have one token an item: texts that they do not have are refused."""


class TokenTable:
    """Tokens of texts numbered 0..n-1.

    Attributes:
        tokens: int32 [all tokens], on disk when they are many.
        offsets: int64 [n + 1]; text i is tokens[offsets[i]:offsets[i + 1]].
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray):
        self.tokens = tokens
        self.offsets = offsets

    @classmethod
    def build(cls, vocabulary: "Vocabulary", chunks: Iterable[pa.Array], total: int, what: str) -> "TokenTable":
        """Tokenise chunks of texts; equal texts of a chunk are tokenised once.

        Args:
            vocabulary: tokenises, and takes out what no text may hold.
            chunks: Arrow string arrays, `total` texts in all.
            total: for the progress bar.
            what: name on the progress bar.
        """
        lengths = []
        # A map keeps its own hold on the file, so that the file can be closed at once.
        place = f"a file of tokens in {tempfile.gettempdir()}"
        full = output_errors(DataError, place, "make room, or set TMPDIR to a directory with free space")
        with full, tempfile.TemporaryFile(prefix="llmrec-tokens-") as file:
            with tqdm(total=total, desc=f"tokenising {what}", unit="text", disable=total < 4 * CHUNK) as bar:
                for chunk in chunks:
                    encoded = pc.dictionary_encode(chunk)
                    flat, offsets = vocabulary.tokens(encoded.dictionary.to_pylist())
                    picked = np.asarray(encoded.indices)
                    sizes = np.diff(offsets)[picked]
                    flat[ranges(offsets[picked], sizes)].tofile(file)
                    lengths.append(sizes)
                    bar.update(len(chunk))
            file.flush()
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths or [np.empty(0, np.int64)]))])
            offsets = offsets.astype(np.int64)
            shape = (int(offsets[-1]),)
            tokens = np.memmap(file, np.int32, mode="r", shape=shape) if shape[0] else np.empty(0, np.int32)
        return cls(tokens, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


def tokenise(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens without any special token, flat int32, and their offsets int64 [texts + 1].

    Raises StreamError where the tokenizer fails.
    """
    if not texts:
        return np.empty(0, np.int32), np.zeros(1, np.int64)
    # A pattern of the tokenizer's that takes too long ends in a panic of its library.
    with input_errors(StreamError, f"tokenizer {type(tokenizer).__name__}", "use tokenizer files that you trust"):
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                        verbose=False)["input_ids"]  # fmt: skip
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, offsets[-1]), offsets


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Indices of the runs starts[i] .. starts[i] + sizes[i], one after another, int64."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


class Vocabulary:
    """A domain's fixed tokens under one tokenizer.

    Attributes:
        prefix, suffix: what the tokenizer puts around one text (BOS, or CLS and SEP).
        marker: int32 tokens of the marker.
        outcomes: int32 tokens of each label's word, in class order.
        forbidden: texts that data may not spell.
        reserved: int64, sorted; special and added tokens that no text of an item may become.

    Raises:
        StreamError: the marker or an outcome has no tokens, or two outcomes have the same. Where each item is one
            token, the marker may be empty: no item's text can then spell an outcome.
    """

    def __init__(self, domain: Domain, tokenizer):
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
        # Longest first, so that breaking up a short one does not hide a longer one that contains it.
        self.forbidden = domain.forbidden(sorted(known, key=lambda text: (-len(text), text)))
        literals = [part for text in (domain.event, domain.header) for part in template_literals(text)]
        spelled = tokenise(tokenizer, literals)[0]
        ids = np.array([*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids], np.int32)
        # A text of a base's vocabulary may be unknown to it; that token stands for data.
        self.reserved = np.setdiff1d(
            ids, [*spelled, *([] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id])]
        )

    def tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of events or headers, flat int32, and their offsets int64 [texts + 1].

        Neutralising works on texts as they are written, and a tokenizer that normalises them can still bring a marker
        or a special token out of another spelling, such as a full-width arrow. Such tokens are taken out here.
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
        # Taking one out can bring another together: each text is searched until nothing is left.
        rows = [flat[offsets[i] : offsets[i + 1]] for i in range(len(texts))]
        for i in np.unique(np.searchsorted(offsets, np.flatnonzero(bad), "right") - 1):
            rows[i] = self._without(rows[i])
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return np.concatenate(rows), offsets

    def _only_known(self, texts: list[str], flat: np.ndarray) -> np.ndarray:
        """Tokens of item ids, one each. Raises DataError for one that the tokenizer does not have."""
        unknown = np.flatnonzero(flat == self.tokenizer.unk_token_id)
        if len(unknown):
            raise DataError(
                f"{shorten(texts[unknown[0]])} is unknown to this model of item ids ({len(unknown)} such): the "
                "catalogue has grown since it was trained; distil it again with the new item table"
            )
        return flat

    def _without(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of one text without reserved tokens and runs that spell the marker."""
        ids, width, marker = ids[~np.isin(ids, self.reserved)], len(self.marker), self.marker.tolist()
        kept: list[int] = []
        for token in ids.tolist():
            kept.append(token)
            if kept[-width:] == marker:
                del kept[-width:]
        return np.array(kept, np.int32)

    def events(self, columns: dict[str, pa.Array]) -> pa.Array:
        """Texts of events, neutralised, from their columns [rows]."""
        return render(self.domain.event, columns, self.forbidden)

    def headers(self, columns: dict[str, pa.Array], count: int) -> pa.Array:
        """Texts of headers [count], neutralised, from the users' columns."""
        if not columns:
            return pa.array([self.domain.header] * count, pa.large_string())
        return render(self.domain.header, columns, self.forbidden)


def special_tokens_around(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that the tokenizer adds before and after one text, each int32."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return np.array(whole[:start], np.int32), np.array(whole[start + len(plain) :], np.int32)
    raise StreamError(f"tokenizer {type(tokenizer).__name__} changes a text when it adds special tokens; use another")
