"""A merged checkpoint by Transformers alone: `AutoTokenizer` on whole texts, then the stock sequence classifier.

Nothing of this package runs between a text and its logits here. A stock classifier pools the last token of a row that
is not the pad token, so nothing may follow a prompt's marker, and the marker must not end in the pad token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary, special_tokens_around
from llmrec_peft.errors import BundleError


def prepare_tokenizer(tokenizer: Any, config: Any, domain: Mapping[str, Any], *, encoder: bool) -> None:
    """Make a merged model's tokenizer and configuration such that stock classes read a decoder at its marker.

    Padding goes to the right, as learned positions count from the first token of a row, pads among them. Where the
    marker ends in the pad token, another special token pads.

    Args:
        tokenizer, config: of the model; both change.
        domain: the plain mapping.

    Raises BundleError where the tokenizer cannot leave its end token out, or has no other token to pad with.
    """
    if encoder:
        return
    suffix = special_tokens_around(tokenizer)[1]
    if len(suffix):
        raise BundleError(
            f"tokenizer {type(tokenizer).__name__} puts {tokenizer.convert_ids_to_tokens(suffix.tolist())} behind "
            "every text and cannot be told not to, so stock classes would read that token and not the marker; serve "
            "the bundle in a Scorer or a DomainBank, or train on a tokenizer without an end token"
        )
    tokenizer.padding_side = "right"
    marker = Vocabulary(Domain.of_manifest(domain, source="the bundle's domain"), tokenizer).marker
    if not len(marker) or int(marker[-1]) != tokenizer.pad_token_id:
        return
    known = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
    other = [token for token in known if tokenizer.convert_tokens_to_ids(token) != int(marker[-1])]
    if not other:
        raise BundleError(
            f"the marker ends in {tokenizer.pad_token!r}, which is the only token to pad with, and stock classes skip "
            "it; choose another marker, or set another pad_token in the base's tokenizer_config.json"
        )
    tokenizer.pad_token = other[0]
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id


class StockModel:
    """A checkpoint and its tokenizer as anybody loads them, in the checkpoint's own number format."""

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=trust_remote_code)
        self._model = model.eval()

    def of_tokens(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Logits [rows, labels] of token ids, padded on the right."""
        pad, longest = self._tokenizer.pad_token_id, max(map(len, rows))
        ids, seen = (torch.full((len(rows), longest), value) for value in (pad, 0))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
            seen[number, : len(row)] = 1
        return self._logits({"input_ids": ids, "attention_mask": seen})

    def of_texts(self, texts: Sequence[str], side: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [texts, labels] of whole texts with the tokenizer's own special tokens, and the tokens of each."""
        batch = self._tokenizer(list(texts), padding=True, padding_side=side, return_tensors="pt")
        ids, seen = batch["input_ids"].numpy(), batch["attention_mask"].numpy().astype(bool)
        return self._logits(batch), [row[kept] for row, kept in zip(ids, seen, strict=True)]

    def _logits(self, batch: Any) -> np.ndarray:
        with torch.no_grad():
            return self._model(**batch).logits.float().numpy()


def measure_stock(
    directory: Path,
    rows: Sequence[np.ndarray],
    texts: Sequence[str] | None,
    logits: np.ndarray,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Compare a merged model's logits with those of stock classes on the same prompts.

    Args:
        rows: the prompts' token ids, as this package joins them.
        texts: the same prompts as texts; None where a model reads item ids, which no text spells.
        logits: of the merged model at the markers, [prompts, labels].

    Returns:
        `stock_difference`: largest difference through our tokens. `stock_prompts`: how many. None without texts:
        `text_same_tokens`, how many of the texts give our tokens; `text_same_difference`, the largest of these (None
        where there is none), which must be nothing but rounding; `text_difference` and `text_mean_difference` through
        the tokenizer's; `text_left_difference`, the largest when they are padded on the left.
    """
    stock = StockModel(directory, trust_remote_code)
    found: dict[str, Any] = {
        "stock_prompts": len(rows),
        "stock_difference": float(np.abs(stock.of_tokens(rows) - logits).max()),
        "text_same_tokens": None,
        "text_same_difference": None,
        "text_difference": None,
        "text_mean_difference": None,
        "text_left_difference": None,
    }
    if texts is None:
        return found
    right, tokens = stock.of_texts(texts, "right")
    left, _ = stock.of_texts(texts, "left")
    same = [np.array_equal(ours, theirs) for ours, theirs in zip(rows, tokens, strict=True)]
    return found | {
        "text_same_tokens": int(sum(same)),
        "text_same_difference": float(np.abs(right - logits)[same].max()) if any(same) else None,
        "text_difference": float(np.abs(right - logits).max()),
        "text_mean_difference": float(np.abs(right - logits).mean()),
        "text_left_difference": float(np.abs(left - logits).max()),
    }
